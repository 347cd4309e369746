"""The teacher cut to a block window: what each query sees, for every family, padded, cached and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from linearize.errors import UsageError
from linearize.evaluate.truncation import block_window, truncated

SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
SLIDING = 11
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral sliding": (MistralConfig, MistralForCausalLM, {"sliding_window": SLIDING}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2 sliding": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": SLIDING, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
CUTS = [(4, 0), (4, 2), (8, 1), (1, 0)]


def build(family: str) -> Any:
    config, model, extra = FAMILIES[family]
    torch.manual_seed(0)
    return model(config(**{**SIZES, **extra}, attn_implementation="sdpa")).eval()


def sees(i: int, j: int, window: int, sinks: int) -> bool:
    return j <= i and (i // window - j // window <= 1 or j < sinks)


def by_hand(model: Any, ids: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Logits [T, V] of one row with a mask written out pair by pair, through the model's eager attention."""
    length = len(ids)
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    everywhere = getattr(model.config, "sliding_window", None) if not hasattr(model.config, "layer_types") else None
    masks = {}
    for kind in set(layer_types):
        reach = model.config.sliding_window if kind == "sliding_attention" else everywhere
        seen = torch.tensor([[sees(i, j, window, sinks) and (reach is None or i - j < reach) for j in range(length)]
                             for i in range(length)])  # fmt: skip
        masks[kind] = torch.zeros(length, length).masked_fill(~seen, float("-inf"))[None, None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    mask = masks if hasattr(model.config, "layer_types") else masks["full_attention"]
    with torch.no_grad():
        logits = model(ids[None], attention_mask=mask, use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return logits


@pytest.mark.parametrize("window, sinks", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_definition(family: str, window: int, sinks: int) -> None:
    model = build(family)
    for length in (1, 2, 7, 8, 9, 33):
        ids = torch.randint(3, 97, (length,))
        with truncated(model, window, sinks), torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits, by_hand(model, ids, window, sinks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_equal_each_alone(family: str) -> None:
    model = build(family)
    rows = [torch.randint(3, 97, (n,)) for n in (33, 20, 1)]
    ids = torch.stack([torch.cat([torch.zeros(33 - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([torch.cat([torch.zeros(33 - len(r), dtype=torch.long), torch.ones_like(r)]) for r in rows])
    with truncated(model, 4, 2), torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        for row, logits in zip(rows, together):
            torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_with_a_cache_equal_the_whole(family: str) -> None:
    model = build(family)
    ids = torch.randint(3, 97, (1, 30))
    with truncated(model, 4, 1), torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :13], use_cache=True)
        parts = [out.logits]
        for t in range(13, 30):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_packed_documents_equal_each_alone() -> None:
    model = build("llama")
    docs = [torch.randint(3, 97, (n,)) for n in (13, 22)]
    positions = torch.cat([torch.arange(len(d)) for d in docs])[None]
    with truncated(model, 4, 2), torch.no_grad():
        packed = model(torch.cat(docs)[None], position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(d[None], use_cache=False).logits[0] for d in docs])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_window_over_everything_is_the_teacher_and_a_small_one_is_not() -> None:
    model = build("llama")
    ids = torch.randint(3, 97, (2, 40))
    with torch.no_grad():
        teacher = model(ids).logits
        with truncated(model, 20):
            torch.testing.assert_close(model(ids).logits, teacher, rtol=1e-4, atol=1e-4)
        with truncated(model, 4):
            cut = model(ids).logits
    torch.testing.assert_close(cut[:, :8], teacher[:, :8], rtol=1e-4, atol=1e-4)  # two blocks see all there is
    assert (cut[:, 8:] - teacher[:, 8:]).abs().amax() > 0.01


def test_the_models_own_attention_comes_back_also_after_an_error() -> None:
    model = build("llama")
    ids = torch.randint(3, 97, (1, 40))
    with torch.no_grad():
        before = model(ids).logits
        saved = model.config.to_dict()
        with pytest.raises(KeyError), truncated(model, 4, 1):
            model(ids)
            raise KeyError
        assert model.config._attn_implementation == "sdpa"
        assert model.config.to_dict() == saved
        assert torch.equal(model(ids).logits, before)


def test_two_models_may_be_cut_to_different_windows_at_once() -> None:
    first, second = build("llama"), build("llama")
    ids = torch.randint(3, 97, (1, 40))
    with torch.no_grad():
        with truncated(first, 4):
            alone = first(ids).logits
        with truncated(first, 4), truncated(second, 8):
            assert torch.equal(first(ids).logits, alone)
            assert not torch.allclose(second(ids).logits, alone)


def test_bad_windows_are_refused() -> None:
    for window, sinks in ((0, 0), (-1, 0), (4, -1)):
        with pytest.raises(UsageError, match="must be positive"), truncated(build("llama"), window, sinks):
            pass


def test_mask_by_hand() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    cut = block_window(causal, window=2, sinks=1)[0, 0].int().tolist()
    assert cut == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 1, 1, 1, 1],
    ]
