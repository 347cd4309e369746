"""Strict readers for text that a person wrote: YAML without surprises and values of one exact type.

Nothing here imports more than PyYAML. A reader takes `(value, where)` and gives the value in its canonical type, or
raises `UsageError` with `where` (a dotted key such as `align.lr`) in front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import yaml

from linearize.errors import UsageError, did_you_mean

MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 16

Reader = Callable[[Any, str], Any]

_COUNT = re.compile(r"(\d[\d_]{0,14}(?:\.\d{1,15})?)(?:[eE]\+?(\d{1,2}))?([kKmMbB]?)")
_EXPONENT = re.compile(r"[+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})[eE][+-]?\d{1,3}")
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses anchors and aliases, keys given twice, keys that are not text, and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _problem("anchors and aliases (& and *) are not allowed", event)
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise _problem(f"nested deeper than {MAX_YAML_DEPTH} levels", event)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                raise _problem(f"the key {show(key)} is not plain text", key_node)
            if key in seen:
                raise _problem(f"the key {show(key)} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _RecipeLoader(_StrictLoader):
    """It refuses numbers, too, that YAML 1.1 reads otherwise than people do."""


def _as_written(loader: _StrictLoader, node: yaml.ScalarNode) -> int | float:
    """A number, unless a leading zero or a colon makes another one of it: YAML 1.1 takes 010 for 8 and 1:30 for 90."""
    whole = node.tag.endswith(":int")
    value = loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)
    digits = node.value.replace("_", "").lstrip("+-")
    if ":" in digits or (whole and digits.isdecimal() and int(digits) != abs(value)):
        base = 60 if ":" in digits else 8
        raise _problem(f"{show(node.value)} would be {show(value)}, in base {base}: write the decimal number", node)
    return value


for _tag in ("int", "float"):
    _RecipeLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _as_written)


def _problem(text: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)


_YAML = "Check the quotes, brackets and indents there."


def read_yaml(text: str, where: str, *, recipe: bool = True) -> Any:
    """The value of one YAML document of at most `MAX_YAML_BYTES` characters.

    Args:
        recipe: whether its numbers are somebody's settings; of a model's card, they are no reason to refuse the rest.

    Raises:
        UsageError: too long, not YAML, more than one document, or one of the things that the loader refuses.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UsageError(f"{where}: longer than {MAX_YAML_BYTES} characters", "This is not a recipe.")
    try:
        return yaml.load(text, Loader=_RecipeLoader if recipe else _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        written = isinstance(error, (yaml.scanner.ScannerError, yaml.parser.ParserError))  # ours say what to do
        problem = error.problem or error.context or "not valid YAML"
        raise UsageError(f"{where}: {problem}{line}", _YAML if written else None) from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # PyYAML lets ValueError out of dates and very long integers; the message may quote the whole value.
        raise UsageError(f"{where}: not valid YAML: {str(error)[:120]}", _YAML) from None


def show(value: Any) -> str:
    """A value for an error message: quoted and short."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return "an enormous number"  # repr() of a long integer can itself raise
    try:
        text = repr(value)
    except ValueError:
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def count(low: int, high: int) -> Reader:
    """Whole numbers in [low, high]; `2M`, `500k`, `1.5M`, `1B` and `2e6` read too. Never a boolean."""

    def read(value: Any, where: str) -> int:
        number: int | None = None
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, float) and math.isfinite(value) and value.is_integer():
            number = int(value)
        elif isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
            digits, exponent, suffix = match.groups()
            exact = Decimal(digits.replace("_", "")).scaleb(int(exponent or 0)) * _SCALE[suffix.lower()]
            if exact == exact.to_integral_value():
                number = int(exact)
        if number is None:
            raise UsageError(f"{where}: expected a whole number such as 2000000 or 2M, got {show(value)}")
        return _within(number, where, low, high)

    return read


def whole(low: int, high: int) -> Reader:
    """Integers in [low, high]. Never a boolean, a float or text."""

    def read(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{where}: expected a whole number, got {show(value)}")
        return _within(value, where, low, high)

    return read


def number(low: float, high: float, *, above: bool = False) -> Reader:
    """Finite floats in [low, high], or (low, high] with `above`. `1e-2`, which YAML 1.1 reads as text, is one."""

    def read(value: Any, where: str) -> float:
        if isinstance(value, str) and _EXPONENT.fullmatch(value.strip()):
            value = float(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UsageError(f"{where}: expected a number, got {show(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{where}: {value} is not a finite number")
        _within(value, where, low, high)
        if above and value <= low:
            raise UsageError(f"{where}: {show(value)} is not above {low:g}")
        return float(value)

    return read


def flag(value: Any, where: str) -> bool:
    """true or false, and nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise UsageError(f"{where}: expected true or false, got {show(value)}")
    return value


def text(limit: int) -> Reader:
    """One line of printable text of at most `limit` characters."""

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise UsageError(f"{where}: expected text, got {show(value)}", "Put it in quotes.")
        if len(value) > limit:
            raise UsageError(f"{where}: longer than {limit} characters")
        if not value.isprintable():
            raise UsageError(f"{where}: holds a line end or a control character")
        return value

    return read


def choice(allowed: Sequence[str]) -> Reader:
    """One of a few words."""

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            near = did_you_mean(value, allowed) if isinstance(value, str) else ""
            raise UsageError(f"{where}: {show(value)} is not one of {', '.join(allowed)}.{near}")
        return value

    return read


def names(allowed: Sequence[str]) -> Reader:
    """A list of words from `allowed`, each at most once; a tuple comes back."""
    one = choice(allowed)

    def read(value: Any, where: str) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where}: expected a list such as [{', '.join(allowed[:2])}], got {show(value)}")
        words = tuple(one(item, where) for item in value)
        for word in words:
            if words.count(word) > 1:
                raise UsageError(f"{where}: {word!r} is named twice")
        return words

    return read


def optional(reader: Reader) -> Reader:
    """`reader`, or nothing (`null`; the word `none` means the same)."""

    def read(value: Any, where: str) -> Any:
        return None if value is None or value == "none" else reader(value, where)

    return read


def unknown_key(section: str, key: str, allowed: Iterable[str], elsewhere: Iterable[str] = ()) -> UsageError:
    """The error for a key that does not exist: the nearest of `allowed` (short) or `elsewhere` (dotted)."""
    allowed = list(allowed)
    by_leaf = [dotted for dotted in elsewhere if dotted.rpartition(".")[2] == key]
    where = f"{section}.{key}" if section else key
    place = f"in section {section!r}" if section else "at the top level"
    near = did_you_mean(key, allowed)
    if by_leaf and not near:
        near = f" Did you mean {' or '.join(repr(dotted) for dotted in by_leaf)}?"
    near = near or did_you_mean(where, elsewhere)
    return UsageError(f"{where[:80]}: unknown key {place}", near.strip() or f"Its keys are {', '.join(allowed)}.")


def _within(value: Any, where: str, low: float, high: float) -> Any:
    if value < low:
        raise UsageError(f"{where}: {show(value)} is below {_plain(low)}")
    if value > high:
        raise UsageError(f"{where}: {show(value)} is above {_plain(high)}")
    return value


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
