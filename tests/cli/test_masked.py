"""What the commands say of a masked language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import linearize.api
from linearize_cli.app import main
from tests import encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.build(tmp_path_factory.mktemp("encoders") / "bert", "bert")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.text_file(tmp_path_factory.mktemp("text") / "text.jsonl", count=9)


def lines(capsys: pytest.CaptureFixture) -> str:
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().err.splitlines())


def test_eval_prints_both_models(
    folder: Path, text: Path, capsys: pytest.CaptureFixture, undocumented: Callable[[str, dict[str, Any]], list[str]]
) -> None:
    argv = ["eval", str(folder), "--data", str(text), "--against", str(folder), "--protocol", "masked@30"]
    assert main([*argv, "--device", "cpu"]) == 0
    shown = lines(capsys)
    assert "masked@30: " in shown and "(15%)" in shown and "each by [MASK], seed 0" in shown
    for label in ("hidden tokens found", "perplexity of hidden tokens", "pseudo-perplexity"):
        assert label in shown
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert undocumented("eval of a masked model", found) == []
    assert found["masking"]["seed"] == 0 and found["against"]["accuracy"] == found["accuracy"]


def test_plan_and_inspect_show_no_cache(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(folder)]) == 0
    assert "keeps no cache" in lines(capsys)
    assert main(["inspect", str(folder), "--recipe", "hedgehog-encoder"]) == 0
    argv = ["convert", str(folder), "out", "--recipe", "hedgehog-encoder", "--plan", "context=48", "device=cpu"]
    assert main(argv) == 0
    shown = lines(capsys)
    assert "keeps no cache" in shown and "KV cache" not in shown and "trained on a context of 66 tokens" in shown


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["audit", "--against", "demo", "--data", "demo"], "linearize eval"),
        (["recall", "--against", "demo", "--data", "demo"], "linearize eval"),
        (["generate", "--prompt", "a"], "fill-mask"),
        (["select", "--data", "demo", "--keep", "1"], "keep_softmax"),
    ],
)
def test_what_needs_a_causal_model_says_what_to_use(
    folder: Path, argv: list[str], hint: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([argv[0], str(folder), *argv[1:]]) == 2
    shown = lines(capsys)
    assert "masked language model" in shown and hint in shown and "Traceback" not in shown


def test_the_next_step_after_a_conversion(
    text: Path, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    report: dict[str, Any] = {
        "task": "masked", "stages": {}, "mean_match": None, "verification": {}, "dtype": "float32", "notes": [],
        "merge_error": {"merge": {"max": 0.0}, "cast": {"max": 0.0}}, "seconds": {"total": 1.0},
    }  # fmt: skip
    monkeypatch.setattr(linearize.api, "convert", lambda *args, **kwargs: report)
    assert main(["convert", str(folder), "out", "--recipe", "hedgehog-encoder", "--data", str(text)]) == 0
    assert f"eval out --against {folder} --data {text}" in lines(capsys)
