"""The commands that the pages show: lines of blocks that begin with `linearize`, and mentions within a sentence."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\s*$")
LINE = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*linearize (.+)$")
INLINE = re.compile(r"`linearize ([a-z-][^`]*)`")
HEADER = re.compile(r"^# (?:Run|Try):\s+linearize (.+)$")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One command as a page shows it."""

    place: str
    """File and line."""
    words: tuple[str, ...]
    """Without the program's name."""
    whole: bool
    """Whether it is there to be copied: a line of a block, not a mention in a sentence."""


def pages(root: Path) -> list[Path]:
    """Every page that shows commands."""
    return [
        *sorted(root.glob("*.md")),
        *sorted((root / "docs").glob("*.md")),
        *sorted((root / "recipes").glob("*.yaml")),
    ]


def shown(path: Path) -> Iterator[Shown]:
    """The commands of one page or recipe."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{path.name}:{number}"
        if path.suffix == ".yaml":
            match = HEADER.match(line)
        elif FENCE.match(line):
            fenced = not fenced
            continue
        else:
            match = LINE.match(line) if fenced or line.startswith("    ") else None
        if match:
            yield Shown(place=place, words=_words(match[1]), whole="..." not in match[1])
        elif path.suffix != ".yaml" and not fenced:
            for mention in INLINE.findall(line):
                yield Shown(place=place, words=_words(mention.partition("|")[0]), whole=False)


def blocks(path: Path, language: str) -> list[str]:
    """The texts of the fenced blocks that begin with ```language."""
    found: list[list[str]] = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        match = FENCE.match(line)
        if match:
            inside = not inside and match[1] == language
            if inside:
                found.append([])
        elif inside:
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def _words(text: str) -> tuple[str, ...]:
    words = [word for word in shlex.split(text, comments=True) if word != "..."]
    # [--option VALUE]: a page's way to say that it may be left out.
    return tuple(word.strip("[]") if word.startswith("[-") else _closed(word) for word in words)


def _closed(word: str) -> str:
    return word if "[" in word else word.rstrip("]")
