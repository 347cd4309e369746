"""Rows of a benchmark, as `linearize bench` writes them and in other shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import UsageError
from linearize.report.bench import conditions, curves, read_bench

MACHINE = {"cpu": "a CPU", "gpu": None, "cores": 2, "memory_bytes": 10}


def row(role: str, context: int, batch: int = 1, speed: float | None = 10.0, **more: Any) -> dict[str, Any]:
    return {
        "role": role, "model": "/home/someone/models/x", "context": context, "batch": batch, "new_tokens": 64,
        "decode_tokens_per_second": speed, "decode_tokens_per_second_low": 1.0, "ttft_seconds": 0.5,
        "peak_bytes": 1 << 20, "weights_bytes": 5, "state_bytes": 7, "machine": MACHINE, "versions": {"torch": "2"},
        "device": "cpu", "dtype": "float32", "date": "2026-11-22",
    } | more  # fmt: skip


def written(folder: Path, text: str) -> str:
    path = folder / "rows.json"
    path.write_text(text)
    return str(path)


def test_what_bench_prints(tmp_path: Path) -> None:
    skipped = {"status": "skipped", "ttft_seconds": None, "peak_bytes": None}
    rows = [
        row("teacher", 512),
        row("student", 512, speed=20.0),
        row("student", 2048, speed=18.0),
        row("student", 512, 4),
        row("student", 8192, speed=None, **skipped),
    ]
    for text in (json.dumps({"rows": rows, "plots": [], "notes": []}), "\n".join(map(json.dumps, rows)) + "\n"):
        path = written(tmp_path, text)
        found = {(c.figure, c.name, c.batch): c for c in read_bench(path)}
        speed = found["decode_tokens_per_second", "student", 1]
        assert speed.points == [(512.0, 20.0), (2048.0, 18.0)] and not speed.teacher
        assert found["decode_tokens_per_second", "teacher", 1].teacher
        assert found["decode_tokens_per_second", "student", 4].points == [(512.0, 10.0)]
        assert {key[0] for key in found} == {"decode_tokens_per_second", "ttft_seconds", "peak_bytes"}
        assert next(c.figure for c in found.values()) == "decode_tokens_per_second"
        assert conditions(path) == "a CPU, cpu, float32, 2026-11-22"


def test_other_shapes(tmp_path: Path) -> None:
    nested = {"batch": 2, "results": [{"context": 128, "teacher": {"tok_s": 5.0}, "student": {"tok_s": 9.0}}]}
    found = {c.name: c for c in read_bench(written(tmp_path, json.dumps(nested)))}
    assert found["teacher"].teacher and found["student"].points == [(128.0, 9.0)] and found["student"].batch == 2
    grouped = {"student": [{"length": 64, "latency_seconds": 0.1}], "teacher": [{"length": 64, "latency_seconds": 0.2}]}
    assert {(c.name, c.teacher) for c in read_bench(written(tmp_path, json.dumps(grouped)))} == {
        ("student", False), ("teacher", True),
    }  # fmt: skip


def test_no_path_of_a_machine_is_shown() -> None:
    found = curves([{"model": "/home/someone/models/x", "context": 8, "tok_s": 1.0}])
    assert [c.name for c in found] == ["x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "neither JSON nor JSON lines"), ("{}", "no row"), ('[{"context": 8}]', "no row"),
        ('{"context": "8", "tok_s": 1}', "no row"), ('[{"context": NaN, "tok_s": 1}]', "no row"),
        ('[{"context": 8, "tok_s": -1}]', "no row"), ("[" * 5000 + "]" * 5000, "--bench"),
        ('{"a": [[[[[[[[[[1]]]]]]]]]]}', "no row"),
    ],
)  # fmt: skip
def test_what_is_no_benchmark_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_bench(written(tmp_path, text))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_bench(str(tmp_path / "none.json"))
    (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_bench(str(tmp_path / "bin"))
