"""What a conversion starts from, checked: the cheap refusals, before any weight is loaded."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from linearize.artifacts.atomic import require_free_space
from linearize.artifacts.download import display_name
from linearize.artifacts.load import check_checkpoint, load_tokenizer, resolve, select_dtype
from linearize.artifacts.weights import digest_checkpoint
from linearize.convert import plan
from linearize.convert.families import require_family
from linearize.convert.same_run import how_asked
from linearize.convert.stages import StageShape
from linearize.convert.stream import Way, choose_way
from linearize.convert.teacher import checked_tensors, teacher_config
from linearize.data import Source, documents_apart, load_source
from linearize.errors import RefusedError, UsageError
from linearize.recipe import Recipe
from linearize.task import Apart, Task, task_of
from linearize.teacher_bits import require_quantisable

BYTES_PER_TOKEN = 8
"""Text read per token that is wanted: more than any usual tokenizer needs."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a conversion starts from, checked."""

    folder: Path
    name: str
    """Of the teacher, for people: its Hub id, `demo`, or the last part of its path."""
    out: Path
    recipe: Recipe
    device: torch.device
    layout: plan.Layout
    sizes: dict[str, int]
    shapes: tuple[StageShape, StageShape]
    tokenizer: Any
    task: Task
    windows: np.ndarray
    """[N, context] int32: the text, for calibration and the choice of layers."""
    training: np.ndarray
    """The same with the recipe's repeats: what both stages train on."""
    source: Source
    dtype: torch.dtype
    """Of the export."""
    teacher_dtype: torch.dtype
    """Of the teacher's files."""
    way: Way
    """Whether a layer at a time, and what it takes."""
    teacher_bits: int | None = None
    """Of the frozen weights while it trains; None: as they are."""


def gather(
    model: str | os.PathLike[str],
    out: Path,
    recipe: Recipe,
    data: str,
    device: torch.device,
    *,
    stream: bool | None = None,
    teacher_bits: int | None = None,
) -> Inputs:
    """Check model, recipe, data and disk, cheapest first; load nothing but text and tokenizer.

    `stream`: a layer at a time; None: if the ordinary way does not fit into memory. `teacher_bits`: see `Inputs`.

    Raises:
        UsageError, RefusedError: see `convert`.
    """
    folder = resolve(model)
    require_family(folder)
    check_checkpoint(folder, finite=False)
    config, stored = teacher_config(folder)
    layout = plan.Layout.of(config, recipe)
    checked_tensors(folder, config)
    if teacher_bits is not None:
        require_quantisable(config.model_type)
    sizes = layout.sizes()
    shapes = plan.stage_shapes(recipe, alignable=sizes["align"] > 0)
    dtype = select_dtype(stored if recipe.dtype == "auto" else recipe.dtype)
    way = choose_way(
        config, recipe, layout, shapes=shapes, stored=stored, device=device, asked=stream, teacher_bits=teacher_bits
    )
    require_free_space(out, way.disk_bytes)
    tokenizer = load_tokenizer(folder)
    apart = documents_apart(data)
    task = task_of(config, tokenizer, apart=apart)
    if apart:
        _require_apart(recipe, streamed=way.streamed)
    wanted = max(sum(shape.tokens for shape in shapes), recipe.calibrate.tokens, 4 * recipe.context)
    part = "train" if data == "demo" else None
    texts, source = load_source(data, split=part, limit_bytes=BYTES_PER_TOKEN * wanted, packed=True)
    windows = task.windows(texts, tokenizer, recipe.context)
    layout.notes = [*layout.notes, *task.notes(windows)]
    if (recipe.calibrate.tokens or recipe.automatic) and not len(task.whole(windows)):
        raise RefusedError(
            f"documents=apart: no window of {recipe.context} tokens lies within one document, for calibration or the "
            "choice of layers to read",
            "Give calibrate.tokens=0 and name the layers of keep_softmax, or a smaller context",
        )
    top = int(windows.max())
    if top >= config.vocab_size:
        raise UsageError(f"the tokenizer gives token {top}, beyond the vocabulary of {config.vocab_size}")
    check_checkpoint(folder, finite=True)
    return Inputs(
        folder=folder,
        name=display_name(model, folder),
        out=out,
        recipe=recipe,
        device=device,
        layout=layout,
        sizes=sizes,
        shapes=shapes,
        tokenizer=tokenizer,
        task=task,
        windows=windows,
        training=task.repeated(windows, tokenizer, recipe.repeats, seed=recipe.seed) if recipe.repeats else windows,
        source=source,
        dtype=dtype,
        teacher_dtype=select_dtype(stored),
        way=way,
        teacher_bits=teacher_bits,
    )


def identity_of(inputs: Inputs) -> dict[str, str]:
    """What must be the same for one run to go on from another."""
    options = how_asked(inputs.recipe, streamed=inputs.way.streamed, teacher_bits=inputs.teacher_bits)
    return options | {
        "teacher": digest_checkpoint(inputs.folder),
        "data": hashlib.sha256(inputs.training.tobytes()).hexdigest(),
        "documents": "apart" if isinstance(inputs.task, Apart) else "joined",
    }


def asked_of(inputs: Inputs) -> dict[str, Any]:
    """The same in the user's words: the recipe's values, and the names of teacher and text."""
    return {"recipe": inputs.recipe.as_dict(), "teacher": inputs.name, "data": inputs.source.name}


def _require_apart(recipe: Recipe, *, streamed: bool) -> None:
    """That a conversion can keep the documents of a window apart.

    Raises:
        UsageError: it cannot.
    """
    if streamed:
        raise UsageError("documents=apart: a conversion that streams its layers cannot keep them apart", "Leave it out")
    if recipe.align.tokens and recipe.align.objective == "weights":
        raise UsageError(
            "documents=apart: align.objective=weights is taken of whole windows", "Give align.objective=output"
        )
