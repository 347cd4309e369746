"""What a folder says of its conversion, read with nothing taken on trust: a value of the wrong kind is as if absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.convert.history import FORMAT, HISTORY

CAP = 16 << 20
MOST_POINTS = 1000
MOST_SERIES = 4096
MOST_ROWS = 512
TEXT = 300
"""Most characters of a text that is shown."""

Points = list[tuple[float, float]]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """A whole number of ordinary size, or None."""
    good = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 60
    return value if good else None


def text(value: Any) -> str:
    """A short text, `` for what is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:.6g}"
    if isinstance(value, str):
        return value if len(value) <= TEXT else value[: TEXT - 3] + "..."
    if isinstance(value, (list, tuple)):
        return text(", ".join(text(item) for item in value[:40])) or "none"
    return "none" if value is None else ""


def at(tree: Any, *keys: str) -> Any:
    """The value at the end of a path through mappings; None where it breaks off."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def mapping(tree: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at the end of a path, or an empty one."""
    found = at(tree, *keys)
    return found if isinstance(found, Mapping) else {}


def rows(tree: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The first mappings of a list at the end of a path."""
    found = at(tree, *keys)
    return [row for row in found[:MOST_ROWS] if isinstance(row, Mapping)] if isinstance(found, list) else []


def texts(tree: Any, *keys: str) -> list[str]:
    """The first texts of a list at the end of a path."""
    found = at(tree, *keys)
    return [text(item) for item in found[:6] if isinstance(item, str)] if isinstance(found, list) else []


def read_history(folder: Path) -> dict[str, dict[str, Points]]:
    """Of each stage, each series as (step, value); {} where there is no history, or none that can be read."""
    path = folder / HISTORY
    try:
        if path.is_symlink() or path.stat().st_size > CAP:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if at(found, "format") != FORMAT:
        return {}
    return {str(name): series for name, stage in mapping(found, "stages").items() if (series := _stage(stage))}


def _stage(stage: Any) -> dict[str, Points]:
    steps, series = at(stage, "steps"), mapping(stage, "series")
    if not isinstance(steps, list) or not 0 < len(steps) <= MOST_POINTS or len(series) > MOST_SERIES:
        return {}
    places = [number(step) for step in steps]
    found: dict[str, Points] = {}
    for name, values in series.items():
        if isinstance(values, list) and len(values) == len(steps):
            both = zip(places, map(number, values), strict=True)
            found[name] = [(x, y) for x, y in both if x is not None and y is not None]
    return {name: points for name, points in found.items() if points}


def of_layers(series: Mapping[str, Points], kind: str) -> dict[int, Points]:
    """The series `kind/N` by layer N."""
    found = {}
    for name, points in series.items():
        prefix, _, layer = name.partition("/")
        if prefix == kind and layer.isdecimal() and len(layer) < 6:
            found[int(layer)] = points
    return dict(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one sequence: a key/value cache against a state."""

    state: int
    """Of all linear layers, whatever the length."""
    teacher_a_token: float
    kept_a_token: float
    """Of the layers that stay softmax."""
    break_even: int | None
    context: int | None
    """Tokens the model was trained on."""

    def teacher(self, tokens: float) -> float:
        """Of the teacher's cache."""
        return self.teacher_a_token * tokens

    def student(self, tokens: float) -> float:
        """Of the state and of what is still cached."""
        return self.state + self.kept_a_token * tokens


def memory_of(found: Mapping[str, Any]) -> Memory | None:
    """From what `linearize.convert.plan.inspect` says of a converted model; None where it has no growing cache."""
    tokens = 2048
    cache, kept = at(found, "kv_bytes", str(tokens)), at(found, "softmax_kv_bytes", str(tokens))
    state = whole(found.get("state_bytes"))
    if not cache or state is None:
        return None
    return Memory(
        state=state,
        teacher_a_token=cache / tokens,
        kept_a_token=(kept or 0) / tokens,
        break_even=whole(found.get("break_even_context")),
        context=whole(found.get("context")),
    )
