"""Configs that ask for too much or for code, and tokenizers that name other files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.artifacts.damage import WEIGHTS, Case, edited, flipped, pack, replaced, sparse

EVIL = "evil.Thing"
CODE = {
    "auto_map": {"AutoConfig": EVIL, "AutoModelForCausalLM": EVIL, "AutoTokenizer": [EVIL, EVIL]},
    "trust_remote_code": True,
    "_attn_implementation": "attacker/kernels",
    "_attn_implementation_internal": "attacker/kernels",
    "attn_implementation": "attacker/kernels:evil",
    "_experts_implementation": "attacker/kernels",
    "experts_implementation": "attacker/kernels",
    "transformers_weights": "{outside}/model.safetensors",
    "_name_or_path": "{outside}",
    "name_or_path": "{outside}",
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "attacker/kernels"},
    "custom_pipelines": {"text-generation": {"impl": EVIL}},
    "tokenizer_class": EVIL,
    "architectures": [EVIL],
    "base_model_tp_plan": {"*": EVIL},
    "base_model_name_or_path": "attacker/model",
    "adapter_path": "{outside}",
    "sub_configs": {"text_config": EVIL},
    "_commit_hash": "../../..",
    "torchscript": True,
    "problem_type": EVIL,
}
"""Keys of a config.json that name code, files or repositories. Harmless when they are not obeyed."""
SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings",
)  # fmt: skip


def configs(rng: random.Random) -> Iterator[Case]:
    """Configs that ask for too much, or for code."""
    for key, value in CODE.items():
        yield Case(
            name=f"config: {key}", kind="hostile config", damage=edited("config.json", **{key: value}), must=False
        )
    yield Case(
        name="config: a model that needs code",
        kind="hostile config",
        damage=edited("config.json", model_type="evil", auto_map=CODE["auto_map"]),
    )
    for value in (
        "",
        "lama",
        "os.system",
        "../llama",
        "linearized_llama",
        "linearized_evil",
        ["llama"],
        7,
        None,
        {"a": 1},
    ):
        yield Case(
            name=f"config: model_type {value!r}", kind="hostile config", damage=edited("config.json", model_type=value)
        )
    yield Case(
        name="config: quantised",
        kind="hostile config",
        damage=edited("config.json", quantization_config={"quant_method": "gptq"}),
    )
    absurd: list[Any] = [0, -1, 10**9, 10**18, 10**400, 2.5, "64", True, [64], {"a": 64}, float("nan"), float("inf")]
    for key in SIZES:
        for value in absurd:
            # 10^9 positions cost nothing where they are computed, and are below the limit.
            must = not (key == "max_position_embeddings" and value == 10**9)
            yield Case(
                name=f"config: {key} {value!r:.24}",
                kind="hostile config",
                damage=edited("config.json", **{key: value}),
                must=must,
            )
    more: dict[str, list[Any]] = {
        "rope_parameters": [7, [], {"rope_type": "evil"}, {"rope_type": "yarn", "factor": 1e308}, {"rope_type": ["x"]}],
        "rope_scaling": [7, {"type": "evil", "factor": "x"}, {"rope_type": "linear", "factor": -1}],
        "hidden_act": ["os.system", 7, None, ["silu"], "../silu"],
        "rms_norm_eps": [0, -1, "x", float("nan"), [1]],
        "layer_types": [7, ["full_attention"], [1, 2], "full", [["x"], ["y"]]],
        "torch_dtype": ["float8", "os.system", ["float32"], {"a": 1}],
        "dtype": ["evil", 7, {"": "float32"}],
        "bos_token_id": [-5, "x", 10**30, [1, 2], {"a": 1}],
        "pad_token_id": [-5, "x", 10**30, 300],
        "attention_dropout": ["x", 7.5, -1, None],
        "initializer_range": ["x", -1, 1e400],
        "tie_word_embeddings": ["x", 7, None],
    }
    for key, values in more.items():
        for value in values:
            yield Case(
                name=f"config: {key} {value!r:.40}",
                kind="hostile config",
                damage=edited("config.json", **{key: value}),
                must=False,
            )
    huge = {
        "hidden_size": 131_072,
        "num_hidden_layers": 1000,
        "intermediate_size": 1_048_576,
        "num_attention_heads": 1024,
    }
    yield Case(name="config: 275 terabytes, and other weights", kind="hostile config", damage=_unbacked(huge))
    for text in (
        "",
        "null",
        "[]",
        "{",
        "[" * 100_000,
        '{"a": 1e99999}',
        '{"model_type": "llama", "model_type": "x"}',
        "\ud800",
    ):
        data = text.encode("utf-8", "surrogatepass")
        yield Case(name=f"config: {text[:30]!r}", kind="hostile config", damage=replaced("config.json", data))
    yield Case(
        name="config: 9 MB",
        kind="hostile config",
        damage=replaced("config.json", b'{"a": "' + b"x" * (9 << 20) + b'"}'),
    )
    for text in (
        "",
        "{",
        "[]",
        '{"max_length": "x", "cache_implementation": "evil"}',
        '{"auto_map": {"a": "evil.Thing"}}',
        "\xff",
    ):
        damage = replaced("generation_config.json", text.encode("latin-1"))
        yield Case(name=f"generation_config: {text[:30]!r}", kind="hostile config", damage=damage, must=False)
    for _ in range(20):
        key, other = rng.sample(SIZES, 2)
        value, size = rng.choice([1, 3, 7, 4096, 131_072]), rng.choice([1, 3, 7, 4096, 131_072])
        damage = edited("config.json", **{key: value, other: size})
        yield Case(name=f"config: {key} {value}, {other} {size}", kind="hostile config", damage=damage, must=False)


def _unbacked(sizes: dict[str, int]) -> Callable[[Path, Path], None]:
    """A model that would not fit anywhere, and no weight of it in the file."""

    def damage(folder: Path, outside: Path) -> None:
        edited("config.json", **sizes, head_dim=None, num_key_value_heads=None)(folder, outside)
        header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        (folder / WEIGHTS).write_bytes(pack(header, b"\0" * 8))

    return damage


def tokenizers(rng: random.Random) -> Iterator[Case]:
    """Tokenizers that are huge, of the wrong type, or name other files and code."""
    canary = "{outside}/tokenizer.json"
    named = {
        "tokenizer_file": canary, "vocab_file": canary, "merges_file": canary, "spm_file": canary,
        "sp_model_file": canary,
        "special_tokens_map_file": canary, "added_tokens_file": canary, "chat_template_file": canary,
        "fast_tokenizer_files": ["tokenizer.1.0.0.json", "../outside/tokenizer.4.0.0.json"],
        "auto_map": CODE["auto_map"], "init_inputs": [canary], "gguf_file": canary, "name_or_path": "{outside}",
        "cache_dir": "{outside}", "subfolder": "../outside", "tokenizer_object": canary, "_commit_hash": "../..",
        "trust_remote_code": True, "processor_class": EVIL, "is_local": False, "local_files_only": False,
        "transformers_version": "x", "mistral_format": True, "fix_mistral_regex": True, "backend": EVIL,
    }  # fmt: skip
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in named.items():
            yield Case(name=f"{name}: {key}", kind="hostile tokenizer", damage=edited(name, **{key: value}), must=False)
        for text in ("", "[]", "null", "7", "{", "[" * 50_000, '{"a": NaN}', '{"a":1,"a":2}', "\xff"):
            damage = replaced(name, text.encode("latin-1"))
            yield Case(name=f"{name}: {text[:20]!r}", kind="hostile tokenizer", damage=damage)
    for value in (
        EVIL,
        ["x"],
        7,
        None,
        {"a": 1},
        "BertJapaneseTokenizer",
        "PreTrainedTokenizerFast",
        "../x",
        "GPT2Tokenizer",
    ):
        damage = edited("tokenizer_config.json", tokenizer_class=value)
        yield Case(name=f"tokenizer_class {value!r}", kind="hostile tokenizer", damage=damage, must=False)
    for key, value in {
        "model_max_length": "x", "added_tokens_decoder": {"x": 7}, "extra_special_tokens": 7, "bos_token": 7,
        "chat_template": ["x"], "padding_side": "up", "additional_special_tokens": {"a": [1]}, "eos_token": {"a": 1},
        "pad_token": [1], "model_input_names": 7, "clean_up_tokenization_spaces": "x",
    }.items():  # fmt: skip
        yield Case(
            name=f"tokenizer_config: {key} {value!r}",
            kind="hostile tokenizer",
            damage=edited("tokenizer_config.json", **{key: value}),
            must=False,
        )
    for text in ("", "{}", "[]", '{"version":"1.0"}', "{", "[" * 50_000, '{"model": {"type": "Evil"}}', "\xff", "7"):
        yield Case(
            name=f"tokenizer.json: {text[:24]!r}",
            kind="hostile tokenizer",
            damage=replaced("tokenizer.json", text.encode("latin-1")),
        )
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "special_tokens_map.json",
    ):
        yield Case(name=f"{name} of 8 GB", kind="hostile tokenizer", damage=sparse(name, 8 << 30))
    for _ in range(15):
        share, bit = rng.random(), rng.randrange(8)
        yield Case(
            name=f"tokenizer.json: bit {bit} at {share:.3f}",
            kind="hostile tokenizer",
            damage=flipped("tokenizer.json", share, bit),
            must=False,
        )
    for text in ("", "[1]", '{"a": "x"}', '{"<x>": -5}', '{"<x>": 1e99}', "{"):
        yield Case(
            name=f"added_tokens: {text!r}",
            kind="hostile tokenizer",
            damage=replaced("added_tokens.json", text.encode()),
            must=False,
        )
