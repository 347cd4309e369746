"""Reading a checkpoint's config.json without letting it decide anything but shapes.

Only keys that the native config class declares are handed on. So `auto_map`, `trust_remote_code`, every
`*_implementation*`, `transformers_weights` and whatever a later version of transformers may obey never reach it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.artifacts.weights import read_json, require_inside
from linearize.errors import UsageError, did_you_mean
from linearize.modeling.family_table import FAMILIES, PREFIX

CONFIG = "config.json"
CONFIG_CAP = 8 << 20
OUR_PREFIX = PREFIX
SUPPORTED = tuple(FAMILIES)
"""The families that can be converted."""
# Sizes beyond these are damage or an attack, not a model: refused before anything is allocated.
LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 131_072,
    "embedding_size": 131_072,
    "intermediate_size": 1_048_576,
    "moe_intermediate_size": 1_048_576,
    "num_local_experts": 65_536,
    "num_experts": 65_536,
    "num_experts_per_tok": 65_536,
    "num_attention_heads": 2_048,
    "num_key_value_heads": 2_048,
    "head_dim": 8_192,
    "vocab_size": 8_000_000,
    "type_vocab_size": 65_536,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
}
MIXER_LIMIT = 1 << 20  # windows, sinks and feature sizes of converted models
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")  # null says "derived" or "none"
_POSITIVE = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_multiplier",
    "logits_scaling",
)
_PER_LAYER: dict[str, type] = {"layer_types": str, "layer_mixers": str, "no_rope_layers": int}
# Read by native code although the config class of the family may not declare them.
_ALSO_READ = frozenset(
    {
        "model_type",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "rotary_pct",
        "rotary_emb_base",
        "sliding_window_pattern",
        "partial_rotary_factor",
        "torch_dtype",
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    }
)
# Fields with an underscore that say which modules a model has: early OPT has no last norm.
_SHAPES = ("_remove_final_layer_norm",)
# Fields of the classes that name code, files or other repositories.
_NEVER = ("auto_map", "trust_remote_code", "transformers_weights", "quantization_config")
_DTYPES = ("float32", "bfloat16", "float16")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked config.json of a checkpoint: `model_type` and the declared keys, all sizes within bounds.

    UsageError, naming file and key, when it is absent, no JSON, of an unknown model type, out of bounds, or when the
    model would need code from the checkpoint.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{path} is missing", "A model is a folder with config.json, safetensors and a tokenizer.")
    require_inside(folder, path)
    raw = read_json(path, cap=CONFIG_CAP)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UsageError(f"{path} has no model_type")
    cls = config_class(model_type, path=path, wants_code="auto_map" in raw)
    if raw.get("quantization_config") is not None:
        raise UsageError(f"{path}: quantised checkpoints are not read", "Use the unquantised model.")
    check_bounds(raw, path)
    keep = declared_keys(cls)
    ours = ("mixer", "layer_") if model_type.startswith(OUR_PREFIX) else ()
    return {
        key: value
        for key, value in raw.items()
        if _harmless(key) and (key in keep or key in _ALSO_READ or key.startswith(ours))
    }


def build_config(folder: str | os.PathLike[str]) -> Any:
    """The transformers config object of a checkpoint, built from `read_config` alone. UsageError if it is refused."""
    config = read_config(folder)
    path = Path(folder) / CONFIG
    cls: Any = config_class(config["model_type"], path=path)
    try:
        return cls.from_dict(config)
    except Exception as error:  # strict config classes raise their own families of errors
        raise UsageError(f"{path} is refused by its own class: {error}") from error


def config_class(model_type: str, *, path: Path, wants_code: bool = False) -> type:
    """The config class of a native model type or of ours; UsageError for any other, with the nearest known name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type.removeprefix(OUR_PREFIX) in SUPPORTED and model_type.startswith(OUR_PREFIX):
        from linearize.modeling.configuration_linearized import CONFIGS

        ours: type = CONFIGS[model_type.removeprefix(OUR_PREFIX)]
        return ours
    if model_type in CONFIG_MAPPING:
        cls: type = CONFIG_MAPPING[model_type]
        return cls
    if wants_code:
        raise UsageError(
            f"{path}: model_type {model_type!r} is not native to transformers and asks to run code from "
            "the checkpoint (auto_map)",
            "Such code is never run.",
        )
    raise UsageError(
        f"{path}: unknown model_type {model_type!r}.{did_you_mean(model_type, SUPPORTED)}", supported_families()
    )


