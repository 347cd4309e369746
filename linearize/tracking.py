"""Tracking: the figures of a conversion's training steps, sent to what the user already has.

Each tracker is driven by its own library's interface, imported only when it is asked for. A tracker watches: it
changes no result, and one that fails is switched off with one warning line. (accelerate's tracker classes are not used:
they need its process state, which reads the environment, picks a device and stays for the rest of the process.)
"""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from linearize.errors import UsageError, did_you_mean
from linearize.progress import recorded_by

NONE = "none"
PROJECT = "linearize"


class Tracker(Protocol):
    """An open run of some tracking library."""

    place: str
    """Where to look at it, for people."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take in figures by name; `step` counts from 1 through all stages."""

    def finish(self) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in `folder`, by `torch.utils.tensorboard`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))
        self.place = f"tensorboard --logdir {shlex.quote(str(folder.parent))}"
        self.writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar a figure."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=step)

    def finish(self) -> None:
        """Write out what is left."""
        self.writer.close()


class RunOf:
    """A run of wandb, or of trackio, which speaks the same language."""

    def __init__(self, library: str, name: str, config: Mapping[str, Any]) -> None:
        self.library: Any = importlib.import_module(library)
        self.library.init(project=PROJECT, name=name, config=dict(config))
        self.place = f"project {PROJECT}, run {name}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """All figures of the step at once."""
        self.library.log(dict(values), step=step)

    def finish(self) -> None:
        """Send what is left."""
        self.library.finish()


MODULES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard"}
"""What --report-to may name, and the package each needs."""


def require_tracker(report_to: str) -> None:
    """Refuse an unknown tracker, and one that is not installed, before any work.

    Raises:
        UsageError: either of them.
    """
    if report_to == NONE:
        return
    if report_to not in MODULES:
        choices = [*MODULES, NONE]
        raise UsageError(
            f"--report-to {report_to}: unknown tracker.{did_you_mean(report_to, choices)}", f"Use {', '.join(choices)}"
        )
    if importlib.util.find_spec(MODULES[report_to]) is None:
        raise UsageError(
            f"--report-to {report_to}: {report_to} is not installed",
            f"pip install {report_to}",
        )


def open_tracker(report_to: str, out: Path, config: Mapping[str, Any]) -> Tracker:
    """Begin a run named as `out` is; TensorBoard's event files go to `runs/` beside it."""
    if report_to == "tensorboard":
        return TensorBoard(out.parent / "runs" / f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}", config)
    return RunOf(MODULES[report_to], out.name, config)


@contextmanager
def tracked(
    report_to: str, out: Path, *, config: Mapping[str, Any], before: Mapping[str, int], tell: Callable[[str], None]
) -> Iterator[None]:
    """Send the figures of the training steps meanwhile to `report_to`.

    Args:
        report_to: a name of MODULES, or `none`.
        out: the conversion's folder; its name names the run.
        config: plain values that the run is described by.
        before: steps of the stages before each stage, so that steps count through.
        tell: is given one line for people: where the figures go, or that the tracker failed and nothing more is sent.
    """
    if report_to == NONE:
        yield
        return
    feed = _Feed(lambda: open_tracker(report_to, out, flat(config)), before, report_to, tell)
    feed.attempt(feed.open)
    try:
        with recorded_by(feed.take):
            yield
    finally:
        feed.close()


class _Feed:
    """Passes figures on until the tracker fails."""

    def __init__(
        self, make: Callable[[], Tracker], before: Mapping[str, int], name: str, tell: Callable[[str], None]
    ) -> None:
        self.make, self.before, self.name, self.tell = make, before, name, tell
        self.tracker: Tracker | None = None
        self.last: tuple[str, int, float] | None = None
        """Stage, step and time of the step before."""
        self.done: dict[str, int] = {}
        """Steps of earlier passes through a stage: a streamed conversion aligns one layer after another."""

    def open(self) -> None:
        self.tracker = self.make()
        self.tell(f"tracking with {self.name}: {self.tracker.place}")

    def take(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        found = {f"{stage}/{name}": float(value) for name, value in values.items()}
        if self.last is not None and self.last[0] == stage:
            found[f"{stage}/seconds_a_step"] = now - self.last[2]
            if step <= self.last[1]:
                self.done[stage] = self.done.get(stage, 0) + self.last[1]
        self.last = (stage, step, now)
        tracker = self.tracker
        if tracker is not None:
            place = self.before.get(stage, 0) + self.done.get(stage, 0) + step
            self.attempt(lambda: tracker.log(found, place))

    def close(self) -> None:
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            self.attempt(tracker.finish)

    def attempt(self, action: Callable[[], None]) -> None:
        """A library that raises, or exits, must not take the conversion with it."""
        try:
            action()
        except (Exception, SystemExit) as error:
            self.tracker = None
            text = " ".join(str(error).split())[:200] or type(error).__name__
            self.tell(f"warning: {self.name} failed, so nothing more is sent to it; the conversion goes on ({text})")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists as text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
