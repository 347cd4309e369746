"""Charts as inline SVG and HTML, with a table of their figures beside each.

A chart's drawing is stretched to whatever room there is and its words are HTML around it, so that they keep their size
on a phone. Colours come from the page's stylesheet; every text is escaped here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

Point = tuple[float, float]
Write = Callable[[float], str]
POINTER = '<div class="cursor" hidden></div><div class="tip" hidden></div>'
"""What the script puts the figures under the pointer into."""
TABLE_ROWS = 9
"""Most rows of a chart's table of figures."""
MOST_COLUMNS = 7
"""Most columns that stand side by side, on a wide screen; with more of them each row is a card everywhere."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    style: str = "student"
    """teacher | student | cut | faint | ramp: a class of the stylesheet."""
    ramp: float = 0.0
    """Place in a family of lines, 0 to 1, where `style` is ramp."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: what it says and how."""

    label: str
    log: bool = False
    write: Write = field(default=lambda value: short(value))
    low: float | None = None
    """Its end, where the points do not set it; so for `high`."""
    high: float | None = None
    base: float = 10.0
    """Of the ticks: 2 for bytes and tokens, whose round numbers are powers of two."""
    ticks: Sequence[float] | None = None
    """The values that are named, if not what suits the range."""
    counts: bool = False
    """Its values are whole numbers, such as steps: no tick lies between two of them."""


def short(value: float) -> str:
    """A number in few characters: 0.012, 3.4, 120, 4.1k, 2M."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e3 if name == "k" else unit
            return f"{value / scale:.3g}{name}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def in_bytes(value: float) -> str:
    """Bytes in binary units."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if abs(value) < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def percent(value: float) -> str:
    """A share, of 1, in percent."""
    return f"{100 * value:.3g} %"


def line_chart(
    series: Sequence[Series], *, title: str, x: Axis, y: Axis, note: str = "", mark: tuple[float, str] | None = None
) -> str:
    """Lines over a common x. `mark` is an x to point at, with words. Points that an axis cannot hold are left out."""
    series = [Series(name=s.name, style=s.style, ramp=s.ramp, points=_drawable(s.points, x, y)) for s in series]
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [p[0] for one in series for p in one.points]
    ys = [p[1] for one in series for p in one.points]
    across = Scale(x, min(xs), max(xs), padded=False)
    up = Scale(y, min(ys), max(ys), padded=True)
    grid = "".join(f'<path class="grid" d="M0 {_n(100 - 100 * up.place(t))}H100"/>' for t in up.ticks)
    paths = "".join(_path(one, across, up) for one in series)
    marked, words = "", ""
    if mark is not None and across.low < mark[0] < across.high:
        place = 100 * across.place(mark[0])
        marked = f'<path class="mark" d="M{_n(place)} 0V100"/>'
        side = "right" if place > 55 else "left"
        words = f'<span class="mark-text {side}" style="left:{_n(place)}%">{escape(mark[1])}</span>'
    described = "; ".join(f"{one.name} from {y.write(one.points[0][1])} to {y.write(one.points[-1][1])}"
                          for one in series[:8])  # fmt: skip
    drawing = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}. '
        f'{escape(described)}">{grid}{marked}{paths}</svg>'
    )
    points = {
        "x": {"log": x.log, "low": across.low, "high": across.high},
        "series": [{"name": s.name, "at": [[p[0], x.write(p[0]), y.write(p[1])] for p in s.points]} for s in series],
    }
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{_legend(series)}</figcaption>'
        + ticked_frame(f"{drawing}{words}{POINTER}", across, up, x, y)
        + f"{_note(note)}{_as_table(series, x, y)}"
        f'<script type="application/json" class="points">{as_json(points)}</script></figure>'
    )


