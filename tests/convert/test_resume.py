"""N steps are k steps, an end of any kind, and N - k more: bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linearize.convert import checkpoint, pipeline
from linearize.convert.early import run_folder
from linearize.convert.pipeline import convert
from linearize.errors import RefusedError, UsageError
from linearize.progress import NullProgress
from tests.interrupter import Interrupter

OPTIONS = [
    "context=64", "mixer.window=16", "mixer.feature_dim=8", "device=cpu", "seed=5",
    "align.tokens=1536", "align.batch_tokens=256", "align.window_dropout=0.5", "align.train=[mixer,q_proj]",
    "finetune.tokens=1536", "finetune.batch_tokens=256", "finetune.lora.dropout=0.1", "finetune.kl=1",
    "finetune.lora.targets=[q_proj,o_proj]", "finetune.full=[v_proj]",
]  # fmt: skip

KILLED = """
import os, signal, sys
import torch
from linearize.convert import checkpoint, pipeline
torch.set_num_threads(1)
teacher, out, data, stage, step, where, resume, *options = sys.argv[1:]
checkpoint.Run.due = lambda self: True
save, write = checkpoint.save, checkpoint.write_json
reached = False

def saved(run, **what):
    global reached
    reached = (what["stage"], what["step"]) == (stage, int(step))
    save(run, **what)
    if reached:
        os.kill(os.getpid(), signal.SIGKILL)

def written(path, values):
    if reached and where == "half" and path.name == checkpoint.MANIFEST:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, values)

from linearize.convert import align, finetune
align.save = finetune.save = saved
checkpoint.write_json = written
pipeline.convert(teacher, out, recipe="lolcats", data=data, overrides=options, resume=resume == "resume")
"""


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes are another test's matter."""
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
        return out, convert(teacher_folder, out, recipe="lolcats", data=str(text_file), overrides=OPTIONS)


def same(whole: tuple[Path, dict[str, Any]], out: Path, report: dict[str, Any]) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, whole[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert report["layers"] == whole[1]["layers"]
    for stage in ("align", "finetune"):
        figures = [{k: v for k, v in r["stages"][stage].items() if k != "seconds"} for r in (report, whole[1])]
        assert figures[0] == figures[1]
    assert not run_folder(out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["after", "half"])
def test_killed_in_both_stages(
    whole: Any, teacher_folder: Path, text_file: Path, tmp_path: Path, source_env: dict[str, str], where: str
) -> None:
    out = tmp_path / "out"
    for stage, step, resume in (("align", "3", "begin"), ("finetune", "2", "resume")):
        places = [str(path) for path in (teacher_folder, out, text_file)]
        command = [sys.executable, "-c", KILLED, *places, stage, step, where, resume, *OPTIONS]
        done = subprocess.run(command, env=source_env, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists() and run_folder(out).exists()
    report = convert(teacher_folder, out, recipe="lolcats", data=str(text_file), overrides=OPTIONS, resume=True)
    same(whole, out, report)


def test_interrupted_and_resumed(
    whole: Any, teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 3600.0)  # only the interruption saves
    out = tmp_path / "out"
    run: Callable[..., Any] = lambda **more: convert(  # noqa: E731
        teacher_folder, out, recipe="lolcats", **{"data": str(text_file), "overrides": OPTIONS, **more}
    )
    with pytest.raises(KeyboardInterrupt):
        run(progress=Interrupter("align", 4))
    assert not out.exists()
    with pytest.raises(RefusedError, match=r"holds an unfinished run\. Add --resume"):
        run()
    with pytest.raises(RefusedError, match=r"differing: the recipe \(seed=6, begun with 5\)\. Give what"):
        run(overrides=[*OPTIONS, "seed=6"], resume=True)
    # so other windows
    with pytest.raises(RefusedError, match=r"differing: the recipe \(context=48, begun with 64\)\. Give"):
        run(overrides=[*OPTIONS, "context=48"], resume=True)
    (tmp_path / "other.txt").write_text(text_file.read_text()[::-1])
    with pytest.raises(RefusedError, match=rf"the text \({tmp_path}/other.txt, begun with {text_file}\)\. Give"):
        run(data=str(tmp_path / "other.txt"), resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(progress=Interrupter("finetune", 5), resume=True)
    same(whole, out, run(resume=True))
    with pytest.raises(RefusedError, match="is a finished conversion: there is nothing to resume"):
        run(resume=True)


class Tables(NullProgress):
    """Counts the layer tables."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def layer_table(self, rows: Any) -> None:
        self.rows.append(rows)


def test_a_stage_that_was_over_is_not_told_again(
    whole: Any, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out, watch = tmp_path / "out", Tables()
    places: dict[str, Any] = {"recipe": "lolcats", "data": str(text_file), "overrides": OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        convert(teacher_folder, out, progress=Interrupter("align", 6), **places)  # the last step
    same(whole, out, convert(teacher_folder, out, progress=watch, resume=True, **places))
    assert not watch.rows


class Told(NullProgress):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_resume_begins_only_what_was_begun(whole: Any, teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out, watch = tmp_path / "out", Told()
    places: dict[str, Any] = {"recipe": "lolcats", "data": str(text_file), "overrides": OPTIONS, "resume": True}
    run_folder(tmp_path / "outs").mkdir()
    with pytest.raises(
        UsageError, match=r"out has no unfinished run to resume. Did you mean 'outs'\? Leave out --resume"
    ):
        convert(teacher_folder, out, **places)
    assert [path.name for path in tmp_path.iterdir()] == [".outs.linearize-run"]

    run_folder(out).mkdir()  # killed before it had saved anything
    (run_folder(out) / "lock").touch()
    same(whole, out, convert(teacher_folder, out, progress=watch, **places))
    assert watch.lines.count("the run was killed before it had saved anything: it begins anew") == 1
