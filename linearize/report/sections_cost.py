"""Memory and speed, the recipe and the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from linearize.report.bench import Curve, kind_of
from linearize.report.charts import Axis, Series, in_bytes, line_chart, pairs, short, table
from linearize.report.facts import Memory, mapping, number, text, whole
from linearize.report.parts import columns, grid, missing, section

CONTEXTS = tuple(2**n for n in range(7, 18))
MOST_CURVES = 8
WIDE = 30.0
"""From which ratio of largest to smallest an axis is logarithmic."""
NAMES = {
    "decode_tokens_per_second": "Speed of writing (decode)",
    "prefill_tokens_per_second": "Speed of reading (prefill)",
    "ttft_seconds": "Time to the first token",
    "peak_bytes": "Memory at its peak, weights included",
    "growth_bytes": "Memory at its peak, above the weights",
}
KINDS = {"speed": "tokens a second", "seconds": "seconds", "bytes": "memory"}


def cost(memory: Memory | None, curves: Sequence[Curve], measured_on: str, command: str) -> str:
    """Bytes of a sequence by the model's own accounting, and what a benchmark measured."""
    parts = []
    if memory is not None:
        lines = [
            Series(name="teacher: key/value cache", points=[(n, memory.teacher(n)) for n in CONTEXTS], style="teacher"),
            Series(name="student: state" + (" and what is still cached" if memory.kept_a_token else ""),
                   points=[(n, memory.student(n)) for n in CONTEXTS]),
        ]  # fmt: skip
        mark = (float(memory.break_even), f"even at {memory.break_even:,}") if memory.break_even else None
        parts.append(line_chart(
            lines, title="Memory of one sequence", x=Axis(label="tokens", log=True, base=2, write=_tokens),
            y=Axis(label="bytes", log=True, base=2, write=in_bytes), mark=mark,
            note="Counted from the model's shapes, not measured.",
        ))  # fmt: skip
    for figure in dict.fromkeys(curve.figure for curve in curves):
        parts += _measured([curve for curve in curves if curve.figure == figure])
    lost = missing("Measured speed and memory are left out. These commands add them:", command)
    lost = "" if curves or not command else lost
    about = f"Speed and memory as measured: {measured_on}." if curves and measured_on else ""
    return section("cost", "Memory and speed", about, grid(*parts), lost)


def _measured(curves: Sequence[Curve]) -> list[str]:
    figure = curves[0].figure
    kind = kind_of(figure) or "speed"
    write = in_bytes if kind == "bytes" else short
    charts = []
    batches = sorted({curve.batch for curve in curves})
    for batch in batches if len(batches) <= 3 else (batches[0], batches[-1]):
        chosen = [curve for curve in curves if curve.batch == batch][:MOST_CURVES]
        others = [curve for curve in chosen if not curve.teacher]
        lines = [
            Series(
                name=c.name,
                points=c.points,
                style="teacher" if c.teacher else "student" if c in others[:1] else "faint",
            )
            for c in chosen
        ]
        title = NAMES.get(figure, figure.replace("_", " ").capitalize())
        title += f", batch {batch}" if len(batches) > 1 or batch > 1 else ""
        values = [value for curve in chosen for _, value in curve.points]
        wide = max(values) > WIDE * min(values)
        up = Axis(
            label=KINDS[kind], log=wide, base=2 if kind == "bytes" else 10, write=write, low=None if wide else 0.0
        )
        across = Axis(label="context", log=True, base=2, write=_tokens)
        charts.append(line_chart(lines, title=title, x=across, y=up))
    return charts


def _tokens(value: float) -> str:
    return f"{value / 1024:.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:,.0f}"


def recipe(manifest: Mapping[str, Any]) -> str:
    """Every key of the recipe."""
    found = mapping(manifest, "recipe")
    plain = {key: text(value) for key, value in found.items() if not isinstance(value, Mapping)}
    parts = [_figure("The recipe", plain)] if plain else []
    for key, value in found.items():
        if isinstance(value, Mapping):
            flat: dict[str, str] = {}
            for name, inner in value.items():
                nested = inner.items() if isinstance(inner, Mapping) else ()
                flat |= {f"{name}.{k}": text(v) for k, v in nested} if nested else {str(name): text(inner)}
            parts.append(_figure(str(key).capitalize(), flat))
    return section("recipe", "The recipe", "Everything that decided how the conversion went.", columns(*parts))


def environment(manifest: Mapping[str, Any]) -> str:
    """Teacher, text, versions and files, by their digests."""
    teacher, data, figures = (mapping(manifest, key) for key in ("teacher", "data", "figures"))
    origin = {"teacher": text(teacher.get("name")), "digest of its weights": text(teacher.get("digest"))}
    origin |= {
        "text": text(data.get("name")),
        "read of it": _bytes(data.get("bytes")),
        "sha256": text(data.get("sha256")),
    }
    origin |= {"recipe digest": text(manifest.get("recipe_digest")), "code digest": text(manifest.get("code_digest"))}
    versions = {str(key): text(value) for key, value in mapping(manifest, "versions").items()}
    stages = []
    for name, found in mapping(figures, "stages").items():
        if isinstance(found, Mapping) and whole(found.get("steps")):
            seconds = number(found.get("seconds"))
            stages.append({"stage": str(name), "tokens": text(found.get("tokens")), "steps": text(found.get("steps")),
                           "first loss": text(found.get("loss_first")), "last loss": text(found.get("loss_last")),
                           "time": "" if seconds is None else _time(seconds)})  # fmt: skip
    parts = [
        _figure("Where it comes from", {key: value for key, value in origin.items() if value and value != "none"}),
        _figure("Versions", versions),
        table(stages, title="Stages") if stages else "",
    ]
    return section("environment", "The environment", "As the export's manifest says it.", columns(*parts))


def _figure(title: str, values: Mapping[str, str]) -> str:
    if not values:
        return ""
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{pairs(values)}</figure>"


def _bytes(value: Any) -> str:
    found = whole(value)
    return "" if found is None else in_bytes(found)


def _time(seconds: float) -> str:
    """`52 s`, `3:05 min`, `1:02:03 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
