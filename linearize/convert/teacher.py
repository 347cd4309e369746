"""A teacher's files: its config, and whether their tensors are those that the config describes. No weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from linearize.errors import RefusedError, UsageError, did_you_mean
from linearize.modeling.family_table import Family, auto_class, lookup

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""What families call the activation of their MLP."""
MASKS = tuple(f".{attention}.{mask}" for attention in ("attn", "attention") for mask in ("bias", "masked_bias"))
"""Buffers that old checkpoints of GPT-2 and GPT-NeoX hold beside their weights."""

DROP_RULES: dict[str, Callable[[str, Any], bool]] = {
    "rotary table, recomputed from the config": lambda name, config: name.endswith("rotary_emb.inv_freq"),
    "causal mask, the same in every model": lambda name, config: name.endswith(MASKS),
    "tied output embedding, the same as the input's": lambda name, config: (
        name in lookup(config).tied and bool(config.tie_word_embeddings)
    ),
    "part of pretraining, of no use to the task": lambda name, config: name.startswith(lookup(config).spare),
}
"""Why a tensor of a teacher's file may have no place of its own in the model; nothing else is ever dropped."""


def teacher_config(folder: Path) -> tuple[Any, str]:
    """The config of a checkpoint and the name of its weights' dtype.

    Raises:
        UsageError: it is no config of ours, or names an activation that nobody knows.
    """
    from transformers.activations import ACT2FN

    from linearize.artifacts.config_reader import CONFIG, build_config
    from linearize.artifacts.load import select_dtype

    config = build_config(folder)
    for key in ACTIVATIONS:
        value = getattr(config, key, None)
        if isinstance(value, str) and value not in ACT2FN:
            raise UsageError(
                f"{folder / CONFIG}: {key} is {value!r:.60}, which is no activation of transformers."
                f"{did_you_mean(value, ACT2FN)}",
                "Check it against the model's own repository",
            )
    return config, str(select_dtype("auto", folder)).removeprefix("torch.")


def checked_tensors(folder: Path, config: Any) -> dict[str, str]:
    """Compare a teacher's files with its config, by names and shapes; {dropped tensor: rule}, see `account`.

    Raises:
        RefusedError: a tensor is missing, or has no place. UsageError: one has another shape.
    """
    from linearize.artifacts.weights import read_tensors

    stored = {name: info.shape for name, (_, info) in read_tensors(folder).items()}
    wanted = native_tensors(config)
    dropped = account(stored, wanted, config)
    require_shapes(stored, wanted, config)
    return dropped


def native_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a teacher's files must hold; transformers joins some when it loads them."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
        return {name: tuple(t.shape) for name, t in revert_weight_conversion(model, model.state_dict()).items()}


def account(stored: Iterable[str], wanted: Iterable[str], config: Any) -> dict[str, str]:
    """Compare the tensors in a teacher's files with those its model wants; {dropped tensor: rule}.

    Raises:
        RefusedError: a tensor without a place, or a place without a tensor (which would be filled with noise).
    """
    family = lookup(config)
    need = {family.current_name(name) for name in wanted}
    have = set(_in_model(stored, need, family))
    tied = dict(family.tied) if config.tie_word_embeddings else {}
    for copy, original in tied.items():
        if copy in have and original not in have:
            have = (have - {copy}) | {original}
    missing = sorted(need - have - set(tied))
    if missing:
        more = f" and {len(missing) - 1} more tensors" if missing[1:] else ""
        raise RefusedError(f"the teacher's files lack {missing[0]}{more}", "The checkpoint is incomplete")
    dropped = {}
    for name in sorted(have - (need - set(tied))):
        rule = next((rule for rule, applies in DROP_RULES.items() if applies(name, config)), None)
        if rule is None:
            raise RefusedError(
                f"the teacher's files hold {name}, which the family {config.model_type} has no place for",
                "It would be lost in the conversion",
            )
        dropped[name] = rule
    return dropped


def require_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], config: Any) -> None:
    """Compare the shapes of the tensors in a teacher's files with those that its config describes.

    Raises:
        UsageError: one differs.
    """
    family = lookup(config)
    need = {family.current_name(name): shape for name, shape in wanted.items()}
    there = _in_model(stored, need, family)
    wrong = [name for name, file in there.items() if name in need and stored[file] != need[name]]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise UsageError(
            f"the weight {wrong[0]}{more} is {_by(stored[there[wrong[0]]])} in the teacher's files and "
            f"{_by(need[wrong[0]])} by its config",
            "Take the config.json that belongs to these weights",
        )


def _in_model(stored: Iterable[str], need: Collection[str], family: Family) -> dict[str, str]:
    """The names that tensors of a teacher's files have in its model, and theirs in the files."""
    found = {family.current_name(name): name for name in stored}
    if any(name.startswith(f"{family.body}.") for name in found):
        return found
    # Files of a body alone, whose head is tied.
    return {name if name in need else f"{family.body}.{name}": file for name, file in found.items()}


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
