"""Losses of a piece of logits, and their gradient in place of the logits: one launch.

    CE_i = lse(s_i) - s_i[label_i]      KL_i = sum_v q_v (t_v - s_v) - lse(t_i) + lse(s_i),   q = softmax(t_i)
    d s_i = ce (p - onehot) + kl (p - q),   p = softmax(s_i)

s the student's logits, t the teacher's. A program reads its row once for sums relative to a running maximum (online
softmax, arXiv 1805.02867) and once more for the gradient. All sums are in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .tuning import distill_rows


@triton.jit
def losses_kernel(
    logits, theirs, labels, losses, ce, kl, size, IGNORE: tl.constexpr, BLOCK: tl.constexpr, TEACHER: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """Grid (rows). logits, theirs [N, size], contiguous; labels [N] int64 -> losses [N, 2]: CE and KL of each row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * size
    losses += row * 2
    column = tl.arange(0, BLOCK)
    if TEACHER:
        theirs += row * size
    if label == IGNORE:
        tl.store(losses, 0.0)
        tl.store(losses + 1, 0.0)
        if GRADIENT:
            for begin in range(0, size, BLOCK):
                nothing = tl.zeros([BLOCK], tl.float32).to(logits.dtype.element_ty)
                tl.store(logits + begin + column, nothing, mask=begin + column < size)
        return
    most = -float("inf")
    total = 0.0
    their_most = -float("inf")
    their_total = 0.0
    apart = 0.0
    for begin in range(0, size, BLOCK):
        inside = begin + column < size
        s = tl.load(logits + begin + column, mask=inside, other=-float("inf")).to(tl.float32)
        new = tl.maximum(most, tl.max(s, 0))
        total = total * tl.exp(most - new) + tl.sum(tl.exp(s - new), 0)
        most = new
        if TEACHER:
            t = tl.load(theirs + begin + column, mask=inside, other=-float("inf")).to(tl.float32)
            new = tl.maximum(their_most, tl.max(t, 0))
            weight = tl.exp(t - new)
            keep = tl.exp(their_most - new)
            their_total = their_total * keep + tl.sum(weight, 0)
            # Where the teacher gives no weight at all, the difference may be inf or nan.
            apart = apart * keep + tl.sum(tl.where(weight > 0, weight * (t - s), 0.0), 0)
            their_most = new
    lse = most + tl.log(total)
    their_lse = their_most + tl.log(their_total)
    tl.store(losses, lse - tl.load(logits + label).to(tl.float32))
    if TEACHER:
        tl.store(losses + 1, apart / their_total - their_lse + lse)
    else:
        tl.store(losses + 1, 0.0)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit before one of them overwrites it
        for begin in range(0, size, BLOCK):
            inside = begin + column < size
            s = tl.load(logits + begin + column, mask=inside, other=-float("inf")).to(tl.float32)
            p = tl.exp(s - lse)
            d = ce * tl.where(begin + column == label, p - 1.0, p)
            if TEACHER:
                t = tl.load(theirs + begin + column, mask=inside, other=-float("inf")).to(tl.float32)
                d += kl * (p - tl.exp(t - their_lse))
            tl.store(logits + begin + column, d.to(logits.dtype.element_ty), mask=inside)


def losses_(
    logits: torch.Tensor, theirs: torch.Tensor | None, labels: torch.Tensor, ce: float, kl: float, ignore: int,
    gradient: bool,
) -> torch.Tensor:  # fmt: skip
    """Sums of CE and KL [2], float32; with `gradient`, that of ce CE + kl KL takes the place of the logits [N, V]."""
    losses = empty((logits.shape[0], 2), dtype=torch.float32, device=logits.device)
    losses_kernel[(logits.shape[0],)](
        logits, theirs, labels, losses, float(ce), float(kl), logits.shape[1], IGNORE=ignore,
        TEACHER=theirs is not None, GRADIENT=gradient, **distill_rows(logits.shape[1]),
    )  # fmt: skip
    return losses.sum(0)


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """What the compile gate builds: see tests/kernels/compile_gate.py."""
    signature = {"logits": "*bf16", "theirs": "*bf16", "labels": "*i64", "losses": "*fp32", "ce": "fp32", "kl": "fp32",
                 "size": "i32:16"}  # fmt: skip
    known = distill_rows(128256)
    constants = {"IGNORE": -100, "TEACHER": True, "GRADIENT": True, "BLOCK": known.pop("BLOCK")}
    return [(losses_kernel, signature, constants, known, "a row of 128256")]
