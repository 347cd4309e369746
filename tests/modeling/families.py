"""Small random teachers of every family, each with what makes the family awkward."""

from __future__ import annotations

from typing import Any

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


def teacher(family: str) -> Any:
    """A random model of `family`, float32, in evaluation mode."""
    torch.manual_seed(0)
    if family == "llama":  # head_dim is not hidden / heads; scaled RoPE; biases; tied embeddings
        config: Any = LlamaConfig(
            **SIZES, head_dim=16, rope_parameters=LLAMA3, attention_bias=True, tie_word_embeddings=True
        )
        model: Any = LlamaForCausalLM(config)
    elif family == "mistral":  # sliding window in every layer
        model = MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=160))
    elif family == "qwen2":  # q, k, v biases; YaRN, whose tables carry a factor; sliding window in the last layer
        config = Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=160, max_window_layers=2, rope_parameters=YARN
        )
        model = Qwen2ForCausalLM(config)
    else:  # q and k norms
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    for p in model.parameters():  # random biases and norms too: zeros and ones would hide a dropped one
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model.eval()


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
