"""Judging masked language models: the figures are what a hand would add up, the masks a function of the seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import linearize
from linearize.api import generate
from linearize.artifacts.load import load_model, load_tokenizer
from linearize.errors import RefusedError, UsageError
from linearize.evaluate.masked import choose_context, evaluate_masked
from linearize.masking import document_windows, hide, marks_of, one_at_a_time
from tests import encoders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("encoders")
    return {family: encoders.build(place / family, family) for family in ("bert", "roberta")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.text_file(tmp_path_factory.mktemp("text") / "text.jsonl", count=20)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_figures_by_hand(family: str, folders: dict[str, Path], text: Path) -> None:
    found = linearize.evaluate(folders[family], data=str(text), context=40, device="cpu")
    model, tokenizer = load_model(folders[family]), load_tokenizer(folders[family])
    marks = marks_of(tokenizer)
    docs = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in encoders.documents(20)]
    rows = document_windows(docs, 40, marks)
    parts = {"masked": hide(rows, marks, 0, "judge"), "pseudo": one_at_a_time(rows, marks, 0, "alone", most=512)}
    right = 0
    for name, (ids, labels) in parts.items():
        nll, count = 0.0, 0
        for row, wanted in zip(torch.from_numpy(ids), torch.from_numpy(labels), strict=True):
            length = int((row != marks.pad).sum())  # alone, and without its padding
            with torch.no_grad():
                logits = model(row[None, :length]).logits[0]
            for place in (wanted != -100).nonzero().flatten().tolist():
                nll -= float(logits[place].log_softmax(-1)[wanted[place]])
                right += name == "masked" and int(logits[place].argmax()) == int(wanted[place])
                count += 1
        assert found[f"{name}_nll"] == pytest.approx(nll / count, rel=1e-5)
        assert found[f"{name}_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
        assert found["masking"]["hidden" if name == "masked" else "alone"] == count
    assert found["accuracy"] == pytest.approx(right / found["masking"]["hidden"])
    assert found["protocol"] == "masked@40" and found["windows"] == len(rows) and found["against"] is None
    assert found["masking"]["rate"] == 0.15 and found["masking"]["replaced_by"] == tokenizer.mask_token


def test_beside_another_on_the_same_masks_and_by_seed(folders: dict[str, Path], text: Path) -> None:
    place = folders["bert"]
    pair = load_model(place), load_tokenizer(place)
    common: dict[str, Any] = {"data": str(text), "device": "cpu", "max_windows": 9, "alone": 30}
    found = evaluate_masked(place, against=pair, protocol="masked@24", **common)
    other = found["against"]
    for key in ("accuracy", "masked_nll", "pseudo_nll", "windows", "masking", "protocol"):
        assert found[key] == other[key]
    assert found["ratio"] == {"masked_perplexity": 1.0, "pseudo_perplexity": 1.0} and found["windows"] == 9
    batched = evaluate_masked(place, protocol="masked@24", batch_size=4, **common)
    assert batched["masked_nll"] == pytest.approx(found["masked_nll"], rel=1e-5)
    assert evaluate_masked(place, seed=1, protocol="masked@24", **common)["masked_nll"] != found["masked_nll"]


def test_contexts_and_protocols(folders: dict[str, Path]) -> None:
    config = load_model(folders["roberta"]).config
    assert choose_context(None, None, config) == 64  # 66 positions, two of them before the first token
    assert choose_context("masked@20", None, config) == choose_context("masked", 20, config) == 20
    for protocol, context, message in (
        ("masked@65", None, "beyond the 64 positions"),
        ("concat@20", None, "for models that predict the next token"),
        ("masked@20", 30, "says 20 tokens and context says 30"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_context(protocol, context, config)


def test_causal_judges_refuse_a_masked_model_and_say_what_to_use(folders: dict[str, Path], text: Path) -> None:
    place = str(folders["bert"])
    where: dict[str, Any] = {"against": str(folders["roberta"]), "data": str(text), "device": "cpu"}
    for judge in (linearize.audit, linearize.recall):
        with pytest.raises(UsageError, match="masked language model") as refused:
            judge(place, **where)
        assert "linearize eval" in str(refused.value.hint)
    with pytest.raises(UsageError, match="masked language model") as refused:
        generate(place, "the cat")
    assert "fill-mask" in str(refused.value.hint)
    with pytest.raises(UsageError, match="is not a masked language model"):
        linearize.evaluate(place, data=str(text), against="demo", device="cpu")
    with pytest.raises(UsageError, match="masked language model"):
        linearize.evaluate("demo", data=str(text), against=place, device="cpu")


def test_too_little_text(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_text("zebra zebra")  # words that the tokenizer does not know: nothing can be hidden
    with pytest.raises(RefusedError, match="no token"):
        evaluate_masked(folders["bert"], data=str(tmp_path / "odd.txt"), device="cpu")
