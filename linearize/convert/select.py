"""Which layers should stay softmax: those whose swap costs the teacher most, each measured by itself.

    window:   the layer is cut to the recipe's window and sinks, untrained: which layers use what lies beyond the window
    aligned:  the layer is the recipe's mixer after a short alignment: which layers the mixer cannot imitate

The first says nothing of what a mixer without a window loses nearby: for such a recipe the two can disagree, and the
second is the one to trust.

A score is the mean KL(teacher || swapped) per token, over all tokens. Single scores know nothing of how layers
interact: two layers that do the same work each look dispensable, and the worth of a layer may hang on another that is
kept or not. KL-guided selection (arXiv:2512.20569) scores layers singly as well, but in a converted model where one is
put back, after far longer training. So `select` also measures the chosen layers together, beside as many spread evenly.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from linearize.artifacts.load import check_checkpoint, load_model, load_tokenizer, no_bars, resolve, select_device
from linearize.convert import plan
from linearize.convert.align import align_layers, aligned_names, mean_match
from linearize.convert.checkpoint import open_run
from linearize.convert.families import require_family
from linearize.convert.inputs import BYTES_PER_TOKEN
from linearize.convert.optim import deterministic
from linearize.convert.placement import REFERENCE, costliest, cut_of, ranking, require_keep, set_apart
from linearize.convert.stages import StageState, shown, stage_shape
from linearize.convert.surgery import linearize_model
from linearize.convert.swap import TOKENS, SwapLoss, measure, window_attentions
from linearize.convert.teacher import teacher_config
from linearize.data import Source, document_marks, load_source, pack, tokenize_documents
from linearize.errors import RefusedError, UsageError, did_you_mean
from linearize.progress import NullProgress, Progress
from linearize.recipe import Recipe
from linearize.recipe_schema import even_layers

METHODS = ("aligned", "window")
WINDOWS = 32
"""Most windows of the recipe's context on which a swap is measured."""
ALIGN_TOKENS = 256_000
"""Most tokens of the short alignment."""
STEPS = 64
"""Steps that the short alignment takes at least, where a step of one window allows it."""


