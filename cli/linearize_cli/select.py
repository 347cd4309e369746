"""`linearize select`: which layers a hybrid should keep softmax."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from linearize_cli import completion
from linearize_cli.commands import Data, Json, Overrides, RecipeName, Revision, app
from linearize_cli.output import console, only_json, plural, print_json, print_table, program, say
from linearize_cli.progress import make_progress

NAMES = {"window": "cut to the window", "aligned": "aligned"}
"""What a swap puts in a layer's place, in words."""


@app.command(short_help="Rank TEACHER's layers by what it loses when swapped.")
def select(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="A folder, a Hub id, or demo.", autocompletion=completion.models)
    ],
    data: Data,
    keep: Annotated[int, typer.Option("--keep", "-k", metavar="N", min=1, help="Layers that stay softmax.")],
    overrides: Overrides = None,
    recipe: RecipeName = "pure",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="aligned, or window (nothing is trained). Default: aligned, where it can be.",
            autocompletion=completion.methods,
        ),
    ] = None,
    align_tokens: Annotated[
        str, typer.Option("--align-tokens", metavar="N", help="Most tokens of the short alignment, such as 500k.")
    ] = "256k",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Rank TEACHER's layers by what it loses when one of them is swapped, and choose N to stay softmax.

    Each layer is swapped by itself: cut to the recipe's window and sinks, untrained, and for the recipe's own mixer
    after a short alignment. The loss is KL(teacher || swapped) in nats a token, on text that nothing was trained on.
    keep_softmax=auto chooses by the first, which is cheap; this command by the second, unless told otherwise. Single
    scores do not see how layers interact, so the chosen ones are measured together too, beside even spacing.

    \b
    Examples:
      linearize select demo --data demo --keep 2 context=512
      linearize select ./my-llama --data text.jsonl --keep 4 --recipe gated-deltanet --method window
    """
    from linearize.artifacts.download import pin
    from linearize.recipe import load_recipe
    from linearize.strict import count

    teacher = pin(teacher, revision)
    chosen = load_recipe(recipe, overrides or ())
    tokens = count(1, 10**12)(align_tokens, "--align-tokens")
    progress = make_progress()
    with only_json(as_json):
        try:
            from linearize.api import select as run

            result = run(
                teacher, data=data, keep=keep, recipe=chosen, method=method, align_tokens=tokens, progress=progress
            )
        finally:
            progress.close()
    if as_json:
        return print_json(result)
    print_selection(result)
    argv = ["convert", teacher, "OUT", "--recipe", recipe, "--data", data, *(overrides or ()), result["override"]]
    say(f"Next: {program()} {shlex.join(argv)}")


def print_selection(result: Mapping[str, Any]) -> None:
    """What `linearize.select` returns: one row a layer, one a placement, and what to paste."""
    methods = [name for name in NAMES if f"{name}_kl" in result["layers"][0]]
    sinks = f", {plural(result['sinks'], 'sink')}" if result["sinks"] else ""
    cut = f"window {result['window']} + the block before{sinks}"
    read = f"{plural(result['windows'], 'window')} of {result['context']:,} tokens"
    trained = f", {result['align_tokens']:,} tokens of alignment" if result["align_tokens"] else ""
    say(f"{result['model']} with {result['recipe']}: {read}, perplexity {result['ppl_teacher']:.4g}; {cut}{trained}")
    kept = {"chosen": result["chosen"], "even": result["uniform"]}
    rows = [
        {"layer": row["layer"], **_figures(row, methods), "rank": row["rank"], **_marks(row["layer"], kept)}
        for row in result["layers"]
    ]
    print_table(rows, title="One layer swapped: KL in nats a token, and the rise of perplexity")
    placed = [
        {"kept softmax": ", ".join(map(str, row["kept"])) or "none", "chosen by": _by(row["placement"])}
        | _figures(row, methods)
        for row in result["placements"]
    ]
    print_table(placed, title="All other layers swapped at once")
    for note in result["notes"]:
        say(f"note: {note}")
    text = f"Keep, by {result['method']}: {result['override']}"
    console().print(text, style="bold", soft_wrap=True)


def _figures(row: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in methods:
        found |= {f"KL {NAMES[name]}": row[f"{name}_kl"], f"+PPL {NAMES[name]}": row[f"{name}_ppl_rise"]}
    return found


def _marks(layer: int, kept: Mapping[str, Sequence[int]]) -> dict[str, str]:
    return {name: "keep" if layer in layers else "" for name, layers in kept.items()}


def _by(placement: str) -> str:
    return {"none": "", "uniform": "even spacing"}.get(placement, f"rank, {NAMES.get(placement, placement)}")
