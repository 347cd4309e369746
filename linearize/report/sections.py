"""What a conversion kept and how it was trained: a section that lacks its facts says what would add them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from linearize.report.charts import Axis, Bar, Series, bar_table, in_bytes, line_chart, percent, short
from linearize.report.facts import Memory, Points, at, number, of_layers, rows, text, texts, whole
from linearize.report.parts import grid, missing, section

# ------------------------------------------------------------------------------------------------------------ quality


def cards(manifest: Mapping[str, Any], audit: Mapping[str, Any] | None, memory: Memory | None, layers: str) -> str:
    """The few figures that matter most."""
    shown: list[tuple[str, str, str]] = []
    if audit is not None:
        recovery = number(audit.get("R"))
        shown.append(("Recovery R", "not defined" if recovery is None else f"{recovery:.1f} %",
                      "worse than the teacher cut to the window" if recovery is not None and recovery < 0 else
                      "0 %: the teacher cut to the window; 100 %: the teacher"))  # fmt: skip
        student, teacher = number(audit.get("ppl_student")), number(audit.get("ppl_teacher"))
        if student is not None and teacher is not None:
            shown.append(("Perplexity", short(student), f"the teacher has {short(teacher)}"))
    matched = [m for row in rows(manifest, "figures", "layers") if (m := number(row.get("explained"))) is not None]
    if matched:
        mean = sum(matched) / len(matched)
        shown.append(("Attention matched", f"{100 * mean:.1f} %", "of the teacher's outputs, after alignment"))
    shown.append(
        ("Linear layers", layers, "the others keep softmax attention" if "of" in layers else "every one of them")
    )
    if memory is not None and memory.state:
        even = f"less than the cache from {memory.break_even:,} tokens on" if memory.break_even else ""
        shown.append(("State of a sequence", in_bytes(memory.state), even))
    stages = [whole(at(manifest, "figures", "stages", name, "tokens")) or 0 for name in ("align", "finetune")]
    if any(stages):
        parts = f"{short(stages[0])} in alignment, {short(stages[1])} in finetuning"
        shown.append(("Tokens of training", short(sum(stages)), parts))
    worse = audit is not None and (number(audit.get("R")) or 0.0) < 0
    first = "" if audit is None else ' class="first worse"' if worse else ' class="first"'
    items = "".join(
        f"<div{first if i == 0 else ''}><dt>{escape(name)}</dt><dd>{escape(value)}"
        f"{f'<small>{escape(about)}</small>' if about else ''}</dd></div>"
        for i, (name, value, about) in enumerate(shown)
    )
    return f'<dl class="cards">{items}</dl>'


NEEDS = (
    "Recovery, the branch audit, perplexity by position and the attention maps need the teacher and some text. This "
    "command adds them:"
)
MASKED = "Recovery, branch audit and attention maps are of models that predict the next token. What this one finds:"


def quality(audit: Mapping[str, Any] | None, command: str, *, masked: bool = False) -> str:
    """Recovery, branches, and perplexity by position."""
    title = "What was kept"
    if audit is None:
        return section("quality", title, "", missing(MASKED if masked else NEEDS, command))
    measured = [
        text(audit.get("protocol")),
        _count(audit.get("windows"), "window"),
        _count(audit.get("tokens"), "token"),
    ]
    about = f"Perplexity on held-out text, all on the same windows ({', '.join(filter(None, measured))})."
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in texts(audit, "notes"))
    return section(
        "quality",
        title,
        about,
        grid(f'<div class="stack">{_recovery(audit)}{_branches(audit)}</div>', _positions(audit)),
        notes,
    )


def _count(value: Any, noun: str) -> str:
    found = whole(value)
    return "" if found is None else f"{found:,} {noun}{'' if found == 1 else 's'}"


def _recovery(audit: Mapping[str, Any]) -> str:
    share = number(audit.get("R"))
    if share is None:
        return ""
    place = min(max(share, 0.0), 100.0)
    at_edge = {True: "transform:none", False: "transform:translateX(-100%)"}[place < 50]
    edge = (
        f'style="left:{0 if place < 8 else 100}%;{at_edge}"'
        if place < 8 or place > 92
        else f'style="left:{place:.1f}%"'
    )
    beyond = " The cut teacher is better than this." if share < 0 else ""
    worse = ' class="worse"' if share < 0 else ""
    floor, whole_one = number(audit.get("ppl_window")), number(audit.get("ppl_teacher"))
    ends = [f"0 %: cut to the window, perplexity {short(floor or 0)}", f"100 %: the teacher, {short(whole_one or 0)}"]
    return (
        '<figure class="scale-box"><figcaption><b>Recovery</b></figcaption><div class="scale"><div class="rail">'
        f'<div class="fill" style="width:{place:.1f}%"></div><output{worse} {edge}>{share:.1f} %</output></div>'
        f'<div class="ends"><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></div></div>'
        f'<p class="note">The share of the loss by cutting the teacher to the window that was won back.{beyond}</p>'
        "</figure>"
    )


BRANCHES = {
    "full": ("The student", "as it is", "student"),
    "window": ("Its window alone", "softmax, near tokens", "faint"),
    "linear": ("Its linear branch alone", "over all past tokens", "faint"),
    "none": ("Without attention", "in its linear layers", "faint"),
}


def _branches(audit: Mapping[str, Any]) -> str:
    bars = []
    for key, name, style in (("ppl_teacher", "The teacher", "teacher"), ("ppl_window", "The teacher, cut", "cut")):
        value = number(audit.get(key))
        if value is not None and value > 0:
            bars.append(Bar(name=name, value=value, shown=short(value), style=style))
    for key, (name, about, style) in BRANCHES.items():
        value = number(at(audit, "branches", key))
        if value is not None and value > 0:
            bars.append(Bar(name=name, value=value, shown=short(value), style=style, about=about))
    if not bars:
        return ""
    wide = max(b.value for b in bars) > 20 * min(b.value for b in bars)
    return bar_table(
        bars, title="Branch audit", heads=("Attention", "Perplexity"), log=wide,
        note="Lower is better. The student is run with parts of its attention switched off.",
    )  # fmt: skip


def _positions(audit: Mapping[str, Any]) -> str:
    found = rows(audit, "by_position")
    lines = []
    for key, name, style in (
        ("teacher", "teacher", "teacher"),
        ("window", "cut teacher", "cut"),
        ("student", "student", "student"),
    ):
        points: Points = []
        for place, row in enumerate(found):
            value = number(row.get(key))
            if value is not None:
                points.append((float(place), value))
        lines.append(Series(name=name, points=points, style=style))
    seen = [number(row.get("from")) or 0.0 for row in found]
    axis = Axis(
        label="tokens seen before, from", write=lambda place: f"{seen[round(place)]:,.0f}", ticks=range(len(seen))
    )
    return line_chart(lines, title="Perplexity by position", x=axis, y=Axis(label="perplexity", log=True))


# ----------------------------------------------------------------------------------------------------------- training


LOST = (
    "Losses over time are left out: this export has no history.json, for it was made by an older version. Converting "
    "again adds it:"
)


def training(manifest: Mapping[str, Any], history: Mapping[str, Mapping[str, Points]], command: str) -> str:
    """Losses and match over time, and each layer's match at the end."""
    parts: list[str] = []
    align, finetune = history.get("align", {}), history.get("finetune", {})
    step = Axis(label="step", write=lambda v: f"{v:,.0f}", counts=True)
    for name, series in (("alignment", align), ("finetuning", finetune)):
        if "loss" not in series:
            continue
        lines = _smoothed("loss", series["loss"])
        unit = "loss, mean over layers" if name == "alignment" else "nats a token"
        parts.append(line_chart(lines, title=f"Loss in {name}", x=step, y=Axis(label=unit)))
        for key, words in (("ce", "Cross-entropy with the next token"), ("kl", "KL from the teacher")):
            if key in series and series[key] != series["loss"]:
                lines = _smoothed(key, series[key])
                parts.append(line_chart(lines, title=words, x=step, y=Axis(label="nats a token")))
    by_layer = of_layers(align, "match")
    losses = _ramp(of_layers(align, "loss"))
    parts.append(line_chart(losses, title="Loss of each layer over time", x=step, y=Axis(label="loss", log=True)))
    # An untrained layer may start far below zero; what it becomes is what the eye should have room for.
    lowest = min((y for points in by_layer.values() for _, y in points[len(points) // 10 :]), default=0.0)
    floor = max(min(lowest - 0.05, 0.9), -0.5)
    lines = _ramp({layer: [(x, max(y, floor)) for x, y in points] for layer, points in by_layer.items()})
    parts.append(line_chart(
        lines, title="Match of each layer over time", x=step,
        y=Axis(label="share of the teacher's attention output explained", write=percent, low=floor, high=1.0),
        note="" if lowest - 0.05 >= -0.5 else "Points below -50 % are drawn at the edge.",
    ))  # fmt: skip
    parts.append(_final_match(manifest))
    reasons = {
        title: text(at(manifest, "figures", "stages", name, "skipped") or "")
        for name, title in (("align", "Alignment"), ("finetune", "Finetuning"))
    }
    skipped = "".join(f'<p class="note">{escape(f"{k} was skipped: {v}.")}</p>' for k, v in reasons.items() if v)
    lost = missing(LOST, command) if not history and not all(reasons.values()) else ""
    about = "Each point is a mean over the steps since the one before; batches differ." if history else ""
    return section("training", "How it was trained", about, lost, grid(*parts), skipped)


def _ramp(by_layer: Mapping[int, Points]) -> list[Series]:
    """A line a layer, coloured by how deep it lies."""
    last = max(len(by_layer) - 1, 1)
    return [
        Series(name=f"layer {layer}", points=points, style="ramp", ramp=place / last)
        for place, (layer, points) in enumerate(by_layer.items())
    ]


def _smoothed(name: str, points: Points) -> list[Series]:
    """A curve, and a running mean over a twelfth of it where it is long enough to be told from the noise of batches."""
    reach = len(points) // 24
    if reach < 1:
        return [Series(name=name, points=points)]
    means = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return [Series(name=name, points=points, style="faint"), Series(name="running mean", points=means)]


def _final_match(manifest: Mapping[str, Any]) -> str:
    bars = []
    for row in rows(manifest, "figures", "layers"):
        layer, share = whole(row.get("layer")), number(row.get("explained"))
        if layer is not None and share is not None:
            bars.append(Bar(name=f"layer {layer}", value=max(share, 0.0), shown=f"{100 * share:.1f} %"))
    if not bars:
        return ""
    title, note = "Match of each layer after alignment", "Explained: share of the teacher's attention output."
    made = bar_table(bars, title=title, heads=("Layer", "Explained"), note=note, whole=1.0)
    return made if len(bars) <= 16 else f"<details><summary>{title}</summary>{made}</details>"
