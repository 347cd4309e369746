"""Trackers: what they are sent, that they change nothing, and that none of them can end a conversion."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import linearize
import linearize.api
from linearize import tracking
from linearize.convert import pipeline
from linearize.convert.pipeline import convert
from linearize.errors import UsageError
from linearize.progress import NullProgress, record
from linearize.tracking import flat, tracked
from linearize_cli.app import main

OPTIONS = [
    "context=64", "mixer.window=16", "mixer.feature_dim=8", "device=cpu", "align.tokens=1024", "align.batch_tokens=256",
    "finetune.tokens=768", "finetune.batch_tokens=256", "finetune.lora.dropout=0.1",
]  # fmt: skip


class Library(types.ModuleType):
    """Stands in for wandb and trackio; raises from `fails_at` on."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        super().__init__(name)
        self.fails_at = fails_at
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> None:
        self.begun = options
        if self.fails_at == "init":
            raise ConnectionError("no network\nat all")

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))
        torch.randn(3)  # a library may do as it likes with the global random state
        if self.fails_at == "log":
            sys.exit("leaving")

    def finish(self) -> None:
        self.finished += 1
        if self.fails_at == "finish":
            raise RuntimeError


class Watch(NullProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(name: str, fails_at: str = "") -> Library:
        made = Library(name, fails_at)
        made.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return install


@pytest.fixture(scope="module")
def plain(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that nobody watches."""
    out = tmp_path_factory.mktemp("plain") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
        convert(teacher_folder, out, recipe="lolcats", data=str(text_file), overrides=OPTIONS)
    return out


@pytest.mark.parametrize(("name", "fails_at"), [("wandb", ""), ("trackio", "log")])
def test_a_tracker_changes_nothing_and_cannot_end_a_conversion(
    plain: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Any,
    name: str, fails_at: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
    fake, watch = library(name, fails_at), Watch()
    out = tmp_path / "watched"
    convert(
        teacher_folder, out, recipe="lolcats", data=str(text_file), overrides=OPTIONS, report_to=name, progress=watch
    )
    ours, theirs = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (out / "history.json").read_bytes() == (plain / "history.json").read_bytes()
    assert fake.begun["project"] == "linearize" and fake.begun["name"] == "watched"
    assert fake.begun["config"]["recipe.align.tokens"] == 1024 and fake.begun["config"]["teacher"] == "tiny"
    assert not any(str(tmp_path) in str(value) for value in fake.begun["config"].values())
    warnings = [line for line in watch.messages if line.startswith("warning")]
    if fails_at:
        assert len(warnings) == 1 and f"{name} failed" in warnings[0] and "\n" not in warnings[0]
        assert len(fake.logged) == 1 and fake.finished == 0
        return
    assert not warnings and fake.finished == 1
    assert [step for step, _ in fake.logged] == [1, 2, 3, 4, 5, 6, 7]
    align, finetune = fake.logged[1][1], fake.logged[-1][1]
    assert {"align/loss", "align/lr", "align/match/0", "align/loss/1", "align/seconds_a_step"} <= set(align)
    assert set(finetune) == {"finetune/loss", "finetune/lr", "finetune/ce", "finetune/seconds_a_step"}
    assert all(isinstance(value, float) for value in align.values()) and align["align/seconds_a_step"] > 0


@pytest.mark.parametrize(
    ("fails_at", "why", "logged"), [("init", "no network at all", 0), ("finish", "RuntimeError", 1)]
)
def test_a_run_that_cannot_be_opened_or_closed_is_one_line(
    library: Any, tmp_path: Path, fails_at: str, why: str, logged: int
) -> None:
    fake, said = library("wandb", fails_at), []
    with tracked("wandb", tmp_path / "out", config={}, before={}, tell=said.append):
        record("align", 1, {"loss": 1.0})
    assert len(fake.logged) == logged and "\n" not in said[-1]
    assert said[-1].startswith("warning: wandb failed") and said[-1].endswith(f"({why})") and len(said) == 1 + logged


def test_an_interrupted_conversion_closes_its_run(library: Any, tmp_path: Path) -> None:
    fake = library("trackio")
    with pytest.raises(KeyboardInterrupt), tracked("trackio", tmp_path, config={}, before={}, tell=lambda text: None):
        raise KeyboardInterrupt
    assert fake.finished == 1
    record("align", 1, {"loss": 1.0})
    assert not fake.logged  # nobody listens any more


def test_steps_count_on_where_layers_are_aligned_one_after_another(library: Any, tmp_path: Path) -> None:
    fake = library("wandb")
    with tracked("wandb", tmp_path, config={}, before={"finetune": 4}, tell=lambda text: None):
        for stage, step in (("align", 1), ("align", 2), ("align", 1), ("align", 2), ("finetune", 1)):
            record(stage, step, {"loss": 1.0})
    assert [step for step, _ in fake.logged] == [1, 2, 3, 4, 5]


def test_tensorboard_writes_what_it_can_read_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    with tracked("tensorboard", tmp_path / "out", config={"seed": 3}, before={"finetune": 2}, tell=said.append):
        for step, loss in ((1, 2.0), (2, 1.5)):
            record("align", step, {"loss": loss, "match/0": 0.5})
        record("finetune", 1, {"loss": 3.0})
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("out-") and said == [
        f"tracking with tensorboard: tensorboard --logdir {tmp_path}/runs"
    ]
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("align/loss")] == [(1, 2.0), (2, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("finetune/loss")] == [(3, 3.0)]
    assert "seed: 3" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_what_is_not_installed_or_unknown_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name in tracking.MODULES:
        with pytest.raises(UsageError, match=f"{name} is not installed") as caught:
            linearize.convert("demo", tmp_path / "out", data="demo", report_to=name)
        assert f"pip install {name}" in str(caught.value)
    with pytest.raises(UsageError, match="Did you mean 'wandb'"):
        linearize.convert("demo", tmp_path / "out", data="demo", report_to="wandbb")
    assert not list(tmp_path.iterdir())


def test_the_command_line_names_the_tracker_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Where a conversion was interrupted, the command that goes on tracks as well."""
    asked: list[str] = []

    def interrupted(*args: Any, report_to: str, **options: Any) -> Any:
        asked.append(report_to)
        (tmp_path / ".out.linearize-run" / "00-align-00000001").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(linearize.api, "convert", interrupted)
    assert main(["convert", "m", str(tmp_path / "out"), "--data", "d", "--report-to", "wandb"]) == 130
    assert asked == ["wandb"] and "--report-to wandb" in capsys.readouterr().err


def test_a_config_is_flat() -> None:
    nested = {"a": 1, "b": {"c": None, "d": [1, "x"], "e": {"f": True}}}
    assert flat(nested) == {"a": 1, "b.c": "None", "b.d": "[1, 'x']", "b.e.f": True}
