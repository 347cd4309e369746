"""The commands: each parses its arguments, calls one function of the library and prints what it returns."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.errors import RefusedError, UsageError
from linearize_cli.output import (
    make_progress,
    only_json,
    print_json,
    print_report,
    print_table,
    program,
    say,
    watching,
)
from linearize_cli.results import print_audit, print_conversion, print_evaluation, print_inspection, print_plan

# Plain help: rich's would more than double the time that --help takes.
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
recipes_app = typer.Typer(rich_markup_mode=None, help="List, read, copy and check recipes.")
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, or demo.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", metavar="R|FILE", help="A recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change, such as align.tokens=2M.")
]
Data = Annotated[
    str, typer.Option("--data", metavar="PATH|HUB_ID|demo", help="Text: .jsonl, .txt (.gz, .xz), a folder, a Hub id.")
]
Context = Annotated[int | None, typer.Option("--context", metavar="N", min=2, help="Tokens of one window.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]


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
        _show_help(context)


@app.command()
def inspect(
    model: Model,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", metavar="R|FILE", help="A recipe's name, or a YAML file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a conversion would swap, and from which context on it pays.

    Parameters, layers, and the bytes of the fixed state against those of a softmax cache at 2k, 32k and 128k tokens.

    \b
    Examples:
      linearize inspect demo
      linearize inspect ./my-llama --recipe gated-deltanet --json
    """
    from linearize.recipe import load_recipe

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
        str | None, typer.Option("--data", metavar="PATH|HUB_ID|demo", help="Text to train on (not needed to --plan).")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print layers, tokens, memory and disk; start nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
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
    """
    from linearize.recipe import load_recipe

    if "=" in out and not Path(out).exists():
        raise UsageError(f"OUT is missing: {out} reads like a recipe key", "linearize convert MODEL OUT key=value ...")
    chosen = load_recipe(recipe, overrides or ())
    if plan:
        with only_json(as_json):
            from linearize.convert.plan import make_plan

            result = make_plan(model, recipe=chosen, data=data, out=out)
        if as_json:
            return print_json(result)
        return print_plan(result, f"Plan: {model} to {out} with {chosen.name}")
    if data is None:
        raise UsageError("--data: missing", "Name a text file, a folder, a Hub data set, or demo.")
    progress = make_progress()
    with only_json(as_json):
        try:
            from linearize.api import convert as run

            result = run(model, out, recipe=chosen, data=data, resume=resume, progress=progress)
        except KeyboardInterrupt:
            progress.close()
            say(_how_to_go_on(out, ["convert", model, out, "--recipe", recipe, "--data", data, *(overrides or ())]))
            raise
        finally:
            progress.close()
    if as_json:
        return print_json(result)
    print_conversion(result, f"Converted {model} with {chosen.name}", out)
    say(f"Next: {program()} {shlex.join(['audit', out, '--against', model, '--data', data])}")


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Data,
    against: Annotated[
        str | None, typer.Option("--against", metavar="TEACHER", help="Measure this model in the same run.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", metavar="P", help="lm-eval/wikitext, concat@N or documents@N.")
    ] = None,
    context: Context = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity per word, byte and token, and bits per byte; the protocol is named with every number.

    \b
    Examples:
      linearize eval out --against demo --data demo
      linearize eval ./my-llama --data wikitext2-raw-test.txt --protocol lm-eval/wikitext --context 2048
    """
    with only_json(as_json), watching():
        from linearize.api import evaluate as run

        result = run(model, data=data, protocol=protocol, context=context, against=against, device=device, dtype=dtype)
    if as_json:
        return print_json(result)
    print_evaluation(result)


