"""Perplexity before any training, with and without calibration, for every recipe.

    python -m benchmarks.step0 TEACHER --data TRAIN --heldout HELDOUT [--recipes a,b] [--tokens 32k] [--windows 8]
        [--context 1024] [--device cpu] [key=value ...]

Each recipe's mixers are put into the teacher as `linearize convert` would, in all layers that the recipe converts
(`keep_softmax: auto` counts as none kept), and judged twice: fresh, and after calibration on TRAIN. Published recipes
do not calibrate by themselves; here all do. A Markdown table goes to standard output, a row as soon as it is known.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.quality_run import machine
from linearize.errors import LinearizeError
from linearize.recipe import Recipe, list_recipes, load_recipe
from linearize.strict import count

DOCUMENTS = 2000
"""Of the training text that calibration draws its windows from."""
COLUMNS = ("recipe", "kept layers", "plain", "calibrated", "R plain %", "R calibrated %")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True, help="what calibration reads")
    parser.add_argument("--heldout", required=True, help="what the models are judged on")
    parser.add_argument("--recipes", default=",".join(list_recipes()), help="default: all")
    parser.add_argument("--tokens", default="32k", help="that calibration reads")
    parser.add_argument("--windows", type=int, default=8, help="of held-out text")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every recipe")
    args = parser.parse_intermixed_args(argv)
    args.tokens = count(1, 10**9)(args.tokens, "--tokens")
    args.recipes = [name.strip() for name in args.recipes.split(",") if name.strip()]
    return args


def plan(recipe: Recipe, config: Any) -> list[str]:
    """`linear` or `softmax` for every layer; what `auto` would keep is not measured here."""
    layers = config.num_hidden_layers
    kept = () if recipe.automatic else recipe.softmax_layers(layers)
    return ["softmax" if index in kept else "linear" for index in range(layers)]


def row(name: str, kept: int, losses: tuple[float, float], teacher: float, cut: float) -> list[str]:
    """Cells of one recipe from perplexities: recovery is against the teacher cut to the recipe's window and sinks."""
    from linearize.evaluate.recovery import recovery

    known = {"teacher": math.log(teacher), "window": math.log(cut)}
    shares = [recovery(**known, student=math.log(loss))[0] for loss in losses]
    told = ["-" if share is None else f"{share:.1f}" for share in shares]
    return [name, str(kept), *(f"{loss:.5g}" for loss in losses), *told]


def measure(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        LinearizeError: as loading, calibration and evaluation do.
    """
    import linearize
    from linearize.convert.calibrate import calibrate
    from linearize.convert.surgery import linearize_model
    from linearize.data import document_marks, load_source, pack, tokenize_documents
    from linearize.evaluate.truncation import truncated
    from linearize.progress import NullProgress

    model, tokenizer = linearize.load(args.teacher, device=args.device)
    model = model.float().requires_grad_(False)
    texts, _ = load_source(args.data, split="train")
    windows = pack(tokenize_documents(texts[:DOCUMENTS], tokenizer), args.context, **document_marks(tokenizer))

    def judge(subject: Any) -> float:
        found = linearize.evaluate(
            (subject, tokenizer), data=args.heldout, context=args.context, max_windows=args.windows, dtype="float32",
            device=args.device,
        )  # fmt: skip
        return float(found["token_perplexity"])

    teacher = judge(model)
    print(f"{machine()}; {datetime.date.today()}; teacher {teacher:.5g}; {args.windows} windows of "
          f"{args.context} tokens; calibrated on {args.tokens:,} tokens\n")  # fmt: skip
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    cuts: dict[tuple[int, int], float] = {}
    for name in args.recipes:
        recipe = load_recipe(name, args.overrides)
        spec = recipe.mixer
        window = (spec.window or 64, spec.sinks)
        if window not in cuts:
            with truncated(model, *window):
                cuts[window] = judge(model)
        layers = plan(recipe, model.config)
        student, _ = linearize_model(model, spec=spec, layer_mixers=layers, seed=recipe.seed)
        student = student.eval()
        plain = judge(student)
        calibrate(student, model, windows=windows, tokens=args.tokens, seed=recipe.seed, progress=NullProgress())
        cells = row(name, layers.count("softmax"), (plain, judge(student)), teacher, cuts[window])
        print("| " + " | ".join(cells) + " |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    try:
        measure(parse(argv))
    except LinearizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
