"""The run folder: lock, identity, damage, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from linearize.convert.checkpoint import (
    KEEP,
    Run,
    find_start,
    latest,
    open_run,
    pack_state,
    record,
    save,
    write_record,
)
from linearize.convert.early import require_no_run, require_out, run_folder
from linearize.convert.restore import settled, unpack_state
from linearize.errors import RefusedError, UsageError


class Stop(Exception):
    pass


def leave(out: Path, steps: int = 3) -> None:
    """An unfinished run with `steps` checkpoints."""
    with pytest.raises(Stop), open_run(out) as run:
        assert find_start(run, {"recipe": "a", "data": "b"}, resume=False) is None
        write_record(run, {"recipe": "a", "data": "b", "micro": 3})
        for step in range(1, steps + 1):
            save(run, stage="align", step=step, tensors={"x": torch.full((4,), step)}, state={"step": step})
        raise Stop


def start_of(run: Run, resume: bool = True, **identity: str) -> int | None:
    found = find_start(run, {"recipe": "a", "data": "b"} | identity, resume=resume)
    return None if found is None else found.step


def test_newest_two_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    leave(out)
    assert len(list(run_folder(out).glob("*-align-*"))) == KEEP == 2
    with pytest.raises(RefusedError, match=r"unfinished run. Add --resume"):
        require_no_run(out)
    with pytest.raises(Stop), open_run(out) as run:
        assert record(run)["micro"] == 3
        found = find_start(run, {"recipe": "a", "data": "b"}, resume=True)
        assert found is not None and (found.stage, found.step, found.state) == ("align", 3, {"step": 3})
        assert found.tensors()["x"].tolist() == [3.0] * 4
        save(run, stage="finetune", step=1, tensors={}, state={})
        assert latest(run).stage == "finetune"  # type: ignore[union-attr]
        raise Stop


def test_a_run_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    with pytest.raises(RefusedError, match="differing: the recipe, the text"), open_run(tmp_path / "out") as run:
        start_of(run, data="c", recipe="d")
    with pytest.raises(RefusedError, match="Add --resume"), open_run(tmp_path / "out") as run:
        start_of(run, resume=False)
    with pytest.raises(Stop), open_run(tmp_path / "out") as run:
        assert start_of(run) == 3
        raise Stop


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    older, newest = sorted(run_folder(tmp_path / "out").glob("*-align-*"))
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    (run_folder(tmp_path / "out") / ".00-align-00000009.tmp-999999").mkdir()
    with pytest.raises(Stop), open_run(tmp_path / "out") as run:
        assert start_of(run) == 2
        assert not list(run.path.glob(".*tmp*"))
        assert not newest.exists()  # or it would count as the newest when old ones are dropped
        raise Stop
    (older / "manifest.json").unlink()
    with pytest.raises(RefusedError, match=f"{older.name}: is damaged"), open_run(tmp_path / "out") as run:
        start_of(run)
    assert older.exists()


def test_a_record_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Stop), open_run(tmp_path / "out") as run:
        for micro, kept in (({"finetune": 2}, []), ({"align": 1, "finetune": 2}, [0, 3]), (None, None)):
            write_record(run, {"micro": micro, "kept": kept})
            assert settled(run, ["finetune"]) == (micro, kept)  # a stage that is skipped has no micro-batch
        for micro, kept in (
            ({}, []),
            ({"align": 1}, []),
            ({"finetune": 0}, []),
            ({"finetune": True}, []),
            (7, []),
            (None, [-1]),
        ):
            write_record(run, {"micro": micro, "kept": kept})
            with pytest.raises(RefusedError, match=r"run\.json: is no checkpoint of this run \((micro|kept)\)"):
                settled(run, ["finetune"])
        raise Stop


def test_two_converts_into_one_folder(tmp_path: Path) -> None:
    with open_run(tmp_path / "out"):
        with pytest.raises(RefusedError, match="another convert writes there"), open_run(tmp_path / "out"):
            pass
        assert run_folder(tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


def test_a_second_convert_is_told_of_the_first_one_not_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    require_out(out, resume=False)
    with pytest.raises(UsageError, match="no unfinished run to resume"):
        require_out(out, resume=True)
    assert not list(tmp_path.iterdir())
    leave(out)
    with open_run(out):
        for resume in (False, True):
            with pytest.raises(RefusedError, match="another convert writes there") as caught:
                require_out(out, resume=resume)
            assert caught.value.exit_code == 3
    leave(out)
    require_out(out, resume=True)
    with pytest.raises(RefusedError, match=r"holds an unfinished run\. Add --resume"):
        require_out(out, resume=False)


def test_what_a_killed_verification_left_is_removed(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    left = run_folder(tmp_path / "out") / "verify" / "copied"
    left.mkdir(parents=True)
    with open_run(tmp_path / "out") as run:
        assert run.room == left.parent and not run.room.exists() and latest(run) is not None


def test_nothing_is_left_of_a_run_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(Stop), open_run(tmp_path / "new" / "folder" / "out"):
        raise Stop
    assert not list(tmp_path.iterdir())
    leave(tmp_path / "out")
    with pytest.raises(Stop), open_run(tmp_path / "out") as run:
        run.discard = True
        raise Stop
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match="cannot be written"), open_run(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_step_but_only_once(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "out") as run, run.listening():
        os.kill(os.getpid(), number)
        assert run.interrupted and run.due()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        run.stop_if_interrupted()
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "out"):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_hang_up_comes_twice_and_stops_once(tmp_path: Path) -> None:
    def unheard(number: int, frame: object) -> None:
        raise AssertionError("nobody listened")

    before = signal.signal(signal.SIGHUP, unheard)  # these tests, too, may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "out") as run, run.listening():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)
            assert run.interrupted and run.due()
            run.stop_if_interrupted()
        with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is unheard
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with open_run(tmp_path / "out") as run, run.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not run.interrupted
    finally:
        signal.signal(signal.SIGHUP, before)


HUNG_UP = """
import os, signal, sys
from pathlib import Path
from linearize.convert.checkpoint import open_run

