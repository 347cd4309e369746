"""What of MixerSpec an encoder can follow: it reads in both directions, so only the feature map has a choice.

Needs nothing but the standard library, so that a recipe can be refused before torch is imported.
"""

from __future__ import annotations

from typing import Any

from .family_table import PREFIX
from .mixer_spec import MixerSpec

NEEDED: dict[str, tuple[Any, str]] = {
    "window": (0, "a block window is defined for causal models"),
    "sinks": (0, "every token sees the first ones already"),
    "decay": ("none", "a state that forgets has a direction of reading, an encoder has none"),
    "write": ("add", "the delta rule depends on the order of writing, an encoder reads all tokens at once"),
    "own_qk": (False, "the maps read the encoder's own queries and keys"),
    "normaliser": ("own", "the weights of a row are divided by their own sum"),
}
"""Axes that bidirectional attention needs at one value, and why."""


def misfit(spec: MixerSpec) -> tuple[str, str] | None:
    """The first axis that says something an encoder cannot do, and what to write instead; None: it fits."""
    for axis, (value, why) in NEEDED.items():
        given = getattr(spec, axis)
        if given != value:
            return f"mixer.{axis}: {_plain(given)} has no meaning in an encoder: {why}", instead(spec)
    return None


def instead(spec: MixerSpec) -> str:
    """The overrides that make `spec` one that an encoder can follow."""
    changes = [f"mixer.{axis}={_plain(value)}" for axis, (value, _) in NEEDED.items() if getattr(spec, axis) != value]
    if spec.coverage != "all":
        changes.append("mixer.coverage=all")
    return f"Use the recipe hedgehog-encoder, or {' '.join(changes)}"


def usable_positions(config: Any) -> int:
    """Tokens that fit into one sequence: RoBERTa's positions count from one past its padding index."""
    if str(config.model_type).removeprefix(PREFIX) == "roberta":
        return config.max_position_embeddings - (config.pad_token_id or 0) - 1
    return config.max_position_embeddings


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
