"""The families that can be converted, and what a recipe cannot carry over from one of them.

Needs configs only: no weights are read and no module is built.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from linearize.artifacts.config_reader import CONFIG, CONFIG_CAP, OUR_PREFIX, supported_families
from linearize.artifacts.weights import read_json, require_inside
from linearize.errors import UsageError
from linearize.modeling.encoder_spec import misfit, usable_positions
from linearize.modeling.family_table import FAMILIES, TEXT_PARTS, Family
from linearize.modeling.mixer_spec import MixerSpec
from linearize.recipe import Recipe

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotations that change with the length read so far: a key that entered a linear state could not be rotated again,
and the first tokens of a long prefill would be rotated otherwise than in decoding."""


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
    config = read_json(path, cap=CONFIG_CAP)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind and not (converted and kind.startswith(OUR_PREFIX)):
        part = config.get("text_config")
        _require_kind(kind, part.get("model_type") if isinstance(part, dict) else None)


def _require_kind(kind: str, part: Any = None) -> None:
    """`part`: the model type of the language model inside, where it is one among others."""
    if kind.startswith(OUR_PREFIX):
        raise UsageError(f"the model is already linearized ({kind})", hint="Convert its teacher instead")
    if kind in FAMILIES:
        return
    text = part if isinstance(part, str) and part in FAMILIES else TEXT_PARTS.get(kind)
    if text is not None:
        raise UsageError(
            f"the family {kind!r:.60} reads more than text, and cannot be converted as a whole",
            hint=f"Save its language model, of the family {text}, and convert that; docs/families.md has the lines",
        )
    raise UsageError(f"the family {kind!r:.60} cannot be converted", hint=supported_families())


def family_of(config: Any) -> Family:
    """The family of a teacher's config.

    Raises:
        UsageError: not a supported family, already linearized, quantised, or not a causal language model.
    """
    kind = str(getattr(config, "model_type", None))
    _require_kind(kind, getattr(getattr(config, "text_config", None), "model_type", None))
    family = FAMILIES[kind]
    architectures = getattr(config, "architectures", None) or [family.task_class]
    if family.task_class not in architectures:
        what = "masked" if family.bidirectional else "causal"
        raise UsageError(
            f"the architecture {architectures[0]!r} cannot be converted; it is not a {what} language model of {kind}",
            hint=f"Needed: {family.task_class}",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("the teacher is quantised", hint="Convert the float weights, then quantise the result")
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.num_attention_heads % groups:
        raise UsageError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of num_key_value_heads {groups}",
            hint="The teacher's config.json is damaged",
        )
    for refusal in family.refused:
        value = getattr(config, refusal.key, None)
        if value not in refusal.allowed:
            raise UsageError(f"the teacher's {refusal.key} is {value!r}: {refusal.reason}", refusal.hint)
    return family


def head_dim(config: Any) -> int:
    """Channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def inner_size(config: Any) -> int:
    """Width of the MLP."""
    found = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    return found or getattr(config, "n_inner", None) or 4 * config.hidden_size


def module_paths(family: Family, wanted: Collection[str], *, key: str) -> list[str]:
    """Where the modules that a recipe's `key` names lie: dotted endings of their names.

    Projections go by their usual names (q_proj, ...) in every family. Where one module makes several of them, they
    are trained together or not at all.

    Raises:
        UsageError: one of several that the family keeps in one module, without the others.
    """
    found = []
    for name in wanted:
        path = family.projections.get(name, name)
        together = [other for other, place in family.projections.items() if place == path and name != path]
        lacking = [other for other in together if other not in wanted]
        if lacking:
            leaf = path.rpartition(".")[2]
            raise UsageError(
                f"{key}: {name} cannot be trained without {' and '.join(lacking)}: in the family {family.model_type} "
                f"they are one projection, {leaf}",
                f"Name {', '.join(together)}, or none of them",
            )
        if path not in found:
            found.append(path)
    return found


def check_stages(family: Family, recipe: Recipe) -> None:
    """Refuse what a recipe's stages cannot do with an encoder.

    Raises:
        UsageError: calibration, measured softmax layers, repeats, or an objective behind o_proj.
    """
    if not family.bidirectional:
        return
    if recipe.automatic:
        raise UsageError(
            f"keep_softmax: {recipe.keep_softmax!r} compares layers by a causal window, which an encoder has not",
            "Use none, every N, or a list of layers",
        )
    if recipe.calibrate.tokens:
        raise UsageError("calibrate.tokens: the maps of an encoder have nothing to calibrate", "Use calibrate.tokens=0")
    if recipe.repeats:
        raise UsageError(
            "repeats: made for models that predict the next token, which an encoder does not", "Use repeats=0"
        )
    if recipe.align.objective == "hidden" and recipe.align.tokens:
        raise UsageError(
            "align.objective: 'hidden' is measured behind o_proj, which lies outside an encoder's self-attention",
            "Use weights or output",
        )


def lies_in(name: str, path: str) -> bool:
    """Whether a parameter or module of this dotted name is, or lies in, a module whose name ends in `path`."""
    return f".{path}." in f".{name}."


def check_fit(config: Any, *, spec: MixerSpec, linear_layers: Sequence[int], context: int | None) -> list[str]:
    """Refuse what the recipe cannot express for this teacher; otherwise notes to show, one line each.

    `context` is that of training; None: there is none to check.

    Raises:
        UsageError: a RoPE kind that depends on the length, a recipe window beyond the teacher's own sliding window, a
            context beyond the teacher's, or one so short that the linear branch is never used.
    """
    family = family_of(config)
    limit = usable_positions(config) if family.bidirectional else getattr(config, "max_position_embeddings", None)
    if limit is not None and context is not None and context > limit:
        raise UsageError(f"context {context} is beyond the {limit} tokens of the teacher", hint=f"Use context={limit}")
    if not linear_layers:
        return ["every layer stays softmax: the result is the teacher"]
    if family.bidirectional and (problem := misfit(spec)) is not None:
        raise UsageError(*problem)
    for layer in linear_layers:
        rope_type = str(family.rope_of(config, layer).get("rope_type", "default"))
        if family.rotates(config, layer) and rope_type in LENGTH_DEPENDENT_ROPE:
            raise UsageError(
                f"the teacher's RoPE kind {rope_type!r} depends on the length of the text, so decoding would disagree "
                "with prefill in a linear layer",
                hint="Supported kinds: default, linear, llama3, yarn",
            )
    if spec.lagged and context is not None and context <= 2 * spec.window:
        raise UsageError(
            f"context {context} lies within the recipe's softmax window of {2 * spec.window} tokens "
            f"(blocks of {spec.window}), so the linear branch would never be used",
            hint=f"Use a context above {2 * spec.window} or a smaller mixer.window",
        )
    notes = [family.note] if family.note else []
    if family.most_positions(config) is not None:
        notes.append(f"positions are learned: the result, like the teacher, reads {limit} tokens at most")
    given_up: dict[int, list[int]] = {}
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
            given_up.setdefault(own, []).append(layer)
    return notes + [
        f"{_named(layers)}: the teacher's sliding window of {own} tokens gives way to the linear branch"
        for own, layers in given_up.items()
    ]


def _named(layers: Sequence[int]) -> str:
    """`layer 3`, or `layers 0, 2-4, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"
