"""The tutorial's commands run, one after the other, and what commands print with --json is what docs/json.md says."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linearize_cli.app import main
from linearize_cli.output import print_json
from tests.docs.fences import blocks
from tests.docs.schema import complaints, tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
TABLES = tables(DOCS / "json.md")
JSON = {
    "inspect": ["inspect demo", "inspect demo --recipe lolcats-hybrid", "inspect out"],
    "convert --plan": ["convert demo other --recipe my.yaml --plan context=256"],
    "eval --data": ["eval out --data heldout.txt --context 256", "eval out --against demo --data heldout.txt"],
    "audit": ["audit out --against demo --data heldout.txt --context 512"],
    "recall": ["recall out --against demo --data demo --context 384 --queries 32 --distance 200"],
    "select": ["select demo --data heldout.txt --keep 2 --method window context=256"],
    "generate": ["generate out --prompt 'def f' --max-new-tokens 4"],
    "bench": ["bench out --against demo --contexts 64 --batches 1 --new-tokens 8 --repeats 1 --no-memory"],
    "report": ["report out --out r.html"],
    "verify": ["verify out", "verify out --against demo"],
    "push": ["push out me/it --dry-run --license mit"],
    "recipes ls": ["recipes ls"],
    "recipes show": ["recipes show pure"],
    "recipes cp": ["recipes cp pure copy.yaml"],
    "recipes validate": ["recipes validate my.yaml"],
    "doctor": ["doctor"],
}
"""Commands whose real outputs are compared with each section; import and tasks need files of their own."""


def run(command: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one line, in this process where it is ours."""
    if not command.startswith("linearize "):
        line = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(shlex.split(command, comments=True)[1:])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_the_tutorial_runs_and_json_is_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    converted = keep_results(monkeypatch)
    lines = [line for block in blocks(DOCS / "tutorial.md", "console") for line in block.splitlines()]
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert len(commands) == len(lines) > 10, "a line of the tutorial is no command"
    for command in commands:
        code, _, err = run(command)
        assert code == 0, f"{command}: {err[-2000:]}"
        assert "Traceback" not in err and "\x1b[" not in err, command
    assert (tmp_path / "out-report.html").is_file() and (tmp_path / "out" / "config.json").is_file()
    (code,) = blocks(DOCS / "tutorial.md", "python")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "tutorial.md", "exec"), {})
    assert said.getvalue().startswith("def read_file(path):")

    (result,) = converted
    assert wrong("convert", result) == []
    for section, lines in JSON.items():
        for line in lines:
            code, out, err = run(f"linearize {line} --json")
            assert code == 0, f"{line}: {err[-2000:]}"
            assert wrong(section, json.loads(out)) == [], line


def keep_results(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What conversions return from here on, as --json would print it; another one would take half a minute."""
    import linearize.convert.pipeline as pipeline

    kept: list[dict[str, Any]] = []
    convert = pipeline.convert

    def keeping(*args: Any, **kwargs: Any) -> dict[str, Any]:
        report = convert(*args, **kwargs)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print_json(report)
        kept.append(json.loads(out.getvalue()))
        return report

    monkeypatch.setattr(pipeline, "convert", keeping)
    return kept


def wrong(section: str, value: dict[str, Any]) -> list[str]:
    return [f"{section}: {line}" for line in complaints(value, TABLES[section])]
