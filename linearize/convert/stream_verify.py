"""Is what was written what was made? An export that is larger than memory is read back a layer at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.artifacts.config_reader import build_config
from linearize.artifacts.pieces import PIECE, TYPES, Stored, as_bytes, open_stored
from linearize.artifacts.shards import Layout
from linearize.convert.stream_layers import FINAL_NORM, Bare, fill, just, strip
from linearize.convert.stream_run import give_back
from linearize.convert.stream_states import embed
from linearize.convert.surgery import empty_student
from linearize.convert.verify import RELATIVE, by_definition
from linearize.errors import VerificationError


def verify_streamed(
    folder: Path, ids: Tensor, logits: Tensor, *, layout: Layout, digests: Mapping[str, str], device: torch.device
) -> dict[str, Any]:
    """Read an export back: its keys, every byte of its weights, and its logits of one row, a layer at a time.

    Args:
        ids: [1, T] tokens. logits: [1, T, V] fp32 on the CPU, as computed while the export was made.
        layout: type and shape of every tensor that it should hold. digests: sha256 of the bytes of each.

    Returns:
        way, max_abs_difference of a logit, and how many tensors were compared.

    Raises:
        VerificationError: a tensor is missing, left over, not finite or not what was written; or the logits differ.
    """
    with open_stored(folder) as stored:
        _require_tensors(stored, layout, digests)
        config = build_config(folder)
        config._attn_implementation = "sdpa"
        bare = strip(empty_student(config), device)
        with torch.no_grad(), by_definition():
            states = embed(stored, embedding_name(bare, stored), ids.numpy()).to(device)
            numbers = torch.zeros(ids.shape, dtype=torch.long, device=device)
            for index, layer in enumerate(bare.layers):
                fill(layer, stored, bare.family.layer_path(index), dtype=None, device=device)
                with bare.holding(index, layer):
                    states = bare.run(numbers, just(states))
                give_back()
            found = last_logits(bare, stored, states, dtype=None)
    if found.shape != logits.shape or not bool(found.isfinite().all()):
        raise VerificationError("the export, read back, gives logits that are not finite or of another shape")
    difference, largest = float((found - logits).abs().max()), float(logits.abs().max())
    if difference > RELATIVE * max(largest, 1.0):
        raise VerificationError(
            f"the export, read back layer by layer, differs from the model that was trained: a logit by "
            f"{difference:.3g} (largest {largest:.3g})"
        )
    return {"way": "layer by layer", "max_abs_difference": difference, "tensors": len(layout)}


def last_logits(
    bare: Bare, stored: Stored, states: Tensor, *, dtype: torch.dtype | None, elements: int = PIECE
) -> Tensor:
    """Logits [B, T, V], fp32 on the CPU, of what left the last layer [B, T, C]; the head is read in pieces."""
    family, device = bare.family, states.device
    norm = fill(bare.norm, stored, f"{family.body}.{FINAL_NORM[family.model_type]}", dtype=dtype, device=device)
    name = f"{family.head}.weight"
    if bare.model.config.tie_word_embeddings or name not in stored.tensors:
        name = embedding_name(bare, stored)
    states = norm(states)
    norm.to("meta")
    pieces = (piece.to(device=device, dtype=dtype or piece.dtype) for piece in stored.pieces(name, elements))
    return torch.cat([nn.functional.linear(states, piece).float().cpu() for piece in pieces], dim=-1)


def embedding_name(bare: Bare, stored: Stored) -> str:
    """Where the files keep the input embedding: a tied one may be stored as the head alone."""
    family = bare.family
    name = f"{family.body}.{family.embedding}.weight"
    return name if name in stored.tensors else f"{family.head}.weight"


def _require_tensors(stored: Stored, layout: Layout, digests: Mapping[str, str]) -> None:
    """Every tensor that should be there, and no other, with the bytes that were written, all of them finite."""
    differing = sorted(set(stored.tensors) ^ set(layout))
    if differing:
        raise VerificationError(f"the export lacks {differing[0]}, or has it without a reason")
    for name, (dtype, shape) in layout.items():
        path, info = stored.tensors[name]
        if TYPES.get(info.dtype) != dtype or info.shape != shape:
            raise VerificationError(f"{path}: {name} is {info.dtype} {list(info.shape)} and should be {dtype} {shape}")
        digest = hashlib.sha256()
        for piece in stored.pieces(name):
            digest.update(as_bytes(piece))
            if piece.is_floating_point() and not bool(piece.isfinite().all()):
                raise VerificationError(f"{path}: {name} holds a value that is not finite")
        if digest.hexdigest() != digests.get(name):
            raise VerificationError(f"{path}: {name} is not what was written")


def differences(one: Tensor, other: Tensor) -> Iterator[tuple[str, float]]:
    """max and mean of |one - other|, a row at a time."""
    rows = [(a - b).abs() for a, b in zip(one.flatten(0, -2), other.flatten(0, -2), strict=True)]
    yield "max", max(float(row.max()) for row in rows)
    yield "mean", sum(float(row.mean()) for row in rows) / len(rows)
