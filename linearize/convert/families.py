"""The families that can be converted, and what a recipe cannot carry over from one of them.

Needs configs only: no weights are read and no module is built.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.artifacts.config_reader import CONFIG, CONFIG_CAP, OUR_PREFIX, supported_families
from linearize.artifacts.weights import read_json, require_inside
from linearize.errors import UsageError, did_you_mean
from linearize.modeling.mixer_spec import MixerSpec

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotations that change with the length read so far: a key that entered a linear state could not be rotated again,
and the first tokens of a long prefill would be rotated otherwise than in decoding."""

TASK = "ForCausalLM"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A native architecture whose attention can be replaced layer by layer."""

    model_type: str
    """The native `model_type`, the key of every registry."""
    name: str
    """The prefix of its transformers classes."""
    sliding: str
    """Which layers may have the teacher's own sliding window: none | all | listed (by `layer_types`)."""

    def window_of(self, config: Any, layer: int) -> int | None:
        """The teacher's own sliding window in this layer, in tokens; None: full attention."""
        window = getattr(config, "sliding_window", None)
        if self.sliding == "all":
            return window
        if self.sliding == "listed" and config.layer_types[layer] == "sliding_attention":
            return window
        return None


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", name="Llama", sliding="none"),
        Family(model_type="mistral", name="Mistral", sliding="all"),
        Family(model_type="qwen2", name="Qwen2", sliding="listed"),
        Family(model_type="qwen3", name="Qwen3", sliding="listed"),
    )
}


def require_family(folder: str | os.PathLike[str], *, converted: bool = False) -> None:
    """Refuse by the model_type in a folder's config.json alone, before anything else of it is judged.

    `converted` lets our own models through. What is no config at all is left to `read_config` to refuse.

    Raises:
        UsageError: not a supported family, or already linearized.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return
    require_inside(Path(folder), path)
    kind = read_json(path, cap=CONFIG_CAP).get("model_type")
    if isinstance(kind, str) and kind and not (converted and kind.startswith(OUR_PREFIX)):
        _require_kind(kind)


def _require_kind(kind: str) -> None:
    if kind.startswith(OUR_PREFIX):
        raise UsageError(f"the model is already linearized ({kind})", hint="Convert its teacher instead")
    if kind not in FAMILIES:
        raise UsageError(
            f"the family {kind!r} cannot be converted.{did_you_mean(kind, FAMILIES)}", hint=supported_families()
        )


def family_of(config: Any) -> Family:
    """The family of a teacher's config.

    Raises:
        UsageError: not a supported family, already linearized, quantised, or not a causal language model.
    """
    kind = str(getattr(config, "model_type", None))
    _require_kind(kind)
    family = FAMILIES[kind]
    architectures = getattr(config, "architectures", None) or [family.name + TASK]
    if family.name + TASK not in architectures:
        raise UsageError(
            f"the architecture {architectures[0]!r} cannot be converted; it is not a causal language model of {kind}",
            hint=f"Needed: {family.name}{TASK}",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("the teacher is quantised", hint="Convert the float weights, then quantise the result")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}",
            hint="The teacher's config.json is damaged",
        )
    return family


def head_dim(config: Any) -> int:
    """Channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_fit(config: Any, *, spec: MixerSpec, linear_layers: Sequence[int], context: int | None) -> list[str]:
    """Refuse what the recipe cannot express for this teacher; otherwise notes to show, one line each.

    `context` is that of training; None: there is none to check.

    Raises:
        UsageError: a RoPE kind that depends on the length, a recipe window beyond the teacher's own sliding window, a
            context beyond the teacher's, or one so short that the linear branch is never used.
    """
    family = family_of(config)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context is not None and context > limit:
        raise UsageError(f"context {context} is beyond the {limit} tokens of the teacher", hint=f"Use context={limit}")
    if not linear_layers:
        return ["every layer stays softmax: the result is the teacher"]
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = str(rope.get("rope_type", "default"))
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise UsageError(
            f"the teacher's RoPE kind {rope_type!r} depends on the length of the text, so decoding would disagree with "
            "prefill in a linear layer",
            hint="Supported kinds: default, linear, llama3, yarn",
        )
    if spec.lagged and context is not None and context <= 2 * spec.window:
        raise UsageError(
            f"context {context} lies within the recipe's softmax window of {2 * spec.window} tokens "
            f"(blocks of {spec.window}), so the linear branch would never be used",
            hint=f"Use a context above {2 * spec.window} or a smaller mixer.window",
        )
    notes = []
    for layer in linear_layers:
        own = family.window_of(config, layer)
        if own is None:
            continue
        if 2 * spec.window > own:
            raise UsageError(
                f"layer {layer}: the recipe's softmax window reaches {2 * spec.window} tokens back, beyond the "
                f"teacher's own sliding window of {own}",
                hint=f"Use mixer.window={own // 2} or less, or keep the layer softmax",
            )
        if context is not None and own < context:
            notes.append(f"layer {layer}: the teacher's sliding window of {own} tokens gives way to the linear branch")
    return notes
