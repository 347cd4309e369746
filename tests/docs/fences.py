"""What the pages show of commands: every line of their blocks, and mentions of `linearize` within a sentence."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\s*$")
LINE = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*linearize (.+)$")
INLINE = re.compile(r"`linearize ([a-z-][^`]*)`")
HEADER = re.compile(r"^# (?:Run|Try):\s+linearize (.+)$")
SHELL = ("", "console", "sh", "bash", "shell")
COMMENT = re.compile(r"(?:^|\s)#\s.*$")


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
        *sorted((root / "docs").rglob("*.md")),
        *sorted((root / "recipes").glob("*.yaml")),
    ]


def shown(path: Path) -> Iterator[Shown]:
    """The commands of one page or recipe."""
    if path.suffix == ".yaml":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := HEADER.match(line):
                yield Shown(place=f"{path.name}:{number}", words=_words(match[1]), whole="..." not in match[1])
        return
    for row in shell_lines(path):
        match = LINE.match(row.text)
        if match and not any(said.startswith("error:") for said in row.said):
            yield Shown(place=row.place, words=_words(match[1]), whole="..." not in match[1])
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= bool(FENCE.match(line))
        for mention in () if fenced else INLINE.findall(line):
            yield Shown(place=f"{path.name}:{number}", words=_words(mention.partition("|")[0]), whole=False)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line that a page gives to a shell."""

    place: str
    """File and line."""
    text: str
    """Without prompt and comment; continued lines are one."""
    language: str
    """Of its block; indented ones have none."""
    said: tuple[str, ...] = ()
    """What the page shows below it, in a block of the console."""


def shell_lines(path: Path) -> list[Line]:
    """Every line for a shell: of fenced blocks without a language or with a shell's, and of blocks that are indented.

    In blocks of the console those are the lines with a prompt, and the rest is output. Of blocks of `text` (what a
    command prints with --help) it is the examples of `linearize`.
    """
    found: list[Line] = []
    language: str | None = None
    rows = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    for number, row in rows:
        fence = FENCE.match(row)
        if fence:
            language = fence[1] if language is None else None
            continue
        place = f"{path.name}:{number}"
        if language is None and not row.startswith("    "):
            continue
        if language == "console" and not row.startswith("$ "):
            assert found, f"{place}: output without a command"
            found[-1] = replace(found[-1], said=(*found[-1].said, row))
            continue
        if (language or "") not in SHELL and not (language == "text" and row.strip().startswith("linearize ")):
            continue
        while row.endswith("\\"):
            row = row[:-1].rstrip() + " " + next(rows)[1].strip()
        text = COMMENT.sub("", row.strip().removeprefix("$ ")).strip()
        if text:
            found.append(Line(place=place, text=text, language=language or ""))
    return found


def mentions(path: Path) -> list[Line]:
    """Commands within the sentences of a page; a bare name is none, nor a sketch (`...`, `a | b`, `[--c]`)."""
    found, fenced = [], False
    for number, row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= bool(FENCE.match(row))
        for text in () if fenced else re.findall(r"`((?:linearize|python -m) [a-z-][^`]*)`", row):
            if not re.search(r"\.\.\.|[|\[]", text) and not re.fullmatch(r"linearize [a-z]+(?: [a-z]+)?", text):
                found.append(Line(place=f"{path.name}:{number}", text=text, language=""))
    return found


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
