"""Runs one line of a page as settings.py says, in this process where it is one of ours."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from linearize.recipe import list_recipes, load_recipe
from linearize_cli.app import main
from tests.docs.settings import ARGUMENTS_ONLY, INSTEAD, NAMES, NEEDS, NOT_RUN, PATHS_ONLY, SHORTER

ROOT = Path(__file__).resolve().parents[2]
SETTING = re.compile(r"^([A-Z_]+)=(\S+) (?=\S)")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of a line."""

    how: str
    """ran | arguments | paths | left out | lacks NAME (a package that is not here)"""
    code: int = 0
    out: str = ""
    err: str = ""


@dataclass(frozen=True, kw_only=True)
class Made:
    """The models that commands made so far, so that a page that makes the same one again gets a copy."""

    room: Path
    default: Path
    """What `out` is on a page that makes none."""
    kept: dict[tuple[str, ...], tuple[Path, Ran]] = field(default_factory=dict)


def run(text: str, made: Made) -> Ran:
    """Run one line in the current folder.

    Raises:
        AssertionError: a program that is none of ours, and that settings.py does not name.
    """
    if rule(text, NOT_RUN):
        return Ran(how="left out")
    text = INSTEAD.get(text, text)
    with _settings(text) as command:
        if command.startswith(PATHS_ONLY):
            named = [word for word in shlex.split(command) if word.startswith("tests/")]
            missing = [word for word in named if not (ROOT / word.replace("NAME", "blend")).exists()]
            return Ran(how="paths", code=1 if missing or not named else 0, err=f"not there: {missing}")
        if rule(command, ARGUMENTS_ONLY):
            return _arguments(shlex.split(_named(command))[1:])
        if command.startswith("python -c "):
            line = command.replace("python", shlex.quote(sys.executable), 1)
            done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120)
            return Ran(how="ran", code=done.returncode, out=done.stdout, err=done.stderr)
        command = command.replace("python -m linearize_cli ", "linearize ", 1)
        assert command.startswith("linearize "), f"{text}: neither one of ours nor in tests/docs/settings.py"
        for word, package in NEEDS.items():
            if word in command and find_spec(package) is None:
                return Ran(how=f"lacks {package}")
        return _ours(words_of(command), made)


def unlike(said: tuple[str, ...], ran: Ran) -> list[str]:
    """The lines that a page shows of an output and that are not in it, whatever the numbers. `...`: not shown."""
    printed = {shape(line) for line in f"{ran.err}\n{ran.out}".splitlines()}
    return [line for line in said if line.strip() not in ("", "...") and shape(line) not in printed]


