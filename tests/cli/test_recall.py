"""`linearize recall`: what is passed on, what is printed, and that asking for help stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import linearize
import linearize.api
from linearize.errors import UsageError
from linearize_cli.app import main

CELL = {
    "task": "pairs",
    "distance": 160,
    "pages": 8,
    "queries": 64,
    "chance": 0.125,
    "teacher": 0.84,
    "teacher_se": 0.05,
    "floor": 0.09,
    "floor_se": 0.04,
    "student": 0.53,
    "student_se": 0.06,
    "share": 58.6,
    "share_se": 7.4,
}
RESULT: dict[str, Any] = {
    "model": "o",
    "against": "m",
    "context": 1024,
    "distances": [160],
    "queries": 64,
    "seed": 0,
    "reference": {"window": 64, "sinks": 4, "own": True},
    "dtype": "float32",
    "device": "cpu",
    "share": 61.2,
    "share_se": 5.1,
    "tasks": {"pairs": {"share": 58.6, "share_se": 7.4}, "quote": {"share": None, "share_se": None}},
    "cells": [CELL, {**CELL, "task": "quote", "chance": None, "queries": 128, "share": None, "share_se": None}],
    "notes": ["a note"],
}
ARGV = ["recall", "o", "--against", "m", "--data", "a file.txt"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found.append((args, kwargs))
        print("chatter of a library")
        return RESULT

    monkeypatch.setattr(linearize.api, "recall", stand_in)
    return found


def test_what_people_read(calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(ARGV) == 0
    text = "\n".join(" ".join(line.split()) for line in capsys.readouterr().err.splitlines())
    assert "student o, teacher m, float32 on cpu; window 64 + the block before, 4 sinks" in text
    assert "pairs 160 64 12 % 9 ± 4 % 84 ± 5 % 53 ± 6 % 59 ± 7 %" in text
    assert "quote 160 128 - 9 ± 4 % 84 ± 5 % 53 ± 6 % not defined" in text and "note: a note" in text
    assert "Recall: 61 ± 5 % of the teacher's own (0 %: the teacher cut to its window)" in text
    assert "pairs 59 ± 7 %, quote not defined" in text


def test_json_is_the_only_thing_on_stdout(calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main([*ARGV, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


def test_everything_is_passed_on(calls: list[Any]) -> None:
    assert main(ARGV) == 0
    more = ["--distance", "200", "--distance", "400", "--queries", "128", "--context", "2048", "--seed", "3"]
    assert main([*ARGV, *more, "--device", "cpu", "--dtype", "float32", "--teacher-bits", "8"]) == 0
    (_, plain), (args, kwargs) = calls
    assert args == ("o",)
    assert kwargs == {
        "against": "m",
        "data": "a file.txt",
        "context": 2048,
        "device": "cpu",
        "dtype": "float32",
        "teacher_bits": 8,
        "queries": 128,
        "distances": [200, 400],
        "seed": 3,
    }
    assert plain["distances"] is None and plain["queries"] == 64 and plain["device"] == "auto"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["recall", "o", "--data", "d"], "--against"),
        (["recall", "o", "--against", "m"], "--data"),
        ([*ARGV, "--distance", "0"], "--distance"),
        ([*ARGV, "--queries", "31"], "--queries"),
        ([*ARGV, "--distance", "far"], "--distance"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], words: str, calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, calls) == ("", []) and len(err.splitlines()) == 1 and words in err


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UsageError("distance 100: not beyond the window")

    monkeypatch.setattr(linearize.api, "recall", refuse)
    assert main([*ARGV, "--json"]) == 2
    assert capsys.readouterr() == ("", "error: distance 100: not beyond the window\n")


def test_help_is_light(source_env: dict[str, str], tmp_path: Path) -> None:
    code = """
import sys, linearize
assert callable(linearize.recall)
from linearize_cli.app import main
assert main(["recall", "--help"]) == 0
assert not {"torch", "transformers", "numpy", "rich"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_env, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "recall" in dir(linearize)
