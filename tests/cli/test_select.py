"""`linearize select`: what is passed on, what is printed, and that asking for help stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import linearize
import linearize.api
from linearize.errors import VerificationError
from linearize.recipe import load_recipe
from linearize_cli.app import main

RESULT: dict[str, Any] = {
    "model": "m",
    "recipe": "lolcats",
    "method": "aligned",
    "keep": 1,
    "chosen": [1],
    "uniform": [2],
    "override": "keep_softmax=[1]",
    "ranking": [1, 0, 2],
    "layers": [
        {"layer": i, "window_kl": kl, "window_ppl_rise": 10 * kl, "aligned_kl": kl / 2, "aligned_ppl_rise": 5 * kl,
         "rank": rank}
        for i, (kl, rank) in enumerate([(0.25, 2), (0.5, 1), (0.125, 3)])
    ],
    "placements": [
        {"placement": name, "kept": kept, "window_kl": kl, "window_ppl_rise": 8.0, "aligned_kl": 0.75,
         "aligned_ppl_rise": 4.0}
        for name, kept, kl in (("none", [], 1.5), ("aligned", [1], 1.25), ("uniform", [2], 1.375))
    ],
    "ppl_teacher": 7.5,
    "window": 64,
    "sinks": 1,
    "context": 512,
    "windows": 32,
    "align_tokens": 256_000,
    "notes": ["a note"],
}  # fmt: skip
ARGV = ["select", "m", "--data", "a file.txt", "--keep", "1"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found.append((args, kwargs))
        print("chatter of a library")
        return RESULT

    monkeypatch.setattr(linearize.api, "select", stand_in)
    return found


def test_what_people_read(calls: list[Any], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/linearize"])
    assert main([*ARGV, "context=512"]) == 0
    text = "\n".join(" ".join(line.split()) for line in capsys.readouterr().err.splitlines())
    assert "32 windows of 512 tokens, perplexity 7.5; window 64 + the block before, 1 sink, 256,000 tokens" in text
    assert "1 0.5 5 0.25 2.5 1 keep -" in text and "2 0.125 1.25 0.0625 0.625 3 - keep" in text
    assert "1 rank, aligned 1.25 8 0.75 4" in text and "2 even spacing 1.375 8" in text and "none - 1.5 8" in text
    assert "note: a note" in text and "Keep, by aligned: keep_softmax=[1]" in text
    assert "Next: linearize convert m OUT --recipe pure --data 'a file.txt' context=512 'keep_softmax=[1]'" in text


def test_a_ranking_by_the_window_alone(
    calls: list[Any], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bare(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if not name.startswith("aligned")}

    rows = {name: [bare(row) for row in RESULT[name]] for name in ("layers", "placements")}
    monkeypatch.setattr(
        linearize.api, "select", lambda *a, **k: {**RESULT, **rows, "method": "window", "align_tokens": 0}
    )
    assert main(ARGV) == 0
    err = capsys.readouterr().err
    assert "KL cut to the window" in err and "KL aligned" not in err and "alignment" not in err


def test_json_is_the_only_thing_on_stdout(calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main([*ARGV, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


def test_everything_is_passed_on(calls: list[Any]) -> None:
    more = ["-r", "gated-deltanet", "--method", "window", "--align-tokens", "1.5M", "seed=3"]
    assert main([*ARGV, *more]) == 0
    ((args, kwargs),) = calls
    assert args == ("m",)
    assert kwargs.pop("progress") is not None
    assert kwargs == {
        "data": "a file.txt",
        "keep": 1,
        "recipe": load_recipe("gated-deltanet", ["seed=3"]),
        "method": "window",
        "align_tokens": 1_500_000,
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["select", "m", "--data", "d"], "keep"),
        (["select", "m", "--data", "d", "--keep", "0"], "keep"),
        ([*ARGV, "--align-tokens", "many"], "--align-tokens: expected a whole number"),
        ([*ARGV, "contxt=3"], "context"),
        ([*ARGV, "-r", "nope"], "nope"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], words: str, calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, calls) == ("", []) and len(err.splitlines()) == 1 and words in err


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: Any, **kwargs: Any) -> Any:
        raise VerificationError("layer 3 died")

    monkeypatch.setattr(linearize.api, "select", die)
    assert main([*ARGV, "--json"]) == 4
    assert capsys.readouterr() == ("", "error: layer 3 died\n")


def test_refused_before_torch_is_imported_and_help_is_light(source_env: dict[str, str], tmp_path: Path) -> None:
    code = """
import sys, linearize
assert callable(linearize.select)
from linearize_cli.app import main
assert main(["select", "--help"]) == 0
assert main(["select", "demo", "--data", "nope.txt", "--keep", "1"]) == 2
assert main(["select", "demo", "--data", "demo", "--keep", "1", "sed=1"]) == 2
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_env, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "select" in dir(linearize)
