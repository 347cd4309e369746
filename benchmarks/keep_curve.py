"""Recovery against the number of layers that stay softmax: those that measurement chooses, beside even spacing.

    python -m benchmarks.keep_curve TEACHER --data TRAIN --heldout HELDOUT --recipe lolcats [key=value ...]

One point is one `linearize convert` with `keep_softmax=[..]` and one `linearize audit`. The layers are ranked once, by
`linearize select --method window`, as keep_softmax=auto ranks them. What is finished in FOLDER is not run again, an
interrupted conversion goes on where it stopped, and `--minutes` starts no further point; run the same command again.
FOLDER then holds curve.json and, with matplotlib, curve.png.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.quality_run import machine

FRACTIONS = "0,1/8,1/4,1/2"
COLUMNS = ("placement", "kept", "layers", "tokens", "state KB", "PPL", "R %")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One conversion."""

    placement: str
    """auto | uniform, or both where they keep the same layers."""
    layers: tuple[int, ...]
    """That stay softmax."""

    @property
    def name(self) -> str:
        """Of its files."""
        return "keep-" + ("-".join(map(str, self.layers)) or "none")


def shares(text: str) -> list[Fraction]:
    """`0,1/8,0.25` as fractions of the layers, rising.

    Raises:
        ValueError: not numbers from 0 up to, but not including, 1.
    """
    try:
        found = sorted({Fraction(part.strip()) for part in text.split(",")})
    except ZeroDivisionError:
        raise ValueError(f"{text}: divides by zero") from None
    if not all(0 <= share < 1 for share in found):
        raise ValueError(f"{text}: a share of the layers lies in [0, 1)")
    return found


def kept_counts(fractions: Sequence[Fraction], num_layers: int) -> list[int]:
    """Layers to keep: the nearest number to each share, one at least for a share above 0, and never all; rising."""
    counts = {0 if not share else max(1, int(share * num_layers + Fraction(1, 2))) for share in fractions}
    return sorted(count for count in counts if count < num_layers)


def points(ranking: Sequence[int], counts: Sequence[int], even: Callable[[int, int], tuple[int, ...]]) -> list[Point]:
    """The conversions of a curve: for every count the first of the ranking, and as many spaced evenly."""
    found = []
    for count in counts:
        auto = tuple(sorted(ranking[:count]))
        uniform = even(len(ranking), count) if count else ()
        if auto == uniform:
            found.append(Point(placement="auto, uniform", layers=auto))
        else:
            found += [Point(placement="auto", layers=auto), Point(placement="uniform", layers=uniform)]
    return found


def rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """The ranking of the layers, made once."""
    done = arguments.out / "selection.json"
    if not done.is_file():
        import linearize

        found = linearize.select(
            arguments.teacher,
            data=arguments.data,
            keep=1,  # the ranking is the same for any number
            recipe=arguments.recipe,
            overrides=arguments.overrides,
            method=arguments.method,
        )
        _write(done, found)
    return json.loads(done.read_text())


def run(point: Point, arguments: argparse.Namespace) -> dict[str, Any]:
    """One point: convert, audit, forget the weights unless asked to keep them."""
    import linearize
    from linearize.convert.early import begun

    out, done = arguments.out / point.name, arguments.out / f"{point.name}.json"
    if done.is_file():
        return json.loads(done.read_text()) | {"placement": point.placement}
    report_file = arguments.out / f"{point.name}.convert.json"
    if not report_file.is_file():
        shutil.rmtree(out, ignore_errors=True)  # stopped between the last two files
        overrides = [*arguments.overrides, f"keep_softmax=[{','.join(map(str, point.layers))}]"]
        report = linearize.convert(
            arguments.teacher,
            out,
            recipe=arguments.recipe,
            data=arguments.data,
            overrides=overrides,
            resume=begun(out),
        )
        _write(report_file, report)
    report = json.loads(report_file.read_text())
    audit = linearize.audit(out, against=arguments.teacher, data=arguments.heldout, context=arguments.context)
    row = {
        **asdict(point),
        "tokens": sum(stage["tokens"] for stage in report["stages"].values()),
        "seconds": sum(s for name, s in report["seconds"].items() if name != "total"),  # of a resumed run, all of it
        "state_bytes": report["state_bytes"],
        "audit": audit,
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }
    _write(done, row)
    if not arguments.keep:
        shutil.rmtree(out)
    return row


def cells(row: dict[str, Any], num_layers: int) -> tuple[str, ...]:
    """A row of the table."""
    audit = row["audit"]
    return (
        row["placement"],
        f"{len(row['layers'])}/{num_layers}",
        ",".join(map(str, row["layers"])) or "none",
        f"{row['tokens'] / 1e6:.1f}M",
        f"{row['state_bytes'] / 1024:.0f}",
        f"{audit['ppl_student']:.2f}",
        "-" if audit["R"] is None else f"{audit['R']:.1f}",
    )


