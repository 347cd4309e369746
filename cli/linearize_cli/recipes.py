"""`linearize recipes`: list, read, copy and check recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.errors import RefusedError, UsageError
from linearize_cli import completion
from linearize_cli.commands import Json, Overrides, app, finish, show_help
from linearize_cli.output import print_json, print_table

recipes_app = typer.Typer(rich_markup_mode=None, help="List, read, copy and check recipes.")
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)


@recipes_app.callback()
def recipes_root(context: typer.Context) -> None:
    """List, read, copy and check recipes."""
    if context.invoked_subcommand is None:
        show_help(context)


@recipes_app.command("ls", short_help="List the recipes that ship, and what was measured.")
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
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A recipe's name, or a YAML file.", autocompletion=completion.recipes),
    ],
    as_json: Json = False,
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
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name.", autocompletion=completion.recipes)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to copy it; it must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a recipe to a file of your own.

    \b
    Example:
      linearize recipes cp lolcats my.yaml
    """
    from linearize.artifacts.atomic import write_new
    from linearize.recipe import recipe_path

    source = recipe_path(name)
    target = file / source.name if file.is_dir() else file
    try:
        write_new(target, source.read_bytes())
    except FileExistsError:
        raise RefusedError(f"{target}: exists", "Choose another name or remove it.") from None
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror})", "Choose another place.") from None
    finish({"name": name, "file": str(target)}, as_json, "")


@recipes_app.command("validate")
def recipes_validate(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A YAML file, or a recipe's name.", autocompletion=completion.recipes),
    ],
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
    finish(result, as_json, "")
