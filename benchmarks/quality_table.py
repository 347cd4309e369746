"""The quality table as Markdown, from the rows of quality.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import quality_recall
from linearize.evaluate.recovery import recovery

Rows = Mapping[str, dict[str, Any]]

HEAD = (
    "row", "tokens", "trained", "seconds", "state KB", "step 0", "PPL", "R %", "R sinks %",
    "window", "linear", "none", "by linear %", "recall %", "LAMBADA %",
)  # fmt: skip
NOTES = """\
R: share of ln PPL between the teacher cut to the row's window (64 where it has none), untrained and without sinks, and
the teacher itself. `R sinks`: the same against the cut with the row's own sinks. `trained`: parameters in alignment +
finetuning. `seconds`: wall clock of the whole conversion, loading and verification included. `state KB`: what one
sequence keeps in linear layers, + the cache of softmax layers at the table's context. `step 0`: perplexity before
training, plain -> calibrated. `PPL`: with all branches; `window`, `linear`, `none`: with the window alone, the linear
branch alone, no attention. `by linear`: share of R that is lost when the linear branch is cut. `recall`: see below."""
RECALL = """\
## Recall beyond the window

Right answers in percent, by task and by distance in tokens. Shares: (row - floor) / (teacher - floor), with the floor
the teacher cut to the row's window and sinks; of the tasks that the teacher does clearly better than its cut."""


def recovered(row: Mapping[str, Any], rows: Rows, *, sinks: bool = False, branch: str = "full") -> float | None:
    """R in percent of a measured row, against the cut without sinks or with its own; None where it is not known."""
    teacher = rows.get("teacher", {})
    floor = rows.get(floor_key(row, sinks=sinks), {})
    if "nll" not in teacher or "nll" not in floor or "nll" not in row:
        return None
    nll = row["nll"]
    if branch != "full":
        scores = (row.get("branches") or {}).get(branch)
        if scores is None:
            return None
        nll = scores["nll"]
    return recovery(teacher=teacher["nll"], window=floor["nll"], student=nll)[0]


def floor_key(row: Mapping[str, Any], *, sinks: bool) -> str:
    """Key of the cut that a row is held against."""
    from benchmarks.quality_rows import WINDOW, cut

    window = row.get("window")
    return cut(window or WINDOW, (row.get("sinks") or 0) if sinks and window else 0).key


def by_linear(row: Mapping[str, Any], rows: Rows) -> float | None:
    """Percent of R that is lost when the linear branch is cut; None without a window, or where nothing was won."""
    full, window = recovered(row, rows), recovered(row, rows, branch="window")
    if full is None or window is None or full <= 0:
        return None
    return 100.0 * (full - window) / full


def ordered(rows: Rows, plan: Sequence[str]) -> list[dict[str, Any]]:
    """Teacher, cuts, recipes, variants; within them as planned, rows of earlier plans behind, seeds side by side."""
    from benchmarks.quality_rows import KINDS

    places = {key: number for number, key in enumerate(plan)}
    firsts: dict[str, int] = {}
    for key, row in rows.items():
        name = row["name"]
        firsts[name] = min(firsts.get(name, len(places)), places.get(key, len(places)))
    return sorted(
        rows.values(),
        key=lambda row: (KINDS.index(row["kind"]), firsts[row["name"]], row["name"], row["seed"] or 0),
    )