signal.signal(signal.SIGHUP, signal.SIG_DFL)
with open_run(Path(sys.argv[1])) as run, run.listening():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGHUP)
    print("step 1", file=sys.stderr, flush=True)
    assert run.interrupted
Path(sys.argv[2]).write_text("saved")
"""


def test_a_terminal_that_has_closed_is_no_reason_not_to_save(tmp_path: Path, source_env: dict[str, str]) -> None:
    ours, terminal = os.openpty()
    command = [sys.executable, "-c", HUNG_UP, str(tmp_path / "out"), str(tmp_path / "told")]
    child = subprocess.Popen(command, env=source_env, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.close(ours)
    child.communicate(timeout=60)
    assert child.returncode == 0 and (tmp_path / "told").read_text() == "saved"


def test_optimiser_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
        start = {"w": torch.ones(3, 2), "b": torch.zeros(2), "kept": torch.ones(1)}
        parameters = {name: nn.Parameter(value) for name, value in start.items()}
        return parameters, torch.optim.AdamW([parameters["w"], parameters["b"]], lr=0.1)

    def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, number: int) -> None:
        loss = (torch.full((1, 3), number + 0.7) @ parameters["w"]).sin().sum()
        if number % 2:  # b is not touched in every step: its count differs
            loss = loss + parameters["b"].cos().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    one, first = make()
    for number in range(6):
        step(one, first, number)
    two, second = make()
    for number in range(3):
        step(two, second, number)
    with torch.no_grad():
        two["kept"].fill_(7.0)
    with pytest.raises(Stop), open_run(tmp_path / "out") as run:
        save(run, stage="align", step=3, tensors=pack_state(two, second), state={})
        found = latest(run)
        assert found is not None
        three, third = make()
        unpack_state(found.tensors(), three, third)
        with pytest.raises(RefusedError, match="does not hold other"):
            unpack_state(found.tensors(), {"other": nn.Parameter(torch.ones(1))}, None)
        raise Stop
    for number in range(3, 6):
        step(three, third, number)
    assert torch.equal(one["w"], three["w"]) and torch.equal(one["b"], three["b"])
    assert three["kept"].tolist() == [7.0]
