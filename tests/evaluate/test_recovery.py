"""Recovery and the branch audit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import linearize
from linearize.errors import RefusedError, UsageError
from linearize.evaluate import audit, evaluate
from linearize.evaluate.recovery import harm, recovery
from linearize.evaluate.truncation import truncated
from linearize.modeling.configuration_linearized import linearized_config
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import MODELS, attention_layers

WINDOW = 8
LOLCATS = MixerSpec(window=WINDOW, sinks=2)
NO_WINDOW = MixerSpec(window=0, coverage="all", normaliser="own", mix="sum")


@pytest.fixture
def student(pair: tuple[Any, Any]) -> Callable[..., tuple[Any, Any]]:
    """student(spec, layers=["linear", "linear"]): the teacher's weights under linear layers, untrained."""

    def build(spec: MixerSpec, layers: list[str] | None = None) -> tuple[Any, Any]:
        teacher, tokenizer = pair
        config = linearized_config(teacher.config, layer_mixers=layers or ["linear"] * 2, spec=spec)
        torch.manual_seed(0)
        model = MODELS["llama"](config)
        left = model.load_state_dict(teacher.state_dict(), strict=False)
        assert not left.unexpected_keys and all(".mixer." in key for key in left.missing_keys)
        return model.eval(), tokenizer

    return build


def test_recovery_is_zero_at_the_floor_and_a_hundred_at_the_teacher() -> None:
    assert recovery(teacher=2.0, window=3.0, student=3.0) == (0.0, [])
    assert recovery(teacher=2.0, window=3.0, student=2.0) == (100.0, [])
    # design/quality.md: the published LoLCATs recipe on the probe.
    r, _ = recovery(teacher=math.log(13.74), window=math.log(16.88), student=math.log(16.32))
    assert r == pytest.approx(16, abs=0.5)


def test_what_is_worse_than_the_cut_is_said_with_a_next_step() -> None:
    value, (note,) = recovery(teacher=2.0, window=math.log(10.0), student=math.log(20.0))
    assert value is not None and value < 0
    assert "perplexity 20 " in note and "window, 10," in note and "align.tokens" in note
    assert harm(full=math.log(20.0), window=math.log(10.0)) == [
        "the linear branch does harm: with its window alone the student has perplexity 10 instead of 20"
    ]
    assert harm(full=2.0, window=2.0) == harm(full=2.0, window=1.995) == harm(full=2.0, window=None) == []


def test_no_recovery_of_a_gap_that_means_nothing() -> None:
    value, notes = recovery(teacher=math.log(10.0), window=math.log(10.05), student=math.log(20.0))
    assert value is None and "perplexity 10.05 instead of 10;" in notes[0] and "less than 1%" in notes[0]
    assert recovery(teacher=2.0, window=2.011, student=2.0)[0] == pytest.approx(100.0)


def test_audit_of_a_windowed_student(pair: Any, student: Any, text_file: Path) -> None:
    model, tokenizer = student(LOLCATS)
    report = audit((model, tokenizer), against=pair, data=str(text_file), context=64)
    assert report["protocol"] == "concat@64"
    assert report["reference"] == {"window": WINDOW, "sinks": 2, "own": True}
    logs = {k: math.log(report[f"ppl_{k}"]) for k in ("teacher", "window", "student")}
    share = (logs["window"] - logs["student"]) / (logs["window"] - logs["teacher"])
    if report["R"] is not None:
        assert report["R"] == pytest.approx(100 * share, rel=1e-6)
    else:  # a random teacher may be no worse for the cut
        assert logs["window"] <= logs["teacher"] + 0.01 and report["notes"]
    # The student's window alone, with the teacher's own weights, is the teacher cut to that window: two separate codes.
    assert report["branches"]["window"] == pytest.approx(report["ppl_window"], rel=1e-4)
    assert report["branches"]["full"] == report["ppl_student"] == report["token_perplexity"]
    assert len({round(v, 6) for v in report["branches"].values()}) == 4
    assert report["branches"]["none"] == pytest.approx(_without_attention(pair, text_file), rel=1e-5)
    assert {m.mixer.branches for _, m in attention_layers(model)} == {"full"}  # put back
    json.dumps(report, allow_nan=False)


