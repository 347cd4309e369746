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
from linearize.artifacts.load import check_checkpoint, load_tokenizer, resolve, select_dtype
from linearize.artifacts.weights import digest_checkpoint, read_tensors
from linearize.convert import plan
from linearize.convert.families import require_family
from linearize.convert.stages import StageShape
from linearize.convert.surgery import account
from linearize.data import Source, document_marks, load_source, pack, tokenize_documents
from linearize.errors import UsageError
from linearize.recipe import Recipe

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
    windows: np.ndarray
    """[N, context] int32."""
    source: Source
    dtype: torch.dtype
    """Of the export."""


def gather(model: str | os.PathLike[str], out: Path, recipe: Recipe, data: str, device: torch.device) -> Inputs:
    """Check model, recipe, data and disk, cheapest first; load nothing but text and tokenizer.

    Raises:
        UsageError, RefusedError: see `convert`.
    """
    folder = resolve(model)
    require_family(folder)
    check_checkpoint(folder, finite=False)
    config, stored = plan.teacher_config(folder)
    layout = plan.Layout.of(config, recipe)
    account(read_tensors(folder), plan.native_keys(config), config)
    sizes = layout.sizes()
    shapes = plan.stage_shapes(recipe, alignable=sizes["align"] > 0)
    dtype = select_dtype(stored if recipe.dtype == "auto" else recipe.dtype)
    require_free_space(out, plan.disk_bytes(sizes, dtype.itemsize))
    tokenizer = load_tokenizer(folder)
    wanted = max(sum(shape.tokens for shape in shapes), 4 * recipe.context)
    texts, source = load_source(data, split="train" if data == "demo" else None, limit_bytes=BYTES_PER_TOKEN * wanted)
    windows = pack(tokenize_documents(texts, tokenizer), recipe.context, **document_marks(tokenizer))
    top = int(windows.max())
    if top >= config.vocab_size:
        raise UsageError(f"the tokenizer gives token {top}, beyond the vocabulary of {config.vocab_size}")
    check_checkpoint(folder, finite=True)
    return Inputs(
        folder=folder,
        name=Path(os.path.abspath(model)).name if Path(model).expanduser().is_dir() else str(model),
        out=out,
        recipe=recipe,
        device=device,
        layout=layout,
        sizes=sizes,
        shapes=shapes,
        tokenizer=tokenizer,
        windows=windows,
        source=source,
        dtype=dtype,
    )


def identity_of(inputs: Inputs) -> dict[str, str]:
    """What must be the same for one run to go on from another."""
    return {
        "recipe": inputs.recipe.digest(),
        "teacher": digest_checkpoint(inputs.folder),
        "data": hashlib.sha256(inputs.windows.tobytes()).hexdigest(),
    }