@app.command()
def audit(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A converted model.")],
    against: Annotated[str, typer.Option("--against", metavar="TEACHER", help="The model that it was made from.")],
    data: Data,
    context: Context = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say what the linear branch is worth: recovery R, each branch alone, and perplexity by position.

    R is 0 % for the teacher cut to the student's window and 100 % for the teacher itself.

    \b
    Example:
      linearize audit out --against demo --data demo
    """
    with only_json(as_json), watching():
        from linearize.api import audit as run

        result = run(out, against=against, data=data, context=context, device=device, dtype=dtype)
    if as_json:
        return print_json(result)
    print_audit(result)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, max=1_000_000)] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0.0, max=100.0, help="0: greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Of the sampling.")] = 0,
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
    with only_json(as_json):
        from linearize.api import generate as run

        result = run(
            model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, device=device, dtype=dtype
        )
    if as_json:
        return print_json(result)
    print(result["text"])
    speed = f"{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} a second"
    say(f"{speed}, {result['device']}, {result['dtype']}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, GPU, Triton, and a two-second self-test of the mixers.

    \b
    Example:
      linearize doctor
    """
    from linearize_cli.doctor import examine, verdict

    with only_json(as_json):
        result = examine()
    _finish(result, as_json, "linearize doctor")
    verdict(result)


@recipes_app.callback()
def recipes_root(context: typer.Context) -> None:
    """List, read, copy and check recipes."""
    if context.invoked_subcommand is None:
        _show_help(context)


@recipes_app.command("ls")
def recipes_ls(as_json: Json = False) -> None:
    """List the recipes that ship: their papers, and what was measured of each.

    R is the recovery (0 %: the teacher cut to the window, 100 %: the teacher), state what a sequence keeps; on which
    teacher, with how many tokens and where stands in the recipe's header (recipes show) and under --json.

    \b
    Example:
      linearize recipes ls
    """
    from linearize.recipe import list_recipes, load_recipe, measured

    rows, shown = [], []
    for recipe in map(load_recipe, list_recipes()):
        figures, about = measured(recipe.name), {"paper": recipe.paper, "summary": recipe.summary}
        rows.append({"name": recipe.name, **about, "measured": figures})
        shown.append({"name": recipe.name, **{key: figures.get(key) for key in ("R", "state")}, **about})
    if as_json:
        return print_json({"recipes": rows})
    print_table(shown)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name, or a YAML file.")], as_json: Json = False
) -> None:
    """Print a recipe. The YAML goes to stdout.

    \b
    Example:
      linearize recipes show lolcats
    """
    from linearize.recipe import load_recipe, recipe_file

    recipe = load_recipe(name)
    if as_json:
        return print_json({"name": recipe.name, "digest": recipe.digest(), "recipe": recipe.as_dict()})
    sys.stdout.write(recipe_file(name).read_text(encoding="utf-8"))


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to copy it; it must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a recipe to a file of your own.

    \b
    Example:
      linearize recipes cp lolcats my.yaml
    """
    from linearize.recipe import recipe_path

    source = recipe_path(name)
    target = file / source.name if file.is_dir() else file
    try:
        with target.open("x", encoding="utf-8") as copy:
            copy.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise RefusedError(f"{target}: exists", "Choose another name or remove it.") from None
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror})") from None
    _finish({"name": name, "file": str(target)}, as_json, "")


@recipes_app.command("validate")
def recipes_validate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, or a recipe's name.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Check a recipe: every key, type and combination.

    \b
    Examples:
      linearize recipes validate my.yaml
      linearize recipes validate lolcats keep_softmax="every 4" align.tokens=2M
    """
    from linearize.recipe import load_recipe

    recipe = load_recipe(file, overrides or ())
    tokens = recipe.align.tokens + recipe.finetune.tokens
    result: dict[str, Any] = {"name": recipe.name, "valid": True, "tokens": tokens, "digest": recipe.digest()}
    _finish(result, as_json, "")


def _finish(result: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print_json(result)
    else:
        print_report(title, result)


def _how_to_go_on(out: str, command: list[str]) -> str:
    # Looked up, not imported: importing torch is a poor answer to Ctrl-C, and without it nothing has been saved.
    checkpoint = sys.modules.get("linearize.convert.checkpoint")
    if checkpoint is None or not checkpoint.run_folder(Path(out)).is_dir():
        return "Nothing was saved yet; run the same command again."
    return f"Go on with: {program()} {shlex.join([*command, '--resume'])}"


def _show_help(context: typer.Context) -> None:
    say(context.get_help())
    raise typer.Exit(2)
