"""What a long run tells about itself while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

Listener = Callable[[str, str], None]
"""Is told what is being done, and to whom: ("reading 64 windows of 512 tokens", "out (window)")."""

Warned = Callable[[str], None]
"""Is told one line that a user should see before the work is done."""

Recorder = Callable[[str, int, Mapping[str, float]], None]
"""Is given the figures of every training step: stage, step (from 1), and values by name."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)
_WARNED: ContextVar[Warned | None] = ContextVar("warned", default=None)
_RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def tell(what: str, who: str) -> None:
    """Say to whoever listens what begins now; nobody need listen."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(what, who)


def warn(line: str) -> None:
    """Say to whoever listens what should be known before the work is done; the results say it too."""
    warned = _WARNED.get()
    if warned is not None:
        warned(line)


@contextmanager
def told_to(listener: Listener, warned: Warned | None = None) -> Iterator[None]:
    """Have `listener` called with whatever is told meanwhile, and `warned` with the warnings."""
    token, other = _LISTENER.set(listener), _WARNED.set(warned)
    try:
        yield
    finally:
        _LISTENER.reset(token)
        _WARNED.reset(other)


def record(stage: str, step: int, values: Mapping[str, float]) -> None:
    """Give the figures of a training step to whoever records them; nobody need."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder(stage, step, values)


@contextmanager
def recorded_by(recorder: Recorder | None) -> Iterator[None]:
    """Have `recorder`, if there is one, given the figures of every training step meanwhile."""
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)


@runtime_checkable
class Progress(Protocol):
    """Where the pipeline reports to. Calls come from one thread, a stage at a time."""

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        """A stage begins (or goes on, when resumed): all its steps, and tokens of one step."""

    def step(self, stage: str, step: int, loss: float | None, tokens: int, extra: Mapping[str, Any]) -> None:
        """One step is done: `step` steps and `tokens` tokens of the stage are behind us; `extra` holds more numbers.

        `loss` is None as long as no step had one to give, as where each of them hid the window.
        """

    def layer_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """How well each layer is matched, one mapping a layer that a step has measured."""

    def message(self, text: str) -> None:
        """One line for people."""

    def finish(self, stage: str) -> None:
        """The stage is over."""


class NullProgress:
    """Says nothing."""

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        """Nothing."""

    def step(self, stage: str, step: int, loss: float | None, tokens: int, extra: Mapping[str, Any]) -> None:
        """Nothing."""

    def layer_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finish(self, stage: str) -> None:
        """Nothing."""
