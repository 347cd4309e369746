"""Recipes: everything that decides how a conversion goes, in one strict and typed value.

A recipe is a YAML file (recipes/*.yaml, or a user's own) read into the frozen dataclasses of `recipe_schema`. Keys that
do not exist, values of the wrong type and combinations without meaning are refused before any model is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UsageError, did_you_mean
from linearize.modeling.mixer_spec import MixerSpec
from linearize.recipe_schema import Align, Calibrate, Finetune, Lora, Recipe, build
from linearize.strict import MAX_YAML_BYTES, read_yaml, show

__all__ = [
    "Align",
    "Calibrate",
    "Finetune",
    "Lora",
    "MixerSpec",
    "Recipe",
    "list_recipes",
    "load_recipe",
    "measured",
    "recipe_file",
    "recipe_from_dict",
    "recipe_path",
]


def list_recipes() -> list[str]:
    """Names of the recipes that ship, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe that ships.

    Raises:
        UsageError: there is none of that name.
    """
    known = list_recipes()
    if name not in known:
        hint = did_you_mean(name, known).strip() or f"They are {', '.join(known)}; a file of your own ends in .yaml."
        raise UsageError(f"recipe {show(name)}: no recipe of that name", hint)
    return _folder() / f"{name}.yaml"


def recipe_file(name_or_path: str | os.PathLike[str]) -> Path:
    """The file meant by a name or a path: a path ends in .yaml or .yml, or holds a slash. Only names are looked up."""
    source = os.fspath(name_or_path)
    is_name = isinstance(name_or_path, str) and "/" not in source and os.sep not in source
    if is_name and not source.lower().endswith((".yaml", ".yml")):
        return recipe_path(source)
    return Path(source).expanduser()


def measured(name: str) -> dict[str, str]:
    """The figures in the header of a recipe that ships, its lines `# Measured: R 16.3 %; state 2.3 MB; ...`, by word.

    Empty where nothing was measured.
    """
    found: dict[str, str] = {}
    for line in recipe_path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        mark, colon, rest = line.lstrip("# ").partition(":")
        if colon and mark == "Measured":
            parts = (part.strip().partition(" ") for part in rest.split(";"))
            found |= {word: value.strip() for word, _, value in parts if value}
    return found


def load_recipe(
    name_or_path: str | os.PathLike[str] | Recipe, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """Read a recipe by name or from a file, then apply overrides.

    Args:
        name_or_path: what `recipe_file` takes, or a recipe.
        overrides: `key=value` strings with dotted keys and YAML values (the last one wins), or a mapping of dotted or
            nested keys to values.

    Raises:
        UsageError: no such recipe, an unreadable file, an unknown key at any depth, or a bad value.
    """
    if isinstance(name_or_path, Recipe):
        source, values = name_or_path.name, name_or_path.as_dict()
    elif not isinstance(name_or_path, (str, os.PathLike)):
        raise UsageError(
            f"recipe {show(name_or_path)}: neither a name nor a file nor a Recipe",
            "Give a recipe's name; linearize.recipe.recipe_from_dict makes a Recipe of a dict.",
        )
    else:
        source = os.fspath(name_or_path)
        values = _read_file(recipe_file(name_or_path))
    for key, value in _pairs(overrides):
        _override(values, key, value)
    return recipe_from_dict(values, source=source)


def recipe_from_dict(values: Mapping[str, Any], *, source: str = "dict") -> Recipe:
    """The recipe of nested plain values, as strict as a file. `source` names it in errors."""
    try:
        return build(Recipe, values, "")
    except UsageError as error:
        raise UsageError(f"recipe {source}: {error.message}", error.hint) from None


def _folder() -> Path:
    # Installed, the files lie inside the package; in a source tree beside it.
    here = Path(__file__).resolve().parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def _read_file(path: Path) -> dict[str, Any]:
    where = f"recipe {path}"
    if path.is_dir():
        raise UsageError(f"{where}: is a folder; a recipe is a YAML file", "See the names with: linearize recipes ls")
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near) or did_you_mean(path.stem, list_recipes())
        raise UsageError(f"{where}: no such file", hint.strip() or "See the names with: linearize recipes ls")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        content = data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror})", "Check its permissions.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{where}: is not UTF-8 text", "A recipe is a YAML file.") from None
    values = read_yaml(content, where)
    if not isinstance(values, dict):
        raise UsageError(f"{where}: holds no key: value lines", "Start from one with: linearize recipes cp NAME FILE")
    return values


def _pairs(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    if isinstance(overrides, str):
        overrides = [overrides]
    pairs = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"override {show(item)}: expected key=value", "Example: align.tokens=2M")
        pairs.append((key.strip(), read_yaml(value, f"override {key.strip()[:60]}")))
    return pairs


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key in place; a mapping as the value is merged key by key."""
    if not isinstance(key, str):
        raise UsageError(f"override {show(key)}: the key is not text")
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        inner = values.get(section)
        if inner is None:  # absent, or a section switched off with null
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"override {key[:80]}: {'.'.join(sections[: depth + 1])!r} is a value, not a section")
        values = inner
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _override(values, f"{last}.{name}", inner)
    else:
        values[last] = value