def declared_keys(cls: Any) -> frozenset[str]:
    """Names of the fields that a config class declares, aliases too."""
    import dataclasses
    import inspect

    if dataclasses.is_dataclass(cls):
        names = {field.name for field in dataclasses.fields(cls)}
    else:  # transformers before its configs became dataclasses
        names = {
            name
            for base in cls.__mro__
            if hasattr(base, "__init__") and base is not object
            for name in inspect.signature(base.__init__).parameters
        } - {"self", "kwargs", "args"}
    aliases: dict[str, str] = getattr(cls, "attribute_map", {})
    return frozenset(names | set(aliases) | set(aliases.values()))


def check_bounds(config: dict[str, Any], path: Path) -> None:
    """UsageError, naming the key, unless every size is a positive integer of a sane magnitude and they fit together."""
    found = by_our_names(config)
    names = _sizes(config)
    for our_name, limit in LIMITS.items():
        value, key = found.get(our_name), names.get(our_name, our_name)
        if value is None:
            if our_name in _NEEDED:
                raise _lacking(config, key, path)
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{path}: {key} must be an integer, not {value!r:.60}")
        if not 1 <= value <= limit:
            raise UsageError(f"{path}: {key} is {_short(value)}, outside 1..{limit}")
    heads, groups = found["num_attention_heads"], found.get("num_key_value_heads")
    if groups is not None and heads % groups:
        raise UsageError(f"{path}: {heads} attention heads cannot share {groups} key-value heads")
    if found.get("head_dim") is None and found["hidden_size"] % heads:
        raise UsageError(f"{path}: hidden_size {found['hidden_size']} does not divide into {heads} heads")
    for key in _POSITIVE:
        value = config.get(key)
        if value is not None and not (_number(value) and 0 < value < math.inf):
            raise UsageError(f"{path}: {key} must be a positive number, not {value!r:.60}")
    layers = found["num_hidden_layers"]
    for key, kind in _PER_LAYER.items():
        value = config.get(key)
        if value is not None and not (
            isinstance(value, list) and len(value) == layers and all(isinstance(item, kind) for item in value)
        ):
            raise UsageError(f"{path}: {key} must name one kind for each of the {layers} layers")
    for key, value in config.items():
        if key.startswith("mixer_") and isinstance(value, int) and abs(value) > MIXER_LIMIT:
            raise UsageError(f"{path}: {key} is {_short(value)}, beyond {MIXER_LIMIT}")
    pad = config.get("pad_token_id")
    if pad is not None and not (_number(pad) and -1 <= pad < config["vocab_size"]):
        raise UsageError(f"{path}: pad_token_id {pad!r:.60} is outside the vocabulary of {config['vocab_size']}")
    dtype = stored_dtype(config)
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"{path}: dtype {dtype!r:.60} is not supported", f"Supported: {', '.join(_DTYPES)}.")


def by_our_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the sizes of its family under the names that all others use (hidden_size, ...), too."""
    return config | {ours: config[theirs] for ours, theirs in _sizes(config).items() if theirs in config}


def _sizes(config: dict[str, Any]) -> Mapping[str, str]:
    family = FAMILIES.get(str(config.get("model_type") or "").removeprefix(PREFIX))
    return {} if family is None else family.sizes


def supported_families() -> str:
    """The hint of every refusal of a family."""
    return f"Supported families: {', '.join(SUPPORTED)}."


def _lacking(config: dict[str, Any], key: str, path: Path) -> UsageError:
    kind = str(config.get("model_type") or "")
    if kind and kind.removeprefix(OUR_PREFIX) not in SUPPORTED:  # a family that calls its sizes by other names
        return UsageError(f"{path}: the family {kind!r:.60} is not supported", supported_families())
    return UsageError(f"{path} has no {key}")


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a config names ("bfloat16"), or None; old files call it torch_dtype."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is None or dtype == "auto":
        return None
    return str(dtype).removeprefix("torch.")


def _harmless(key: str) -> bool:
    return key in _SHAPES or not (key.startswith("_") or "_implementation" in key or key in _NEVER)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**15 else "a number of more than 15 digits"
