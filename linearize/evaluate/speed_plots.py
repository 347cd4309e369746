"""Plots of a benchmark, as SVG: speed and memory against context, student and teacher in one picture.

Needs matplotlib, which is imported only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UsageError

FIGURES = {
    "decode": ("decode_tokens_per_second", "new tokens a second, whole batch", 1.0),
    "prefill": ("prefill_tokens_per_second", "prompt tokens read a second, whole batch", 1.0),
    "first-token": ("ttft_seconds", "seconds to the first new token", 1.0),
    "memory": ("growth_bytes", "peak memory above the weights, MiB", 2.0**-20),
    "cache": ("cache_bytes", "state and keys and values after the last token, MiB", 2.0**-20),
}
"""File: what is drawn, its axis and what it is multiplied by."""
COLOURS = {"student": "#1f4e79", "teacher": "#d98e32"}
DASHES = ("-", "--", ":", "-.")
"""Lines of one model differ by batch."""


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One SVG a figure that was measured; the paths. The folder is made.

    Raises:
        UsageError: the folder cannot be written.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # Text stays text and names depend on nothing but the figures: two runs over the same rows give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "linearize", "font.size": 9})
    done = [{**row, "cache_bytes": row["state_bytes"] + row["kv_bytes"]} for row in rows if row["status"] == "ok"]
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (key, label, scale) in FIGURES.items():
            if not any(row[key] is not None for row in done):
                continue
            figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
            _lines(axes, done, key, scale)
            axes.set(xlabel="context, tokens", ylabel=label, xscale="log", yscale="log")
            axes.set_xticks(sorted({row["context"] for row in done}), minor=False)
            axes.set_xticks([], minor=True)
            axes.get_xaxis().set_major_formatter(lambda value, place: f"{value:,.0f}")
            axes.set_title(_title(done), fontsize=8)
            axes.legend(frameon=False, fontsize=8)
            axes.grid(alpha=0.3)
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            plt.close(figure)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None
    return paths


def _lines(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, scale: float) -> None:
    batches = sorted({row["batch"] for row in rows})
    for role, colour in COLOURS.items():
        for number, batch in enumerate(batches):
            mine = [r for r in rows if r["role"] == role and r["batch"] == batch and r[key] is not None]
            if not mine:
                continue
            x, y = [r["context"] for r in mine], [r[key] * scale for r in mine]
            style = {"color": colour, "linestyle": DASHES[number % len(DASHES)], "label": f"{role}, batch {batch}"}
            axes.plot(x, y, marker="o", markersize=3.5, **style)
            if f"{key}_low" in mine[0]:
                low, high = ([r[f"{key}_{end}"] * scale for r in mine] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    where = first["machine"]["gpu"] or f"{first['machine']['cpu']}, {first['machine']['threads']} threads"
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("linearize", "torch", "transformers"))
    return f"{where}, {first['dtype']}, {first['date']}\n{versions}"
