"""What both training stages have in common: their size and their state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from linearize.convert.history import Track, add, finished, new_track, require_track
from linearize.progress import Progress, record

RECENT = 10
"""Steps that a running mean looks back: one batch alone says little."""


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """How long a stage is."""

    name: str
    """align | finetune"""
    steps: int
    """Optimiser steps; 0: the stage is skipped."""
    batch: int
    """Windows of one step."""
    context: int
    offset: int = 0
    """Steps that the order of the data is ahead, so that a later stage reads on where the one before ended."""
    skipped: str | None = None
    """Why the stage is skipped, for people."""

    @property
    def tokens(self) -> int:
        """Tokens read in the whole stage."""
        return self.steps * self.batch * self.context


def stage_shape(
    name: str, *, tokens: int, batch_tokens: int, context: int, after: StageShape | None = None, skip: str | None = None
) -> StageShape:
    """Steps and batch for a budget of tokens: whole windows a step (one at least), the nearest number of steps."""
    batch = max(1, batch_tokens // context)
    if tokens == 0:
        skip = f"{name}.tokens is 0"
    steps = 0 if skip else max(1, round(tokens / (batch * context)))
    offset = 0 if after is None else math.ceil(after.steps * after.batch / batch)
    return StageShape(name=name, steps=steps, batch=batch, context=context, offset=offset, skipped=skip)


@dataclass(kw_only=True)
class StageState:
    """What a stage writes into its checkpoints besides tensors."""

    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    loss_first: float | None = None
    """Of the first step of alignment; of the first ten of finetuning, whose batches differ more than it moves."""
    loss_last: float | None = None
    """Mean of the last ten steps."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The stage's own figures, as plain values."""
    history: Track = field(default_factory=new_track)
    """Its figures over time; see `history`."""

    def __post_init__(self) -> None:
        require_track(self.history)


def ends(state: StageState, *, first: int, name: str = "loss") -> tuple[float | None, float | None]:
    """A figure where a stage began and where it ended, for people: means over steps that the two do not share.

    A running mean looks back over all of a short stage, so there each is taken of one half at most.

    Args:
        first: steps that `loss_first` is the mean of.
        name: of the figure; of others than the loss, a long stage knows the end alone.

    Returns:
        None for the end of a stage of one step, which has none.
    """
    values = [value for value in finished(state.history)["series"].get(name, ()) if value is not None]
    if not values or len(values) >= first + RECENT or state.history["stride"] > 1:
        return (state.loss_first, state.loss_last) if name == "loss" else (None, state.extra.get(f"{name}_last"))
    half = len(values) // 2
    begun = values[: max(1, min(first, half))]
    ended = values[len(values) - min(RECENT, half) :]
    return sum(begun) / len(begun), sum(ended) / len(ended) if ended else None


def note(state: StageState, stage: str, values: Mapping[str, float | None]) -> None:
    """Keep the figures of the step that `state` is at, and tell whoever records them; None: it has no such figure."""
    add(state.history, state.step, values)
    record(stage, state.step, {name: value for name, value in values.items() if value is not None})


@contextmanager
def shown(progress: Progress, shape: StageShape) -> Iterator[None]:
    """Announce a stage, and its end, however it ends."""
    progress.start(shape.name, shape.steps, shape.batch * shape.context)
    try:
        yield
    finally:
        progress.finish(shape.name)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how many seconds the block takes."""
    begin = time.monotonic()
    yield
    seconds[name] = time.monotonic() - begin
