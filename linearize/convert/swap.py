"""What a teacher loses when attention layers of it are swapped for others, measured against the teacher itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.convert.finetune_loss import PIECE, token_losses
from linearize.convert.stages import StageShape, shown
from linearize.convert.surgery import LINEAR, linearize_model
from linearize.errors import VerificationError
from linearize.masking import IGNORE
from linearize.modeling.family_table import body, logits, lookup
from linearize.modeling.mixer_spec import MixerSpec
from linearize.progress import NullProgress, Progress
from linearize.task import shifted_labels

TOKENS = {"cpu": 4_096, "cuda": 16_384}
"""Most tokens read at once."""

Swap = Mapping[int, nn.Module]
"""Attention modules by the index of the decoder layer that they are put into."""


@dataclass(frozen=True, kw_only=True)
class SwapLoss:
    """How a swapped teacher does, in nats per token over all positions that have a next token."""

    kl: float
    """KL(teacher || swapped)."""
    nll: float
    """Of the next token."""

    def ppl_rise(self, teacher: SwapLoss) -> float:
        """Perplexity above the teacher's."""
        return _exp(self.nll) - _exp(teacher.nll)


@contextmanager
def swapped(teacher: Any, swap: Swap) -> Iterator[None]:
    """Put these attention modules into the teacher's layers; its own come back afterwards, also on errors."""
    family = lookup(teacher.config)
    layers = family.layers_of(teacher)
    own = {index: family.attention_of(teacher, index) for index in swap}
    try:
        for index, attention in swap.items():
            family.put_attention(layers, index, attention)
        yield
    finally:
        for index, attention in own.items():
            family.put_attention(layers, index, attention)


def window_attentions(teacher: Any, *, window: int, sinks: int) -> dict[int, nn.Module]:
    """The teacher's attention cut to its own block of `window` tokens, the block before and `sinks`, for every layer.

    They are mixers without their linear branch, so they cut as a student's window does, and in linear time. All weights
    are the teacher's own storage.
    """
    from linearize.modeling.modeling_linearized import attention_layers, set_branches

    student, _ = linearize_model(
        teacher,
        spec=MixerSpec(window=window, sinks=sinks),
        layer_mixers=[LINEAR] * teacher.config.num_hidden_layers,
        seed=0,
        own=lambda name: False,
    )
    set_branches(student, "window")
    return dict(attention_layers(student.eval()))


@torch.no_grad()
def measure(
    teacher: Any, windows: np.ndarray, swaps: Sequence[Swap], *, stage: str, progress: Progress | None = None
) -> tuple[SwapLoss, list[SwapLoss]]:
    """The teacher as it is, and with each of `swaps` in turn, on windows int32 [N, T] and in the teacher's dtype.

    The teacher is read once a batch; logits are held for PIECE tokens at a time.

    Raises:
        VerificationError: a loss that is not finite.
    """
    device = next(teacher.parameters()).device
    size = max(1, TOKENS.get(device.type, TOKENS["cpu"]) // windows.shape[1])
    steps = math.ceil(len(windows) / size)
    shape = StageShape(name=stage, steps=steps, batch=min(size, len(windows)), context=windows.shape[1])
    watch = progress or NullProgress()
    sums = torch.zeros(1 + len(swaps), 2, dtype=torch.float64)  # next token and KL; the teacher comes first
    read, scored = 0, 0
    with shown(watch, shape):
        for step in range(steps):
            ids = torch.from_numpy(windows[step * size : (step + 1) * size]).to(device).long()
            labels = shifted_labels(ids).flatten()
            read, scored = read + ids.numel(), scored + int((labels != IGNORE).sum())
            target = _last_hidden(teacher, ids)
            sums[0] += _sums(teacher, target, labels, None)
            for place, swap in enumerate(swaps, 1):
                with swapped(teacher, swap):
                    hidden = _last_hidden(teacher, ids)
                sums[place] += _sums(teacher, hidden, labels, target)
            watch.step(stage, step + 1, float(sums[1:, 1].mean()) / scored if swaps else 0.0, read, {})
    nll, kl = (sums / scored).unbind(-1)
    for place, values in enumerate(sums.tolist()):
        if not all(math.isfinite(value) for value in values):
            where = f"layer {', '.join(map(str, swaps[place - 1]))} swapped" if place else "the teacher"
            raise VerificationError(f"{where}: the loss is not finite on this text", "The weights overflow")
    whole, *others = [SwapLoss(kl=max(0.0, k), nll=n) for n, k in zip(nll.tolist(), kl.tolist(), strict=True)]
    return whole, others


def _last_hidden(model: Any, ids: Tensor) -> Tensor:
    """[B, T] -> [B * T, hidden]."""
    return body(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)  # type: ignore[no-any-return]


def _sums(model: Any, hidden: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
    """Sums over the labelled tokens of the next token's loss and of the KL: float64 [2] on the CPU."""
    found = torch.zeros(2, dtype=torch.float64)
    for begin in range(0, len(labels), PIECE):
        part = slice(begin, begin + PIECE)
        theirs = None if target is None else logits(model, target[part])
        found += torch.stack(token_losses(logits(model, hidden[part]), labels[part], theirs)).double().cpu()
    return found


def _exp(nats: float) -> float:
    return math.exp(min(nats, 690.0))