def ticked_frame(plot: str, across: Scale, up: Scale, x: Axis, y: Axis) -> str:
    """A drawing with its axes' words around it."""
    rows, columns = (zip(at.ticks, _alike(axis, at.ticks), strict=True) for at, axis in ((up, y), (across, x)))
    left = "".join(f'<span style="bottom:{_n(100 * up.place(t))}%">{escape(word)}</span>' for t, word in rows)
    below = "".join(f'<span class="{_edge(across.place(t))}" style="left:{_n(100 * across.place(t))}%">'
                    f"{escape(word)}</span>" for t, word in columns)  # fmt: skip
    return (
        f'<div class="frame"><div class="y-label">{escape(y.label)}</div><div class="y-ticks" aria-hidden="true">{left}'
        f'</div><div class="plot">{plot}</div><div class="x-ticks" aria-hidden="true">{below}</div>'
        f'<div class="x-label">{escape(x.label)}</div></div>'
    )


def as_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of a bar table."""

    name: str
    value: float
    shown: str
    style: str = "student"
    about: str = ""


def bar_table(
    bars: Sequence[Bar], *, title: str, heads: tuple[str, str], log: bool = False, note: str = "", whole: float = 0.0
) -> str:
    """A table whose figures are drawn as bars, too. With `log`, a bar's length is the logarithm of its figure. The bar
    of `whole` fills its place, or that of the largest figure."""
    values = [math.log(max(bar.value, 1e-9)) if log else bar.value for bar in bars]
    low = min(values) - 0.06 * (max(values) - min(values) or 1.0) if log else min(0.0, *values)
    room = (max(*values, whole if not log else -math.inf) - low) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(bar.name)}{_small(bar.about)}</th><td class="bar"><svg viewBox="0 0 100 10" '
        f'preserveAspectRatio="none" aria-hidden="true"><rect class="rail" width="100" height="10"/><rect class="'
        f'{escape(bar.style)}" width="{_n(max(0.4, 100 * (value - low) / room))}" height="10"/></svg></td>'
        f'<td class="number">{escape(bar.shown)}</td></tr>'
        for bar, value in zip(bars, values, strict=True)
    )
    scale = "Bars are drawn on a logarithmic scale." if log else ""
    return (
        f'<figure class="bars"><figcaption><b>{escape(title)}</b></figcaption><table><thead><tr><th scope="col">'
        f'{escape(heads[0])}</th><td></td><th scope="col" class="number">{escape(heads[1])}</th></tr></thead><tbody>'
        f"{rows}</tbody></table>{_note(' '.join(t for t in (note, scale) if t))}</figure>"
    )


def table(rows: Sequence[Mapping[str, str]], *, title: str) -> str:
    """Plain rows of words, one column a key; the first names its row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    made = _columns([[(name, row.get(name, "")) for name in names] for row in rows], title)
    return f'<figure class="listing"><figcaption><b>{escape(title)}</b></figcaption>{made}</figure>'


def pairs(values: Mapping[str, str]) -> str:
    """Names and what they are."""
    rows = "".join(
        f"<div><dt>{escape(name).replace('_', '_<wbr>')}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="pairs">{rows}</dl>'


class Scale:
    """Where a value lies on an axis, 0 to 1, and which values are named there."""

    def __init__(self, axis: Axis, low: float, high: float, *, padded: bool) -> None:
        self.log = axis.log
        low, high = axis.low if axis.low is not None else low, axis.high if axis.high is not None else high
        if padded and not axis.log:
            low, high = _nice_ends(low, high, axis)
        if padded and axis.log:
            low, high = low / 1.15, high * 1.15
        if high <= low:
            low, high = (low / 2, low * 2) if axis.log else (low - 0.5, low + 0.5)
        self.low, self.high = low, high
        made = axis.ticks or (_log_ticks(low, high, axis.base) if axis.log else _ticks(low, high, base=axis.base))
        inside = [tick for tick in made if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        self.ticks = [tick for tick in inside if not axis.counts or tick == round(tick)]

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _nice_ends(low: float, high: float, axis: Axis) -> tuple[float, float]:
    room = (high - low) or abs(high) or 1.0
    return (low if axis.low is not None else low - 0.06 * room), (high if axis.high is not None else high + 0.06 * room)


def _ticks(low: float, high: float, about: int = 5, *, base: float = 10.0) -> list[float]:
    step = base ** math.floor(math.log((high - low) / about, base))
    round_ones = (1.0, 2.0) if base == 2 else (1.0, 2.0, 2.5, 5.0, 10.0)
    step = next((step * m for m in round_ones if (high - low) / (step * m) <= about), step * base)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, base: float) -> list[float]:
    """Powers of two, or round decimals: whichever spacing gives a handful; else plain ticks of the narrow range."""
    for steps in ((1.0,),) if base == 2 else ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        first, last = math.floor(math.log(low, base) - 1e-9), math.ceil(math.log(high, base) + 1e-9)
        found = [step * base**i for i in range(first, last + 1) for step in steps]
        inside = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 6)]
    return [tick for tick in _ticks(low, high, base=base) if tick > 0]


