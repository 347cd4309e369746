"""The embedded teacher: small enough to ship, plain enough to convert, and it reads further back than 64 tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.demo.text import stdlib_documents

LENGTH, WINDOW, WINDOWS = 512, 64, 40


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "linearize" / "demo" / "teacher"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_files_are_few_and_small(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert sizes["model.safetensors"] <= 4_000_000
    assert sizes["tokenizer.json"] <= 200_000


def test_weights_are_bf16_tied_and_finite(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert tensor.isfinite().all(), name
    assert "lm_head.weight" not in names  # tied: the embedding is stored once
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_architecture(model: Any) -> None:
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.head_dim >= 32
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.max_position_embeddings >= 512
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x  # trailing  \n\n",
        "naïve Ω 漢字 🐍👩‍👩‍👧 \u200b\x00\x7f",
        " leading, 'quotes', 1_000.5e-3 ",
        "\r\n\r \u2028",
        "",
    ],
)
def test_tokenizer_keeps_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_tokenizer_agrees_with_the_model(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name) == getattr(model.generation_config, name)
    assert tokenizer.chat_template is None


def test_continues_source_code(model: Any, tokenizer: Any) -> None:
    """Greedy, it repeats a pattern that stands further back than the window."""
    names = ("alpha", "bravo", "carol", "delta", "eagle", "fancy", "grape", "hotel")
    body = "".join(f"    def get_{name}(self):\n        return self._{name}\n\n" for name in names)
    inputs = tokenizer(f"class Record:\n{body}    def get_india(self):", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids).startswith("\n        return self._")


def test_uses_its_context(model: Any, tokenizer: Any) -> None:
    """Held-out text is at least 10 % more perplexing through a 64-token window (own block and the one before)."""
    ids = [
        token
        for _, text in stdlib_documents("heldout")
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    count = len(ids) // LENGTH
    windows = torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)[:: max(1, count // WINDOWS)]
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    visible = (j <= i) & (i // WINDOW - j // WINDOW <= 1)
    block = torch.zeros(LENGTH, LENGTH).masked_fill(~visible, -torch.inf)[None, None]

    full, cut = (_perplexity(model, windows, mask) for mask in (None, block))
    assert full < 20
    assert cut >= 1.10 * full


@torch.no_grad()
def _perplexity(model: Any, windows: torch.Tensor, mask: torch.Tensor | None) -> float:
    """exp of the mean cross-entropy over all predicted tokens of int64 [N, LENGTH]; mask additive [1, 1, T, T]."""
    total = 0.0
    for rows in windows.split(8):
        logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()  # fmt: skip
    return float(torch.tensor(total / (windows.shape[0] * (LENGTH - 1))).exp())
