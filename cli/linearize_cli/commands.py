"""The commands: each parses its arguments, calls one function of the library and prints what it returns."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.errors import RefusedError, UsageError
from linearize_cli import completion
from linearize_cli.output import (
    only_json,
    print_json,
    print_report,
    program,
    say,
    watching,
)
from linearize_cli.progress import make_progress
from linearize_cli.results import print_audit, print_conversion, print_inspection, print_plan
from linearize_cli.terminal import print_text

# Plain help: rich's would more than double the time that --help takes.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, or demo.", autocompletion=completion.models)
]
_TEACHER_HELP = "The model that it was made from."
Teacher = Annotated[
    str, typer.Option("--against", metavar="TEACHER", help=_TEACHER_HELP, autocompletion=completion.models)
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Of a model of the Hub, the first: a commit, tag or branch."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_RECIPE = typer.Option(
    "--recipe", "-r", metavar="R|FILE", help="A recipe's name, or a YAML file.", autocompletion=completion.recipes
)
RecipeName = Annotated[str, _RECIPE]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Recipe keys to change, such as align.tokens=2M.",
        autocompletion=completion.overrides,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH|HUB_ID|demo",
        help="Text: .jsonl, .txt, .parquet, .csv, folder, Hub id.",
        autocompletion=completion.texts,
    ),
]
Context = Annotated[int | None, typer.Option("--context", metavar="N", min=2, help="Tokens of one window.")]
Windows = Annotated[
    int | None, typer.Option("--max-windows", metavar="N", min=1, help="Read only the first N windows of the text.")
]
TeacherBits = Annotated[
    int | None,
    typer.Option("--teacher-bits", metavar="8|4", help="Hold TEACHER in so many bits. Needs bitsandbytes."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", autocompletion=completion.devices)]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.", autocompletion=completion.dtypes),
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Convert pretrained softmax language models into linear-time ones, with an honest account of what was lost.

    \b
    Examples:
      linearize convert demo out --recipe lolcats --data demo align.tokens=200k finetune.tokens=200k
      linearize audit out --against demo --data demo
      linearize recipes ls

    \b
    Results for people go to stderr; with --json one JSON object goes to stdout.
    Exit codes: 0 ok, 2 usage, 3 refused before work, 4 verification failed, 130 interrupted.
    """
    if version:
        from linearize import __version__

        print(f"linearize {__version__}")
    elif context.invoked_subcommand is None:
        show_help(context)


