"""A progress that interrupts a conversion where a test wants it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from linearize.progress import NullProgress


class Interrupter(NullProgress):
    """Presses Ctrl-C in one step."""

    def __init__(self, stage: str, at: int) -> None:
        self.stage, self.at = stage, at

    def step(self, stage: str, step: int, loss: float, tokens: int, extra: Mapping[str, Any]) -> None:
        if (stage, step) == (self.stage, self.at):
            os.kill(os.getpid(), signal.SIGINT)
