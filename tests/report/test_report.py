"""`linearize.report`: from a folder to a file, what is refused, and the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import linearize
import linearize.api
from linearize.errors import RefusedError, UsageError
from linearize_cli.app import main


def test_with_a_teacher_and_a_text(full: dict[str, Any], places: dict[str, Path]) -> None:
    page = Path(full["file"]).read_text()
    assert len(page.encode()) == full["bytes"] and page.startswith("<!doctype html>")
    assert full["sections"] == ["quality", "training", "attention", "cost", "recipe", "environment"]
    assert len(full["left_out"]) == 1 and "bench" in full["left_out"][0]
    audit = linearize.audit(places["run"], against=places["teacher"], data=str(places["text"]), device="cpu")
    assert full["audit"] == audit
    assert len(full["attention"]) == 12 and full["attention"][-1]["layer"] == 2
    assert '<option value="2" selected>2</option>' in page and '<option value="3" selected>3</option>' in page
    assert str(places["run"].parent) not in page and "Match of each layer over time" in page


def test_without_them_it_takes_what_the_folder_holds(places: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "an older run"
    shutil.copytree(places["run"], run)
    (run / "history.json").unlink()
    manifest = json.loads((run / "linearize.json").read_text())
    del manifest["files"]["history.json"]
    (run / "linearize.json").write_text(json.dumps(manifest))
    found = linearize.report(run)
    assert found["file"] == str(tmp_path / "an older run-report.html") and found["audit"] is None
    assert len(found["left_out"]) == 4 and any("history.json" in line for line in found["left_out"])
    manifest["audit"] = {"R": 12.5, "ppl_student": 4.0, "ppl_teacher": 3.0, "branches": {}}
    (run / "linearize.json").write_text(json.dumps(manifest))
    again = linearize.report(run)  # only a report is replaced by a report
    assert again["audit"]["R"] == 12.5 and "12.5 %" in Path(again["file"]).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["an older run", "an older run-report.html"]


def test_with_rows_of_a_benchmark(places: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"role": role, "context": n, "batch": 1, "decode_tokens_per_second": 5.0 * n, "date": "2026-11-22"}
            for role in ("student", "teacher") for n in (64, 128)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = linearize.report(places["run"], out=tmp_path / "r.html", bench=tmp_path / "rows.jsonl")
    page = (tmp_path / "r.html").read_text()
    assert "Speed of writing (decode)" in page and "2026-11-22" in page and len(found["left_out"]) == 2


def test_bad_input_is_refused_before_any_work(places: dict[str, Path], tmp_path: Path) -> None:
    run, teacher, data = places["run"], places["teacher"], str(places["text"])
    kept = tmp_path / "kept.html"
    kept.write_text("<html>mine</html>")
    with pytest.raises(RefusedError, match="not a report"):
        linearize.report(run, out=kept)
    assert kept.read_text() == "<html>mine</html>"
    refused: list[tuple[str, dict[str, Any]]] = [
        ("is an ordinary checkpoint", {"run": teacher}),
        ("there is no model", {"run": tmp_path / "none"}),
        ("--data: missing", {"against": teacher}),
        ("--against: missing", {"data": data}),
        ("--layer and --head", {"layer": 1}),
        ("is a folder", {"out": tmp_path}),
        ("there is no folder", {"out": tmp_path / "a" / "b.html"}),
        ("cannot be read", {"bench": tmp_path / "none.json"}),
        ("--layer 3: the model has 3 of them", {"layer": 3, "against": teacher, "data": data}),
        ("--head 4: the model has 4 of them", {"head": 4, "against": teacher, "data": data}),
    ]
    for words, options in refused:
        with pytest.raises(UsageError, match=words):
            linearize.report(**({"run": run, "out": tmp_path / "r.html"} | options))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.html"]


def test_the_command_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    calls: list[Any] = []

    def stand_in(run: str, **options: Any) -> dict[str, Any]:
        calls.append((run, options))
        print("chatter of a library")
        return {"file": "r.html", "bytes": 2048, "sections": [], "left_out": ["a thing"], "audit": None}

    monkeypatch.setattr(linearize.api, "report", stand_in)
    assert main(["report", "out"]) == 0
    text = capsys.readouterr().err
    assert "left out: a thing" in text and "wrote r.html (2.0 KiB)" in text
    argv = [
        "report",
        "out",
        "--against",
        "m",
        "--data",
        "d",
        "--out",
        "r.html",
        "--bench",
        "b",
        "--layer",
        "3",
        "--head",
    ]
    more = ["--context", "64", "--device", "cpu", "--dtype", "float32", "--teacher-bits", "4", "--json"]
    assert main([*argv, "0", *more]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "r.html"
    assert calls[1] == ("out", {
        "against": "m", "data": "d", "out": "r.html", "bench": "b", "layer": 3, "head": 0, "context": 64,
        "device": "cpu", "dtype": "float32", "teacher_bits": 4,
    })  # fmt: skip
    assert main(["report", "out", "--layer", "-1"]) == 2 and main(["report"]) == 2


def test_help_is_light(source_env: dict[str, str], tmp_path: Path) -> None:
    code = """
import sys, linearize
from linearize_cli.app import main
assert main(["report", "--help"]) == 0 and main(["convert", "--help"]) == 0
assert not {"torch", "transformers", "numpy", "rich", "tensorboard", "wandb", "trackio"} & set(sys.modules)
assert callable(linearize.report) and "report" in dir(linearize)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_env, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "linearize report out --against demo --data demo" in done.stdout and "--report-to" in done.stdout
