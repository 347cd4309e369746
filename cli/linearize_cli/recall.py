"""`linearize recall`: what a converted model remembers from beyond its window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from linearize_cli.commands import Context, Data, Device, Dtype, Json, Revision, Teacher, TeacherBits, app
from linearize_cli.output import console, only_json, plural, print_json, print_table, say, unsaid, watching


@app.command(short_help="Say what OUT remembers from beyond its window.")
def recall(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A converted model.")],
    against: Teacher,
    data: Data,
    distance: Annotated[
        list[int] | None,
        typer.Option("--distance", metavar="N", min=1, help="Tokens from a value to its query; may be repeated."),
    ] = None,
    queries: Annotated[
        int, typer.Option("--queries", metavar="N", min=32, max=1_000_000, help="Of a task at each distance.")
    ] = 64,
    context: Context = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Of the pages.")] = 0,
    teacher_bits: TeacherBits = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say what OUT remembers from beyond its window, beside what its teacher does.

    Pairs, a passkey and a quotation are planted in the text of --data and asked for farther away than the window
    reaches. 0 % is the teacher cut to that window, 100 % the teacher; where the teacher cannot do a task itself, there
    is no share.

    \b
    Examples:
      linearize recall out --against demo --data demo
      linearize recall out --against ./my-llama --data text.jsonl --distance 256 --distance 1500 --context 2048
    """
    from linearize.artifacts.download import pin

    out = pin(out, revision)
    with only_json(as_json), watching():
        from linearize.api import recall as run

        result = run(
            out,
            against=against,
            data=data,
            context=context,
            device=device,
            dtype=dtype,
            queries=queries,
            distances=distance or None,
            seed=seed,
            teacher_bits=teacher_bits,
        )
    if as_json:
        return print_json(result)
    print_recall(result)


def print_recall(result: Mapping[str, Any]) -> None:
    """What `linearize.recall` returns: one row a task and distance, then the share of all."""
    reference = result["reference"]
    sinks = f", {plural(reference['sinks'], 'sink')}" if reference["sinks"] else ""
    say(f"student {result['model']}, teacher {result['against']}, {result['dtype']} on {result['device']}; "
        f"window {reference['window']} + the block before{sinks}")  # fmt: skip
    rows = [
        {
            "task": cell["task"],
            "tokens away": cell["distance"],
            "queries": cell["queries"],
            "guessing": _percent(cell["chance"]),
            "cut teacher": _percent(cell["floor"], cell["floor_se"]),
            "teacher": _percent(cell["teacher"], cell["teacher_se"]),
            "student": _percent(cell["student"], cell["student_se"]),
            "share": _share(cell),
        }
        for cell in result["cells"]
    ]
    print_table(rows, title="Right answers beyond the window, with standard errors")
    by_task = ", ".join(f"{name} {_share(found)}" for name, found in result["tasks"].items())
    for note in unsaid(result["notes"]):
        say(f"note: {note}")
    text = f"Recall: {_share(result)} of the teacher's own (0 %: the teacher cut to its window); {by_task}"
    if result["share"] is None:
        text = "Recall: not defined, for there is no task that the teacher does clearly better than when it is cut"
    console().print(text, style="bold", soft_wrap=True)


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if error is None else f"{100 * value:.0f} ± {100 * error:.0f} %"


def _share(found: Mapping[str, Any]) -> str:
    return "not defined" if found["share"] is None else f"{found['share']:.0f} ± {found['share_se']:.0f} %"
