"""Our kernels beside other people's, in one run: times, memory, decode, whole models.

    python -m benchmarks.kernels [--only WORD ...] [--minutes 4] [--out FILE] [--again] [--logs FOLDER]
    python -m benchmarks.kernels --table FILE
    python -m benchmarks.kernels --plot FILE [--to docs/plots] [--format svg]

Times are medians of triton's do_bench on one GPU, the clocks as found. Every op is held against its float64 definition
before it is timed, and a wrong one is not.

First a warm-up: every op, ours and peers', is compiled, tuned and run once at every shape, in processes side by side
(16 cores make it 1 to 2 minutes). Libraries that tune themselves do so by benchmarks/kernels_tuning.py: all
configurations as they have them, each timed for a shorter time than usual while only this one is, but not on an idle
card, so that among configurations that are nearly as fast another may be taken than the library would alone. Then one
process after the other has the card and is timed; the others wait. Peers are compiled by the assembler that our
package chooses (linearize_kernels/backend.py), like ours.

Every measurement leaves a row: a figure, or why there is none (benchmarks/kernels_rows.py lists the reasons). Rows are
appended to FILE as JSON lines with machine, versions, date and commit. What FILE has already from the same machine,
versions and sources of kernels and models is not measured again, so that a run that --minutes cut short goes on where
it stopped; --again measures it anew. Whole models come last: they need 2 to 3 minutes more than the default.

--only takes words of ops (layer, window, scalar gate, channel gate, delta rule, decode, model), implementations
(linearize, SDPA, flex, composed, fla, TFLA) or processes (benchmarks/kernels_jobs.py lists them all).
Peers' packages: pip install fla-core mlstm_kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels_rows import ROOT, Row, append, environment, figure, latest, read, settled, table

RESULTS = ROOT / "benchmarks/results/kernels.jsonl"


def measure(only: Sequence[str], *, out: Path, minutes: float, again: bool, logs: Path | None = None) -> list[Row]:
    """Measure everything that is asked for and not yet known; rows are written as they come."""
    from benchmarks.kernels_jobs import LAST, LIMIT, LIMITS, wanted, workers
    from benchmarks.kernels_run import run

    known = set() if again else settled(out)
    keys = {name: wanted(jobs, known) for name, jobs in workers(only).items()}
    rows: list[Row] = []

    def heard(row: Row) -> None:
        append(out, row)
        rows.append(row | environment())
        label = " ".join(row[name] for name in ("op", "implementation", "shape", "pass"))
        print(f"{label}: {figure(row)}", flush=True)

    run(
        {name: found for name, found in keys.items() if found},
        minutes=minutes,
        limit=lambda name: LIMITS.get(name, LIMIT),
        last=LAST,
        heard=heard,
        said=lambda words: print(words, flush=True),
        logs=logs,
    )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Our kernels beside other people's.")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--minutes", type=float, default=4.0, help="stop after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines, appended")
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what every process says")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a table of FILE and do nothing else")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw FILE and do nothing else")
    parser.add_argument("--to", type=Path, default=Path("docs/plots"), help="folder of the plots")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    asked: Any = parser.parse_args(argv)
    if asked.minutes <= 0:
        parser.error("--minutes must be above 0")
    for path in (asked.table, asked.plot):
        if path is not None and not path.is_file():
            parser.error(f"there is no file {path}")
    if asked.plot is not None:
        from benchmarks.kernels_plots import draw

        for path in draw(read(asked.plot), asked.to, asked.format):
            print(path)
        return
    if asked.table is not None:
        print(table(list(latest(read(asked.table)).values())))
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    rows = measure(asked.only, out=asked.out, minutes=asked.minutes, again=asked.again, logs=asked.logs)
    print("\n" + table(rows) if rows else "nothing to measure: every figure is known (--again measures anew)")


if __name__ == "__main__":
    main()
