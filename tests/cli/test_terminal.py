"""Control characters in names, notes and errors do not reach a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from linearize_cli.app import main
from linearize_cli.output import console, fail, print_report, print_table, say
from linearize_cli.terminal import clean
from tests.cli.stand_ins import RUNS

EVIL = "\x1b]0;title\x07\x1b[31m\x9b2J\x7f\rX"


def test_what_is_taken_away() -> None:
    assert clean(f"a{EVIL}b\tc\nd") == "a ]0;title  [31m 2J  Xb\tc\nd"


@pytest.mark.parametrize("terminal", [True, False])
def test_every_way_to_a_terminal_is_clean(
    terminal: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    say(EVIL)
    fail(EVIL)
    print_table([{f"k{EVIL}": EVIL, "n": 1}], title=EVIL)
    print_report(EVIL, {"name": EVIL, "rows": [{"a": EVIL}], "inner": {f"k{EVIL}": EVIL}})
    console().print(f"note: {EVIL}")
    told = capsys.readouterr().err
    assert told.count("X") >= 8
    left = told.replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")  # bold and italic of our own
    assert clean(left) == left, left


def exported(folder: Path) -> Path:
    """An export whose manifest has such names wherever it may."""
    folder.mkdir()
    names: dict[str, Any] = {"name": EVIL, "teacher": {"name": EVIL, "digest": EVIL}, "format": 1}
    names |= {
        "data": {"name": EVIL, "bytes": 3},
        "recipe": {"name": EVIL, "mixer": {EVIL: 1}},
        "versions": {"torch": EVIL, EVIL: "1"},
    }
    names |= {"files": {f"a{EVIL}": {"size": 1, "sha256": "0" * 64}}, "figures": {"layers": [{"layer": EVIL}]}}
    (folder / "linearize.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps({"model_type": f"linearized_{EVIL}", EVIL: EVIL}))
    (folder / f"b{EVIL}.py").write_text("")
    return folder


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "generate --prompt x", "eval --data demo", "push me/x --dry-run"]
)
def test_nothing_of_an_export_steers_a_terminal(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    name, *options = command.split()
    assert main([name, str(exported(tmp_path / "out")), *options]) in (2, 3, 4)
    out, err = capsys.readouterr()
    assert err and clean(out + err) == out + err


def test_generated_text_cannot_steer_a_terminal(
    library: dict[str, Any], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library["generate"]["text"] = "a\tb\n\x1b]52;c;eA==\x07\x1b[2J\x9b\rc"
    assert main(RUNS["generate"]) == 0
    assert capsys.readouterr().out.endswith(library["generate"]["text"] + "\n"), "to a file or a pipe every byte"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(RUNS["generate"]) == 0
    out = capsys.readouterr().out.removeprefix("chatter of a library\n")
    assert out == "a\tb\n\\x1b]52;c;eA==\\x07\\x1b[2J\\x9b\\x0dc\n"
