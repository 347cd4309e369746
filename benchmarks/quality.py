"""Convert a teacher by every recipe at one budget of tokens, measure all of them alike, and keep one table.

    python -m benchmarks.quality TEACHER --data TRAIN --heldout HELDOUT:source=tech --budget 10M --out FOLDER
        [--recipes a,b] [--variants benchmarks/ablations.yaml] [--seeds 0,1 --leaders 2] [--lambada FILE]
        [--minutes 8] [--jobs 4] [--devices cuda:0,cuda:1] [key=value ...]

FOLDER gets quality.md, quality.json (all that is known of every row) and logs/ROW.log. The same command goes on where
the last one stopped: finished rows are kept unless their recipe has changed, and a conversion that the end of a slice
interrupted is resumed from its checkpoint in FOLDER/work. Exit code 75: there is more to do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_jobs import ROOT, Scheduler, open_table
from benchmarks.quality_rows import WINDOW, code_digest, conversions, read_variants
from linearize.artifacts.atomic import sha256
from linearize.errors import LinearizeError, UsageError
from linearize.recipe import list_recipes, load_recipe
from linearize.strict import count

MORE_TO_DO = 75


def setting_of(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for rows to stand in one table; no path of this machine."""
    from linearize.artifacts.load import resolve
    from linearize.artifacts.weights import digest_checkpoint

    folder = resolve(args.teacher)
    return {
        "teacher": args.teacher if args.teacher == "demo" else folder.name,
        "teacher_digest": digest_checkpoint(folder),
        "data": Path(args.data).name,
        "heldout": Path(args.heldout).name,
        "budget": args.budget,
        "context": args.context,
        "windows": args.windows,
        "overrides": list(args.overrides),
        "recall_queries": args.recall_queries,
        "lambada": None if args.lambada is None else sha256(args.lambada),
        "lambada_rows": args.lambada_rows,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UsageError: bad input.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True, help="what the conversions train on")
    parser.add_argument("--heldout", required=True, help="what all rows are judged on, e.g. heldout.jsonl:source=tech")
    parser.add_argument("--budget", required=True, help="training tokens of a row, both stages together, e.g. 10M")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--recipes", help="beside those that are always there; default: all")
    parser.add_argument("--only", default="", help="run no other rows now (names; the teacher and its cuts always)")
    parser.add_argument("--variants", type=Path, metavar="FILE.yaml", help="NAME: {recipe: R, set: [key=value]} rows")
    parser.add_argument("--seeds", default="0", help="of all rows the first, of the leaders all")
    parser.add_argument("--leaders", default="2", help="how many pure and how many hybrid recipes, or names of rows")
    parser.add_argument("--recall-queries", type=int, default=256, metavar="N", help="at each distance; 0: do not ask")
    parser.add_argument("--lambada", metavar="FILE", help="a .jsonl file of context and continuation")
    parser.add_argument("--lambada-rows", type=int, metavar="N", help="only the first N of them")
    parser.add_argument("--context", type=int, help="tokens of a window to judge on; default: that of the recipes")
    parser.add_argument("--windows", type=int, default=64, help="how many of them")
    parser.add_argument("--minutes", type=float, default=8.0, help="length of this slice")
    parser.add_argument("--jobs", type=int, help="conversions at a time; default: one a device")
    parser.add_argument("--devices", default="auto", help="auto, cpu, or cuda:0,cuda:1")
    parser.add_argument("--keep", action="store_true", help="keep the converted models, in FOLDER/work")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every recipe")
    args = parser.parse_intermixed_args(argv)
    args.budget = count(1, 10**12)(args.budget, "--budget")
    args.devices = [name.strip() for name in args.devices.split(",") if name.strip()] or ["auto"]
    args.jobs = args.jobs or len(args.devices)
    args.only = [name.strip() for name in args.only.split(",") if name.strip()]
    try:
        args.seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    except ValueError:
        raise UsageError(f"--seeds {args.seeds!r}: give whole numbers, such as 0,1") from None
    names = list_recipes() if args.recipes is None else [n.strip() for n in args.recipes.split(",") if n.strip()]
    args.recipes = names
    args.context = args.context or load_recipe("lolcats", args.overrides).context
    if args.context <= 2 * WINDOW:
        raise UsageError(f"--context {args.context} does not reach beyond the window (two blocks of {WINDOW})")
    if args.lambada is not None and not Path(args.lambada).is_file():
        raise UsageError(f"--lambada: there is no file {args.lambada}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run what fits into the slice; the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--one"]:
        from benchmarks.quality_run import main as one

        return one(Path(given[1]))
    try:
        args = parse(given)
        variants = {} if args.variants is None else read_variants(args.variants)
        first, notes = conversions(
            recipes=args.recipes,
            variants=variants,
            budget=args.budget,
            seed=args.seeds[0],
            overrides=args.overrides,
            teacher=args.teacher,
        )
        table = open_table(args.out, setting_of(args))
    except LinearizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for note in notes:
        print(note, flush=True)
    table.state |= {"notes": notes, "code": code_digest(ROOT)}
    left = Scheduler(table, args, first).run()
    table.write(left)
    print("\n" + (args.out / "quality.md").read_text(encoding="utf-8"))
    if left:
        print(f"more to do ({len(left)} rows): run the same command again")
    return MORE_TO_DO if left else 0


if __name__ == "__main__":
    sys.exit(main())