def render(state: Mapping[str, Any]) -> str:
    """The whole of quality.md."""
    rows, setting = state["rows"], state["setting"]
    lines = ordered(rows, state["plan"])
    measured = [row for row in lines if "error" not in row]
    parts = [
        f"# Quality of conversions of {setting['teacher']}",
        f"At most {setting['budget']:,} training tokens a row. Train: {setting['data']}. "
        f"Judged on {setting['heldout']}, `concat@{setting['context']}`, {setting['windows']} windows"
        + (f"; LAMBADA: {setting['lambada_rows'] or 'all'} rows" if setting["lambada"] else "")
        + (f". Settings: {' '.join(setting['overrides'])}" if setting["overrides"] else "")
        + ".",
        "\n".join(f"- {line}" for line in _origins(measured)),
        table([HEAD, *(cells(row, rows, setting["context"]) for row in lines)]),
        NOTES,
        "## Perplexity by position\n\nPositions: how many tokens of its window of text a prediction could see.",
        positions(measured),
    ]
    if asked := quality_recall.lines(measured, rows, shown):
        parts += [RECALL, table(asked)]
    notes = [*state["notes"], *remarks(lines, rows)]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    if state.get("left"):
        parts.append(f"Not done yet: {', '.join(state['left'])}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _origins(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which machines, days and states of the code the rows come from: one line each."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(f"{row['machine']}; {row['date']}; code {row['code']}", []).append(shown(row))
    if len(found) < 2:
        return list(found)
    return [f"{origin}: {', '.join(names)}" for origin, names in found.items()]


def shown(row: Mapping[str, Any]) -> str:
    """A row's name for people."""
    if row["kind"] == "cut":
        return f"teacher cut to W={row['window']}, {row['sinks']} sinks"
    return str(row["name"]) if row["seed"] is None else f"{row['name']} (seed {row['seed']})"


def cells(row: Mapping[str, Any], rows: Rows, context: int) -> tuple[str, ...]:
    """One line of the main table."""
    if "error" in row:
        return (shown(row), "failed", *["-"] * (len(HEAD) - 2))
    report = row.get("convert")
    tokens = trained = seconds = step0 = "-"
    if report is None:
        state = f"cache {row['cache_bytes'] / 1024:.0f}"
    else:
        tokens = amount(sum(stage["tokens"] for stage in report["stages"].values()))
        sizes = report["parameters"]["trained"]
        trained = f"{sizes['align']:,} + {sizes['finetune']:,}"
        marks = [f"{row['shared']} at once"] if row.get("shared", 1) > 1 else []
        marks += [f"{row['slices']} slices"] if row["slices"] > 1 else []
        seconds = f"{row['seconds']:.0f}" + (f" ({', '.join(marks)})" if marks else "")
        state = f"{report['state_bytes'] / 1024:.0f}"
        state += f" + cache {row['cache_bytes'] / 1024:.0f}" if row["cache_bytes"] else ""
        calibration = report.get("calibration") or {}
        if calibration.get("ppl_after") is not None:
            step0 = f"{number(calibration.get('ppl_before'))} -> {number(calibration['ppl_after'])}"
    branches = row.get("branches") or {}
    audit = [number((branches.get(b) or {}).get("perplexity")) for b in ("window", "linear", "none")]
    right = (row.get("lambada") or {}).get("accuracy")
    return (
        shown(row),
        tokens,
        trained,
        seconds,
        state,
        step0,
        number(row["token_perplexity"]),
        percent(recovered(row, rows)),
        percent(recovered(row, rows, sinks=True)),
        *audit,
        percent(by_linear(row, rows)),
        quality_recall.cell(row, rows),
        percent(None if right is None else 100 * right),
    )


def positions(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity by position, one line a row."""
    if not rows:
        return ""
    spans = [(part["from"], part["to"]) for part in rows[0]["by_position"]]
    head = ("row", *(f"{low}-{high}" for low, high in spans))
    return table([head, *((shown(r), *(number(p["perplexity"]) for p in r["by_position"])) for r in rows)])


def remarks(lines: Sequence[Mapping[str, Any]], rows: Rows) -> list[str]:
    """What the cells cannot say."""
    found = []
    for row in lines:
        if "error" in row:
            found.append(f"{shown(row)} failed: {row['error']['kind']}: {row['error']['message']}")
        for note in (row.get("convert") or {}).get("notes", []):
            found.append(f"{shown(row)}: {note}")
        if row.get("softmax_layers"):
            found.append(f"{shown(row)} keeps softmax in layers {', '.join(map(str, row['softmax_layers']))}")
    if any(row.get("shared", 1) > 1 for row in lines):
        found.append("`N at once`: N conversions shared the device for a part of the time; the seconds are not its own")
    if any(row.get("slices", 1) > 1 for row in lines):
        found.append("`N slices`: stopped and resumed; the seconds are those of all slices, each with its own loading")
    found += quality_recall.remarks(rows)
    if rows.get("teacher", {}).get("nll") and not any(recovered(row, rows) is not None for row in lines):
        found.append("R is not defined here: the cut costs the teacher too little, or is not measured yet")
    return found


def amount(tokens: int) -> str:
    """Tokens, with three digits."""
    return f"{tokens / 1e6:.3g}M" if tokens >= 1_000_000 else f"{tokens / 1e3:.3g}k"


def number(value: float | None) -> str:
    """A perplexity."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A share that is in percent already."""
    return "-" if value is None else f"{value:.1f}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first line is the head, in columns of even width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shaped = [
        "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([shaped[0], rule, *shaped[1:]])
