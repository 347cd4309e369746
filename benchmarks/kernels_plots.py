"""Plots of kernel measurements: time against context, memory against context, decode speed against batch.

    python -m benchmarks.kernels --plot benchmarks/results/kernels.jsonl --to docs/plots [--format svg]

Writes kernels-time, kernels-memory and kernels-decode. Needs `pip install matplotlib`. A plot whose rows are not in
the file is not drawn. The machine with the most rows is drawn, and named.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels_rows import Row, latest

COLOURS = {
    "linearize": "#d98e32",
    "SDPA cuDNN": "#1f4e79",
    "SDPA flash": "#9bb7d4",
    "composed": "#3a7d44",
    "fla fused_recurrent": "#3a7d44",
    "softmax": "#1f4e79",
}
OTHERS = ("#a23b72", "#7a5c3e", "#5b5ea6", "#2a9d8f")
GREY = "#555555"
Point = tuple[float, float]


def series(rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> dict[str, list[Point]]:
    """Points of each implementation, by x."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        found.setdefault(row["implementation"], []).append((x(row), y(row)))
    return {name: sorted(points) for name, points in found.items()}


def context_of(row: Row) -> int:
    """Tokens a sequence, from a shape such as 4x8192."""
    return int(row["shape"].partition("x")[2].split()[0])


def batch_of(row: Row) -> int:
    """Sequences, from a shape such as 4x8192."""
    return int(row["shape"].partition("x")[0])


def pick_rows(rows: Sequence[Row], op: str, which: str) -> list[Row]:
    """Rows of one op and pass that have a figure, on shapes of the main head size and of the most tokens.

    A smaller batch fills less of the card: of the same context it would be another point above the first.
    """
    found = [
        row for row in rows
        if row["op"] == op and row["pass"] == which and row.get("ms") is not None and " d" not in row["shape"]
    ]  # fmt: skip
    most = max((batch_of(row) * context_of(row) for row in found), default=0)
    return [row for row in found if batch_of(row) * context_of(row) == most]


def draw_lines(axes: Any, lines: Mapping[str, Sequence[Point]], *, x: str, y: str, title: str) -> None:
    """One line an implementation, both axes logarithmic."""
    spare = iter(OTHERS)
    for name, points in lines.items():
        colour = COLOURS.get(name) or next(spare, GREY)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.6, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(ticks, [f"{int(t) // 1024}k" if t >= 1024 else f"{int(t)}" for t in ticks])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def panels(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """What each plot shows: its panels, with lines and words; panels without points are left out."""
    decode = [row for row in rows if row["op"] == "model" and row["pass"] == "decode" and row.get("ms") is not None]
    contexts = sorted({row["context"] for row in decode})
    wanted: dict[str, list[dict[str, Any]]] = {
        "kernels-time": [
            {
                "lines": series(pick_rows(rows, "layer", which), context_of, lambda r: r["ns_per_token_head"]),
                "x": "context, tokens", "y": "ns a token and head", "title": title,
            }
            for which, title in (("forward", "Forward"), ("both", "Forward and backward"))
        ],
        "kernels-memory": [
            {
                "lines": series(pick_rows(rows, "layer", "both"), context_of,
                                lambda r: r["peak_bytes"] / 2**30 / batch_of(r)),
                "x": "context, tokens", "y": "GiB a sequence",
                "title": "Peak memory of a layer, forward and backward",
            },
            {
                "lines": series([r for r in decode if "sequence_bytes" in r], lambda r: r["context"],
                                lambda r: r["sequence_bytes"] / 2**20),
                "x": "context, tokens", "y": "MiB a sequence", "title": "Cache of a whole model",
            },
        ],
        "kernels-decode": [
            {
                "lines": series([r for r in decode if r["context"] == context], lambda r: r["batch"],
                                lambda r: r["tokens_per_s"]),
                "x": "batch", "y": "tokens/s", "title": f"Decode after {context // 1024}k tokens",
            }
            for context in contexts
        ],
    }  # fmt: skip
    kept = {name: [panel for panel in found if panel["lines"]] for name, found in wanted.items()}
    return {name: found for name, found in kept.items() if found}


def draw(rows: Sequence[Row], folder: Path, kind: str) -> list[Path]:
    """Write the plots that the rows allow, as `kind` (svg or png).

    Raises:
        SystemExit: matplotlib is missing, or no plot can be drawn from these rows.
    """
    chosen = list(latest(rows).values())
    if not chosen:
        sys.exit("no rows to draw")
    machine = Counter(row["machine"] for row in chosen).most_common(1)[0][0]
    chosen = [row for row in chosen if row["machine"] == machine]
    wanted = panels(chosen)
    if not wanted:
        sys.exit("no plot can be drawn from these rows: they need the ops layer or model")
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, found in wanted.items():
        figure, axes = plt.subplots(1, len(found), figsize=(4.6 * len(found), 3.6), squeeze=False)
        for place, panel in zip(axes[0], found, strict=True):
            draw_lines(place, **panel)
        versions = chosen[-1]["versions"]
        words = f"{machine}, torch {versions.get('torch')}, Triton {versions.get('triton')}, bfloat16"
        figure.text(0.99, 0.01, words, ha="right", va="bottom", fontsize=6.5, color=GREY)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        paths.append(folder / f"{name}.{kind}")
        figure.savefig(paths[-1], dpi=160)
        plt.close(figure)
    return paths
