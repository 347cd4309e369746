"""May this conversion go on from what a run folder holds? Only if it is the same one; what differs is said in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linearize.errors import RefusedError
from linearize.recipe import Recipe
from linearize.strict import show

_WORDS = {
    "recipe": "the recipe",
    "teacher": "the model",
    "data": "the text",
    "documents": "documents=",
    "teacher_bits": "--teacher-bits",
}
_MOST = 3
"""Keys of a recipe that are named."""


def how_asked(recipe: Recipe, *, streamed: bool, teacher_bits: int | None) -> dict[str, str]:
    """What must be the same for one run to go on from another, as far as options say it: no model or text is read."""
    return {
        "recipe": recipe.digest(),
        "streamed": "yes" if streamed else "no",
        "teacher_bits": str(teacher_bits or "as stored"),
    }


def require_same(
    path: Path, before: Mapping[str, Any], identity: Mapping[str, Any], asked: Mapping[str, Any], *, saved: bool = True
) -> None:
    """Refuse to go on from a run of something else.

    Args:
        path: the run folder.
        before: what it says of itself: digests by the keys of `identity`, and `asked`, as far as they are there.
        identity: what must be the same.
        asked: the recipe's values and the names of model and text, to say what differs.
        saved: whether the folder holds checkpoints; without any there is nothing to delete.

    Raises:
        RefusedError: it is another conversion, or does not say which it is.
    """
    over = f"to start over, {f'delete {path} and ' if saved else ''}leave out --resume."
    if not before:
        raise RefusedError(f"{path}: does not say of which conversion it is (run.json is missing or damaged)",
                           over[0].upper() + over[1:])  # fmt: skip
    differing = [key for key, value in identity.items() if before.get(key) != value]
    if not differing:
        return
    then = before.get("asked")
    found = [_told(key, then if isinstance(then, Mapping) else {}, asked, before) for key in differing]
    if "recipe" in differing and "data" in differing and _same_name("data", then, asked):
        found.pop(differing.index("data"))  # other windows of the same text, because the recipe cuts them otherwise
    raise RefusedError(
        f"{path}: holds an unfinished run of another conversion; differing: {', '.join(found)}",
        f"Give what it was begun with; or, {over}",
    )


def _told(key: str, then: Mapping[str, Any], now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """One thing that differs, with both values where they are known."""
    if key == "streamed":
        return "--stream (it was begun with it)" if before.get(key) == "yes" else "--stream (it was begun without it)"
    word = _WORDS.get(key, key)
    if key == "recipe":
        values, earlier = dict(_flat(now.get(key))), dict(_flat(then.get(key)))
        names = [name for name in (values | earlier) if values.get(name) != earlier.get(name)] if earlier else []
        keys = [f"{name}={_plain(values.get(name))}, begun with {_plain(earlier.get(name))}" for name in names[:_MOST]]
        more = [f"and {len(names) - _MOST} more"] if len(names) > _MOST else []
        return f"{word} ({'; '.join(keys + more)})" if keys else word
    if isinstance(then.get(key), str) and key in now:
        if then[key] != now[key]:
            return f"{word} ({now[key]}, begun with {then[key]:.200})"
        return f"{word} ({now[key]} has changed)"
    return word


def _same_name(key: str, then: Any, now: Mapping[str, Any]) -> bool:
    return isinstance(then, Mapping) and key in now and then.get(key) == now[key]


def _flat(values: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", list(value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> str:
    return value[:60] if isinstance(value, str) else show(value)
