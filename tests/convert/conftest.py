"""Small random teachers of every family, and a text to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, head_dim 16, biases": (
        "llama",
        {"tie_word_embeddings": True, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    ),
    "llama mha, rope llama3": ("llama", {"num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    "llama mqa, rope linear": ("llama", {"num_key_value_heads": 1, "rope_parameters": LINEAR}),
    "mistral sliding window": ("mistral", {"sliding_window": 32, "head_dim": 16}),
    "mistral full": ("mistral", {"sliding_window": None}),
    "qwen2 biases, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 some sliding layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen3 norms, head_dim 16, yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3 some sliding layers, tied": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 32,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., Any]:
    """make_teacher(variant, **config) -> a random model in memory, fp32, eval, no parameter at its default."""
    return _make_teacher


@pytest.fixture(params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    """Each kind of teacher in turn."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    """A tiny Llama on disk, with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    return build_llama(folder, initializer_range=0.2, max_position_embeddings=256, num_hidden_layers=2)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Some text that no change of the code changes: a loss of one batch hangs on it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    licence = (root / "LICENSE").read_text()
    path.write_text((licence * (60_000 // len(licence) + 1))[:60_000])
    return path


def _make_teacher(variant: str, **config: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = VARIANTS[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**SIZES, **changes, **config}), attn_implementation="sdpa"
        )
        with torch.no_grad():  # biases and norms start as 0 and 1, which would hide that they were dropped
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.float().eval()
