"""Masked language models through the same conversion: from a folder to a folder, and back to what was promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline as transformers_pipeline

import linearize
from linearize.artifacts.load import load_model, load_tokenizer
from linearize.artifacts.manifest import verify_manifest
from linearize.convert import checkpoint, pipeline
from linearize.convert.align_loss import layer_loss
from linearize.convert.capture import TeacherLayer, captured
from linearize.convert.finetune_loss import backward_losses
from linearize.convert.pipeline import convert
from linearize.convert.plan import inspect, make_plan
from linearize.convert.surgery import linearize_model
from linearize.errors import UsageError
from linearize.masking import IGNORE
from linearize.recipe import load_recipe
from linearize.task import Masked, task_of
from tests import encoders
from tests.interrupter import Interrupter

FAMILIES = ("bert", "roberta")
QUICK = ["context=48", "device=cpu", "align.batch_tokens=384", "finetune.batch_tokens=384"]
SHORT = [*QUICK, "align.tokens=6k", "finetune.tokens=6k", "finetune.lr=5e-3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher of each family."""
    place = tmp_path_factory.mktemp("encoders")
    return {family: encoders.build(place / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.text_file(tmp_path_factory.mktemp("text") / "text.jsonl")


def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes are another test's matter."""
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})


def padded(family: str, folder: Path) -> tuple[Masked, torch.Tensor]:
    tokenizer = load_tokenizer(folder)
    task = task_of(load_model(folder).config, tokenizer)
    assert isinstance(task, Masked)
    return task, torch.from_numpy(task.windows(encoders.documents(12), tokenizer, 40)).long()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_conversion(family: str, folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert(folders[family], out, recipe="hedgehog-encoder", data=str(text), overrides=SHORT)
    for stage in report["stages"].values():
        assert stage["loss_last"] < stage["loss_first"]
    assert [row["layer"] for row in report["layers"]] == [0, 1]
    for way in report["verification"].values():
        assert way["max_abs_difference"] == 0.0 and way["same_text"]
    assert verify_manifest(out) == []
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"linearized_{family}" and "AutoModelForMaskedLM" in config["auto_map"]
    card = (out / "README.md").read_text()
    assert "AutoModelForMaskedLM" in card and "AutoModelForCausalLM" not in card and "fill-mask" in card
    model, tokenizer = linearize.load(out)
    assert model.config.linear_layers == [0, 1] and tokenizer.mask_token_id is not None
    found = transformers_pipeline("fill-mask", model=str(out))(f"the cat {tokenizer.mask_token} on the mat", top_k=1)
    assert found[0]["token_str"] in tokenizer.get_vocab()
    with pytest.raises(UsageError, match="already linearized"):
        convert(out, tmp_path / "again", recipe="hedgehog-encoder", data=str(text))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_converted_is_the_teacher_bit_for_bit(
    family: str, folders: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unverified(monkeypatch)
    out, none = tmp_path / "out", ["keep_softmax=[0,1]", "finetune.tokens=0"]
    convert(folders[family], out, recipe="hedgehog-encoder", data=str(text), overrides=[*SHORT, *none])
    task, ids = padded(family, folders[family])
    ours, theirs = (load_model(folder)(**task.call(ids)).logits for folder in (out, folders[family]))
    assert torch.equal(ours, theirs)
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[family], out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_count_real_and_hidden_tokens_alone(family: str, folders: dict[str, Path]) -> None:
    """Padding is no part of an alignment loss; ce and kl are means over hidden tokens, as added up by hand."""
    task, rows = padded(family, folders[family])
    teacher = load_model(folders[family])
    layers = ["linear", "linear"]
    student, _ = linearize_model(teacher, spec=load_recipe("hedgehog-encoder").mixer, layer_mixers=layers, seed=0)
    real = task.real(rows)
    assert real is not None and not bool(real.all())
    attention = student.base_model.encoder.layer[1].attention.self

    def losses(ids: torch.Tensor, objective: str) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def look(layer: TeacherLayer) -> None:
            found.extend(layer_loss(attention, layer, "full", objective, real=task.real(ids)))
            assert layer.weights is not None
            assert float(layer.weights.transpose(1, 3)[~task.real(ids)].abs().max()) == 0.0  # type: ignore[operator]

        with torch.no_grad(), captured(teacher, [1], look, weights=True):
            teacher.base_model(**task.call(ids))
        return found

    for objective in ("output", "weights"):
        short = rows[:1]
        wide = torch.cat((short, short.new_full((1, 9), task.marks.pad)), dim=1)
        for ours, theirs in zip(losses(short, objective), losses(wide, objective), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4)

    ids, labels = task.examples(rows.numpy(), 0, "mask")
    hidden = labels != IGNORE
    with torch.no_grad():
        log_p, log_q = (m(**task.call(ids)).logits[hidden].log_softmax(-1) for m in (student, teacher))
    count = len(log_p)
    ce = -log_p[range(count), labels[hidden]].sum()
    kl = (log_q.exp() * (log_q - log_p)).sum()
    weight = student.base_model.encoder.layer[0].attention.self.mixer.q_map.weight.requires_grad_()
    sums = backward_losses(student, teacher, ids, labels, ce=1.0, kl=1.0, scale=1.0, task=task)
    assert torch.allclose(sums, torch.stack((ce, kl)), rtol=1e-4)
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0


def test_interrupted_and_resumed(
    folders: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unverified(monkeypatch)
    monkeypatch.setattr(checkpoint, "SECONDS", 3600.0)  # only the interruption saves
    options = [*QUICK, "align.tokens=2k", "finetune.tokens=2k", "finetune.lora.dropout=0.1"]
    common: dict[str, Any] = {"recipe": "hedgehog-encoder", "data": str(text), "overrides": options}
    whole = convert(folders["bert"], tmp_path / "whole", **common)
    out = tmp_path / "parts"
    for number, (stage, at) in enumerate((("align", 2), ("finetune", 3))):
        with pytest.raises(KeyboardInterrupt):
            convert(folders["bert"], out, **common, resume=number > 0, progress=Interrupter(stage, at))
    parts = convert(folders["bert"], out, **common, resume=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert parts["layers"] == whole["layers"]


def test_an_older_checkpoint_with_heads_of_pretraining(
    folders: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the Hub: norms called gamma and beta, a pooler, the next-sentence head, stored position ids."""
    unverified(monkeypatch)
    old = encoders.build(tmp_path / "old", "bert")
    tensors = load_file(old / "model.safetensors")
    renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
               for n, x in tensors.items()}  # fmt: skip
    renamed["bert.pooler.dense.weight"] = torch.zeros(24, 24)
    renamed["bert.pooler.dense.bias"] = torch.zeros(24)
    renamed["cls.seq_relationship.weight"] = torch.zeros(2, 24)
    renamed["cls.seq_relationship.bias"] = torch.zeros(2)
    renamed["bert.embeddings.position_ids"] = torch.arange(66)[None]
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    plan = make_plan(old, recipe=load_recipe("hedgehog-encoder", QUICK))
    assert set(plan["dropped"]) >= {"bert.pooler.dense.weight", "cls.seq_relationship.bias"}
    out = tmp_path / "out"
    none = ["keep_softmax=[0,1]", "finetune.tokens=0", "align.tokens=0"]
    convert(old, out, recipe="hedgehog-encoder", data=str(text), overrides=[*QUICK, *none])
    task, ids = padded("bert", folders["bert"])
    assert torch.equal(load_model(out)(**task.call(ids)).logits, load_model(folders["bert"])(**task.call(ids)).logits)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("lolcats", [], r"mixer\.window: 64 .*encoder"),
        ("liger-gla", ["mixer.window=0"], r"mixer\.decay"),
        ("gated-deltanet", [], r"mixer\.decay"),
        ("retention", ["mixer.decay=none"], r"mixer\.normaliser: norm"),
        ("hedgehog-encoder", ["calibrate.tokens=1k"], r"calibrate\.tokens"),
        ("hedgehog-encoder", ["keep_softmax=auto"], "keep_softmax"),
        ("hedgehog-encoder", ["repeats=0.5"], r"repeats: .* the next token"),
        ("hedgehog-encoder", ["align.objective=hidden"], r"align\.objective"),
        ("hedgehog-encoder", ["context=65"], "context 65"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_by_name(
    folders: dict[str, Path], recipe: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        make_plan(folders["roberta"], recipe=load_recipe(recipe, [*QUICK, *overrides]))
    assert refused.value.hint


def test_other_refusals(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    decoder = encoders.build(tmp_path / "decoder", "bert", is_decoder=True)
    with pytest.raises(UsageError, match="is_decoder"):
        make_plan(decoder, recipe=load_recipe("hedgehog-encoder", QUICK))
    with pytest.raises(UsageError, match="masked language model"):
        linearize.select(folders["bert"], data=str(text), keep=1)
    config = json.loads((folders["roberta"] / "config.json").read_text()) | {"pad_token_id": 3}
    other = encoders.build(tmp_path / "pads", "roberta")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="pads with token 1"):
        convert(other, tmp_path / "out", recipe="hedgehog-encoder", data=str(text), overrides=QUICK)


def test_plan_and_inspection_promise_no_cache(folders: dict[str, Path]) -> None:
    plan = make_plan(folders["bert"], recipe=load_recipe("hedgehog-encoder", QUICK))
    assert plan["new_parameters"] == 2 * 2 * 3 * (8 * 8 + 8)
    seen = inspect(folders["bert"], load_recipe("hedgehog-encoder", QUICK))
    for found in (plan, seen):
        assert found["state_bytes"] == 0 and any("keeps no cache" in note for note in found["notes"])
    assert inspect(folders["bert"])["layers"] == 2


def test_rows_of_a_batch_are_hidden_by_the_step(folders: dict[str, Path]) -> None:
    task, rows = padded("bert", folders["bert"])
    assert "padding" in task.notes(rows.numpy())[0] and not task.notes(rows.numpy()[:, :3])
    first, again, other = (task.examples(rows.numpy(), 0, "mask", step)[0] for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert np.array_equal(np.asarray(task.call(first)["attention_mask"]), (rows != task.marks.pad).long().numpy())
