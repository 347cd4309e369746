"""How a conversion went: every figure of every step, averaged down to a few hundred points, in `history.json`.

    {"format": 1, "stages": {"align": {"steps": [2, 4, 6], "series": {"lr": [...], "loss": [...], "match/0": [...]}}}}

A point is the mean over the steps since the point before, up to and including the step that it is named by; null where
none of them had the figure. There is nothing of the clock in it: a run that was resumed writes the same bytes.

Series of align: lr, loss (mean over the layers), loss/N and match/N of layer N (match: the share of the teacher's
attention output that is explained). Series of finetune: lr, loss, ce, kl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.artifacts.atomic import write_bytes

HISTORY = "history.json"
FORMAT = 1
POINTS = 480
"""Most points of a series; where there would be more, each two become one."""
DIGITS = 6
"""Significant digits of a point."""

Track = dict[str, Any]
"""A stage's history as plain values, as a checkpoint holds it: stride, steps, series and what is not yet a point."""


def new_track() -> Track:
    """Of a stage that has not begun."""
    return {"stride": 1, "steps": [], "series": {}, "open": {"steps": 0, "last": 0, "sums": {}}}


def require_track(track: Any) -> None:
    """ValueError unless `track` is what `new_track` and `add` make."""
    pending = track.get("open") if isinstance(track, dict) else None
    steps, series = (track.get(key) for key in ("steps", "series")) if pending else (None, None)
    fits = (
        isinstance(pending, dict)
        and isinstance(track.get("stride"), int)
        and track["stride"] > 0
        and _whole(steps)
        and isinstance(series, dict)
        and all(isinstance(points, list) and len(points) == len(steps or ()) for points in series.values())
        and _whole([pending.get("steps"), pending.get("last")])
        and isinstance(pending.get("sums"), dict)
        and all(isinstance(sums, (list, tuple)) and len(sums) == 2 for sums in pending["sums"].values())
    )
    if not fits:
        raise ValueError("the history is not one that a stage keeps")


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and value >= 0 for value in values)


def add(track: Track, step: int, values: Mapping[str, float | None]) -> None:
    """Take in the figures of `step` (from 1); None: the step has no such figure."""
    pending = track["open"]
    pending["steps"] += 1
    pending["last"] = step
    for name, value in values.items():
        total, count = pending["sums"].get(name, (0.0, 0))
        pending["sums"][name] = (total, count) if value is None else (total + value, count + 1)
    if pending["steps"] >= track["stride"]:
        _close(track)
        if len(track["steps"]) >= POINTS:
            _halve(track)


def finished(track: Track) -> dict[str, Any]:
    """What `history.json` says of a stage: {"steps": [...], "series": {name: [...]}}; `track` is left as it is."""
    whole = {
        "steps": list(track["steps"]),
        "series": {name: list(points) for name, points in track["series"].items()},
        "open": track["open"],
    }
    if track["open"]["steps"]:
        _close(whole)
    return {"steps": whole["steps"], "series": whole["series"]}


def write_history(folder: Path, tracks: Mapping[str, Track]) -> None:
    """Write `history.json` of the stages that took a step into `folder`; nothing where none did."""
    stages = {name: finished(track) for name, track in tracks.items() if track.get("steps") or _begun(track)}
    if stages:
        text = json.dumps({"format": FORMAT, "stages": stages}, separators=(",", ":"), allow_nan=False)
        write_bytes(folder / HISTORY, text.encode() + b"\n")


def _begun(track: Track) -> bool:
    return bool(track.get("open", {}).get("steps"))


def _close(track: Track) -> None:
    """Make a point of what is open."""
    pending, before = track["open"], len(track["steps"])
    for name, (total, count) in pending["sums"].items():
        points = track["series"].setdefault(name, [None] * before)
        points.append(_rounded(total / count) if count else None)
    for points in track["series"].values():
        points.extend([None] * (before + 1 - len(points)))  # a figure that this stretch did not have
    track["steps"].append(pending["last"])
    track["open"] = {"steps": 0, "last": 0, "sums": {}}


def _halve(track: Track) -> None:
    """Make one point of each two; an odd last one stays as it is."""
    track["stride"] *= 2
    track["steps"] = track["steps"][1::2] + track["steps"][len(track["steps"]) // 2 * 2 :]
    for name, points in track["series"].items():
        pairs = [_mean(points[i : i + 2]) for i in range(0, len(points), 2)]
        track["series"][name] = pairs


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(sum(known) / len(known)) if known else None


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
