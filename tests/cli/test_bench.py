"""`linearize bench` and `linearize eval --tasks`: what is passed on, what is printed, and what is refused at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import linearize.api
import linearize.evaluate.speed
import linearize.evaluate.tasks
from linearize_cli.app import main

MACHINE = {"cpu": "A CPU", "cores": 8, "threads": 4, "memory_bytes": 2**34, "gpu": None, "system": "Linux x86_64"}
ROW: dict[str, Any] = {
    "role": "student",
    "model": "o",
    "context": 2048,
    "batch": 4,
    "new_tokens": 64,
    "status": "ok",
    "reason": None,
    "repeats": 3,
    "ttft_seconds": 0.5,
    "prefill_tokens_per_second": 16384.0,
    "prefill_tokens_per_second_low": 16000.0,
    "prefill_tokens_per_second_high": 17000.0,
    "decode_tokens_per_second": 120.0,
    "decode_tokens_per_second_low": 110.0,
    "decode_tokens_per_second_high": 130.0,
    "weights_bytes": 2**20,
    "growth_bytes": 2**20,
    "peak_bytes": 2**21,
    "memory_method": "m",
    "state_bytes": 4096,
    "kv_bytes": 0,
    "beyond_trained": True,
    "device": "cpu",
    "dtype": "float32",
    "machine": MACHINE,
    "versions": {"linearize": "0", "torch": "2"},
    "date": "2026-01-01",
}
REFUSED = {**ROW, "role": "teacher", "model": "t", "status": "refused", "reason": "too far", "beyond_trained": True}
SPEED: dict[str, Any] = {"rows": [ROW, REFUSED], "plots": ["p/decode.svg"], "file": "f.jsonl", "notes": ["a note"]}
SCORE: dict[str, Any] = {
    "task": "piqa",
    "version": 1.0,
    "filter": "none",
    "fewshot": 0,
    "questions": 200,
    "metric": "acc",
    "higher_is_better": True,
    "student": 0.61,
    "student_se": 0.0345,
    "teacher": 0.65,
    "teacher_se": 0.0337,
    "difference": -0.04,
    "difference_se": 0.02,
}
TASKS: dict[str, Any] = {
    "model": "o",
    "against": "t",
    "tasks": ["piqa"],
    "rows": [SCORE, {**SCORE, "metric": "ppl", "higher_is_better": False, "filter": "strict", "difference_se": None}],
    "groups": [],
    "limit": 200,
    "fewshot": None,
    "batch_size": 8,
    "context": 1024,
    "dtype": "float32",
    "device": "cpu",
    "versions": {"lm_eval": "0.4.13"},
    "notes": ["lm-eval: a warning"],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(result: dict[str, Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
            found.append((args, kwargs))
            print("chatter of a library")
            return result

        return call

    monkeypatch.setattr(linearize.evaluate.speed, "bench", stand_in(SPEED))
    monkeypatch.setattr(linearize.evaluate.tasks, "evaluate_tasks", stand_in(TASKS))
    return found


def read(capsys: pytest.CaptureFixture) -> str:
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().err.splitlines())


def test_bench_for_people(calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "o", "--against", "t"]) == 0
    text = read(capsys)
    assert "student o, teacher t; float32 on A CPU, 4 of 8 cores; 2026-01-01; linearize 0, torch 2" in text
    assert "2,048 4 student 120 ± 10 16,384 ± 500 0.50 s 2.0 MiB 4.0 KiB -" in text
    assert "2,048 4 teacher refused" in text and "refused: teacher t, 2,048 tokens x 4: too far" in text
    assert "the student was not trained on contexts of 2,048 tokens" in text
    assert "note: a note" in text and "wrote p/decode.svg" in text and "wrote f.jsonl" in text


def test_bench_passes_everything_on(calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "o", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SPEED
    assert calls[0][0] == ("o",)
    assert calls[0][1] == {
        "against": None, "contexts": None, "batches": [1, 4, 16], "new_tokens": 64, "device": "auto", "dtype": "auto",
        "repeats": 3, "max_seconds": 120.0, "max_bytes": None, "memory": True, "seed": 0, "file": None, "plots": None,
    }  # fmt: skip
    limits = ["--max-memory", "8GiB", "--no-memory", "--max-seconds", "5", "--repeats", "2"]
    places = ["--contexts", "512, 2k", "--batches", "2", "--plots", "p", "--out", "f.jsonl"]
    more = [*limits, *places, "--new-tokens", "16", "--seed", "7"]
    assert main(["bench", "o", *more]) == 0
    given = calls[1][1]
    assert (given["contexts"], given["batches"], given["max_bytes"]) == ([512, 2048], [2], 8 * 2**30)
    assert (given["memory"], given["plots"], given["file"]) == (False, Path("p"), Path("f.jsonl"))
    assert (given["new_tokens"], given["max_seconds"], given["repeats"], given["seed"]) == (16, 5.0, 2, 7)


def test_tasks_for_people(calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", "o", "--against", "t", "--tasks", "piqa,arc_easy", "--limit", "200"]) == 0
    text = read(capsys)
    assert "lm-eval 0.4.13: student o, teacher t; float32 on cpu, context 1024" in text
    assert "piqa acc ↑ 0 200 0.6100 ± 0.0345 0.6500 ± 0.0337 -0.0400 ± 0.0200" in text
    assert "piqa ppl (strict) ↓ 0 200 0.6100 ± 0.0345 0.6500 ± 0.0337 -0.04" in text
    assert "note: only the first 200 questions" in text and "note: lm-eval: a warning" in text
    args, given = calls[0]
    assert args == ("o",) and given["tasks"] == ["piqa", "arc_easy"]


def test_tasks_pass_everything_on(calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    more = ["--fewshot", "2", "--batch-size", "3", "--include-path", "d", "--context", "64", "--dtype", "float32"]
    assert main(["eval", "o", "--tasks", "a", *more, "--teacher-bits", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == TASKS
    assert calls[0][1] == {
        "tasks": ["a"], "limit": None, "fewshot": 2, "batch_size": 3, "include_path": Path("d"), "bars": False,
        "against": None, "context": 64, "device": "auto", "dtype": "float32", "teacher_bits": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "o"], "--data: missing"),
        (["eval", "o", "--data", "d", "--tasks", "a"], "--tasks and --data are two measurements"),
        (["eval", "o", "--tasks", "a", "--protocol", "concat"], "--protocol goes with --data"),
        (["eval", "o", "--data", "d", "--limit", "3"], "--limit goes with --tasks"),
        (["eval", "o", "--data", "d", "--include-path", "x"], "--include-path goes with --tasks"),
        (["bench", "o", "--contexts", "2x"], "--contexts: '2x' is not a whole number"),
        (["bench", "o", "--contexts", "512,"], "--contexts: ''"),
        (["bench", "o", "--batches", "0"], "--batches: '0'"),
        (["bench", "o", "--max-memory", "much"], "--max-memory: 'much'"),
        (["bench", "o", "--new-tokens", "4"], "--new-tokens"),
    ],
)
def test_refused_in_one_line(argv: list[str], message: str, calls: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2 and not calls
    text = capsys.readouterr().err
    assert message in text and len(text.splitlines()) == 1


def test_help_and_a_missing_harness_stay_light(source_env: dict[str, str], tmp_path: Path) -> None:
    code = """
import sys
from linearize_cli.app import main
assert main(["bench", "--help"]) == main(["eval", "--help"]) == 0
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "lm_eval" else real(name, *a)
assert main(["eval", "o", "--tasks", "piqa"]) == 2
assert not {"torch", "transformers", "datasets", "lm_eval", "matplotlib", "numpy", "rich"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=source_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "error: --tasks needs the package lm-eval, which is not installed" in done.stderr
    assert "pip install 'lm-eval>=0.4.12'" in done.stderr and len(done.stderr.splitlines()) == 1
