"""The section of attention maps: controls, three canvases, the tokens, and entropy and monotonicity of every head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from linearize.report.charts import Axis, Scale, as_json, table, ticked_frame
from linearize.report.sections import missing, section

ABOUT = (
    "Which earlier tokens (across) each token (down) reads, and how much. Both models read the same text by "
    "themselves. Two properties make softmax work: its weights are spiky, so their entropy is low, and they grow with "
    "q.k, so that they keep its order. A linear attention should have both (Hedgehog, arXiv:2402.04347)."
)
PANELS = (
    ("teacher", "Teacher", ""),
    ("student", "Student", "Weights of single pairs do not exist here: the recipe normalises the sum as a whole."),
    ("linear", "Its linear branch alone", "This layer has no linear branch."),
)


def attention(found: Mapping[str, Any] | None, command: str) -> str:
    """The section, from what `measure.attention_facts` gathered; without it what adds it, "" where that was said."""
    if found is None:
        lost = missing("Attention maps need the teacher and some text. This command adds them:", command)
        return section("attention", "What reads what", "", lost if command else "")
    beside = f'<div class="grid-2 below">{_scatter(found)}{_table(found)}</div>'
    return section("attention", "What reads what", ABOUT, _maps(found), beside)


def _maps(found: Mapping[str, Any]) -> str:
    layer, head = found["start"]
    kinds = {row["layer"]: row["kind"] for row in found["rows"]}
    named = {i: f"{i} (softmax)" if kinds[i] == "softmax" else str(i) for i in found["layers"]}
    layers = "".join(_option(i, words, i == layer) for i, words in named.items())
    heads = "".join(_option(i, str(i), i == head) for i in found["heads"])
    panels = "".join(
        f'<div class="map" data-map="{name}"><h3>{escape(title)}</h3><canvas tabindex="0" role="img" width="64" '
        f'height="64" aria-label="{escape(title)}"></canvas><div class="empty" hidden>{escape(empty)}</div>'
        '<dl><div><dt>entropy</dt><dd class="entropy">-</dd></div>'
        '<div><dt>monotone</dt><dd class="monotone">-</dd></div></dl></div>'
        for name, title, empty in PANELS
    )
    data = {key: found[key] for key in ("tokens", "texts", "rows", "window", "start")}
    shown, of = (len(found["layers"]), len(found["heads"])), found["of"]
    some = "" if shown == tuple(of) else f" Shown are {shown[0]} of {of[0]} layers and {shown[1]} of {of[1]} heads."
    window = " Left of the thin line lies what the softmax window cannot see." if found["window"] else ""
    return (
        '<figure id="maps"><div class="controls">'
        f'<span class="step"><label>Layer <select id="layer">{layers}</select></label>'
        '<button type="button" data-move="layer" data-by="-1" aria-label="Previous layer">&#8593;</button>'
        '<button type="button" data-move="layer" data-by="1" aria-label="Next layer">&#8595;</button></span>'
        f'<span class="step"><label>Head <select id="head">{heads}</select></label>'
        '<button type="button" data-move="head" data-by="-1" aria-label="Previous head">&#8592;</button>'
        '<button type="button" data-move="head" data-by="1" aria-label="Next head">&#8594;</button></span></div>'
        f'<div class="maps">{panels}</div>'
        '<p class="readout" aria-live="polite">Point at a map, or focus one and use the arrow keys.</p>'
        '<div class="strip" role="region" aria-label="The text that was read" tabindex="0"></div>'
        f'<p class="note">{found["tokens"]} tokens of {escape(found["source"])}. The stronger the colour, the more '
        f"weight (by its root).{escape(window)}{escape(some)} Entropy in nats, mean over rows; monotone: Spearman's "
        "correlation of weight and q.k, mean over rows, 1 for every softmax.</p>"
        '<span class="probe" id="probes"><i style="color:var(--surface)"></i><i style="color:var(--accent)"></i>'
        '<i style="color:var(--deep)"></i><i style="color:var(--negative)"></i><i style="color:var(--soft)"></i>'
        '<i style="color:var(--ink)"></i></span>'
        '<noscript><p class="note">The maps are drawn by a script, which is switched off.</p></noscript>'
        f'<script type="application/json" id="attention-data">{as_json(data)}</script>'
        f'<script type="text/plain" id="attention-maps">{escape(found["maps"])}</script></figure>'
    )


def _option(value: int, words: str, chosen: bool) -> str:
    return f'<option value="{value}"{" selected" if chosen else ""}>{escape(words)}</option>'


def _scatter(found: Mapping[str, Any]) -> str:
    """Entropy of every head: the teacher's across, the student's up."""
    dots = []
    for place, row in enumerate(found["rows"]):
        for name in ("linear", "student"):
            if row["teacher"] and row[name]:
                dots.append((place, name, row["teacher"]["entropy"], row[name]["entropy"]))
    if not dots:
        return ""
    top = 1.05 * max(max(x, y) for _, _, x, y in dots) or 1.0
    scale = Scale(Axis(label=""), 0.0, top, padded=False)
    drawn = "".join(
        f'<path class="dot {name}" data-row="{place}" d="M{100 * scale.place(x):.2f} '
        f'{100 - 100 * scale.place(y):.2f}h0"><title>{escape(_named(found["rows"][place], name, y))}</title></path>'
        for place, name, x, y in dots
    )
    words = "Entropy of every head. Dots on the line: as spiky as the teacher's"
    drawing = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{words}. The table beside holds '
        f'the figures."><path class="mark" d="M0 100L100 0"/>{drawn}</svg>'
    )
    keys = '<span class="key">student</span><span class="key faint">its linear branch alone</span>'
    legend = f'<span class="legend">{keys}</span>'
    return (
        f'<figure class="chart scatter"><figcaption><b>Entropy of every head</b>{legend}</figcaption>'
        + ticked_frame(drawing, scale, scale, Axis(label="teacher, nats"), Axis(label="student, nats"))
        + '<p class="note">On the dashed line a head is as spiky as the teacher\'s; above it, more blurred. '
        "A click on a dot, or near one, shows the head's maps.</p></figure>"
    )


def _named(row: Mapping[str, Any], name: str, value: float) -> str:
    part = "" if name == "student" else ", linear branch"
    return f"layer {row['layer']}, head {row['head']}{part}: {value:.2f} nats, teacher {row['teacher']['entropy']:.2f}"


def _table(found: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, str]] = [
        {
            "layer": str(row["layer"]),
            "head": str(row["head"]),
            "H teacher": _figure(row, "teacher", "entropy"),
            "H student": _figure(row, "student", "entropy"),
            "H linear": _figure(row, "linear", "entropy"),
            "mono student": _figure(row, "student", "monotonicity"),
            "mono linear": _figure(row, "linear", "monotonicity"),
        }
        for row in found["rows"]
    ]
    return table(rows, title="Entropy (H) and monotonicity of every head")


def _figure(row: Mapping[str, Any], name: str, key: str) -> str:
    return "-" if row[name] is None else f"{row[name][key]:.2f}"