def series(rows: Sequence[dict[str, Any]], num_layers: int) -> dict[str, list[tuple[float, float]]]:
    """Share of the layers kept and R, by placement; a point of both lies on both curves."""
    found: dict[str, list[tuple[float, float]]] = {"auto": [], "uniform": []}
    for row in rows:
        for placement, line in found.items():
            if placement in row["placement"].split(", ") and row["audit"]["R"] is not None:
                line.append((len(row["layers"]) / num_layers, row["audit"]["R"]))
    return {placement: sorted(line) for placement, line in found.items()}


def plot(rows: Sequence[dict[str, Any]], num_layers: int, title: str, file: Path) -> bool:
    """Draw the curves into `file`; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for (placement, line), style in zip(series(rows, num_layers).items(), ("o-", "s--")):
        axes.plot([x for x, _ in line], [y for _, y in line], style, label=placement)
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.set(xlabel="share of the layers kept softmax", ylabel="recovery R, %", title=title)
    axes.legend(title="placement")
    figure.savefig(file, dpi=150)
    return True


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True, help="what the conversions train on")
    parser.add_argument("--heldout", required=True, help="what the audits read, e.g. heldout.jsonl:source=tech")
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--shares", type=shares, default=FRACTIONS, help=f"of the layers, kept (default {FRACTIONS})")
    parser.add_argument("--method", choices=("aligned", "window"), default="window", help="that ranks the layers")
    parser.add_argument("--context", type=int, default=1024, help="of the audits")
    parser.add_argument("--out", type=Path, default=Path("keep-curve"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further point after this")
    parser.add_argument("--keep", action="store_true", help="keep the converted models")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    found = parser.parse_intermixed_args(argv)
    if any(override.split("=")[0].strip() == "keep_softmax" for override in found.overrides):
        parser.error("keep_softmax is what the curve varies: leave it out, and say --shares")
    return found


def require_same(arguments: argparse.Namespace) -> None:
    """Refuse a folder that holds the points of another teacher, recipe or text: they would be taken for ours."""
    from linearize.recipe import load_recipe

    kind = {
        "teacher": arguments.teacher,
        "recipe": load_recipe(arguments.recipe, arguments.overrides).digest(),
        "texts": [arguments.data, arguments.heldout, arguments.context],
        "method": arguments.method,
    }
    mark = hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()
    file = arguments.out / "run.json"
    if not file.is_file():
        _write(file, {"mark": mark, **kind})
    elif json.loads(file.read_text())["mark"] != mark:
        sys.exit(f"{arguments.out}: holds another curve (see {file.name} there); name another folder with --out")


def _write(file: Path, value: Any) -> None:
    """Whole or not at all: a point that was cut short is not to be taken for a finished one."""
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(json.dumps(value, indent=1, default=str))
    os.replace(draft, file)


def main(argv: Sequence[str] | None = None) -> None:
    """Rank, run what fits into the time, print the table, write and draw the curve."""
    arguments = arguments_of(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    require_same(arguments)
    begin, rows, left = time.monotonic(), [], []
    from linearize.recipe_schema import even_layers

    ranking = rank(arguments)["ranking"]
    size = len(ranking)
    print(f"layers by what their swap costs: {', '.join(map(str, ranking))}", flush=True)
    for point in points(ranking, kept_counts(arguments.shares, size), even_layers):
        if time.monotonic() - begin > 60 * arguments.minutes:
            left.append(point.name)
            continue
        try:
            rows.append(run(point, arguments))
        except Exception as error:  # a point that fails is reported as it is, and the others still run
            print(f"{point.name}: {type(error).__name__}: {error}", file=sys.stderr)
            left.append(point.name)
            continue
        print("  ".join(cells(rows[-1], size)), flush=True)
    if rows:
        _write(
            arguments.out / "curve.json",
            {"recipe": arguments.recipe, "layers": size, "ranking": ranking, "points": rows},
        )
        audit = rows[0]["audit"]
        print(f"\n{rows[0]['machine']}; {rows[0]['date']}")
        print(f"{audit['protocol']}: teacher {audit['ppl_teacher']:.2f}, cut to the window {audit['ppl_window']:.2f}\n")
        table = [COLUMNS, *(cells(row, size) for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        for line in table:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
        if not plot(rows, size, arguments.recipe, arguments.out / "curve.png"):
            print("no plot: matplotlib is not installed")
    if left:
        print(f"not done: {', '.join(left)} (run the same command again)")


if __name__ == "__main__":
    main()
