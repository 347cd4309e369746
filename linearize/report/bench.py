"""Rows of a benchmark as curves over the context. Any JSON or JSON lines will do whose rows name a context."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize.errors import UsageError
from linearize.report.facts import Points, number

CAP = 64 << 20
ABOUT = ("machine", "versions")
"""Mappings of a row that describe it."""
KINDS = ("speed", "seconds", "bytes")
DEPTH = 8
CONTEXT = ("context", "tokens", "length", "prompt_tokens", "seq_len", "prompt")
BATCH = ("batch", "batch_size")
NAME = ("role", "model", "subject", "side", "who", "name", "label")
TEACHER = ("teacher", "softmax", "against")
"""Words in a name by which the teacher is known."""
UNSHOWN = ("_low", "_high", "weights_bytes", "state_bytes", "kv_bytes", "max_bytes")
"""Ends of names of figures that are no curve of their own: extremes, and what is counted, not measured."""
_GIVE = "Give what linearize bench --json printed, or its --out file."


@dataclass(kw_only=True)
class Curve:
    """One figure of one model at one batch size, over the context."""

    figure: str
    name: str
    batch: int
    teacher: bool
    points: Points = field(default_factory=list)


def read_bench(path: str) -> list[Curve]:
    """The curves of a file that `linearize bench` wrote, or one like it.

    Raises:
        UsageError: no such file, one that is no JSON, or one without a row that names a context and a figure.
    """
    place = Path(path).expanduser()
    try:
        if place.stat().st_size > CAP:
            raise UsageError(f"--bench {path}: larger than {CAP >> 20} MB, so these are no rows of a benchmark")
        content = place.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--bench {path}: cannot be read ({error.strerror})", _GIVE) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--bench {path}: is not UTF-8 text") from error
    found = curves(list(_rows(_parsed(content, path), {})))
    if not found:
        raise UsageError(f"--bench {path}: no row has a context and a figure", _GIVE)
    return found


def _parsed(content: str, path: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        pass
    except RecursionError as error:
        raise UsageError(f"--bench {path}: is nested too deeply") from error
    try:
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--bench {path}: is neither JSON nor JSON lines", _GIVE) from error


def _rows(value: Any, outer: dict[str, Any], depth: int = 0) -> Iterator[dict[str, Any]]:
    """Every mapping that names a context, with the names that the mappings around it give."""
    if depth > DEPTH:
        return
    if isinstance(value, list):
        for item in value:
            yield from _rows(item, outer, depth + 1)
    elif isinstance(value, Mapping):
        plain = {str(k): v for k, v in value.items() if isinstance(v, (str, int, float)) and not isinstance(v, bool)}
        described = {k: value[k] for k in ABOUT if isinstance(value.get(k), Mapping)}
        if any(number(plain.get(key)) for key in CONTEXT):
            nested = {str(k): v for k, v in value.items() if isinstance(v, Mapping) and k not in ABOUT}
            sides = {k: v for k, v in nested.items() if any(kind_of(str(x)) and number(v[x]) is not None for x in v)}
            for side, figures in sides.items():  # one row, a mapping a model
                yield {**outer, **plain, **figures, **described, "model": side}
            if not sides:
                yield {**outer, **plain, **described}
            return
        around = {k: v for k, v in plain.items() if k in (*NAME, *BATCH)}
        for key, item in value.items():
            named = {} if isinstance(item, list) and key in ("rows", "results", "runs") else {"model": str(key)}
            yield from _rows(item, {**named, **outer, **around} if around or outer else named, depth + 1)


def conditions(path: str) -> str:
    """On what the rows were measured, as far as they say it."""
    found: dict[str, None] = {}
    for row in _rows(_parsed(Path(path).expanduser().read_text(encoding="utf-8"), path), {}):
        for key in ("gpu", "machine", "device", "dtype", "date"):
            value = row.get(key)
            for said in (value.get("gpu") or value.get("cpu"),) if isinstance(value, Mapping) else (value,):
                if isinstance(said, str):
                    found[said[:120]] = None
    return ", ".join(list(found)[:8])


def curves(found: list[dict[str, Any]]) -> list[Curve]:
    """One curve for each figure, model and batch size that rows share."""
    made: dict[tuple[str, str, int], Curve] = {}
    for row in found:
        context = next((value for key in CONTEXT if (value := number(row.get(key)))), None)
        batch = next((int(value) for key in BATCH if (value := number(row.get(key)))), 1)
        name = next((Path(row[key]).name[:80] for key in NAME if isinstance(row.get(key), str)), "") or "model"
        if context is None or context <= 0:
            continue
        for key, raw in row.items():
            value = number(raw)
            if value is None or value <= 0 or kind_of(key) is None:
                continue
            teacher = any(word in name.lower() for word in TEACHER)
            curve = made.setdefault((key, name, batch), Curve(figure=key, name=name, batch=batch, teacher=teacher))
            curve.points.append((context, value))
    for curve in made.values():
        curve.points = sorted(dict(curve.points).items())
    return sorted(made.values(), key=lambda curve: KINDS.index(kind_of(curve.figure) or ""))


def kind_of(key: str) -> str | None:
    """What a figure is, by its name: speed (tokens a second), seconds, bytes; None: not a figure."""
    name = key.lower()
    if name.endswith(UNSHOWN):
        return None
    if "per_second" in name or "tokens_s" in name or "tok_s" in name or name.endswith("tps"):
        return "speed"
    if "bytes" in name or "memory" in name:
        return "bytes"
    if name.endswith("seconds") or name.endswith("_s") or "ttft" in name or "first_token" in name:
        return "seconds"
    return None
