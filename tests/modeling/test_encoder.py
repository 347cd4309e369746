"""Bidirectional linear attention: the linear form is the definition, padding is nothing, the rest is the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import linearize.modeling
from linearize.modeling.configuration_linearized import CONFIGS
from linearize.modeling.encoder_linearized import BidirectionalMixer, linear_output, quadratic_weights
from linearize.modeling.encoder_spec import misfit, usable_positions
from linearize.modeling.feature_maps import FeatureMap
from linearize.modeling.mixer_spec import LEARNED_MAPS, POSITIVE_MAPS, MixerSpec
from linearize.modeling.modeling_linearized import MODELS

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 70,
    "type_vocab_size": 2,
    "initializer_range": 0.3,
}
PAD = {"bert": 0, "roberta": 1}
NATIVE: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, BertForMaskedLM),
    "roberta": (RobertaConfig, RobertaForMaskedLM),
}
LENGTHS = (1, 2, 7, 63, 64, 65)


def spec(feature_map: str = "hedgehog_exp", **axes: Any) -> MixerSpec:
    return MixerSpec(feature_map=feature_map, normaliser="own", window=0, coverage="all", **axes)


def converted(family: str, layers: list[str] | None = None, **sizes: Any) -> Any:
    axes = {f"mixer_{name}": value for name, value in spec().as_dict().items()}
    config = CONFIGS[family](**SIZES | {"pad_token_id": PAD[family]} | sizes, **axes, layer_mixers=layers)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = MODELS[family](config).eval()
    with torch.no_grad():  # away from the identity
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def tokens(length: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 60, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", POSITIVE_MAPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_linear_form_is_the_quadratic_definition(name: str, length: int) -> None:
    torch.manual_seed(length)
    feature_map = FeatureMap(name, 3, 8, None)
    for parameter_name, value in feature_map.initial_values().items():
        getattr(feature_map, parameter_name).data.copy_(value + 0.1 * torch.randn(value.shape))
    q, k, v = torch.randn(3, 2, 3, length, 8).double().unbind(0)
    fq, fk = feature_map(q), feature_map(k)
    weights = quadratic_weights(fq, fk)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for row in range(length):  # the definition once more, without matrices
        scores = torch.stack([(fq[:, :, row] * fk[:, :, s]).sum(-1) for s in range(length)], dim=-1)
        assert torch.allclose(weights[:, :, row], scores / scores.sum(-1, keepdim=True), rtol=1e-9)
    assert torch.allclose(linear_output(fq, fk, v), weights @ v, rtol=1e-9, atol=1e-12)
    single = linear_output(fq.float(), fk.float(), v.float())
    assert torch.allclose(single.double(), weights @ v, rtol=1e-4, atol=1e-5)


def test_gradients_of_both_forms_agree() -> None:
    torch.manual_seed(0)
    fq, fk = (torch.rand(1, 2, 9, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    one = torch.autograd.grad((linear_output(fq, fk, v) * weight).sum(), (fq, fk, v))
    other = torch.autograd.grad(((quadratic_weights(fq, fk) @ v) * weight).sum(), (fq, fk, v))
    for ours, theirs in zip(one, other, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in LEARNED_MAPS if n in POSITIVE_MAPS])
@torch.no_grad()
def test_padding_has_no_weight_and_the_record_is_the_output(name: str) -> None:
    torch.manual_seed(1)
    mixer = BidirectionalMixer(spec(name), num_heads=3, head_dim=8)
    q, k, v = torch.randn(3, 2, 3, 11, 8).unbind(0)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[0, :4] = real[1, 9:] = False
    mixer.record = mixer.record_weights = True
    out = mixer(q, k, v, real=real)
    weights = mixer.last_weights
    assert weights is not None and float(weights.transpose(1, 3)[~real].abs().max()) == 0.0
    assert torch.equal(mixer.last_output, out)
    mixer.record_weights = False
    assert torch.allclose(mixer(q, k, v, real=real)[real], out[real], rtol=1e-5, atol=1e-6)
    loud = torch.where(real[:, None, :, None], k, 50.0), torch.where(real[:, None, :, None], v, 1e4)
    assert torch.equal(mixer(q, *loud, real=real)[real], mixer(q, k, v, real=real)[real])
    nobody = mixer(q, k, v, real=torch.zeros_like(real))
    assert bool(nobody.isfinite().all())


@pytest.mark.parametrize("family", NATIVE)
def test_no_linear_layer_is_the_native_model_bit_for_bit(family: str) -> None:
    model = converted(family, ["softmax", "softmax"])
    config, native_class = NATIVE[family]
    native = native_class(config(**SIZES | {"pad_token_id": PAD[family]})).eval()
    native.load_state_dict(model.state_dict())
    ids = torch.cat((tokens(33), torch.full((1, 6), PAD[family])), dim=1)
    mask = (ids != PAD[family]).long()
    types = (torch.arange(39) > 15).long()[None]
    for call in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}):
        assert torch.equal(model(**call).logits, native(**call).logits)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("layers", [["linear", "linear"], ["softmax", "linear"]])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_each_sequence_alone(family: str, layers: list[str], side: str) -> None:
    model = converted(family, layers)
    rows = [tokens(length, seed=length) for length in (1, 13, 64, 29)]
    width = 64
    ids = torch.full((len(rows), width), PAD[family])
    mask = torch.zeros_like(ids)
    places = []
    for n, row in enumerate(rows):
        begin = 0 if side == "right" else width - row.shape[1]
        place = slice(begin, begin + row.shape[1])
        ids[n, place], mask[n, place] = row[0], 1
        places.append(place)
    types = (ids % 2) * mask
    # BERT counts columns: whoever pads on the left tells it the positions. RoBERTa counts real tokens by itself.
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if family == "bert" and side == "left" else {}
    with torch.no_grad():
        together = model(ids, attention_mask=mask, token_type_ids=types, **positions).logits
        for n, (row, place) in enumerate(zip(rows, places, strict=True)):
            alone = model(row, token_type_ids=types[n : n + 1, place]).logits[0]
            assert torch.allclose(together[n, place], alone, rtol=1e-4, atol=1e-4), (family, side, n)


def test_every_token_sees_both_sides_and_positions_and_types_matter() -> None:
    model = converted("roberta", ["linear", "linear"])
    ids = tokens(21)
    with torch.no_grad():
        logits = model(ids).logits
        first, last = ids.clone(), ids.clone()
        first[0, 0] = last[0, -1] = 7
        assert not torch.equal(model(first).logits[0, -1], logits[0, -1])
        assert not torch.equal(model(last).logits[0, 0], logits[0, 0])
        shifted = torch.arange(21)[None] + PAD["roberta"] + 1
        assert torch.equal(model(ids, position_ids=shifted).logits, logits)  # RoBERTa's positions start past padding
        assert not torch.equal(model(ids, position_ids=shifted - 1).logits, logits)
        assert not torch.equal(model(ids, token_type_ids=torch.ones_like(ids)).logits, logits)
    assert usable_positions(model.config) == 68 and usable_positions(converted("bert").config) == 70


@pytest.mark.parametrize("family", NATIVE)
def test_all_layers_linear_makes_no_mask_of_t_by_t(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(family)
    base = model.base_model
    seen = []
    own = base._create_attention_masks

    def spy(**kwargs: Any) -> Any:
        made = own(**kwargs)
        seen.append(made[0])
        return made

    monkeypatch.setattr(base, "_create_attention_masks", spy)
    mask = torch.ones(1, 64, dtype=torch.long)
    mask[0, 50:] = 0
    model(tokens(64), attention_mask=mask)
    assert seen == [None]


def test_what_an_encoder_cannot_follow_is_refused() -> None:
    bad = {
        "window": {"window": 16, "normaliser": "shared", "coverage": "outside"},
        "decay": {"decay": "fixed"},
        "write": {"write": "delta", "normaliser": "norm"},
        "normaliser": {"normaliser": "norm"},
        "own_qk": {"own_qk": True},
    }
    plain = {"normaliser": "own", "window": 0, "coverage": "all"}
    for axis, axes in bad.items():
        problem = misfit(MixerSpec(**plain | axes))
        assert problem is not None and f"mixer.{axis}" in problem[0] and f"mixer.{axis}=" in problem[1]
        values = dict(part.removeprefix("mixer.").split("=") for part in problem[1].split() if "=" in part)
        fixed = {name: {"0": 0, "false": False}.get(value, value) for name, value in values.items()}
        assert misfit(MixerSpec(**plain | axes | fixed)) is None  # what it tells to write is enough
    assert misfit(MixerSpec(**plain)) is None
    with pytest.raises(ValueError, match=r"mixer\.decay: fixed"):
        BidirectionalMixer(MixerSpec(**plain | {"decay": "fixed"}), num_heads=1, head_dim=4)
    with pytest.raises(ValueError, match="both directions"):
        converted("bert", is_decoder=True)
    model = converted("bert")
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.long))


@pytest.mark.parametrize("family", NATIVE)
def test_saved_and_loaded_by_the_auto_classes(family: str, tmp_path: Path) -> None:
    linearize.modeling.register()
    model = converted(family, ["linear", "softmax"])
    model.save_pretrained(tmp_path)
    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    ids = tokens(17)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    bare = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert torch.equal(bare(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


def test_half_precision_mixes_in_float32() -> None:
    mixer = BidirectionalMixer(spec(), num_heads=2, head_dim=8)
    q, k, v = (8 * torch.randn(1, 2, 40, 8)).expand(3, 1, 2, 40, 8).unbind(0)
    half = mixer(*(x.bfloat16() for x in (q, k, v)))
    exact = mixer(*(x.bfloat16().float() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16 and torch.equal(half, exact.bfloat16())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("family", NATIVE)
def test_missing_maps_start_at_their_own_values(family: str, tmp_path: Path) -> None:
    """A teacher's checkpoint loaded as a student, and one that lacks a single tensor."""
    student = converted(family)
    config, kind = NATIVE[family]
    kind(config(**SIZES, pad_token_id=PAD[family])).save_pretrained(tmp_path / "teacher")
    fresh = MODELS[family].from_pretrained(tmp_path / "teacher", config=student.config)
    mixers = [module for module in fresh.modules() if isinstance(module, BidirectionalMixer)]
    assert len(mixers) == 2
    for mixer in mixers:
        assert all(torch.equal(mixer.state_dict()[name], x) for name, x in mixer.initial_values().items())
    state = student.state_dict()
    lost = next(name for name in state if name.endswith("mixer.k_map.bias"))
    student.save_pretrained(tmp_path / "student", state_dict={name: x for name, x in state.items() if name != lost})
    found = MODELS[family].from_pretrained(tmp_path / "student").state_dict()
    assert bool((found.pop(lost) == 0).all())
    assert all(torch.equal(x, state[name]) for name, x in found.items())
