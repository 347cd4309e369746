"""Many alignments of one layer each, shown, recorded and reported as the one alignment that they are."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from linearize.convert.history import DIGITS, finished
from linearize.convert.stages import StageState
from linearize.progress import Progress, record, recorded_by

_NOTHING = {"steps": 0, "last": 0, "sums": {}}


def joined(values: Mapping[str, Any]) -> StageState:
    """The alignment of all layers as one stage, as if they had been trained side by side.

    `values`: the StageState of each layer as plain values, by the layer's number.
    """
    states = {int(i): StageState(**state) for i, state in values.items()}
    if not states:
        return StageState()
    every = list(states.values())
    tracks = {i: finished(state.history) for i, state in states.items()}
    first = next(iter(tracks.values()))
    series: dict[str, list[float | None]] = {"lr": first["series"]["lr"], "loss": []}
    for track in tracks.values():
        series |= {name: points for name, points in track["series"].items() if "/" in name}
    columns = zip(*(track["series"]["loss"] for track in tracks.values()), strict=True)
    series["loss"] = [None if (mean := _mean(column)) is None else float(f"{mean:.{DIGITS}g}") for column in columns]
    return StageState(
        step=every[0].step,
        seconds=sum(state.seconds for state in every),
        loss_first=_mean([state.loss_first for state in every]),
        loss_last=_mean([state.loss_last for state in every]),
        extra={key: track for state in every for key, track in state.extra.items()},
        history=every[0].history | {"steps": first["steps"], "series": series, "open": _NOTHING},
    )


@contextmanager
def recorded_from(step: int) -> Iterator[None]:
    """Whoever records the figures of steps is told numbers that rise from layer to layer."""
    outside = contextvars.copy_context()

    def shifted(stage: str, number: int, values: Mapping[str, float]) -> None:
        outside.run(record, stage, step + number, values)

    with recorded_by(shifted):
        yield


class OneOfMany:
    """Shows the alignment of one layer as a part of the whole."""

    def __init__(self, watch: Progress, before: int) -> None:
        self._watch, self._before = watch, before

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        """The whole has begun."""

    def step(self, stage: str, step: int, loss: float | None, tokens: int, extra: Mapping[str, Any]) -> None:
        """A step of the whole."""
        before = tokens // step * self._before if step else 0
        self._watch.step(stage, self._before + step, loss, before + tokens, extra)

    def layer_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All layers are shown at the end."""

    def message(self, text: str) -> None:
        """Passed on."""
        self._watch.message(text)

    def finish(self, stage: str) -> None:
        """The whole goes on."""


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
