"""Mixers that tests run over: those of the shipped recipes, and others chosen so that every axis meets every trap."""

from __future__ import annotations

from typing import Any

from linearize.modeling.mixer_spec import MixerSpec
from linearize.recipe import list_recipes, load_recipe

ALONE: dict[str, Any] = {"window": 0, "coverage": "all"}
EXTRA: dict[str, dict[str, Any]] = {
    "elu-channel": {"feature_map": "elu", "decay": "channel", "normaliser": "own", **ALONE},
    "softmax-window-sinks": {"feature_map": "softmax", "sinks": 5, "state_heads": "kv"},
    "shared-scalar-dt": {"decay": "scalar", "dt_gain": True, "state_heads": "kv", "feature_dim": 8},
    "shared-channel-sinks": {"decay": "channel", "feature_dim": 4, "sinks": 1},
    "shared-fixed-wide-sinks": {"decay": "fixed", "feature_dim": 4, "window": 16, "sinks": 20},
    "gated-delta-lagged": {
        "feature_map": "l2norm",
        "decay": "scalar",
        "write": "delta",
        "normaliser": "norm",
        "mix": "gate",
        "window": 32,
        "sinks": 3,
        "state_heads": "kv",
    },
    "delta-negative": {
        "feature_map": "l2norm",
        "write": "delta",
        "negative_eigenvalues": True,
        "normaliser": "none",
        "mix": "sum",
        "coverage": "all",
        "window": 64,
    },
    "delta-mass": {
        "feature_map": "crelu",
        "decay": "scalar",
        "write": "delta",
        "normaliser": "scale",
        "mix": "mass",
        "coverage": "all",
        "window": 32,
        "sinks": 4,
        "window_weight": 0.7,
    },
    "delta-linear-map": {"feature_map": "linear", "decay": "scalar", "write": "delta", "normaliser": "norm", **ALONE},
    "hedgehog-mass-own": {
        "feature_map": "hedgehog_exp",
        "feature_dim": 80,
        "decay": "scalar",
        "normaliser": "own",
        "mix": "mass",
        "coverage": "all",
        "own_qk": True,
        "state_heads": "kv",
        "window": 32,
        "sinks": 4,
    },
    "window-alone": {
        "feature_map": "identity",
        "write": "none",
        "normaliser": "none",
        "mix": "sum",
        "coverage": "all",
        "window": 32,
        "sinks": 4,
    },
    "delta-fixed": {"feature_map": "l2norm", "decay": "fixed", "write": "delta", "normaliser": "none", **ALONE},
}


def recipe_specs() -> dict[str, MixerSpec]:
    """The mixer of every shipped recipe; that of encoders is hedgehog's own."""
    return {name: load_recipe(name).mixer for name in list_recipes() if name != "hedgehog-encoder"}


def all_specs() -> dict[str, MixerSpec]:
    """Shipped mixers and the extra ones."""
    return recipe_specs() | {name: MixerSpec(**axes) for name, axes in EXTRA.items()}
