"""What the shell offers on TAB for the values of arguments and options.

Where nothing here begins like the word, the shell completes files itself, with slashes and spaces as it should.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer

DEVICES = ("auto", "cpu", "cuda")
METHODS = ("aligned", "window")
TRACKERS = ("none", "trackio", "wandb", "tensorboard")
PROTOCOLS = ("lm-eval/wikitext", "concat@", "documents@", "masked@")


def models(incomplete: str) -> list[str]:
    """`demo`, beside folders."""
    return _with_files(["demo"], incomplete)


def texts(incomplete: str) -> list[str]:
    """`demo`, beside files and folders."""
    return _with_files(["demo"], incomplete)


def recipes(incomplete: str) -> list[str]:
    """Names of the recipes that ship, beside files."""
    from linearize.recipe import list_recipes

    return _with_files(list_recipes(), incomplete)


def overrides(context: typer.Context, incomplete: str) -> list[str]:
    """Keys of a recipe with the values that the chosen one has, as in `align.tokens=4000000`."""
    from linearize.recipe import load_recipe

    chosen = context.params.get("recipe") or context.params.get("file") or "pure"
    try:
        values = load_recipe(chosen).as_dict()
    except Exception:  # a half-typed recipe: nothing to say, and never a traceback in somebody's prompt
        return []
    given = {item.partition("=")[0] for item in context.params.get("overrides") or ()}
    pairs = dict(_flat(values))
    return [f"{key}={value}" for key, value in pairs.items() if key not in given and key.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Kinds of devices."""
    return _beginning(DEVICES, incomplete)


def dtypes(incomplete: str) -> list[str]:
    """Names of dtypes."""
    from linearize.recipe_readers import DTYPES

    return _beginning(DTYPES, incomplete)


def trackers(incomplete: str) -> list[str]:
    """What --report-to takes."""
    return _beginning(TRACKERS, incomplete)


def methods(incomplete: str) -> list[str]:
    """What select's --method takes."""
    return _beginning(METHODS, incomplete)


def protocols(incomplete: str) -> list[str]:
    """Beginnings of what --protocol takes."""
    return _beginning(PROTOCOLS, incomplete)


def files(incomplete: str) -> list[str]:
    """Nothing of ours: the shell's own files."""
    return []


def _beginning(words: Iterable[str], start: str) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _with_files(words: Iterable[str], start: str) -> list[str]:
    """The words that begin so, and then also the paths: for where the shell is given words it adds no files."""
    found = _beginning(words, start)
    if not found:
        return []
    paths = (path for path in Path().glob(f"{start}*") if not path.name.startswith("."))
    return found + sorted(f"{path}/" if path.is_dir() else str(path) for path in paths)


def _flat(values: dict, before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif before or key not in ("name", "paper", "summary"):
            yield f"{before}{key}", _yaml(value)


def _yaml(value: object) -> str:
    """A value as an override writes it, without spaces: no quoting is needed for it in most shells."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_yaml, value))}]"
    return str(value)
