"""The row of a small conversion on a CPU: what it is made of, and what it does not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import conversion_speed
from benchmarks.conversion_speed import WARM, Clock, main

TINY = {"layers": 1, "hidden": 32, "heads": 2, "kv-heads": 1, "intermediate": 32, "vocab": 4200, "context": 192,
        "batch-tokens": 384, "steps": WARM + 2, "repeats": 1}  # fmt: skip


def test_a_row_and_what_it_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--device", "cpu", *(f"--{name}={value}" for name, value in TINY.items())]
    for _ in range(2):  # the second finds the teacher, and replaces what was converted
        assert main(arguments) == 0
        row: dict[str, Any] = json.loads(capsys.readouterr().out)
        rates, softmax = row["conversion tokens/s"], row["softmax"]
        assert softmax["forward"]["windows"] == softmax["lora"]["windows"] == 2
        for stage, other in (("align", "forward"), ("finetune", "lora")):
            assert row["percent"][stage] == pytest.approx(
                100 * rates[stage] / softmax[other]["tokens_per_s"], rel=0.02, abs=0.1
            )
    assert (tmp_path / "out" / "config.json").is_file()


def test_steps_that_compile_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 50.0, 90.0, 120.0, 121.0, 123.0, 125.0])
    monkeypatch.setattr(conversion_speed.time, "monotonic", lambda: next(times))
    clock = Clock()
    clock.start("align", 7, 1000)
    for step in range(7):
        clock.step("align", step + 1, 0.0, 0, {})
        assert (clock.rate("align") is None) is (step < WARM + 1)
    assert clock.rate("align") == 500.0 and clock.rate("finetune") is None
