"""What is said when a conversion is stopped, by Ctrl-C or by a full disk: the command that goes on, where one does."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import RefusedError
from linearize_cli.app import main
from tests.cli.stand_ins import RUNS


def run_of(out: Path) -> Path:
    return out.parent / f".{out.name}.linearize-run"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT of a conversion that got as far as checkpoints."""
    fake = types.ModuleType("linearize.convert.checkpoint")
    fake.run_folder = run_of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "linearize.convert.checkpoint", fake)
    return tmp_path / "my out"


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_gives_the_command_that_goes_on(
    saved: bool,
    out: Path,
    library: dict[str, Any],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if saved:
        run_of(out).mkdir()
    library["convert"] = KeyboardInterrupt()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/linearize"])
    argv = ["convert", "m", str(out), "--data", "d", "keep_softmax=every 4"]
    assert main(argv) == 130
    err = capsys.readouterr().err
    assert "interrupted" in err
    go_on = f"linearize convert m '{out}' --recipe pure --data d 'keep_softmax=every 4' --resume"
    assert (go_on in err) == saved, err
    assert ("Nothing was saved" in err) == (not saved)


@pytest.mark.parametrize(("saved", "number"), [(True, 28), (False, 28), (True, 13)])
def test_a_disk_that_fills_up_says_how_to_go_on(
    saved: bool,
    number: int,
    out: Path,
    library: dict[str, Any],
    capsys: pytest.CaptureFixture,
) -> None:
    if saved:
        run_of(out).mkdir()
    error = RefusedError("no space left on the disk")
    error.__cause__ = OSError(number, "told by the system")
    library["convert"] = error
    assert main(["convert", "m", str(out), "--data", "d", "--teacher-bits", "4"]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "chatter of a library"]
    assert lines[-1] == "error: no space left on the disk"
    told = saved and number == 28
    assert len(lines) == 1 + told and (not told or "--data d --teacher-bits 4 --resume" in lines[0]), lines


def test_ctrl_c_elsewhere(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    library["evaluate"] = KeyboardInterrupt()
    assert main(RUNS["evaluate"]) == 130
    assert "--resume" not in capsys.readouterr().err