def shape(line: str) -> str:
    """A line without its numbers, digests, units of bytes, rules and spaces."""
    line = re.sub(r"\b[0-9a-f]{12,}\b", "H", line)
    line = re.sub(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?(?:\+\w+)?", "0", line)
    line = re.sub(r"\b(?:bytes|[KMGT]iB)\b", "B", line)
    return " ".join(re.sub(r"[─]+", " ", line).split())


def rule(text: str, rules: dict[str, str]) -> str | None:
    """The beginning under which a line is in a table of settings.py."""
    return next((begin for begin in rules if f"{text} ".startswith(begin)), None)


def words_of(command: str) -> list[str]:
    """The arguments of a line of `linearize`, with the test's names and sizes."""
    command = command.removeprefix("linearize ").replace("[-", "-").replace("] ", " ").removesuffix("]")
    words = shlex.split(_named(command))
    if not {"--plan", "--help"} & set(words):
        known = {*words} if {"--recipe", "-r"} & {*words} else {*words, "pure"}
        sizes = next((sizes for key, sizes in SHORTER.items() if set(key.split()) <= known), "")
        words = _sized(words, [size for size in sizes.split() if size.partition("=")[0] not in _zeros(words)])
    return words


def _named(command: str) -> str:
    """A line with what stands here for the pages' names."""
    for name, value in NAMES.items():
        command = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", value, command)
    return command


def _zeros(words: list[str]) -> set[str]:
    """Keys of recipes that are 0 in the one that a command names (most are stages that it skips), or on the page."""
    named = next((word for word in words if word in list_recipes()), "pure")
    recipe = load_recipe(named).as_dict()
    stages = {f"{name}.tokens" for name in ("calibrate", "align", "finetune") if not recipe[name]["tokens"]}
    return stages | {word.removesuffix("=0") for word in words if word.endswith("=0")}


def _sized(words: list[str], sizes: list[str]) -> list[str]:
    """`words` with the options and keys of `sizes` in the place of their own."""
    found = list(words)
    while sizes:
        if sizes[0].startswith("--") and len(sizes) > 1 and not sizes[1].startswith("--"):
            name, new, sizes = sizes[0], sizes[:2], sizes[2:]
            while name in found:
                del found[found.index(name) : found.index(name) + 2]
        else:
            name, new, sizes = re.sub("=.*", "=", sizes[0]), sizes[:1], sizes[1:]
            found = [word for word in found if not word.startswith(name)]
        found += new
    return found


def _ours(words: list[str], made: Made) -> Ran:
    """One command of linearize. Where it makes a model, the folder is new, or a copy of the same command's result."""
    makes = makes_model(words)
    prepare(made, makes=makes or _makes_file(words))
    if "--resume" in words:
        _interrupt([word for word in words if word != "--resume"])
    if makes:
        key = tuple(word for word in words if word != makes)
        if key in made.kept:
            folder, ran = made.kept[key]
            shutil.copytree(folder, makes)
            return ran
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    ran = Ran(how="ran", code=code, out=out.getvalue(), err=err.getvalue())
    if makes and code == 0 and Path(makes).exists():
        made.kept[key] = (made.room / str(len(made.kept)), ran)
        shutil.copytree(makes, made.kept[key][0])
    return ran


def _interrupt(words: list[str]) -> None:
    """Leave what a conversion leaves that Ctrl-C stopped after its training."""
    with (
        mock.patch("linearize.convert.export.merge", side_effect=KeyboardInterrupt),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        assert main(words) == 130, err.getvalue()


def prepare(made: Made, *, makes: str = "") -> None:
    """Remove what a command is about to make; if that is not `out`, see that there is one."""
    path = Path(makes)
    if makes and (path.is_symlink() or path.is_file()):
        path.unlink()
    elif makes and path.is_dir():
        shutil.rmtree(path)
    if makes != "out" and not Path("out").exists():
        shutil.copytree(made.default, "out")


def _makes_file(words: list[str]) -> str:
    return words[3] if words[:2] == ["recipes", "cp"] and len(words) > 3 else ""


def makes_model(words: list[str]) -> str:
    """The folder that a command makes; empty: none."""
    if "--help" in words:
        return ""
    place = {"convert": 2, "import": 3}.get(words[0])
    return words[place] if place and len(words) > place else ""


@contextlib.contextmanager
def _settings(text: str) -> Iterator[str]:
    """What is left of a line without the environment that it sets, which holds within the block."""
    text = re.sub(r"^env (?:-u \w+ )*", "", text)
    values = {}
    while match := SETTING.match(text):
        values[match[1]] = match[2]
        text = text[match.end() :]
    with mock.patch.dict(os.environ, values):
        yield text


class _Read(Exception):
    """The arguments were read."""


def _arguments(words: list[str]) -> Ran:
    """Start a Python program up to where it has read its arguments."""

    def stopping(name: str) -> Any:
        read = getattr(argparse.ArgumentParser, name)

        def and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
            read(self, args, namespace)
            raise _Read

        return mock.patch.object(argparse.ArgumentParser, name, and_stop)

    program, words = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    module = program if "/" not in program else str(ROOT / program)
    start = runpy.run_path if "/" in program else runpy.run_module
    paths = [str(ROOT), str((ROOT / program).parent), *sys.path]
    with (
        stopping("parse_args"),
        stopping("parse_intermixed_args"),
        mock.patch.object(sys, "argv", [program, *words]),
        mock.patch.object(sys, "path", paths),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            start(module, run_name="__main__")
        except _Read:
            return Ran(how="arguments")
        except SystemExit:
            return Ran(how="arguments", code=2, err=err.getvalue())
    return Ran(how="arguments", code=1, err=f"{program} read no arguments")
