"""Whether a checkpoint's weights and its config fit each other, by name, shape and number."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.artifacts.config_reader import CONFIG, OUR_PREFIX
from linearize.artifacts.download import brief
from linearize.artifacts.weights import read_tensors
from linearize.errors import UsageError
from linearize.modeling.family_table import FAMILIES, auto_class

ROOM = 1 << 26
"""Numbers that a model may hold beyond twice those of its files: masks, tables, a missing head."""
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|attn\.bias$")  # recomputed by every model, never read


def require_weights_for(folder: Path, config: Any) -> None:
    """UsageError if the model of `config` holds far more numbers than the files: what is missing would be allocated."""
    import torch

    tensors, layers = read_tensors(folder), getattr(config, "num_hidden_layers", 0)
    if len(tensors) < layers:  # building a thousand empty layers takes seconds
        raise UsageError(
            f"{folder / CONFIG} describes a model of {layers} layers, and the weights hold {len(tensors)} tensors",
            "Its config does not describe these weights.",
        )
    try:
        with torch.device("meta"):
            empty = auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"{folder} cannot be loaded: {type(error).__name__}: {brief(error)}") from error
    wanted = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    there = sum(info.elements for _, info in tensors.values())
    if wanted > 2 * there + ROOM:
        raise UsageError(
            f"{folder / CONFIG} describes a model of {wanted:,} numbers, and the weights hold {there:,}",
            "Its config does not describe these weights.",
        )


def key_problems(folder: Path, config: Any, info: Mapping[str, Any]) -> list[str]:
    """One line for every kind of weight that is missing, left over or of another shape.

    `info` is what transformers returns for `output_loading_info`, with mismatched sizes ignored.
    """
    family = FAMILIES.get(config.model_type.removeprefix(OUR_PREFIX))
    spare = () if family is None else family.spare
    left = [key for key in info["unexpected_keys"] if not _DERIVED.search(key) and not key.startswith(spare)]
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    found = []
    for keys, what in (
        (info["missing_keys"], "lacks the weight"),
        (left, "has a weight that the model does not use:"),
        (mismatched, "has the wrong shape for the weight"),
    ):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            found.append(f"{folder} {what} {min(keys)}{more}")
    return found
