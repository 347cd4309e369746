"""`linearize import`: linear models that others published, as ordinary exports."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from linearize_cli.commands import Device, Dtype, Json, Revision, app
from linearize_cli.output import console, only_json, plural, print_json, program, say
from linearize_cli.progress import make_progress

imports_app = typer.Typer(rich_markup_mode=None, help="Turn published linear checkpoints into ordinary exports.")
app.add_typer(imports_app, name="import", invoke_without_command=True)


@imports_app.callback()
def imports_root(context: typer.Context) -> None:
    """Turn published linear checkpoints into ordinary exports."""
    if context.invoked_subcommand is None:
        say(context.get_help())
        raise typer.Exit(2)


@imports_app.command("lolcats", short_help="Put LoLCATs' published weights onto BASE.")
def import_lolcats(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model they were made from: a folder or a Hub id.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    distilled: Annotated[str, typer.Option("--distilled", metavar="FILE.pt", help="Feature maps and window factors.")],
    finetuned: Annotated[
        str | None, typer.Option("--finetuned", metavar="FILE.pt", help="Low-rank adapters; they are merged.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", metavar="N", min=1, max=1 << 20, help="Block of the window. Default: by name, or 64."),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora-alpha", metavar="A", min=1e-6, max=1e6, help="Default: twice the rank, as published."),
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Put LoLCATs' published weights onto BASE and write the model to OUT.

    The .pt files are read without unpickling them. OUT is what convert would write: it loads with from_pretrained, and
    was compared in fresh processes. What the mixers here cannot compute exactly is refused by name.

    \b
    Examples:
      linearize import lolcats meta-llama/Llama-3.1-8B out --distilled distill/model.pt --finetuned ft/model.pt
      linearize import lolcats ./my-llama out --distilled maps.pt --window 32 --json
    """
    from linearize.artifacts.download import pin

    base = pin(base, revision)
    progress = make_progress()
    with only_json(as_json):
        try:
            from linearize.api import import_lolcats as run

            result = run(
                base,
                out,
                distilled=distilled,
                finetuned=finetuned,
                window=window,
                lora_alpha=lora_alpha,
                device=device,
                dtype=dtype,
                progress=progress,
            )
        finally:
            progress.close()
    if as_json:
        return print_json(result)
    print_import(result, base, out)
    say(f"Next: {program()} {shlex.join(['audit', out, '--against', base, '--data', 'TEXT'])}")


def print_import(result: Mapping[str, Any], base: str, out: str) -> None:
    """What `linearize.import_lolcats` returns."""
    target = console()
    target.print(f"Imported LoLCATs weights on {base}", style="bold", soft_wrap=True)
    linear, softmax = result["layers"]["linear"], result["layers"]["softmax"]
    window = f"window {result['window']} + the block before" if result["window"] else "no window"
    lora = result["lora"]
    merged = f", adapters of rank {lora['r']} merged" if lora else ""
    say(f"{plural(len(linear), 'linear layer')}, {len(softmax)} softmax; {2 * result['feature_dim']} features a head; "
        f"{window}{merged}")  # fmt: skip
    for way in result["verification"].values():
        worst = way["max_abs_difference"]
        say(f"Loads with {way['way']}: {'same logits' if worst == 0 else f'logits within {worst:.2g}'}, same text.")
    for note in result["notes"]:
        say(f"note: {note}")
    target.print(f"The model is in {out}", soft_wrap=True)
