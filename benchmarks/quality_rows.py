"""Which rows the quality table has, and what each of them trains: recipes scaled to one budget, ablations, seeds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError, UsageError, did_you_mean
from linearize.recipe import Recipe, list_recipes, load_recipe, recipe_from_dict
from linearize.strict import read_yaml

WINDOW = 64
"""Block window of the cuts that the table always holds, and of the floor for a recipe that has no window."""
SINKS = 4
ALWAYS = ("sliding-window", "lolcats", "hedgehog", "liger-gla")
"""Recipes that every table holds: a trained window without a linear branch, and three as published."""
KINDS = ("teacher", "cut", "recipe", "variant")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,60}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: the teacher, the teacher cut to a window, or a conversion."""

    kind: str
    name: str
    seed: int | None = None
    window: int | None = None
    """Of a cut; so `sinks`."""
    sinks: int | None = None
    recipe: dict[str, Any] | None = None
    """Of a conversion: every value, at the budget of the table."""

    @property
    def key(self) -> str:
        """Unique in a table, and a file name."""
        return self.name if self.seed is None else f"{self.name}-s{self.seed}"

    @cached_property
    def digest(self) -> str | None:
        """Of the recipe: a row that was made by another one is not this row."""
        return None if self.recipe is None else self.built.digest()

    @cached_property
    def built(self) -> Recipe:
        """The recipe as a value."""
        assert self.recipe is not None
        return recipe_from_dict(self.recipe, source=self.name)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with key and digest."""
        return asdict(self) | {"key": self.key, "digest": self.digest}


def reference(window: int, sinks: int) -> tuple[int, int]:
    """Window and sinks of the cut that a student of this window and these sinks is held against."""
    return (window, sinks) if window else (WINDOW, 0)


def cut(window: int, sinks: int) -> Row:
    """The teacher cut to a window, untrained."""
    return Row(kind="cut", name=f"cut-w{window}-sinks{sinks}", window=window, sinks=sinks)


def references(rows: Iterable[Row]) -> list[Row]:
    """The teacher and every cut that these conversions are held against; the two of W = 64 always."""
    wanted = {(WINDOW, SINKS), (WINDOW, 0)}
    for row in rows:
        mixer = row.built.mixer
        window, sinks = reference(mixer.window, mixer.sinks)
        wanted |= {(window, sinks), (window, 0)}
    first = [(WINDOW, SINKS), (WINDOW, 0)]
    return [Row(kind="teacher", name="teacher"), *(cut(*pair) for pair in [*first, *sorted(wanted - set(first))])]


def scale(recipe: Recipe, budget: int, *, teacher: str | None = None) -> Recipe:
    """`recipe` with its two stages in their proportion and `budget` tokens in all.

    A recipe that trains nothing stays as it is. With `teacher`, a recipe whose alignment would be skipped there,
    because nothing that it names has a parameter, gives all to finetuning.
    """
    align, finetune = recipe.align.tokens, recipe.finetune.tokens
    if align + finetune == 0:
        return recipe
    first = round(budget * align / (align + finetune))
    scaled = load_recipe(recipe, {"align.tokens": first, "finetune.tokens": budget - first})
    if teacher is not None and first and finetune and _not_aligned(teacher, scaled):
        return load_recipe(recipe, {"align.tokens": 0, "finetune.tokens": budget})
    return scaled


def _not_aligned(teacher: str, recipe: Recipe) -> bool:
    from linearize.convert.plan import make_plan

    try:
        # Which layers stay softmax does not matter here, and choosing them may cost a measurement.
        plan = make_plan(teacher, recipe=load_recipe(recipe, {"keep_softmax": "none"}))
    except LinearizeError:
        return False  # the conversion will say what is wrong
    return plan["tokens"]["align"] == 0


def read_variants(path: Path) -> dict[str, dict[str, Any]]:
    """`name: {recipe: NAME, set: [key=value, ...]}` -> the same, checked.

    Raises:
        UsageError: an unreadable file, a name that is a recipe's or no file name, an unknown key.
    """
    where = f"variants {path}"
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read ({error})") from None
    if not isinstance(values, dict) or not values:
        raise UsageError(f"{where}: holds no rows", "A row is NAME: {recipe: RECIPE, set: [key=value, ...]}")
    for name, row in values.items():
        if not _NAME.fullmatch(name) or name in (*list_recipes(), *ALWAYS):
            raise UsageError(f"{where}: {name[:60]!r} is the name of a recipe, or no name", "Use letters, digits and -")
        if not isinstance(row, dict) or not isinstance(row.get("recipe"), str):
            raise UsageError(f"{where}: {name} names no recipe")
        unknown = sorted(set(row) - {"recipe", "set"})
        if unknown:
            raise UsageError(f"{where}: {name}.{unknown[0]} is unknown.{did_you_mean(unknown[0], ('recipe', 'set'))}")
        values[name] = {"recipe": row["recipe"], "set": [str(item) for item in row.get("set") or []]}
    return values


def conversions(
    *,
    recipes: Sequence[str],
    variants: Mapping[str, Mapping[str, Any]],
    budget: int,
    seed: int,
    overrides: Sequence[str],
    teacher: str | None,
) -> tuple[list[Row], list[str]]:
    """A row for each recipe and each variant at one seed, and what is to be said about names that are left out.

    Raises:
        UsageError: an unknown recipe or key, or a bad value.
    """
    rows, notes, shipped = [], [], list_recipes()
    names = list(dict.fromkeys([*ALWAYS, *recipes]))
    for name in names:
        if name in ALWAYS and name not in shipped:
            notes.append(f"{name} is left out: there is no recipe of that name")
            continue
        rows.append(_row("recipe", name, name, [], budget, seed, overrides, teacher))
    for name, variant in variants.items():
        rows.append(_row("variant", name, variant["recipe"], variant["set"], budget, seed, overrides, teacher))
    return rows, notes


def _row(
    kind: str,
    name: str,
    source: str,
    changes: Sequence[str],
    budget: int,
    seed: int,
    overrides: Sequence[str],
    teacher: str | None,
) -> Row:
    try:
        recipe = load_recipe(source, [*overrides, *changes, f"seed={seed}"])
        recipe = scale(recipe, budget, teacher=teacher)
    except UsageError as error:
        raise UsageError(f"row {name}: {error.message}", error.hint) from None
    if kind == "recipe":
        name = Path(name).stem  # it may be a file; a variant's name keeps its dots
    return Row(kind=kind, name=name, seed=seed, recipe=recipe.as_dict())


def reseeded(row: Row, seed: int) -> Row:
    """The same conversion from another seed."""
    assert row.recipe is not None
    return Row(kind=row.kind, name=row.name, seed=seed, recipe=row.recipe | {"seed": seed})


def leaders(rows: Sequence[Row], scores: Mapping[str, float | None], wanted: str) -> list[Row]:
    """The rows that are worth further seeds: named ones, or the N best recipes, of the pure and of the hybrid each.

    One list for both would hold hybrids alone.

    Args:
        rows: conversions at the first seed. scores: recovery by key; None: failed. wanted: a number, or names.
    """
    if not wanted.isdigit():
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        known = {row.name: row for row in rows}
        missing = [name for name in names if name not in known]
        if missing:
            raise UsageError(f"--leaders: there is no row {missing[0]!r}.{did_you_mean(missing[0], known)}")
        return [known[name] for name in names]
    chosen: list[Row] = []
    for hybrid in (False, True):
        group = [
            (score, row)
            for row in rows
            if row.kind == "recipe"
            and (row.built.keep_softmax not in ("none", ())) is hybrid
            and (score := scores.get(row.key)) is not None
        ]
        group.sort(key=lambda pair: -pair[0])
        chosen += [row for _, row in group[: int(wanted)]]
    return chosen


def code_digest(root: Path) -> str:
    """Twelve digits that name the state of the code that converts and judges."""
    whole = hashlib.sha256()
    for room in ("linearize", "kernels"):
        for path in sorted((root / room).rglob("*.py")):
            whole.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]
