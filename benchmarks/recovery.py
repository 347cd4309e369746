"""Convert a teacher by several recipes on the same text, audit each, and print one table.

    python -m benchmarks.recovery TEACHER --data TRAIN --heldout HELDOUT --recipes lolcats,liger-gla [key=value ...]

Every row is one `linearize convert` and one `linearize audit`. Finished rows in FOLDER are not run again, an
interrupted conversion goes on where it stopped, and `--minutes` ends a slice before a time limit does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = ("recipe", "tokens", "trained", "seconds", "state KB", "PPL", "R %", "full", "window", "linear", "none")


def machine() -> str:
    """The device and the versions that a figure needs."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, {platform.python_version()}"


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: convert, audit, forget the weights unless asked to keep them."""
    import linearize

    out = arguments.out / name
    done = arguments.out / f"{name}.json"
    if done.is_file():
        return json.loads(done.read_text())
    if not out.exists():
        report = linearize.convert(
            arguments.teacher, out, recipe=name, data=arguments.data, overrides=arguments.overrides, resume=True
        )
        (arguments.out / f"{name}.convert.json").write_text(json.dumps(report, indent=1, default=str))
    report = json.loads((arguments.out / f"{name}.convert.json").read_text())
    audit = linearize.audit(out, against=arguments.teacher, data=arguments.heldout, context=arguments.context)
    row = {"recipe": name, "convert": report, "audit": audit, "machine": machine()}
    row["date"] = datetime.date.today().isoformat()
    done.write_text(json.dumps(row, indent=1, default=str))
    if not arguments.keep:
        shutil.rmtree(out)
    return row


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    convert, audit = row["convert"], row["audit"]
    branches = audit["branches"]
    shown = [f"{branches[b]:.2f}" if branches[b] is not None else "-" for b in ("full", "window", "linear", "none")]
    recovered = "-" if audit["R"] is None else f"{audit['R']:.1f}"
    tokens = sum(stage["tokens"] for stage in convert["stages"].values())
    trained = convert["parameters"]["trained"]
    return (
        row["recipe"],
        f"{tokens / 1e6:.1f}M",
        f"{trained['align']:,} + {trained['finetune']:,}",
        f"{sum(s for name, s in convert['seconds'].items() if name != 'total'):.0f}",  # of a resumed run, all of it
        f"{convert['state_bytes'] / 1024:.0f}",
        f"{audit['ppl_student']:.2f}",
        recovered,
        *shown,
    )


def main() -> None:
    """Parse, run what fits into the time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True, help="what the conversions train on")
    parser.add_argument("--heldout", required=True, help="what the audits read, e.g. heldout.jsonl:source=tech")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--recipes", default="lolcats,hedgehog,liger-gla,gated-deltanet")
    parser.add_argument("--out", type=Path, default=Path("recovery"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further row after this")
    parser.add_argument("--keep", action="store_true", help="keep the converted models")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin, rows, left = time.monotonic(), [], []
    for name in arguments.recipes.split(","):
        if time.monotonic() - begin > 60 * arguments.minutes:
            left.append(name)
            continue
        try:
            rows.append(run(name, arguments))
        except Exception as error:  # a recipe that fails is reported as it is, and the others still run
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            left.append(name)
            continue
        print("  ".join(cells(rows[-1])), flush=True)
    if rows:
        audit = rows[0]["audit"]
        print(f"\n{rows[0]['machine']}; {rows[0]['date']}")
        print(f"{audit['protocol']}: teacher {audit['ppl_teacher']:.2f}, cut to the window {audit['ppl_window']:.2f}\n")
        table = [COLUMNS, *(cells(row) for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        for line in table:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    if left:
        print(f"not done: {', '.join(left)} (run the same command again)")


if __name__ == "__main__":
    main()
