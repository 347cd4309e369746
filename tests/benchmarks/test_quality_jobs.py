"""Jobs of the quality table: each row once, some at a time, stopped at the end of a slice and gone on with."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, quality_jobs
from benchmarks.quality_jobs import Scheduler, open_table
from benchmarks.quality_rows import Row, conversions
from linearize.errors import RefusedError

SETTING = {
    "teacher": "tiny",
    "budget": 1000,
    "data": "train.jsonl",
    "heldout": "held.jsonl",
    "context": 256,
    "windows": 8,
    "overrides": [],
    "lambada": None,
    "lambada_rows": None,
}


def rows_of(*recipes: str) -> list[Row]:
    """Conversions at a budget of 1000 tokens, without those that are always there."""
    made, _ = conversions(recipes=recipes, variants={}, budget=1000, seed=0, overrides=[], teacher=None)
    return [row for row in made if row.name in recipes]


# Each job is replaced by a few lines that do what the name of its row says

FAKE = """
import json, os, pathlib, signal, sys, time
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(job["result"]).parent
name = job["rows"][0]["name"]
def stop(*_):
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
with open(folder / "runs", "a") as log:
    log.write(name + "\\n")
(folder / (name + ".started")).touch()
print("hello from", name, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
mode = {modes}.get(name, "ok")
if mode == "die":
    os._exit(3)
if mode == "wait":
    time.sleep(600)
if mode.startswith("with "):  # until another one runs beside it
    while not (folder / (mode[5:] + ".started")).exists():
        time.sleep(0.01)
results = []
for row in job["rows"]:
    if mode == "fail":
        row["error"] = {{"kind": "VerificationError", "message": "it diverged"}}
    else:
        row.update(machine="m", date="d", code=job["code"], cache_bytes=1, nll={nll}[row["kind"]],
                   token_perplexity=9.0, by_position=[], window=64, sinks=0, slices=1, seconds=1.0)
        row["branches"] = {{}}
        row["convert"] = None
    results.append(row)
pathlib.Path(job["result"]).write_text(json.dumps(results))
"""
NLL = {"teacher": 1.0, "cut": 2.0, "recipe": 1.5, "variant": 1.5}


@pytest.fixture
def slice_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """slice_of(rows, modes, **arguments) -> keys that remain after one call of the command."""

    def run(rows: list[Row], modes: dict[str, str] | None = None, **given: Any) -> list[str]:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(modes=modes or {}, nll=NLL))
        monkeypatch.setattr(quality_jobs, "command", lambda job: [sys.executable, str(script), str(job)])
        args = argparse.Namespace(**{
            "teacher": "t", "data": "d", "heldout": "h", "context": 256, "windows": 8, "lambada": None, "keep": False,
            "lambada_rows": None, "recall_queries": 0, "minutes": 5.0, "jobs": 1, "devices": ["cpu"], "seeds": [0],
            "leaders": "2", "only": [], **given,
        })  # fmt: skip
        table = open_table(tmp_path / "table", SETTING)
        table.state["code"] = "c"
        left = Scheduler(table, args, rows).run()
        table.write(left)
        return [row.key for row in left]

    return run


def runs(tmp_path: Path) -> list[str]:
    """Jobs as they were started."""
    return (tmp_path / "table" / "work" / "runs").read_text().split()


def held(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "table" / "quality.json").read_text())["rows"]


def test_every_row_is_run_once(slice_of: Any, tmp_path: Path, capfd: Any) -> None:
    rows = rows_of("lolcats", "hedgehog")
    assert slice_of(rows) == []
    assert runs(tmp_path) == ["teacher", "lolcats", "hedgehog"]
    assert list(held(tmp_path)) == ["teacher", "cut-w64-sinks4", "cut-w64-sinks0", "lolcats-s0", "hedgehog-s0"]
    assert "[hedgehog-s0] hello from hedgehog" in capfd.readouterr().out
    assert "hello from lolcats" in (tmp_path / "table" / "logs" / "lolcats-s0.log").read_text()
    assert slice_of(rows) == []
    assert len(runs(tmp_path)) == 3
    # A recipe that is another one now is another row; the others stay.
    changed = [rows[0], Row(kind="recipe", name="hedgehog", seed=0, recipe=rows[1].recipe | {"context": 512})]
    assert slice_of(changed) == []
    assert runs(tmp_path)[3:] == ["hedgehog"]
    assert held(tmp_path)["hedgehog-s0"]["recipe"]["context"] == 512


def test_only_some_rows(slice_of: Any, tmp_path: Path) -> None:
    assert slice_of(rows_of("lolcats", "hedgehog"), only=["hedgehog"]) == []
    assert runs(tmp_path) == ["teacher", "hedgehog"]


def test_jobs_share_a_device_and_the_table_says_so(slice_of: Any, tmp_path: Path) -> None:
    modes = {"lolcats": "with hedgehog", "hedgehog": "with lolcats"}
    # Three at a time: the teacher's job is not counted as a conversion of its own, and is marked with nothing.
    assert slice_of(rows_of("lolcats", "hedgehog", "t2r"), modes, jobs=3) == []
    rows = held(tmp_path)
    assert rows["lolcats-s0"]["shared"] >= 2 and rows["hedgehog-s0"]["shared"] >= 2
    assert rows["teacher"]["shared"] == 1


def test_jobs_are_spread_over_devices(slice_of: Any, tmp_path: Path) -> None:
    modes = {"teacher": "with lolcats", "lolcats": "with teacher"}
    assert slice_of(rows_of("lolcats"), modes, jobs=2, devices=["cuda:0", "cuda:1"]) == []
    logs = [(tmp_path / "table" / "logs" / f"{n}.log").read_text().split()[-1] for n in ("baselines", "lolcats-s0")]
    assert logs == ["0", "1"]
    assert held(tmp_path)["lolcats-s0"]["shared"] == 1


def test_the_end_of_a_slice_stops_what_runs_and_starts_no_more(slice_of: Any, tmp_path: Path) -> None:
    rows = rows_of("lolcats", "hedgehog")
    assert slice_of(rows, minutes=0.0) == ["teacher", "cut-w64-sinks4", "cut-w64-sinks0", "lolcats-s0", "hedgehog-s0"]
    assert not (tmp_path / "table" / "work" / "runs").exists()
    assert slice_of(rows, {"lolcats": "wait"}, minutes=0.05) in (["lolcats-s0", "hedgehog-s0"],)
    assert "Not done yet: lolcats-s0, hedgehog-s0." in (tmp_path / "table" / "quality.md").read_text()
    assert slice_of(rows) == []
    assert runs(tmp_path) == ["teacher", "lolcats", "lolcats", "hedgehog"]


def test_a_row_that_fails_is_a_row_and_the_others_still_run(slice_of: Any, tmp_path: Path) -> None:
    rows = rows_of("lolcats", "hedgehog", "t2r")
    assert slice_of(rows, {"lolcats": "die", "hedgehog": "fail"}) == []
    text = (tmp_path / "table" / "quality.md").read_text()
    assert "lolcats (seed 0) failed: Died: exit code 3; see logs/lolcats-s0.log" in text
    assert "hedgehog (seed 0) failed: VerificationError: it diverged" in text
    # What died may have been the machine's fault and is tried again; what diverged would only diverge again.
    assert slice_of(rows) == []
    assert runs(tmp_path) == ["teacher", "lolcats", "hedgehog", "t2r", "lolcats"]
    assert "error" not in held(tmp_path)["lolcats-s0"] and "error" in held(tmp_path)["hedgehog-s0"]


def test_further_seeds_wait_for_the_leaders(slice_of: Any, tmp_path: Path) -> None:
    rows = rows_of("lolcats", "hedgehog")
    assert slice_of(rows, {"hedgehog": "fail"}, seeds=[0, 5, 6], leaders="1") == []
    assert runs(tmp_path) == ["teacher", "lolcats", "hedgehog", "lolcats", "lolcats"]
    assert held(tmp_path)["lolcats-s6"]["recipe"]["seed"] == 6


def test_a_table_of_another_setting_is_refused(tmp_path: Path) -> None:
    open_table(tmp_path, SETTING).write()
    open_table(tmp_path, SETTING)
    with pytest.raises(RefusedError, match="another setting; differing: budget, context"):
        open_table(tmp_path, SETTING | {"budget": 2, "context": 512})


# The real thing


@pytest.mark.slow
def test_a_conversion_that_a_signal_stopped_goes_on(
    tmp_path: Path, root: Path, build_llama: Any, source_env: dict[str, str]
) -> None:
    """Two calls of the command on a tiny teacher: the first is interrupted in alignment, the second ends the table."""
    teacher = build_llama(tmp_path / "tiny", max_position_embeddings=256, initializer_range=0.4)
    text = tmp_path / "text.txt"
    text.write_text((root / "LICENSE").read_text() * 4)
    words = tmp_path / "words.jsonl"
    words.write_text('{"context": "Licensed under the Apache", "continuation": "License"}\n')
    command = [
        sys.executable, "-m", "benchmarks.quality", str(teacher), "--data", str(text), "--heldout", str(text),
        "--budget", "100k", "--out", str(tmp_path / "table"), "--recipes", "", "--only", "lolcats", "--windows", "2",
        "--lambada", str(words), "--devices", "cpu", "context=136", "align.batch_tokens=136", "--context", "136",
        "finetune.batch_tokens=136",
    ]  # fmt: skip
    env = {**source_env, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    seen = []
    for line_ in process.stdout:
        seen.append(line_)
        if "[lolcats-s0] align: step 1 of" in line_:
            process.send_signal(signal.SIGTERM)
    assert process.wait() == quality.MORE_TO_DO, "".join(seen)
    table = json.loads((tmp_path / "table" / "quality.json").read_text())
    assert table["left"] == ["lolcats-s0"] and "teacher" in table["rows"]

    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[lolcats-s0] going on from step" in done.stdout
    table = json.loads((tmp_path / "table" / "quality.json").read_text())
    row, teacher_row = table["rows"]["lolcats-s0"], table["rows"]["teacher"]
    assert row["slices"] == 2 and row["seconds"] > 0 and row["shared"] == 1
    assert {"cut-w64-sinks0", "cut-w64-sinks4"} < set(table["rows"])
    assert sum(stage["tokens"] for stage in row["convert"]["stages"].values()) == pytest.approx(100_000, abs=272)
    assert row["tokens"] == teacher_row["tokens"] == 2 * 135
    assert set(row["branches"]) == {"full", "window", "linear", "none"}
    assert row["lambada"]["rows"] == teacher_row["lambada"]["rows"] == 1
    assert str(tmp_path) not in json.dumps(table)
    assert {path.name for path in (tmp_path / "table").iterdir()} == {"quality.md", "quality.json", "logs", "work"}
    assert not [path for path in (tmp_path / "table" / "work").iterdir() if path.is_dir()]  # no model is left behind
    assert os.fspath(tmp_path) not in (tmp_path / "table" / "quality.md").read_text()
