"""Plots of a quality table: what each row wins back and by which branch, and perplexity by position.

    python -m benchmarks.quality_plots FOLDER/quality.json --to docs/plots [--top 3] [--rows a,b]

Writes recovery.svg and positions.svg (or .png with --format png). Needs `pip install matplotlib`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_table import ordered, recovered

LOWEST = -40.0
"""Percent at which bars are cut off: a branch that knows nothing has R far below zero, and would flatten all others."""
BRANCHES = (
    ("full", "#1f4e79", "all branches"),
    ("window", "#9bb7d4", "window alone"),
    ("linear", "#d98e32", "linear branch alone"),
)
GREY = "#555555"
COLOURS = ("#1f4e79", "#d98e32", "#3a7d44", "#a23b72", "#7a5c3e", "#5b5ea6", "#c44536", "#2a9d8f")


def label(row: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """A row's name, with its seed only where there are several."""
    seeds = sum(other["name"] == row["name"] for other in rows.values())
    return f"{row['name']} (seed {row['seed']})" if seeds > 1 else str(row["name"])


def conversions_by_recovery(state: Mapping[str, Any], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Measured conversions whose R is known, the best first; of `wanted` alone if it names any."""
    rows = [row for row in ordered(state["rows"], state["plan"]) if row.get("branches")]
    rows = [row for row in rows if not wanted or row["name"] in wanted]
    scored = [(recovered(row, state["rows"]), row) for row in rows]
    known = [(value, row) for value, row in scored if value is not None]
    return [row for _, row in sorted(known, key=lambda pair: -pair[0])]


def draw_recovery(axes: Any, state: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Three bars a row: R of all branches, of the window alone, of the linear branch alone."""
    height = 0.8 / len(BRANCHES)
    for number, row in enumerate(rows):
        for place, (branch, colour, _) in enumerate(BRANCHES):
            value = recovered(row, state["rows"], branch=branch)
            y = number + (place - 1) * height
            if value is None:
                axes.text(1.0, y, "no window", va="center", ha="left", fontsize=6.5, color=GREY)
                continue
            axes.barh(y, max(value, LOWEST), height=height * 0.92, color=colour)
            text = f"{value:.0f}" if value >= LOWEST else f"‹ {value:,.0f}"
            axes.text(max(value, 0.0) + 1.0, y, text, va="center", ha="left", fontsize=6.5, color=GREY)
    axes.set_yticks(range(len(rows)), [label(row, state["rows"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(LOWEST, 108)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("recovery R, % (0: the teacher cut to the window; 100: the teacher)")
    for _, colour, text in BRANCHES:
        axes.barh([-10], [0], color=colour, label=text)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def draw_positions(axes: Any, state: Mapping[str, Any], chosen: Sequence[dict[str, Any]]) -> None:
    """Nats per token of each row less the teacher's, by how much a prediction could see."""
    rows = state["rows"]
    base = [part["nll"] for part in rows["teacher"]["by_position"]]
    spans = [f"{part['from']}–{part['to'] - 1}" for part in rows["teacher"]["by_position"]]
    cuts = [row for row in rows.values() if row["kind"] == "cut" and row["window"] == 64 and "nll" in row]
    lines = [(row, GREY, "--" if row["sinks"] else ":", f"teacher cut to 64, {row['sinks']} sinks") for row in cuts]
    lines += [(row, COLOURS[i % len(COLOURS)], "-", label(row, rows)) for i, row in enumerate(chosen)]
    for row, colour, style, text in lines:
        losses = [part["nll"] - own for part, own in zip(row["by_position"], base, strict=True)]
        axes.plot(range(len(losses)), losses, style, color=colour, marker="o", markersize=3, label=text)
    axes.axhline(0, color=GREY, linewidth=0.8, label="teacher")
    axes.set_xticks(range(len(spans)), spans)
    axes.set_xlabel("tokens that a prediction could see")
    axes.set_ylabel("nats per token above the teacher")


def draw(state: Mapping[str, Any], folder: Path, *, kind: str, top: int, wanted: Sequence[str]) -> list[Path]:
    """Both plots; the files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "font.size": 8,
        "svg.hashsalt": "quality",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot

    ranked = conversions_by_recovery(state, wanted)
    if not ranked:
        raise SystemExit("no row has a recovery to draw (the teacher, its cuts and one conversion are needed)")
    folder.mkdir(parents=True, exist_ok=True)
    setting, files = state["setting"], []
    told = f"{setting['teacher']}, at most {setting['budget'] / 1e6:g} M tokens, "
    told += f"{setting['heldout']} at {setting['context']}"
    for name, size in (("recovery", (7.0, 1.0 + 0.42 * len(ranked))), ("positions", (7.0, 3.6))):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        if name == "recovery":
            draw_recovery(axes, state, ranked)
        else:
            best = {row["name"]: row for row in reversed(ranked)}  # of several seeds the best
            draw_positions(axes, state, sorted(best.values(), key=ranked.index)[:top])
        axes.set_title(told, fontsize=8, color=GREY, loc="left")
        axes.legend(frameon=False, fontsize=7)
        files.append(folder / f"{name}.{kind}")
        figure.savefig(files[-1], dpi=160, metadata={"Date": None} if kind == "svg" else None)
        pyplot.close(figure)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="quality.json")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--top", type=int, default=4, help="how many rows the plot of positions shows")
    parser.add_argument("--rows", default="", help="names of the only rows to show")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    state = json.loads(args.table.read_text(encoding="utf-8"))
    wanted = [name.strip() for name in args.rows.split(",") if name.strip()]
    for path in draw(state, args.to, kind=args.format, top=args.top, wanted=wanted):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
