"""The second teacher: any family comes out whole, its schedule fits the time, and it has learned from its text."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import linearize
from benchmarks import pretrain_demo
from benchmarks.pretrain_teacher import FAMILIES, SIZES, bos_before, build_model, fit_steps, main, make_optimizers
from linearize.convert.families import check_fit
from linearize.recipe import load_recipe

CONTEXT = 160
FEW = ("--size", "tiny", "--vocab", "300", "--context", str(CONTEXT), "--batch", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences over a dozen words, each document of its own length; the last fifth is labelled `held`."""
    draw = random.Random(0)
    words = ["river", "stone", "über", "東京", "walks", "sleeps", "the", "a", "and", "old", "green", "."]
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(100):
            text = " ".join(draw.choices(words, k=draw.choice((5, 40, 120))))
            file.write(json.dumps({"source": "held" if i >= 80 else "train", "text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def teacher(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3 of 40 steps, with what it logged."""
    out = tmp_path_factory.mktemp("teacher") / "out"
    main([str(out), "--data", f"{texts}:source=train", "--heldout", f"{texts}:source=held", "--family", "qwen3",
          "--tokens", str(40 * 2 * CONTEXT), "--log-every", "10", "--shard", "100KB", *FEW])  # fmt: skip
    return out


def test_it_loads_and_reports_what_an_audit_would_see(teacher: Path, texts: Path) -> None:
    model, tokenizer = linearize.load(teacher, device="cpu")
    assert model.config.model_type == "qwen3"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token_id == model.config.bos_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    text = "naïve 東京\n\tdef f(x): # 🐍"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (teacher / "model.safetensors.index.json").is_file()  # --shard was obeyed

    log = (teacher / "pretrain_teacher.log").read_text()
    told = float(re.search(r"full context PPL ([\d.]+)", log)[1])  # type: ignore[index]
    seen = linearize.evaluate(str(teacher), data=f"{texts}:source=held", context=CONTEXT, device="cpu")
    assert told == pytest.approx(seen["token_perplexity"], rel=1e-4)
    assert told < 0.5 * len(tokenizer)  # an untrained model has about the size of its vocabulary
    cuts = [float(x) for x in re.findall(r"with \d sinks PPL ([\d.]+)", log)]
    assert len(cuts) == 2
    assert all(cut != told for cut in cuts)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_built_and_can_be_converted(family: str) -> None:
    from linearize.convert.families import head_dim

    tokenizer = pretrain_demo.train_tokenizer(["some text"], 300)
    for size in SIZES:
        with torch.device("meta"):
            model = build_model(family, size, tokenizer=tokenizer, context=1024)
        attention = model.model.layers[0].self_attn
        assert model.config.model_type == family
        assert attention.q_proj.out_features == SIZES[size].num_attention_heads * SIZES[size].head_dim
        assert head_dim(model.config) == SIZES[size].head_dim
        assert (attention.q_proj.bias is not None) == (family == "qwen2")
        assert hasattr(attention, "q_norm") == (family == "qwen3")
        assert not check_fit(
            model.config, spec=load_recipe("lolcats").mixer, linear_layers=[0, 1], context=1024
        )  # no layer of the teacher has a window of its own


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_tokenizer_made_ahead_is_used(family: str, texts: Path, tmp_path: Path) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    main([str(made), "--data", str(texts), "--tokens", "0", *FEW])
    assert not (made / "config.json").exists()
    few = [word for word in FEW if word not in ("--vocab", "300")]
    main([str(out), "--data", str(texts), "--tokenizer", str(made), "--tokens", "1k", "--family", family,
          "--optimizer", "muon" if hasattr(torch.optim, "Muon") else "adamw", *few])  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    model, _ = linearize.load(out, device="cpu", dtype="auto")
    assert model.config.model_type == family
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_schedule_fits_the_time() -> None:
    assert fit_steps(1000, 20, step_seconds=0.1, seconds_left=98.0) == 1000
    assert fit_steps(1000, 20, step_seconds=0.1, seconds_left=50.0) == 20 + 485  # 97 % of what fits
    assert fit_steps(1000, 20, step_seconds=0.1, seconds_left=-3.0) == 20


def test_training_ends_when_its_time_is_over(texts: Path, tmp_path: Path) -> None:
    main([str(tmp_path / "out"), "--data", str(texts), "--tokens", "10M", "--minutes", "0", *FEW])
    log = (tmp_path / "out" / "pretrain_teacher.log").read_text()
    assert "time is over" in log
    assert f"trained: 20 of {10**7 // (2 * CONTEXT)} steps" in log


def test_bos_stands_before_each_document_and_every_epoch_is_shuffled() -> None:
    docs = [np.full(n, 10 + n, dtype=np.uint16) for n in range(1, 30)]
    batches = pretrain_demo.training_batches(docs, 1, 7, 0, bos_before(0))
    rows = np.concatenate(list(islice(batches, 200)))
    assert rows.dtype == np.int64
    assert rows.shape[1] == 8
    for row in rows:
        changes = np.flatnonzero(np.diff(row)) + 1
        # Where a document ends, BOS follows, and nothing else does.
        assert all((row[i] == 0) != (row[i - 1] == 0) for i in changes)
    assert set(np.unique(rows)) == {0, *(10 + n for n in range(1, 30))}
    per_epoch = sum(len(doc) + 1 for doc in docs) // 8 - 1
    assert sorted(map(tuple, rows[:per_epoch])) != sorted(map(tuple, rows[per_epoch : 2 * per_epoch]))


def test_each_parameter_has_one_optimizer_and_only_matrices_decay() -> None:
    tokenizer = pretrain_demo.train_tokenizer(["some text"], 300)
    model = build_model("qwen2", "tiny", tokenizer=tokenizer, context=64)
    names = {id(p): name for name, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        optimizers = make_optimizers(model, kind, lr=1e-3, weight_decay=0.3)
        groups: list[dict[str, Any]] = [group for one in optimizers for group in one.param_groups]
        held = [names[id(p)] for group in groups for p in group["params"]]
        assert sorted(held) == sorted(names.values())
        for group in groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.3 if p.ndim == 2 else 0.0), names[id(p)]
    by_muon = {names[id(p)] for p in optimizers[1].param_groups[0]["params"]}
    assert len(by_muon) == 2 * 7
    assert "model.embed_tokens.weight" not in by_muon


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [*a, "--tokens", "many"], "--tokens"),
        (lambda a: [*a, "--context", "4000"], "less than two windows"),
        (lambda a: [*a, "--data", "missing.jsonl"], "missing.jsonl"),
        (lambda a: [*(w for w in a if w not in ("--vocab", "300")), "--tokenizer", "."], "tokenizer.json"),
        (lambda a: [*a, "--lr", "-1"], "--lr"),
        (lambda a: [*a, "--weight-decay", "1000", "--lr", "1", "--warmup", "0"], "diverged"),
    ],
)
def test_mistakes_end_in_one_line(
    change: Callable[[list[str]], list[str]], message: str, texts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(change([str(tmp_path / "out"), "--data", str(texts), "--tokens", "8k", *FEW]))
    assert stop.value.code in (2, 3, 4)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0


def test_an_existing_model_is_kept(teacher: Path, texts: Path) -> None:
    before = (teacher / "pretrain_teacher.log").read_bytes()
    with pytest.raises(SystemExit):
        main([str(teacher), "--data", str(texts), "--tokens", "8k", *FEW])
    assert (teacher / "pretrain_teacher.log").read_bytes() == before
    assert math.isfinite(sum(p.float().sum().item() for p in linearize.load(teacher, device="cpu")[0].parameters()))
