"""Perplexity: sums by hand, the same whatever the batch, and figures that say what they are."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import linearize
from linearize.data import load_source
from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.evaluate import evaluate, perplexity
from linearize.evaluate.perplexity import Scores, by_position, score, tokenizer_digest
from linearize.evaluate.protocols import Row, make_task, parse_protocol
from linearize.progress import told_to


def rows_of_lengths(*lengths: int, seed: int = 0) -> list[Row]:
    draw = np.random.default_rng(seed)
    return [
        Row(tokens=draw.integers(0, 256, n, dtype=np.int32), scored=max(1, n - 1 - i)) for i, n in enumerate(lengths)
    ]


def by_hand(model: Any, rows: list[Row]) -> tuple[float, int]:
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()
        with torch.no_grad():
            table = model(ids[None]).logits[0].double().log_softmax(-1)
        for position in range(len(ids) - row.scored, len(ids)):
            total -= float(table[position - 1, ids[position]])
            count += 1
    return total, count


def test_score_equals_a_sum_by_hand(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    rows = rows_of_lengths(2, 3, 17, 64, 64, 65, 127)
    total, count = by_hand(model, rows)
    scores = score(model, rows)
    assert int(scores.counts.sum()) == count
    assert scores.nll.sum() == pytest.approx(total, rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)
    assert scores.counts[0] == 0  # nothing is predicted from nothing


def test_score_does_not_depend_on_the_batch_or_on_chunks(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair
    rows = rows_of_lengths(2, 3, 17, 64, 64, 65, 127)
    one = score(model, rows, batch_size=1)
    monkeypatch.setattr(perplexity, "CHUNK", 259 * 5)  # five rows of logits at once
    for size in (2, 5, 7, None):
        other = score(model, rows, batch_size=size)
        np.testing.assert_allclose(other.nll, one.nll, rtol=2e-6, atol=1e-9)
        assert np.array_equal(other.counts, one.counts)


def test_no_more_logits_than_a_chunk_exist_in_fp32(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    monkeypatch.setattr(perplexity, "CHUNK", 259 * 8)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    score(model, rows_of_lengths(100, 100))
    assert max(seen) == 8 and sum(seen) == 99 + 98


def test_a_family_with_more_than_a_head_is_scored_through_its_own_forward(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    rows = rows_of_lengths(20, 31)
    plain = score(model, rows)
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:  # stands for a soft-cap or a scale of logits
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    model.config.model_type = "somebody_elses"
    scaled = score(model, rows)
    assert not np.allclose(scaled.nll, plain.nll)
    model.forward = forward
    np.testing.assert_allclose(score(model, rows).nll, plain.nll, rtol=1e-6)


def test_the_model_is_put_back(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    model.train()
    score(model, rows_of_lengths(9))
    assert model.training


def test_a_loss_that_is_not_finite_is_an_error(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(VerificationError, match="the loss is not finite") as caught:
        score(model, rows_of_lengths(9), name="broken")
    assert "broken" in str(caught.value) and caught.value.exit_code == 4


def test_positions_are_buckets_of_doubling_length() -> None:
    nll = np.arange(300, dtype=float)
    counts = np.ones(300, dtype=np.int64)
    nll[0], counts[0] = 0.0, 0
    table = by_position(Scores(nll=nll / 100, counts=counts))
    assert [(r["from"], r["to"], r["tokens"]) for r in table] == [
        (0, 64, 63),
        (64, 128, 64),
        (128, 256, 128),
        (256, 512, 44),
    ]
    assert table[1]["nll"] == pytest.approx(0.955)
    assert table[1]["perplexity"] == pytest.approx(math.exp(0.955))


def test_figures_say_what_they_are(pair: tuple[Any, Any], text_file: Path) -> None:
    result = evaluate(pair, data=str(text_file), context=64)
    texts, source = load_source(str(text_file))
    task = make_task(parse_protocol("concat@64", context=None, default_context=0), texts, pair[1])
    total, count = by_hand(pair[0], task.rows)
    assert result["protocol"] == "concat@64" and result["context"] == 64
    assert (result["windows"], result["tokens"]) == (len(task.rows), count)
    assert result["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
    assert result["word_perplexity"] == pytest.approx(math.exp(total / task.words), rel=1e-5)
    assert result["byte_perplexity"] == pytest.approx(math.exp(total / task.bytes), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(total / task.bytes / math.log(2), rel=1e-6)
    assert (result["words"], result["bytes"]) == (task.words, task.bytes)
    assert (result["bos"], result["eos"]) == ("before each document", "none")
    assert (result["dtype"], result["device"]) == ("float32", "cpu")
    assert result["data"] == source.describe() and len(result["tokenizer_sha256"]) == 64
    assert result["against"] is None and result["ratio"] is None
    json.dumps(result, allow_nan=False)


def test_context_is_the_models_own_unless_given(pair: tuple[Any, Any], text_file: Path) -> None:
    assert evaluate(pair, data=str(text_file))["protocol"] == "concat@128"
    assert evaluate(pair, data=str(text_file), protocol="documents@32")["protocol"] == "documents@32"


def test_against_is_measured_on_the_same_rows(
    pair: tuple[Any, Any], text_file: Path, build_llama: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(build_llama(tmp_path / "other", seed=1, max_position_embeddings=64))
    both = evaluate((other, pair[1]), data=str(text_file), against=pair, max_windows=4)
    alone = evaluate(pair, data=str(text_file), context=64, max_windows=4)
    assert both["protocol"] == both["against"]["protocol"] == "concat@64"  # the first model's context rules
    assert both["against"]["nll"] == alone["nll"]
    assert both["ratio"]["token_perplexity"] == pytest.approx(both["token_perplexity"] / alone["token_perplexity"])


def test_by_path_with_source_and_window_limit(teacher_folder: Path, text_file: Path, pair: tuple[Any, Any]) -> None:
    by_path = evaluate(str(teacher_folder), data=str(text_file), source="tech", context=32, max_windows=3)
    by_pair = evaluate(pair, data=f"{text_file}:source=tech", context=32, max_windows=3)
    assert by_path["model"] == str(teacher_folder)
    assert by_path["nll"] == by_pair["nll"] and by_path["windows"] == 3
    api = linearize.evaluate(teacher_folder, data=f"{text_file}:source=tech", context=32)
    assert api["data"] == by_pair["data"]


def test_auto_dtype_is_fp32_on_a_cpu(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path)
    auto = evaluate(str(tmp_path), data=str(text_file), context=32, max_windows=2, device="cpu")
    half = evaluate(str(tmp_path), data=str(text_file), context=32, max_windows=2, device="cpu", dtype="bfloat16")
    assert (auto["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["nll"] == pytest.approx(auto["nll"], rel=0.05) and half["nll"] != auto["nll"]


def test_bad_input_is_one_line(pair: tuple[Any, Any], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="text is shorter than one context"):
        evaluate(pair, data=str(text_file), context=100_000)
    with pytest.raises(UsageError, match="no such file"):
        evaluate(pair, data=str(tmp_path / "no.txt"))
    with pytest.raises(UsageError, match="there is no model"):
        evaluate(str(tmp_path / "nothing"), data=str(text_file))


def test_tokenizer_digest_is_of_what_it_does(pair: tuple[Any, Any]) -> None:
    _, tokenizer = pair
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)  # leaves settings behind in the backend
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_digest(tokenizer) != before


def test_wikitext_equals_the_harness_run_beside_it(
    root: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    # What the script sets, so that it is put back.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    spec = importlib.util.spec_from_file_location("lm_eval_parity", root / "benchmarks" / "lm_eval_parity.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    raw = tmp_path / "raw.txt"
    page = " = Title {0} = \n \n It 's a page @-@ long ( or {0} ) one . \n = = Part = = \n" + "more \u6771\u4eac \n" * 9
    raw.write_text(" \n" + "".join(page.format(i) for i in range(3)), encoding="utf-8")
    ours = evaluate(str(teacher_folder), data=str(raw), protocol="lm-eval/wikitext", device="cpu", dtype="float32")
    theirs = script.harness(str(teacher_folder), raw, context=128, device="cpu")
    for metric in script.METRICS:
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-6), metric


@pytest.mark.slow
def test_wikitext_anchor(shared: Path) -> None:
    """lm-eval 0.4.13's own figures for this model and file; benchmarks/lm_eval_parity.py runs both."""
    result = evaluate(
        str(shared / "teachers" / "stories260k"),
        data=str(shared / "data" / "wikitext2-raw-test.txt"),
        protocol="lm-eval/wikitext",
        device="cpu",
    )
    assert result["protocol"] == "lm-eval/wikitext@512" and result["bos"] == "double"
    assert result["word_perplexity"] == pytest.approx(914382.7699, rel=1e-6)
    assert result["byte_perplexity"] == pytest.approx(13.024490413, rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(3.703155022683, rel=1e-6)
    assert (result["tokens"], result["words"], result["bytes"]) == (766_012, 241_335, 1_290_527)


def test_windows_beyond_the_trained_positions_are_noted(pair: Any, text_file: Path) -> None:
    near = evaluate(pair, data=str(text_file), context=128)
    assert near["notes"] == []
    far = evaluate(pair, data=str(text_file), context=200, max_windows=1)
    assert far["beyond_trained"] and not near["beyond_trained"]
    assert len(far["notes"]) == 1
    assert far["notes"][0].startswith("windows of 200 tokens reach beyond the 128 positions that ")


def test_scoring_tells_what_it_reads(pair: Any) -> None:
    heard: list[tuple[str, str]] = []
    with told_to(lambda what, who: heard.append((what, who))):
        score(pair[0], rows_of_lengths(9, 17), name="teacher")
        score(pair[0], rows_of_lengths(9))
    assert heard == [("reading 2 windows of 17 tokens", "teacher"), ("reading 1 window of 9 tokens", "the model")]


def test_loading_and_tokenising_make_no_noise(
    teacher_folder: Path, text_file: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    logging.enable_propagation()
    try:
        _, tokenizer = linearize.load(teacher_folder, device="cpu")
        assert len(tokenizer("a b c " * 9999)["input_ids"]) > tokenizer.model_max_length
        assert logging.is_progress_bar_enabled(), "put back"
    finally:
        logging.disable_propagation()
        if not before:
            logging.disable_progress_bar()
    assert capsys.readouterr().err == ""