def _alike(axis: Axis, ticks: Sequence[float]) -> list[str]:
    """The words of ticks: 5k below 10k, where `short` alone would say 5000."""
    words = [axis.write(tick) for tick in ticks]
    if not any(word.endswith("k") for word in words):
        return words
    return [f"{t / 1e3:.3g}k" if word.isdigit() and t >= 1e3 else word for t, word in zip(ticks, words, strict=True)]


def _drawable(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    return [
        (a, b)
        for a, b in points
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not x.log) and (b > 0 or not y.log)
    ]


def _path(one: Series, across: Scale, up: Scale) -> str:
    places = [(_n(100 * across.place(a)), _n(100 - 100 * up.place(b))) for a, b in one.points]
    line = "M" + "L".join(f"{a} {b}" for a, b in places)
    ramp = f' style="--t:{_n(100 * one.ramp)}%"' if one.style == "ramp" else ""
    drawn = f'<path class="line {one.style}"{ramp} d="{line}"/>' if len(places) > 1 else ""
    if len(places) <= 24:  # a line of no length with round ends: a dot that no stretching turns into an oval
        dots = "".join(f"M{a} {b}h0" for a, b in places)
        drawn += f'<path class="dots {one.style}"{ramp} d="{dots}"/>'
    return f"<g>{drawn}<title>{escape(one.name)}</title></g>"


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    family = [one for one in series if one.style == "ramp"]
    items = [f'<span class="key {one.style}">{escape(one.name)}</span>' for one in series if one.style != "ramp"]
    if len(family) > 1:
        items.append(f'<span class="key-ramp">{escape(family[0].name)}<i></i>{escape(family[-1].name)}</span>')
    return f'<span class="legend">{"".join(items)}</span>'


def _as_table(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """The figures for who does not see the drawing: a few of the common x, one column a line."""
    places = sorted({p[0] for one in series for p in one.points})
    if len(places) > TABLE_ROWS:
        places = [places[round(i * (len(places) - 1) / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
    found = [dict(one.points) for one in series]
    rows = [
        [(x.label, x.write(place))]
        + [(one.name, y.write(at[place]) if place in at else "") for one, at in zip(series, found, strict=True)]
        for place in places
    ]
    return f"<details><summary>Figures</summary>{_columns(rows, 'Figures')}</details>"


def _columns(rows: Sequence[Sequence[tuple[str, str]]], title: str) -> str:
    """Rows of (column, word), every row alike. Where there is no room for the columns, the page makes a card of each
    row, in which a word stands under its column's name; the roles keep it a table for who hears it."""
    head = "".join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name, _ in rows[0])
    body = ""
    for (first, named), *rest in rows:
        cells = "".join(f'<td role="cell" data-name="{escape(name)}">{escape(word)}</td>' for name, word in rest)
        row = f'<th scope="row" role="rowheader" data-name="{escape(first)}">{escape(named)}</th>'
        body += f'<tr role="row">{row}{cells}</tr>'
    many = " many" if len(rows[0]) > MOST_COLUMNS else ""
    return (
        f'<div class="scroll{many}" tabindex="0" role="region" aria-label="{escape(title)}"><table role="table">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table></div>'
    )


def _edge(place: float) -> str:
    return "start" if place < 0.04 else "end" if place > 0.96 else ""


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
