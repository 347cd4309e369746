"""Whether a teacher is converted a layer at a time, and what that takes.

Streaming holds one layer of the teacher and of the student; hidden states of the training windows lie on the disk. It
does everything of a recipe that looks at one layer, and refuses by name what needs the whole model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from linearize.artifacts.load import select_device
from linearize.convert import plan
from linearize.convert.checkpoint import KEEP
from linearize.convert.families import head_dim, inner_size
from linearize.convert.stages import StageShape
from linearize.convert.stream_layers import FINAL_NORM
from linearize.errors import LinearizeError, RefusedError, UsageError
from linearize.modeling.family_table import lookup
from linearize.recipe import Recipe

SHARD_BYTES = 5_000_000_000
"""Most bytes of one file of an export."""
PROBE = 256
"""Most tokens of the row on which an export is compared with what was computed while it was made."""
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a conversion runs, and what it needs: estimates, usually within a third."""

    streamed: bool
    memory_bytes: int
    disk_bytes: int
    hidden_bytes: int
    """Of the disk, what hidden states take; 0 unless streamed."""
    said: str | None
    """One line for people, where it was chosen for them."""


def choose_way(
    config: Any,
    recipe: Recipe,
    layout: plan.Layout,
    *,
    shapes: tuple[StageShape, StageShape],
    stored: str,
    device: torch.device,
    asked: bool | None,
    teacher_bits: int | None = None,
) -> Way:
    """Stream or not: as `asked`; None: where the ordinary way does not fit into the memory of this machine.

    Args:
        stored: dtype of the teacher's files. shapes: alignment and finetuning. teacher_bits: of the frozen weights,
            where they are quantised, which is never streamed.

    Raises:
        UsageError: streaming was asked for, and the recipe or the family cannot be streamed. RefusedError: the same,
            where only streaming would fit.
    """
    sizes = layout.sizes()
    export = plan.DTYPE_BYTES[stored if recipe.dtype == "auto" else recipe.dtype]
    whole = Way(
        streamed=False,
        memory_bytes=plan.training_bytes(config, recipe, sizes, stored=stored, teacher_bits=teacher_bits),
        disk_bytes=plan.disk_bytes(sizes, export),
        hidden_bytes=0,
        said=None,
    )
    limit = memory_limit(device)
    too_large = whole.memory_bytes > limit
    if teacher_bits is not None or asked is False or (asked is None and not too_large):
        return whole
    problem = why_not(config, recipe)
    size = f"needs about {_gigabytes(whole.memory_bytes)} of memory, and there are {_gigabytes(limit)}"
    if problem is not None and asked:
        raise UsageError(f"--stream: {problem.message}", problem.hint)
    if problem is not None:
        raise RefusedError(
            f"the teacher {size}, so only streaming would do: {problem.message}",
            f"{problem.hint}, or try the ordinary way with --no-stream",
        )
    hidden = hidden_bytes(config, recipe, shapes[0], stored)
    layer = _layer_sizes(layout)
    disk = (sizes["teacher"] + sizes["new"]) * export + hidden + (KEEP + 2) * 4 * 3 * layer["aligned"] + (64 << 20)
    return Way(
        streamed=True,
        memory_bytes=streaming_bytes(config, recipe, layer, shapes[0], device),
        disk_bytes=disk,
        hidden_bytes=hidden,
        said=None if asked else f"streaming, a layer at a time: the teacher {size} (--no-stream: the ordinary way)",
    )


def planned_way(
    config: Any,
    recipe: Recipe,
    layout: plan.Layout,
    *,
    shapes: tuple[StageShape, StageShape],
    stored: str,
    asked: bool | None,
    teacher_bits: int | None = None,
) -> tuple[Way, list[str]]:
    """As `choose_way`, for a plan, which may be made on a smaller machine than the conversion's: with what to note.

    Raises:
        UsageError: streaming was asked for, and the recipe or the family cannot be streamed.
    """
    try:
        device = select_device(recipe.device)
    except UsageError:
        device = torch.device("cpu")
    known: dict[str, Any] = {"shapes": shapes, "stored": stored, "device": device, "teacher_bits": teacher_bits}
    choose = partial(choose_way, config, recipe, layout, **known)
    try:
        way = choose(asked=asked)
    except RefusedError as error:
        return choose(asked=False), [f"not on this machine: {error.message}"]
    return way, [way.said] if way.said else []


