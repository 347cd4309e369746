"""Every weight of the teacher has its place in the student, and every new one a value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.convert.export import cast
from linearize.convert.surgery import linearize_model, mixer_plan, trained_names
from linearize.convert.teacher import account
from linearize.errors import RefusedError
from linearize.modeling.mixer_spec import MixerSpec

SPEC = MixerSpec(window=8)
GATED = MixerSpec(
    feature_map="l2norm", write="delta", decay="scalar", normaliser="norm", mix="gate", coverage="all", window=8
)


def ids(batch: int = 2, length: int = 70) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def operate(teacher: Any, softmax: set[int], spec: MixerSpec = SPEC, **options: Any) -> Any:
    plan = mixer_plan(teacher.config.num_hidden_layers, softmax)
    return linearize_model(teacher, spec=spec, layer_mixers=plan, seed=0, **options)


def test_no_layer_converted_is_the_teacher_bit_for_bit(
    make_teacher: Callable[..., Any], variant: str, tmp_path: Path
) -> None:
    from linearize.artifacts.load import load_model

    teacher = make_teacher(variant)
    student, report = operate(teacher, {0, 1, 2})
    assert report.new == ()
    assert torch.equal(logits(student, ids()), logits(teacher, ids()))
    for name, model in (("teacher", teacher), ("student", student)):
        cast(model, torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    loaded = load_model(tmp_path / "student", device="cpu")
    original = load_model(tmp_path / "teacher", device="cpu")
    assert loaded.dtype == original.dtype == torch.bfloat16
    assert type(loaded) is not type(original)
    assert torch.equal(logits(loaded, ids()), logits(original, ids()))


@pytest.mark.parametrize("spec", [SPEC, GATED], ids=["hedgehog", "delta"])
def test_keys(make_teacher: Callable[..., Any], variant: str, spec: MixerSpec) -> None:
    teacher = make_teacher(variant)
    student, report = operate(teacher, {1}, spec)
    theirs = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    ours = dict(student.named_parameters()) | dict(student.named_buffers())
    assert set(report.mapped) == set(theirs)
    assert set(report.new) == set(ours) - set(theirs) and report.new
    assert all(".self_attn.mixer." in name and "layers.1." not in name for name in report.new)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert all(bool(torch.isfinite(ours[name]).all()) for name in report.new)
    tied = teacher.config.tie_word_embeddings
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert bool(torch.isfinite(logits(student, ids())).all())


def test_frozen_weights_are_shared_and_trained_ones_are_not(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    student, _ = operate(teacher, set(), own=lambda name: name.endswith("q_proj.weight"))
    ours, theirs = student.model.layers[0].self_attn, teacher.model.layers[0].self_attn
    assert ours.k_proj.weight.data_ptr() == theirs.k_proj.weight.data_ptr()
    assert ours.k_proj.weight is not theirs.k_proj.weight
    assert ours.q_proj.weight.data_ptr() != theirs.q_proj.weight.data_ptr()
    student.to(torch.bfloat16)
    assert theirs.k_proj.weight.dtype == torch.float32


def test_mixers_start_from_the_seed_alone(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    spec = MixerSpec(decay="channel", feature_map="identity", normaliser="norm", mix="gate", coverage="all", window=8)
    torch.manual_seed(1)
    one, report = operate(teacher, set(), spec)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    two, _ = operate(teacher, {0}, spec)
    tensors = dict(one.named_parameters())
    later = [n for n in report.new if "layers.0." not in n]
    assert all(torch.equal(tensors[n], dict(two.named_parameters())[n]) for n in later)
    first = [n for n in later if n.startswith("model.layers.1.") and n.endswith("decay.down")]
    assert not torch.equal(tensors[first[0]], tensors[first[0].replace("layers.1", "layers.2")])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_accounting_of_files(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    wanted = set(teacher.state_dict())
    assert account(wanted, wanted, teacher.config) == {}
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert account(wanted | {rotary}, wanted, teacher.config) == {rotary: "rotary table, recomputed from the config"}
    with pytest.raises(RefusedError, match=r"self_attn\.sinks, which the family llama has no place for"):
        account(wanted | {"model.layers.0.self_attn.sinks"}, wanted, teacher.config)
    with pytest.raises(RefusedError, match=r"lack lm_head\.weight"):
        account(wanted - {"lm_head.weight"}, wanted, teacher.config)


def test_accounting_of_tied_embeddings(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("qwen2 biases, tied")
    wanted = set(teacher.state_dict())
    assert "lm_head.weight" in wanted
    assert account(wanted - {"lm_head.weight"}, wanted, teacher.config) == {}
    dropped = account(wanted, wanted, teacher.config)
    assert list(dropped) == ["lm_head.weight"] and "tied" in dropped["lm_head.weight"]
    with pytest.raises(RefusedError, match=r"q_proj\.bias"):
        account({n for n in wanted if not n.endswith("0.self_attn.q_proj.bias")}, wanted, teacher.config)


def test_trained_names(make_teacher: Callable[..., Any]) -> None:
    student, report = operate(make_teacher("qwen2 biases, tied"), {0})
    assert set(trained_names(student, ["mixer"])) == set(report.new)
    assert trained_names(student, ["q_proj"], [1]) == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
    ]
    assert trained_names(student, ["nothing"]) == []
