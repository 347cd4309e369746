"""A streamed conversion that died anywhere and was resumed is the one that nothing disturbed, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linearize.convert import checkpoint, pipeline, stream_convert, stream_progress, stream_run
from linearize.convert.early import run_folder
from linearize.convert.pipeline import convert
from linearize.convert.stream_states import Stream
from linearize.errors import RefusedError
from linearize.progress import NullProgress
from tests.convert.streamed import SMALL, same


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes are another test's matter."""
    for module in (pipeline, stream_convert):
        monkeypatch.setattr(module, "verify_export", lambda folder, expected, **places: {})


class Dead(BaseException):
    """As if the process were gone."""


@pytest.fixture(scope="module")
def reference(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streamed run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_convert, "verify_export", lambda folder, expected, **places: {})
        convert(teacher_folder, out, recipe="pure", data=str(text_file), overrides=PURE, stream=True)
    return out


PURE = [*SMALL, "calibrate.tokens=128"]
DEATHS = {
    "between two layers": (stream_run, "_save", 2),
    "in a calibration": (stream_run, "calibrate", 2),
    "between two steps": (stream_progress.OneOfMany, "step", 9),
    "before hidden states are written": (Stream, "write", 4),
    "while a layer is written": (stream_convert.ShardWriter, "write", 20),
    "in verification": (stream_convert, "verify_streamed", 1),
}


@pytest.mark.parametrize("where", DEATHS)
def test_resumed_after_a_death(
    where: str, reference: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, number = DEATHS[where]
    function, calls = getattr(owner, name), []
    done: list[int] = []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            raise Dead
        return function(*args, **kwargs)

    layer = stream_run._convert_layer
    out, run = tmp_path / "out", {"recipe": "pure", "data": str(text_file), "overrides": PURE}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        patch.setattr(checkpoint.Run, "due", lambda self: True)
        with pytest.raises(Dead):
            convert(teacher_folder, out, stream=True, **run)
    assert not out.exists() and len(calls) == number
    with pytest.raises(RefusedError, match="holds an unfinished run"):
        convert(teacher_folder, out, stream=True, **run)
    with pytest.raises(RefusedError, match=r"differing: --stream \(it was begun with it\)"):
        convert(teacher_folder, out, stream=False, resume=True, **run)
    before = checkpoint.latest(checkpoint.Run(path=run_folder(out), lock=-1))
    assert before is not None
    monkeypatch.setattr(stream_run, "_convert_layer", lambda work, index: (done.append(index), layer(work, index)))
    convert(teacher_folder, out, resume=True, **run)  # it knows by itself that it streams
    assert done == list(range(before.step, 2))  # what was written is not done again
    same(out, reference)
    assert not run_folder(out).exists()


KILLED = """
import os, signal, sys
import torch
from linearize.convert import align, checkpoint
from linearize.convert.pipeline import convert
torch.set_num_threads(1)
teacher, out, data, *options = sys.argv[1:]
checkpoint.Run.due = lambda self: True
save = checkpoint.save
def saved(run, **what):
    save(run, **what)
    if run.path.name == "layer-00001" and what["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
align.save = saved
convert(teacher, out, recipe="pure", data=data, overrides=options, stream=True)
"""


@pytest.mark.slow
def test_killed_within_a_layer(
    reference: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, source_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(teacher_folder), str(out), str(text_file), *PURE]
    done = subprocess.run(command, env=source_env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    steps: list[int] = []

    class Counting(NullProgress):
        def step(self, stage: str, step: int, *rest: Any) -> None:
            steps.append(step)

    convert(teacher_folder, out, recipe="pure", data=str(text_file), overrides=PURE, resume=True, progress=Counting())
    assert steps == [10, 11, 12]  # of six a layer
    same(out, reference)


def test_a_missing_file_of_hidden_states_is_named(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run = tmp_path / "out", {"recipe": "pure", "data": str(text_file), "overrides": PURE}
    with monkeypatch.context() as patch:
        patch.setattr(stream_run, "_convert_layer", lambda work, index: (_ for _ in ()).throw(Dead))
        with pytest.raises(Dead):
            convert(teacher_folder, out, stream=True, **run)
    os.truncate(run_folder(out) / "align-00000.hidden", 100)
    with pytest.raises(RefusedError, match=r"align-00000\.hidden is missing or cut short\. To start over, delete"):
        convert(teacher_folder, out, resume=True, **run)


def test_hidden_states_lie_on_the_disk_under_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next checkpoint counts on them: a file whose name is not flushed may be gone after the power is."""
    flushed: list[tuple[int, int]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        place = os.fstat(handle)
        flushed.append((place.st_dev, place.st_ino))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    stream = Stream(name="align", rows=np.arange(2), context=3, hidden=4, dtype=torch.float32, batch=1, folder=tmp_path)
    stream.write(1, (torch.ones(1, 3, 4) for _ in range(2)))
    places = [path.stat() for path in (stream.path(1), tmp_path)]
    assert flushed == [(place.st_dev, place.st_ino) for place in places]
    stream.require(1)