def why_not(config: Any, recipe: Recipe) -> LinearizeError | None:
    """What of a recipe or a teacher needs the whole model in memory, with what to write instead; None: nothing."""
    family = lookup(config)
    if family.model_type not in FINAL_NORM:
        return LinearizeError(
            f"the family {family.model_type!r} cannot be streamed", f"These can: {', '.join(FINAL_NORM)}"
        )
    if recipe.finetune.tokens:
        return LinearizeError("finetune.tokens: finetuning needs the whole model in memory", "Write finetune.tokens=0")
    if recipe.automatic:
        return LinearizeError(
            f"keep_softmax: {recipe.keep_softmax!r} measures the whole model, layer by layer swapped",
            'Write keep_softmax="every 4", none, or a list of layers',
        )
    return None


def hidden_bytes(config: Any, recipe: Recipe, align: StageShape, stored: str) -> int:
    """Disk that hidden states take at most: of every window that is read, before and after the layer at work."""
    calibrated = max(1, round(recipe.calibrate.tokens / recipe.context)) if recipe.calibrate.tokens else 0
    windows = align.steps * align.batch + calibrated
    return 2 * windows * recipe.context * config.hidden_size * plan.DTYPE_BYTES[stored]


def streaming_bytes(config: Any, recipe: Recipe, layer: dict[str, int], align: StageShape, device: torch.device) -> int:
    """Memory of streaming: one layer in fp32 with what training it needs, one micro-batch of activations, one row of
    logits."""
    from linearize.convert.preflight import MICRO_TOKENS

    weights = 4 * (layer["all"] + layer["owned"] + 4 * layer["aligned"]) + 2 * layer["largest"]
    windows = max(1, min(align.batch, MICRO_TOKENS.get(device.type, MICRO_TOKENS["cpu"]) // recipe.context))
    attention = config.num_attention_heads * head_dim(config)
    per_token = 2 * (48 * config.hidden_size + 12 * inner_size(config) + 32 * attention)
    scores = 8 * config.num_attention_heads * recipe.context**2 if recipe.calibrate.tokens else 0
    logits = 12 * min(PROBE, recipe.context) * config.vocab_size
    return weights + max(windows * recipe.context * per_token, scores) + logits


def memory_limit(device: torch.device) -> int:
    """Bytes of memory that this machine, or the container that this runs in, has; on a GPU, of it, if that is less."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUPS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            limit = min(limit, int(text))
    if device.type == "cuda":
        limit = min(limit, torch.cuda.get_device_properties(device).total_memory)
    return limit


def _layer_sizes(layout: plan.Layout) -> dict[str, int]:
    """Parameters of the largest layer: all, owned by the student besides, aligned; and the largest tensor of all."""
    from linearize.convert.align import aligned_names

    family = lookup(layout.config)
    aligned = set(aligned_names(layout.student, layout.recipe.align, layout.linear))
    rows: dict[int, dict[str, int]] = {}
    largest = 0
    for name, parameter in layout.student.named_parameters():
        index = family.layer_index(name)
        if index is None:
            continue
        row = rows.setdefault(index, {"all": 0, "owned": 0, "aligned": 0})
        size = parameter.numel()
        row["all"] += size
        row["aligned"] += size if name in aligned else 0
        row["owned"] += size if name in aligned and ".mixer." not in name else 0
        largest = max(largest, size)
    return {key: max(row[key] for row in rows.values()) for key in ("all", "owned", "aligned")} | {"largest": largest}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
