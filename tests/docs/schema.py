"""The tables of docs/json.md, and whether a value is what they say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROW = re.compile(r"^\| (`[^|]*`) \| ([^|]+) \| ([^|]*)\|$")
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "list": (list,),
    "open object": (dict,),
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a table says of one path."""

    kinds: tuple[str, ...]
    optional: bool


def tables(page: Path) -> dict[str, dict[str, Key]]:
    """{section: {path: key}} of the page."""
    found: dict[str, dict[str, Key]] = {}
    section = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip()
            found[section] = {}
        match = ROW.match(line)
        if match and section:
            said = match[2].strip()
            key = Key(kinds=tuple(said.removesuffix("?").split(" or ")), optional=said.endswith("?"))
            for path in re.findall(r"`([^`]+)`", match[1]):
                assert path not in found[section], f"{section}: {path} twice"
                found[section][path] = key
    return found


def complaints(value: dict[str, Any], table: dict[str, Key]) -> list[str]:
    """What differs between an output and its table: keys that are not documented, that are missing, other types."""
    found: list[str] = []
    _compare(value, "", table, found)
    return found


def _compare(value: Any, path: str, table: dict[str, Key], found: list[str]) -> None:
    key = table.get(path)
    if key is not None and not any(_is(value, kind) for kind in key.kinds):
        found.append(f"{path} is {value!r:.60}, documented as {' or '.join(key.kinds)}")
    inner = [name for name in table if name.startswith((f"{path}.", f"{path}[]")) or not path]
    if isinstance(value, dict) and not (key is not None and ({"open object", "any"} & set(key.kinds))):
        for name, part in value.items():
            where = _child(path, name, inner)
            if where is None:
                found.append(f"{_join(path, name)} is not documented")
            else:
                _compare(part, where, table, found)
        for name in _direct(path, inner):
            if name not in value and not _may_lack(_join(path, name), table):
                found.append(f"{_join(path, name)} is missing")
    elif isinstance(value, list) and any(name.startswith(f"{path}[]") for name in table):
        for part in value:
            _compare(part, f"{path}[]", table, found)


def _is(value: Any, kind: str) -> bool:
    if kind == "any":
        return True
    if kind.startswith("list of "):
        return isinstance(value, list) and all(_is(item, kind.removeprefix("list of ")) for item in value)
    return isinstance(value, KINDS[kind]) and (isinstance(value, bool) <= (kind == "boolean"))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _child(path: str, name: str, inner: list[str]) -> str | None:
    """The documented path that serves a key: its own, or the one with a star."""
    for candidate in (_join(path, name), _join(path, "*")):
        if any(re.match(rf"{re.escape(candidate)}(?:$|\.|\[\])", other) for other in inner):
            return candidate
    return None


def _direct(path: str, inner: list[str]) -> set[str]:
    """Names of the keys right below a path."""
    rests = (
        name.removeprefix(f"{path}.") if path else name for name in inner if not path or name.startswith(f"{path}.")
    )
    return {re.split(r"\.|\[\]", rest)[0] for rest in rests} - {"*"}


def _may_lack(path: str, table: dict[str, Key]) -> bool:
    """Whether a key may be absent: it says so, or all that is documented below it does."""
    below = [key for name, key in table.items() if re.match(rf"{re.escape(path)}(?:$|\.|\[\])", name)]
    return all(key.optional for key in below)