def choose_layers(
    teacher: Any,
    windows: np.ndarray,
    recipe: Recipe,
    *,
    keep: int,
    max_windows: int = WINDOWS,
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """The `keep` layers of a loaded teacher that should stay softmax, by the method `window`: nothing is trained.

    A function of teacher, windows and recipe alone. At most `max_windows` of windows int32 [N, context], spread over
    all of them, are read once for each layer and once more, on the teacher's device and in its dtype.

    Raises:
        UsageError: `keep` is not between 1 and all but one layer, or the windows lie within the cut.
    """
    require_keep(keep, teacher.config.num_hidden_layers)
    window, sinks = cut_of(recipe.mixer, windows.shape[1])
    measured, _ = set_apart(windows, max_windows)
    cut = window_attentions(teacher, window=window, sinks=sinks)
    _, losses = measure(teacher, measured, _singles(cut), stage="select", progress=progress)
    return costliest(_scores(cut, losses), keep)


def select(
    model: str | os.PathLike[str],
    *,
    data: str,
    keep: int,
    recipe: Recipe,
    method: str | None = None,
    align_tokens: int = ALIGN_TOKENS,
    max_windows: int = WINDOWS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rank the layers of `model` by what it loses when one is swapped, and choose `keep` of them to stay softmax.

    Args:
        model: a folder, a Hub id, or `demo`. data: see `linearize.data.load_source`; of `demo` the training part.
        recipe: gives window, sinks, mixer, context, alignment, seed and device; its `keep_softmax` is not looked at.
        method: which score chooses: aligned (both are measured) | window (only that one is; nothing is trained); None:
            aligned, unless the recipe has nothing to align.
        align_tokens: most tokens of the alignment, on text that nothing is measured on.
        max_windows: most windows of the recipe's context that are measured on.

    Returns:
        layers [{layer, window_kl, window_ppl_rise, aligned_kl, aligned_ppl_rise, rank}] with KL in nats per token,
        chosen and uniform (indices), placements [{placement, kept, ..}] (the same figures with all layers swapped but
        those that each method, or even spacing, keeps), override (`keep_softmax=[..]`), ppl_teacher, match (share of
        the attention outputs that alignment explains, mean), and what was read. Figures of a method that was not
        measured are absent.

    Raises:
        UsageError: bad input, or a recipe that does not fit. RefusedError: too little text. VerificationError: the
            alignment died.
    """
    if method not in (None, *METHODS):
        raise UsageError(f"method {method!r} is unknown.{did_you_mean(method, METHODS)}", f"Use {' or '.join(METHODS)}")
    for name, value in (("align_tokens", align_tokens), ("max_windows", max_windows)):
        if value < 1:
            raise UsageError(f"{name} {value} is not positive")
    begin, watch = time.monotonic(), progress or NullProgress()
    device = select_device(recipe.device)
    material = _read(model, data, recipe, keep=keep, method=method, align_tokens=align_tokens, max_windows=max_windows)
    devices = [device] if device.type == "cuda" else []
    with deterministic(), no_bars(), torch.random.fork_rng(devices=devices):
        teacher = load_model(material.folder, device=device, dtype=torch.float32, finite=False)  # it was checked
        teacher.requires_grad_(False)
        window, sinks = material.cut
        found = [_measured("window", window_attentions(teacher, window=window, sinks=sinks), teacher, material, watch)]
        state = None
        if material.align_tokens:
            mixers, state = _aligned(teacher, recipe, material, watch)
            found.insert(0, _measured("aligned", mixers, teacher, material, watch))
        judge = found[0]
        chosen = costliest(judge.scores, keep)
        uniform = even_layers(len(judge.scores), keep)
        sets: dict[str, tuple[int, ...]] = {
            "none": (),
            **{one.name: costliest(one.scores, keep) for one in found},
            "uniform": uniform,
        }
        placements = _placements(found, sets, teacher, material, watch)
    order = ranking(judge.scores)
    return {
        "model": str(model),
        "recipe": recipe.name,
        "method": judge.name,
        "keep": keep,
        "chosen": list(chosen),
        "uniform": list(uniform),
        "override": f"keep_softmax=[{','.join(map(str, chosen))}]",
        "ranking": order,
        "layers": [
            {"layer": layer, **_figures(found, layer), "rank": 1 + order.index(layer)} for layer in sorted(order)
        ],
        "placements": placements,
        "ppl_teacher": float(np.exp(judge.teacher.nll)),
        "match": None if state is None else mean_match(state),
        "window": window,
        "sinks": sinks,
        "context": recipe.context,
        "windows": len(material.measured),
        "tokens": int(material.measured.size),
        "align_tokens": material.align_tokens,
        "device": str(device),
        "data": material.source.describe(),
        "notes": _notes(recipe, placements, judge.name),
        "seconds": time.monotonic() - begin,
    }


@dataclass(frozen=True, kw_only=True)
class _Material:
    """What a selection reads, checked."""

    folder: Path
    source: Source
    cut: tuple[int, int]
    layout: plan.Layout
    """Of the model with every layer swapped."""
    measured: np.ndarray
    """[N, context] int32."""
    training: np.ndarray
    """The windows that alignment may read."""
    align_tokens: int
    """0: nothing is aligned."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One method's figures."""

    name: str
    mixers: dict[int, nn.Module]
    teacher: SwapLoss
    losses: dict[int, SwapLoss]

    @property
    def scores(self) -> dict[int, float]:
        return {layer: loss.kl for layer, loss in self.losses.items()}


def _read(
    model: str | os.PathLike[str],
    data: str,
    recipe: Recipe,
    *,
    keep: int,
    method: str | None,
    align_tokens: int,
    max_windows: int,
) -> _Material:
    """Check model, recipe and text, cheapest first; load nothing but text and tokenizer."""
    folder = resolve(model)
    require_family(folder)
    check_checkpoint(folder, finite=False)
    config, _ = teacher_config(folder)
    require_keep(keep, config.num_hidden_layers)
    layout = plan.Layout.of(config, replace(recipe, keep_softmax="none"))
    cut = cut_of(recipe.mixer, recipe.context)
    alignable = layout.sizes()["align"] > 0
    if method == "aligned" and not alignable:
        raise UsageError(
            f"method aligned: {recipe.name} has nothing that alignment could train (align.train)", "Use method window"
        )
    if method == "window" or not alignable:
        align_tokens = 0
    tokenizer = load_tokenizer(folder)
    wanted = align_tokens + max_windows * recipe.context
    texts, source = load_source(data, split="train" if data == "demo" else None, limit_bytes=BYTES_PER_TOKEN * wanted)
    windows = pack(tokenize_documents(texts, tokenizer), recipe.context, **document_marks(tokenizer))
    if (top := int(windows.max())) >= config.vocab_size:
        raise UsageError(f"the tokenizer gives token {top}, beyond the vocabulary of {config.vocab_size}")
    # Little text is shared: a quarter of it to measure on.
    few = min(max_windows, max(1, len(windows) // 4)) if align_tokens else max_windows
    measured, training = set_apart(windows, few)
    if align_tokens and not len(training):
        raise RefusedError(
            f"text is too short: {len(windows)} window of {recipe.context} tokens, and alignment needs one of its own",
            "Give more text, a smaller context, or use method window",
        )
    check_checkpoint(folder, finite=True)
    return _Material(
        folder=folder,
        source=source,
        cut=cut,
        layout=layout,
        measured=measured,
        training=training,
        align_tokens=align_tokens,
    )


def _aligned(
    teacher: Any, recipe: Recipe, material: _Material, watch: Progress
) -> tuple[dict[int, nn.Module], StageState]:
    """The recipe's mixer for every layer, after a short alignment of all of them side by side."""
    from linearize.modeling.modeling_linearized import attention_layers

    layout, tokens = material.layout, material.align_tokens
    student, _ = linearize_model(
        teacher,
        spec=recipe.mixer,
        layer_mixers=layout.mixers,
        seed=recipe.seed,
        own=set(aligned_names(layout.student, recipe.align, layout.linear)).__contains__,
    )
    step = max(recipe.context, min(recipe.align.batch_tokens, tokens // STEPS))
    shape = stage_shape("align", tokens=tokens, batch_tokens=step, context=recipe.context)
    device = next(teacher.parameters()).device
    micro = max(1, min(shape.batch, TOKENS.get(device.type, TOKENS["cpu"]) // recipe.context))
    with tempfile.TemporaryDirectory() as place, open_run(Path(place) / "select") as run, shown(watch, shape):
        state = align_layers(
            student,
            teacher,
            align=recipe.align,
            shape=shape,
            micro=micro,
            seed=recipe.seed,
            windows=material.training,
            run=run,
            start=None,
            progress=watch,
        )
    return dict(attention_layers(student.eval())), state


def _singles(mixers: Mapping[int, nn.Module]) -> list[dict[int, nn.Module]]:
    """One swap a layer."""
    return [{layer: mixer} for layer, mixer in mixers.items()]


def _scores(mixers: Mapping[int, nn.Module], losses: Sequence[SwapLoss]) -> dict[int, float]:
    return {layer: loss.kl for layer, loss in zip(mixers, losses, strict=True)}


def _measured(name: str, mixers: dict[int, nn.Module], teacher: Any, material: _Material, watch: Progress) -> _Found:
    stage = f"one layer {'cut to the window' if name == 'window' else name}"
    whole, losses = measure(teacher, material.measured, _singles(mixers), stage=stage, progress=watch)
    return _Found(name=name, mixers=mixers, teacher=whole, losses=dict(zip(mixers, losses, strict=True)))


def _placements(
    found: Sequence[_Found],
    kept: Mapping[str, tuple[int, ...]],
    teacher: Any,
    material: _Material,
    watch: Progress,
) -> list[dict[str, Any]]:
    """All layers swapped at once but the kept ones: what the scores of single layers cannot tell."""
    rows: list[dict[str, Any]] = [{"placement": name, "kept": list(layers)} for name, layers in kept.items()]
    different = list(dict.fromkeys(kept.values()))
    for method in found:
        swaps = [{i: mixer for i, mixer in method.mixers.items() if i not in layers} for layers in different]
        stage = f"the others {'cut to the window' if method.name == 'window' else method.name}"
        whole, losses = measure(teacher, material.measured, swaps, stage=stage, progress=watch)
        for row, layers in zip(rows, kept.values(), strict=True):
            loss = losses[different.index(layers)]
            row |= {f"{method.name}_kl": loss.kl, f"{method.name}_ppl_rise": loss.ppl_rise(whole)}
    return rows


def _figures(found: Sequence[_Found], layer: int) -> dict[str, float]:
    row: dict[str, float] = {}
    for method in sorted(found, key=lambda one: one.name, reverse=True):
        loss = method.losses[layer]
        row |= {f"{method.name}_kl": loss.kl, f"{method.name}_ppl_rise": loss.ppl_rise(method.teacher)}
    return row


def _notes(recipe: Recipe, placements: Sequence[Mapping[str, Any]], method: str) -> list[str]:
    notes = []
    if not recipe.mixer.window:
        notes.append(
            f"{recipe.name} has no window: the cut is to a reference window of {REFERENCE[0]} with {REFERENCE[1]} "
            "sinks, and says nothing of what the mixer loses nearby"
        )
    together = {row["placement"]: row[f"{method}_kl"] for row in placements}
    for row in placements:
        if row["placement"] not in ("none", method) and together[row["placement"]] < together[method]:
            kept = ",".join(map(str, row["kept"]))
            how = "evenly spaced layers" if row["placement"] == "uniform" else f"layers that {row['placement']} chooses"
            notes.append(f"kept together, the {how} do better here: consider keep_softmax=[{kept}]")
    return notes
