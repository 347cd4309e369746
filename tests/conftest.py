"""Shared fixtures. Nothing here reaches a network, and torch is imported only by the tests that use it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch or huggingface_hub. Two cores and two workers: one thread each is the fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="linearize-tests-modules-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this once, when it is imported. Without a GPU its kernels run in Python, on the CPU's tensors.
GPU_FILES = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
if not GPU_FILES or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real teachers and data that lies beside the repository where it is developed."""
    path = ROOT.parent / "shared"
    if not (path / "teachers").is_dir():
        pytest.skip("needs ../shared (real teachers and data), which is not here")
    return path


@pytest.fixture(scope="session")
def undocumented() -> Callable[[str, dict[str, Any]], list[str]]:
    """undocumented(section, output) -> how what a command prints with --json differs from docs/json.md."""
    from tests.docs import schema

    tables = schema.tables(ROOT / "docs" / "json.md")
    return lambda section, output: schema.complaints(output, tables[section])


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, as torch.utils.deterministic.fill_uninitialized_memory has it by default."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def source_env() -> dict[str, str]:
    """Environment of a subprocess that runs from the source tree, whatever is installed."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "cli"))
    return {**os.environ, "PYTHONPATH": paths}


@pytest.fixture(scope="session")
def build_llama() -> Callable[..., Path]:
    """build_llama(folder, *, seed=0, shards=None, **config) -> folder: a tiny random Llama and a byte-level tokenizer.

    2 layers, hidden 32, 4 heads, 2 kv heads, vocabulary 259 (256 bytes, <s>, </s>, <pad>), float32. `shards` is the
    most bytes of one shard.
    """
    return _build_llama


def _build_llama(folder: Path, *, seed: int = 0, shards: int | None = None, **config: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    ).save_pretrained(folder)