@app.command(short_help="Show what a conversion would swap, and when it pays.")
def inspect(
    model: Model,
    recipe: Annotated[str | None, _RECIPE] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what a conversion would swap, and from which context on it pays.

    Parameters, layers, and the bytes of the fixed state against those of a softmax cache at 2k, 32k and 128k tokens.

    \b
    Examples:
      linearize inspect demo
      linearize inspect ./my-llama --recipe gated-deltanet --json
      linearize inspect owner/name --revision v1.0
    """
    from linearize.artifacts.download import pin
    from linearize.recipe import load_recipe

    model = pin(model, revision)
    chosen = None if recipe is None else load_recipe(recipe)
    with only_json(as_json):
        from linearize.convert.plan import inspect as run

        result = run(model, chosen)
    if as_json:
        return print_json(result)
    print_inspection(result, f"{model}" + (f" with {recipe}" if recipe else ""))


@app.command()
def convert(
    model: Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    overrides: Overrides = None,
    recipe: RecipeName = "pure",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH|HUB_ID|demo",
            help="Text to train on (not needed to --plan).",
            autocompletion=completion.texts,
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print layers, tokens, memory and disk; start nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    report_to: Annotated[
        str,
        typer.Option(
            "--report-to",
            metavar="TRACKER",
            help="Send figures to trackio, wandb or tensorboard.",
            autocompletion=completion.trackers,
        ),
    ] = "none",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="A layer at a time, for a teacher larger than memory; without finetuning. Default: if it must be.",
        ),
    ] = None,
    teacher_bits: Annotated[
        int | None,
        typer.Option(
            "--teacher-bits",
            metavar="8|4",
            help="Bits of the frozen weights while training; the export is exact. Needs bitsandbytes.",
        ),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Convert MODEL and write the result to OUT.

    Everyday keys: context, seed, align.tokens, finetune.tokens (0 skips the stage), keep_softmax, device, dtype.

    \b
    Examples:
      linearize convert demo out --recipe lolcats --data demo align.tokens=200k finetune.tokens=200k
      linearize convert ./my-llama out -r gated-deltanet --data text.jsonl keep_softmax="every 4" context=2048
      linearize convert ./my-llama out -r my.yaml --data text.jsonl --plan
      linearize convert ./my-llama out -r my.yaml --data text.jsonl --resume
      linearize convert ./large-llama out -r lolcats --data text.jsonl --stream finetune.tokens=0
      linearize convert ./large-llama out -r lolcats --data text.jsonl --teacher-bits 4
    """
    from linearize.artifacts.download import pin
    from linearize.recipe import load_recipe

    model = pin(model, revision)
    if "=" in out and not Path(out).exists():
        raise UsageError(f"OUT is missing: {out} reads like a recipe key", "linearize convert MODEL OUT key=value ...")
    chosen = load_recipe(recipe, overrides or ())
    if plan:
        from linearize.convert.early import refuse_early

        refuse_early(model, out, data, resume=resume)  # before torch and transformers, which take seconds to import
        with only_json(as_json):
            from linearize.convert.plan import make_plan

            how: dict[str, Any] = {"stream": stream, "teacher_bits": teacher_bits, "resume": resume}
            result = make_plan(model, recipe=chosen, data=data, out=out, **how)
        if as_json:
            return print_json(result)
        return print_plan(result, f"Plan: {model} to {out} with {chosen.name}")
    if data is None:
        raise UsageError("--data: missing", "Name a text file, a folder, a Hub data set, or demo.")
    progress = make_progress()
    with only_json(as_json):
        try:
            from linearize.api import convert as run

            more: dict[str, Any] = {"resume": resume, "progress": progress, "report_to": report_to, "stream": stream}
            result = run(model, out, recipe=chosen, data=data, teacher_bits=teacher_bits, **more)
        except (KeyboardInterrupt, RefusedError) as stop:
            progress.close()
            if isinstance(stop, RefusedError) and not (_filled(stop) and _run_of(out)):
                raise
            tracking = [] if report_to == "none" else ["--report-to", report_to]
            way = [] if stream is None else ["--stream" if stream else "--no-stream"]
            bits = [] if teacher_bits is None else ["--teacher-bits", str(teacher_bits)]
            options = ["--recipe", recipe, "--data", data, *tracking, *way, *bits]
            say(_how_to_go_on(out, ["convert", model, out, *options, *(overrides or ())]))
            raise
        finally:
            progress.close()
    if as_json:
        return print_json(result)
    print_conversion(result, f"Converted {model} with {chosen.name}", out)
    judge = "eval" if result.get("task") == "masked" else "audit"
    say(f"Next: {program()} {shlex.join([judge, out, '--against', model, '--data', data])}")


@app.command(short_help="Say what the linear branch is worth, beside the teacher.")
def audit(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A converted model.")],
    against: Teacher,
    data: Data,
    context: Context = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    save: Annotated[bool, typer.Option("--save", help="Write the figures into OUT's card and manifest.")] = False,
    max_windows: Windows = 64,
    teacher_bits: TeacherBits = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what the linear branch is worth: recovery R, each branch alone, and perplexity by position.

    R is 0 % for the teacher cut to the student's window and 100 % for the teacher itself. With --save the model card
    says so too, with the command that checks it.

    \b
    Examples:
      linearize audit out --against demo --data demo
      linearize audit out --against demo --data demo --save
    """
    from linearize.artifacts.download import pin

    out = pin(out, revision)
    if save and max_windows != 64:
        raise UsageError("--max-windows: what --save writes is read from 64 windows", "Leave out one of the two.")
    with only_json(as_json), watching():
        from linearize.api import audit as run

        how: dict[str, Any] = {"device": device, "dtype": dtype, "teacher_bits": teacher_bits,
                               "max_windows": max_windows}  # fmt: skip
        result = run(out, against=against, data=data, context=context, save=save, **how)
    if as_json:
        return print_json(result)
    print_audit(result)
    if save:
        say(f"Written to {Path(out) / 'README.md'} and {Path(out) / 'linearize.json'}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, max=1_000_000)] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0.0, max=100.0, help="0: greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Of the sampling.")] = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text. The text goes to stdout, figures to stderr.

    \b
    Examples:
      linearize generate out --prompt "def main():"
      linearize generate out --prompt "import os" --max-new-tokens 200 --temperature 0.8 --seed 1
    """
    with only_json(as_json), watching(doings=False):
        from linearize.api import generate as run
        from linearize.artifacts.download import pin

        model = pin(model, revision)

        result = run(
            model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, device=device, dtype=dtype
        )
    if as_json:
        return print_json(result)
    print_text(result["text"])
    speed = f"{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} a second"
    say(f"{speed}, {result['device']}, {result['dtype']}")


@app.command(short_help="Check this machine: what is missing, how to install it.")
def doctor(as_json: Json = False) -> None:
    """Check this machine: what is installed, what is missing and how to install it, and whether the mixers compute.

    Versions, optional packages, GPU, free disk, the Hub's cache and token (whether there is one), and a self-test of a
    few seconds. Exit code 0: a conversion can run, 4: something must be mended first.

    \b
    Examples:
      linearize doctor
      linearize doctor --json
    """
    from linearize_cli.doctor import examine, print_examination, verdict

    with only_json(as_json):
        result = examine()
    if as_json:
        print_json(result)
    else:
        print_examination(result)
    verdict(result)


def finish(result: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a result for people or for programs."""
    if as_json:
        print_json(result)
    else:
        print_report(title, result)


def _filled(error: RefusedError) -> bool:
    """Whether it was a full disk that ended a run: what was saved before is still there."""
    from linearize.artifacts.atomic import is_disk_full

    return isinstance(error.__cause__, Exception) and is_disk_full(error.__cause__)


def _run_of(out: str) -> bool:
    from linearize.artifacts.atomic import place_of

    # Looked up, not imported: importing torch is a poor answer to Ctrl-C, and without it nothing has been saved.
    checkpoint = sys.modules.get("linearize.convert.checkpoint")
    return checkpoint is not None and checkpoint.run_folder(place_of(out)).is_dir()


def _how_to_go_on(out: str, command: list[str]) -> str:
    if not _run_of(out):
        return "Nothing was saved yet; run the same command again."
    return f"Go on with: {program()} {shlex.join([*command, '--resume'])}"


def show_help(context: typer.Context) -> None:
    """What a group of commands does without one.

    Raises:
        Exit: always, as after any usage error.
    """
    say(context.get_help())
    raise typer.Exit(2)
