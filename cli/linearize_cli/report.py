"""`linearize report`: what a conversion did and what it is worth, as one HTML file."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize_cli.commands import Context, Device, Dtype, Json, Revision, TeacherBits, app
from linearize_cli.output import human_bytes, only_json, print_json, say, watching


@app.command(short_help="Write one HTML file that shows how a conversion went.")
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A converted model.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="TEACHER", help="The model that it was made from.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH|HUB_ID|demo", help="Text that was not trained on.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE", help="The file. Default: RUN-report.html beside RUN.")
    ] = None,
    bench: Annotated[
        str | None, typer.Option("--bench", metavar="FILE", help="What linearize bench --json printed.")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", metavar="L", min=0, help="Attention map shown first.")] = None,
    head: Annotated[int | None, typer.Option("--head", metavar="H", min=0, help="Its head.")] = None,
    context: Context = None,
    teacher_bits: TeacherBits = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write one HTML file that shows how a conversion went and what it is worth.

    Losses and match over time, recovery, branches, perplexity by position, attention maps of teacher and student,
    memory, recipe and versions. The file needs no network and nothing beside it. What is measured with the teacher and
    a text is left out without them; the file says so.

    \b
    Examples:
      linearize report out
      linearize report out --against demo --data demo
      linearize report out --against ./my-llama --data heldout.jsonl --bench bench.json --layer 3 --head 0
    """
    from linearize.artifacts.download import pin

    run = pin(run, revision)
    with only_json(as_json), watching():
        from linearize.api import report as make

        result = make(
            run,
            out=out,
            against=against,
            data=data,
            bench=bench,
            layer=layer,
            head=head,
            context=context,
            device=device,
            dtype=dtype,
            teacher_bits=teacher_bits,
        )
    if as_json:
        return print_json(result)
    for line in result["left_out"]:
        say(f"left out: {line}")
    say(f"wrote {result['file']} ({human_bytes(result['bytes'])})")
