"""Small random teachers of every family, each with what makes the family awkward."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from linearize.artifacts.load import resolve
from linearize.modeling.family_table import FAMILIES as TABLE
from linearize.modeling.family_table import auto_class, implementation

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
}
LIVELY = {"initializer_range": 0.1}
"""Weights so large that bounds on scores and logits bind."""
EXPERTS = {**LIVELY, "num_experts_per_tok": 2, "sliding_window": 160}

TEACHERS: dict[str, dict[str, Any]] = {
    # head_dim is not hidden / heads; scaled RoPE; biases; tied embeddings
    "llama": {"head_dim": 16, "rope_parameters": LLAMA3, "attention_bias": True, "tie_word_embeddings": True},
    # sliding window in every layer
    "mistral": {"head_dim": 16, "sliding_window": 160},
    # q, k, v biases; YaRN, whose tables carry a factor; sliding window in the last layer
    "qwen2": {"use_sliding_window": True, "sliding_window": 160, "max_window_layers": 2, "rope_parameters": YARN},
    # q and k norms
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        **EXPERTS,
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "use_sliding_window": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    # bounds on scores and logits that bind; a scaling of its own; sliding and full layers in turn
    "gemma2": {
        **LIVELY,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 0.4,
        "sliding_window": 160,
        "layer_types": KINDS,
    },
    # q and k norms; another RoPE for each kind of layer
    "gemma3_text": {
        **LIVELY,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 0.4,
        "sliding_window": 160,
        "layer_types": KINDS,
        "rope_parameters": TWO_BASES,
    },
    # one projection for q, k and v; partial RoPE (Phi-4-mini)
    "phi3": {
        **LIVELY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "sliding_window": 160,
    },
    # norms over the whole width
    "olmo2": LIVELY,
    "olmo3": {**LIVELY, "sliding_window": 160, "layer_types": KINDS, "rope_parameters": TWO_BASES},
    # no RoPE in the second layer
    "smollm3": {**LIVELY, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 160},
    # four multipliers
    "granite": {
        **LIVELY,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.5,
    },
    # partial RoPE, biases, a norm for every head
    "stablelm": {
        **LIVELY,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    # one projection for q, k and v, its heads in turn; partial RoPE; parallel residual
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "initializer_range": 0.1,
    },
    # learned positions; one transposed projection; scores scaled by layer; dropout, which conversions must not run
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 64, "initializer_range": 0.1},
    # learned positions with an offset; scaled queries; an embedding of another width
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.1},
}
"""What each family's config says besides SIZES."""

UNGROUPED = ("gpt_neox", "gpt2", "opt")
"""Families whose query heads all have a key head of their own."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Those on which everything is tried."""
DECODERS = tuple(kind for kind in TEACHERS if not TABLE[kind].bidirectional)
"""Those of tests/convert/test_family_matrix.py."""


def teacher_config(family: str, **changes: Any) -> Any:
    """The config of a small teacher."""
    sizes = SIZES
    if family in UNGROUPED:
        sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    # A copy: configs keep and change the dicts that they are given.
    return AutoConfig.for_model(family, **deepcopy({**sizes, **TEACHERS[family], **changes}))


def teacher(family: str, **changes: Any) -> Any:
    """A random model of `family`, float32, in evaluation mode."""
    torch.manual_seed(0)
    config = teacher_config(family, **changes)
    model = auto_class(config).from_config(config, attn_implementation=implementation(config))
    for p in model.parameters():  # random biases and norms too: zeros and ones would hide a dropped one
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def save_with_images(folder: Path) -> None:
    """A Gemma 3 that reads images, too, in bfloat16, with the demo's tokenizer, in `folder`."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    # The whole has no bound on its logits, and the checkpoints of Gemma 3 ask for none.
    text = {**SIZES, **TEACHERS["gemma3_text"], "vocab_size": 4096, "final_logit_softcapping": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(text_config=deepcopy(text), vision_config=vision, mm_tokens_per_image=4, dtype="bfloat16")
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    for path in resolve("demo").glob("token*"):
        shutil.copyfile(path, folder / path.name)
