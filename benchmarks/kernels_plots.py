"""Plots of kernel measurements: time against context, memory against context, decode against batch.

    python -m benchmarks.kernels --plot benchmarks/results/kernels.jsonl --to docs/plots [--format svg]

Writes kernels-time (a layer), kernels-memory (a layer; a model's cache) and kernels-decode (one token of a layer; a
model's tokens a second). Needs `pip install matplotlib`. A plot or a panel whose rows are not in the file is left out.
The machine with the most rows is drawn, and named.
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
    "linearize, block end": "#f0c48a",
    "linearize pure": "#a23b72",
    "linearize pure, block end": "#d9a5c2",
    "fla fused_recurrent": "#3a7d44",
    "softmax": "#1f4e79",
    "SDPA after 2k": "#9bb7d4",
    "SDPA after 32k": "#4f81b3",
    "SDPA after 128k": "#1f4e79",
}
OTHERS = ("#7a5c3e", "#5b5ea6", "#2a9d8f", "#a23b72")
GREY = "#555555"
MANY = 5
"""Lines that leave room for their names inside a panel."""
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
    from matplotlib.ticker import LogLocator

    for name, points in sorted(lines.items(), key=lambda line: -line[1][-1][1]):
        colour = COLOURS.get(name) or next(spare, GREY)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.6, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(ticks, [f"{int(t)}" if t % 1024 else f"{int(t) // 1024}k" for t in ticks])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(lines) > MANY else {}
    axes.legend(frameon=False, fontsize=8, **beside)


def step_name(row: Row) -> str:
    """Whose step it is, and after how many tokens where that matters."""
    if row["implementation"] == "SDPA":
        return f"SDPA after {row['context'] // 1024}k"
    return row["implementation"] + (", block end" if row["pass"] == "block end" else "")


def steps(rows: Sequence[Row]) -> list[Row]:
    """Steps of a layer, named by `step_name`; after the most tokens, where the name does not tell."""
    found = [row for row in rows if row["op"] == "decode" and row.get("ms") is not None]
    most: dict[tuple[str, int], Row] = {}
    for row in sorted(found, key=lambda r: r["context"]):
        name = step_name(row)
        most[name, row["batch"]] = row | {"implementation": name}
    return list(most.values())


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
            for which, title in (
                ("forward", "Forward"), ("both", "Forward and backward"), ("maps", "Forward, maps' gradients alone")
            )
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
                "lines": series(steps(rows), lambda r: r["batch"], lambda r: 1e3 * r["ms"]),
                "x": "batch", "y": "microseconds", "title": "One token of one layer",
            },
        ] + [
            {
                "lines": series([r for r in decode if r["context"] == context], lambda r: r["batch"],
                                lambda r: r["tokens_per_s"]),
                "x": "batch", "y": "tokens/s", "title": f"A whole model's decode after {context // 1024}k tokens",
            }
            for context in contexts
        ],
    }  # fmt: skip
    if len(wanted["kernels-time"][-1]["lines"]) < 2:  # nobody to compare with
        del wanted["kernels-time"][-1]
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
        sys.exit("no plot can be drawn from these rows: they need the ops layer, decode or model")
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, found in wanted.items():
        columns = 2 if len(found) == 4 else len(found)
        rows_of_panels = -(-len(found) // columns)
        size = (4.6 * columns, 3.6 * rows_of_panels)
        figure, axes = plt.subplots(rows_of_panels, columns, figsize=size, squeeze=False, layout="constrained")
        for place, panel in zip(axes.flat, found, strict=False):
            draw_lines(place, **panel)
        versions = chosen[-1]["versions"]
        words = f"{machine}, torch {versions.get('torch')}, Triton {versions.get('triton')}, bfloat16"
        figure.supxlabel(words, x=0.99, ha="right", fontsize=6.5, color=GREY)
        paths.append(folder / f"{name}.{kind}")
        figure.savefig(paths[-1], dpi=160)
        plt.close(figure)
    return paths