def _without_attention(pair: Any, text_file: Path) -> float:
    teacher, tokenizer = pair
    kept = [layer.self_attn.o_proj.weight.detach().clone() for layer in teacher.model.layers]
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        value = evaluate((teacher, tokenizer), data=str(text_file), context=64)["token_perplexity"]
        for layer, weight in zip(teacher.model.layers, kept):
            layer.self_attn.o_proj.weight.copy_(weight)
    return value


def test_positions_stand_side_by_side(pair: Any, student: Any, text_file: Path) -> None:
    report = audit(student(LOLCATS), against=pair, data=str(text_file), context=128)
    table = report["by_position"]
    assert [(r["from"], r["to"]) for r in table] == [(0, 64), (64, 128)]
    assert sum(r["tokens"] for r in table) == report["tokens"]
    teacher = evaluate(pair, data=str(text_file), context=128)
    assert [r["teacher"] for r in table] == [r["perplexity"] for r in teacher["by_position"]]
    for kind in ("teacher", "window", "student"):
        mean = sum(r["tokens"] * math.log(r[kind]) for r in table) / report["tokens"]
        assert math.exp(mean) == pytest.approx(report[f"ppl_{kind}"], rel=1e-9)


def test_the_floor_is_the_teacher_cut_in_every_layer(pair: Any, student: Any, text_file: Path) -> None:
    hybrid = audit(student(LOLCATS, ["linear", "softmax"]), against=pair, data=str(text_file), context=64)
    teacher, tokenizer = pair
    with truncated(teacher, WINDOW, 2):
        cut = evaluate((teacher, tokenizer), data=str(text_file), context=64)["token_perplexity"]
    assert hybrid["ppl_window"] == cut
    assert hybrid["branches"]["window"] != pytest.approx(cut, rel=1e-4)  # its softmax layer still sees all


def test_a_recipe_without_a_window_is_measured_against_the_reference_and_says_so(
    pair: Any, student: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.evaluate.recovery.REFERENCE_WINDOW", 16)
    report = audit(student(NO_WINDOW), against=pair, data=str(text_file), context=64)
    assert report["branches"]["window"] is None
    assert report["branches"]["linear"] == pytest.approx(report["branches"]["full"], rel=1e-6)
    assert report["reference"] == {"window": 16, "sinks": 0, "own": False}
    assert any("reference window of 16" in note for note in report["notes"])


def test_max_windows_and_source(pair: Any, student: Any, text_file: Path) -> None:
    report = audit(student(LOLCATS), against=pair, data=str(text_file), context=32, max_windows=2, source="tech")
    assert report["windows"] == 2 and report["tokens"] == 62
    assert report["data"]["documents"] == 6


def test_what_cannot_be_audited_is_refused(pair: Any, student: Any, text_file: Path, tmp_path: Path) -> None:
    data = str(text_file)
    with pytest.raises(UsageError, match=r"not a converted model .its type is llama"):
        audit(pair, against=pair, data=data)
    with pytest.raises(UsageError, match="has no linear layer"):
        audit(student(LOLCATS, ["softmax", "softmax"]), against=pair, data=data)
    with pytest.raises(RefusedError, match=r"context 16 does not reach beyond the window .two blocks of 8"):
        audit(student(LOLCATS), against=pair, data=data, context=16)
    with pytest.raises(RefusedError, match=r"does not reach beyond the window .two blocks of 64"):
        audit(student(NO_WINDOW), against=pair, data=data, context=128)
    with pytest.raises(RefusedError, match="text is shorter than one context"):
        audit(student(LOLCATS), against=pair, data=data, context=99_999)
    pair[1].save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["東京"])
    with pytest.raises(UsageError, match="different tokenizers"):
        audit(student(LOLCATS), against=(pair[0], other), data=data)


def test_by_path_takes_the_context_of_the_recipe(
    pair: Any, student: Any, text_file: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    from linearize.artifacts.manifest import write_manifest

    model, tokenizer = student(LOLCATS)
    out = tmp_path / "out"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_manifest(out, {"recipe": {"name": "lolcats", "context": 48}})
    report = linearize.audit(out, against=teacher_folder, data=str(text_file), device="cpu")
    assert report["protocol"] == "concat@48"
    assert report["model"] == str(out) and report["against"] == str(teacher_folder)
    direct = audit((model, tokenizer), against=pair, data=str(text_file), context=48)
    assert report["ppl_student"] == pytest.approx(direct["ppl_student"], rel=1e-6)
