"""GPT-NeoX, GPT-2 and OPT: what other decoders do not have. Learned positions, fused or transposed projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linearize.modeling.cache_linearized import LinearizedCache
from linearize.modeling.configuration_linearized import kv_bytes, linearized_config
from linearize.modeling.layout import document_mask
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import MODELS, attention_layers
from tests.modeling.families import UNGROUPED, teacher
from tests.modeling.test_decode import GREEDY, Replay, graphs, padded  # noqa: F401 - a fixture
from tests.specs import recipe_specs

SPECS = recipe_specs()
PLANS = {"all": ["linear"] * 3, "hybrid": ["linear", "softmax", "linear"]}


def convert(native: Any, spec: MixerSpec, plan: list[str], **config: Any) -> Any:
    """A student with the teacher's weights and fresh, shaken mixers."""
    made = linearized_config(native.config, layer_mixers=plan, spec=spec)
    for key, value in config.items():
        setattr(made, key, value)
    student = MODELS[native.config.model_type](made).eval()
    missing, unexpected = student.load_state_dict(native.state_dict(), strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    torch.manual_seed(5)
    for name, p in student.named_parameters():
        if ".mixer." in name:
            p.data += 0.1 * torch.randn_like(p)
    return student


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_packed_documents(family: str, implementation: str) -> None:
    """Invariant 5, also in softmax layers; those of OPT do not look at positions, and are given a mask."""
    student = convert(teacher(family), SPECS["lolcats"], PLANS["hybrid"])
    student.set_attn_implementation(implementation)
    x, positions = ids(2, 150), torch.cat((torch.arange(67), torch.arange(83)))[None]
    packed = student(x, position_ids=positions, use_cache=False).logits
    assert relative(packed[:, :67], student(x[:, :67]).logits) < 1e-5
    assert relative(packed[:, 67:], student(x[:, 67:]).logits) < 1e-5


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_packed_documents_in_a_student_of_softmax_layers_are_the_teachers(family: str) -> None:
    native = teacher(family)
    student = convert(native, SPECS["lolcats"], ["softmax"] * 3)
    x, positions = ids(2, 150), torch.cat((torch.arange(67), torch.arange(83)))[None].expand(2, -1)
    assert torch.equal(student(x, position_ids=positions).logits, native(x, position_ids=positions).logits)


@torch.no_grad()
def test_learned_positions_count_tokens_and_not_columns() -> None:
    """At prefill, and in what a padded batch goes on with: GPT-2 itself counts columns unless it is told otherwise."""
    student = convert(teacher("gpt2"), SPECS["gated-deltanet"], PLANS["hybrid"])
    x, mask = ids(1, 80), torch.ones(1, 100, dtype=torch.long)
    mask[0, :20] = 0
    padded = torch.cat((torch.zeros(1, 20, dtype=torch.long), x), 1)
    alone, cache = LinearizedCache(student.config), LinearizedCache(student.config)
    want = [student(x[:, a:b], past_key_values=alone).logits for a, b in ((0, 70), (70, 75), (75, 76))]
    got = [
        student(padded[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 90), (90, 95), (95, 96))
    ]
    for ours, theirs in zip(got, want, strict=True):
        assert relative(ours[:, -theirs.shape[1] :], theirs) < 1e-5


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_generate(family: str) -> None:
    """Greedy with a cache is greedy without, padded too, and so are beams."""
    student = convert(teacher(family), SPECS["lolcats"], PLANS["hybrid"])
    x = ids(2, 90)
    greedy: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    want = student.generate(x, **greedy)
    assert torch.equal(student.generate(x, use_cache=False, **greedy), want)
    padded = torch.cat((torch.zeros(2, 20, dtype=torch.long), x), 1)
    mask = (padded != 0).long()
    padded[0], mask[0] = torch.cat((ids(1, 20, 9)[0], x[0])), 1
    got = student.generate(padded, attention_mask=mask, **greedy)
    assert torch.equal(got[1, 20:], want[1])
    assert torch.equal(got[0], student.generate(padded[:1], **greedy)[0])
    beams: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": None}
    assert torch.equal(student.generate(x, **beams), student.generate(x, use_cache=False, **beams))


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_generate_is_the_same_by_replays(family: str, graphs: list[Replay]) -> None:  # noqa: F811
    """With a stand-in for CUDA graphs (test_decode.py): learned positions come from the device, not from the host."""
    student = convert(teacher(family), SPECS["lolcats"], PLANS["hybrid"])
    x, mask = padded(3, 60)
    got = student.generate(x, attention_mask=mask, max_new_tokens=30, **GREEDY)
    assert student.decode_graph_reason is None and graphs[-1].replays == 28
    student.decode_graphs = False
    assert torch.equal(student.generate(x, attention_mask=mask, max_new_tokens=30, **GREEDY), got)


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_scores_are_scaled_as_in_the_teacher(family: str) -> None:
    """GPT-2's by layer, if its config says so; OPT's before they reach the mixer."""
    native = teacher(family)
    student = convert(native, MixerSpec(feature_dim=8), PLANS["all"])
    scales = {module.mixer.scaling for _, module in attention_layers(student)}
    assert scales == {"gpt_neox": {12**-0.5}, "gpt2": {12**-0.5 / n for n in (1, 2, 3)}, "opt": {1.0}}[family]
    assert kv_bytes(student.config, 10, dtype_bytes=4) == 3 * 2 * 48 * 10 * 4


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_more_tokens_than_learned_positions_are_refused(plan: str, graphs: list[Replay]) -> None:  # noqa: F811
    """Before an index goes astray; padding does not count, and rotations have no end."""
    student = convert(teacher("gpt2", max_position_embeddings=64), SPECS["lolcats"], PLANS[plan])
    x, mask = ids(1, 70), torch.ones(1, 70, dtype=torch.long)
    with pytest.raises(ValueError, match="more than 64 tokens"):
        student(x)
    mask[0, :6] = 0
    assert student(x, attention_mask=mask).logits.isfinite().all()
    with pytest.raises(ValueError, match="more than 64 tokens"):
        student.generate(x[:, :60], max_new_tokens=8, **GREEDY)
    assert student.decode_graph_reason == "the text may grow beyond the 64 learned positions"
    student.generate(x[:, :60], max_new_tokens=4, **GREEDY)
    assert student.decode_graph_reason is None
    turning = convert(teacher("gpt_neox", max_position_embeddings=64), SPECS["lolcats"], PLANS[plan])
    assert turning(x).logits.isfinite().all()


def test_document_mask() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]), 2)
    first = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()
    assert torch.equal(mask, torch.stack((first, torch.ones(5, 5).tril().bool()))[:, None])
