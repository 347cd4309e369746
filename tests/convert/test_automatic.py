"""What a conversion finds out before it trains: which layers to keep, and the start of gates, scales and shares."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linearize.artifacts.load import load_model
from linearize.artifacts.manifest import read_manifest
from linearize.convert import checkpoint, pipeline
from linearize.convert.early import run_folder
from linearize.convert.pipeline import convert
from linearize.data import load_source
from linearize.errors import RefusedError, UsageError
from linearize.progress import NullProgress
from linearize.recipe import load_recipe

QUICK = [
    "context=96", "mixer.window=16", "mixer.sinks=2", "mixer.feature_dim=8", "device=cpu", "seed=4", "align.tokens=0",
    "finetune.tokens=0", "calibrate.tokens=0", "align.batch_tokens=384", "finetune.batch_tokens=384",
]  # fmt: skip


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes are another test's matter."""
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    """A random teacher of four layers."""
    return build_llama(
        tmp_path_factory.mktemp("deep") / "deep",
        initializer_range=0.2,
        max_position_embeddings=256,
        num_hidden_layers=4,
    )


class Watch(NullProgress):
    """Keeps the messages, and presses Ctrl-C in one step."""

    def __init__(self, stage: str = "", at: int = 0) -> None:
        self.stage, self.at = stage, at
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, stage: str, step: int, loss: float, tokens: int, extra: Mapping[str, Any]) -> None:
        if (stage, step) == (self.stage, self.at):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What `choose_layers` chose, a call at a time."""
    found: list[tuple[int, ...]] = []
    choose = pipeline.choose_layers

    def counted(*args: Any, **kwargs: Any) -> tuple[int, ...]:
        found.append(choose(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(pipeline, "choose_layers", counted)
    return found


@pytest.mark.parametrize(("keep", "count"), [("auto", 1), ("auto 2", 2)])
def test_layers_to_keep_are_measured(
    deep_teacher: Path, text_file: Path, tmp_path: Path, choices: list[tuple[int, ...]], keep: str, count: int
) -> None:
    out, watch = tmp_path / "out", Watch()
    overrides = [*QUICK, f"keep_softmax={keep}"]
    report = convert(deep_teacher, out, recipe="pure", data=str(text_file), overrides=overrides, progress=watch)
    (kept,) = choices
    assert len(kept) == count and set(kept) < set(range(4))
    assert kept != load_recipe("pure", overrides).softmax_layers(4), "else the placeholder would do as well"
    mixers = ["softmax" if i in kept else "linear" for i in range(4)]
    assert json.loads((out / "config.json").read_text())["layer_mixers"] == mixers
    assert f"keeping softmax in layers {', '.join(map(str, kept))}" in watch.messages
    manifest = read_manifest(out)
    assert manifest["recipe"]["keep_softmax"] == list(kept)
    assert report["keys"]["new"] == sum("mixer." in n for n in load_file(out / "model.safetensors")) > 0
    assert report["seconds"]["select"] > 0
    assert f"the attention of {4 - count} of its 4 layers" in (out / "README.md").read_text()

    # The same layers, named, make the same model.
    named = [*QUICK, f"keep_softmax={list(kept)}"]
    convert(deep_teacher, tmp_path / "named", recipe="pure", data=str(text_file), overrides=named)
    assert len(choices) == 1
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "named"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_no_layer_left_or_no_room_to_tell_them_apart_is_refused(
    deep_teacher: Path, text_file: Path, tmp_path: Path, choices: list[tuple[int, ...]]
) -> None:
    places: dict[str, Any] = {"recipe": "pure", "data": str(text_file)}
    with pytest.raises(UsageError, match=r"'auto 4' leaves none of 4 layers to convert"):
        convert(deep_teacher, tmp_path / "out", overrides=[*QUICK, "keep_softmax=auto 4"], **places)
    with pytest.raises(UsageError, match="keep_softmax"):
        convert(deep_teacher, tmp_path / "out", overrides=[*QUICK, "mixer.window=48", "keep_softmax=auto"], **places)
    assert not choices and not list(tmp_path.iterdir())


def test_calibration_is_told(deep_teacher: Path, text_file: Path, tmp_path: Path) -> None:
    reports, watch = {}, Watch()
    for tokens in (0, 1000):
        reports[tokens] = convert(
            deep_teacher, tmp_path / str(tokens), recipe="pure", data=str(text_file), progress=watch,
            overrides=[*QUICK, f"calibrate.tokens={tokens}", "keep_softmax=[2]"],
        )  # fmt: skip
    assert reports[0]["calibration"] is None
    found = reports[1000]["calibration"]
    assert set(found) == {"tokens", "layers", "ppl_teacher", "ppl_before", "ppl_after"} and found["tokens"] == 960
    assert [row["layer"] for row in found["layers"]] == [0, 1, 3]
    assert all(row["error_after"] <= row["error_before"] for row in found["layers"])
    assert any(row["error_after"] < row["error_before"] for row in found["layers"])
    told = [m for m in watch.messages if "calibrat" in m]
    assert told[0] == "calibrating 3 layers on 960 tokens"
    assert told[1].startswith(f"perplexity before training: {found['ppl_before']:.4g}, calibrated") and len(told) == 2

    # Nothing else happened: the two exports are the model before and after, and the figures are theirs.
    teacher, before, after = (
        load_model(path, device="cpu") for path in (deep_teacher, tmp_path / "0", tmp_path / "1000")
    )
    told = {name: found[f"ppl_{name}"] for name in ("teacher", "before", "after")}
    assert len(set(told.values())) == 3
    ids = last_windows(deep_teacher, text_file)
    with torch.no_grad():
        for name, model in (("teacher", teacher), ("before", before), ("after", after)):
            loss = torch.stack([model(row[None], labels=row[None], use_cache=False).loss for row in ids]).mean()
            assert told[name] == pytest.approx(math.exp(loss), rel=1e-4), name
    moved = {n.split("mixer.")[-1] for n, p in after.named_parameters() if not torch.equal(p, dict(
        before.named_parameters())[n])}  # fmt: skip
    parts = {n.split(".")[0] for n in moved}
    assert parts and parts <= {"decay", "far_mass", "q_map", "k_map"}, "calibration sets mixers alone"


def test_calibration_reads_the_tokens_it_was_asked_for_where_there_are_so_many(
    deep_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:2000])
    for text, read in ((text_file, 4800), (short, 1920)):
        report = convert(deep_teacher, tmp_path / str(read), recipe="pure", data=str(text),
                         overrides=[*QUICK, "calibrate.tokens=4800", "keep_softmax=[1,2,3]"])  # fmt: skip
        assert report["calibration"]["tokens"] == read


def last_windows(teacher: Path, text_file: Path) -> torch.Tensor:
    """The text that the check is made on."""
    from linearize.artifacts.load import load_tokenizer
    from linearize.data import document_marks, pack, tokenize_documents

    tokenizer = load_tokenizer(teacher)
    texts, _ = load_source(str(text_file), split=None, limit_bytes=8 * 4 * 96)
    windows = pack(tokenize_documents(texts, tokenizer), 96, **document_marks(tokenizer))
    return torch.from_numpy(windows[-pipeline.CALIBRATION_CHECK :]).long()


def test_nothing_to_calibrate_where_no_layer_is_linear(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    overrides = [*QUICK, "calibrate.tokens=1000", "keep_softmax=every 1"]
    report = convert(teacher_folder, tmp_path / "out", recipe="pure", data=str(text_file), overrides=overrides)
    assert report["calibration"] is None


TRAINED = [
    *QUICK, "keep_softmax=auto", "calibrate.tokens=1000", "align.tokens=1536", "finetune.tokens=2304",
    "align.optimizer=muon", "align.branch=both", "finetune.optimizer=muon", "finetune.window_dropout=0.5",
    "finetune.lora.dropout=0.1",
]  # fmt: skip
"""Four steps of alignment, six of finetuning (1, 3 and 4 without the window), with all that a resumed run repeats."""
KEPT = (1,)


@pytest.mark.parametrize("recipe", ["pure", "gated-deltanet"])
def test_a_resumed_run_is_the_uninterrupted_one(
    deep_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Bit for bit, and without measuring layers a second time."""
    asked: list[int] = []
    monkeypatch.setattr(pipeline, "choose_layers", lambda *a, keep, **b: asked.append(keep) or KEPT)
    monkeypatch.setattr(checkpoint, "SECONDS", 3600.0)  # only the interruption saves
    overrides = TRAINED
    if recipe == "gated-deltanet":  # no window, nothing to hide
        overrides = [o for o in TRAINED if not o.startswith(("mixer.", "finetune.window", "align.branch"))]
        overrides = [o for o in overrides if "lora" not in o]
    places: dict[str, Any] = {"recipe": recipe, "data": str(text_file), "overrides": overrides}
    whole = convert(deep_teacher, tmp_path / "whole", **places)
    assert asked == [1]
    steps = {name: stage["steps"] for name, stage in whole["stages"].items()}
    assert steps == {"align": 4, "finetune": 6}

    out, heard = tmp_path / "out", []
    for number, (stage, at) in enumerate((("align", 2), ("finetune", 3), ("", 0))):
        watch = Watch(stage, at)
        if stage:
            with pytest.raises(KeyboardInterrupt):
                convert(deep_teacher, out, progress=watch, resume=number > 0, **places)
            record = json.loads(next(run_folder(out).glob("*.json")).read_text())
            assert record["kept"] == list(KEPT)
        else:
            report = convert(deep_teacher, out, progress=watch, resume=True, **places)
        heard.append([m for m in watch.messages if m.startswith(("keeping", "going on"))])
    assert asked == [1, 1], "a resumed run keeps the layers that were recorded"
    keeping = f"keeping softmax in layers {KEPT[0]}"
    assert heard == [
        [keeping],
        ["going on from step 2 of align", keeping],
        ["going on from step 3 of finetune", keeping],
    ]

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert report["layers"] == whole["layers"] and report["calibration"] == whole["calibration"] is not None
    for stage in ("align", "finetune"):
        figures = [{k: v for k, v in r["stages"][stage].items() if k != "seconds"} for r in (report, whole)]
        assert figures[0] == figures[1]
    for folder in (out, tmp_path / "whole"):
        mixers = json.loads((folder / "config.json").read_text())["layer_mixers"]
        assert mixers == ["linear", "softmax", "linear", "linear"]
    assert not run_folder(out).exists()


def test_auto_and_the_layers_it_chose_are_two_recipes_to_a_resume(
    deep_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "choose_layers", lambda *a, **b: KEPT)
    places: dict[str, Any] = {"recipe": "pure", "data": str(text_file)}
    with pytest.raises(KeyboardInterrupt):
        convert(deep_teacher, tmp_path / "out", progress=Watch("align", 1), overrides=TRAINED, **places)
    with pytest.raises(RefusedError, match=r"another conversion; differing: the recipe \(keep_softmax="):
        convert(
            deep_teacher, tmp_path / "out", overrides=[*TRAINED, f"keep_softmax={list(KEPT)}"], resume=True, **places
        )
