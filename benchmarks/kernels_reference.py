"""The definitions, in float64: every weight of every pair. For a few hundred tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_shapes import Shape
from linearize_kernels import block_window_mask, linear_weights, window_weights

Exact = dict[str, Tensor]


def grouped(q: Tensor, heads: int) -> Tensor:
    """[B, H, T, D] -> [B, heads, H / heads, T, D]."""
    return q.unflatten(1, (heads, -1))


def repeated(x: Tensor, heads: int) -> Tensor:
    """[B, K, ...] -> [B, heads, ...], each kv head for its group of query heads."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def seen_by(kind: str, length: int, window: int, device: torch.device) -> Tensor:
    """[T, T] bool, True where query i attends key j: causal, block (window.py's) or sliding (the last keys)."""
    i = torch.arange(length, device=device)
    causal = i[:, None] >= i[None, :]
    if kind == "causal":
        return causal
    if kind == "block":
        return block_window_mask(length, window, 0, device)
    return causal & (i[:, None] - i[None, :] < window)


def softmax_attention(shape: Shape, kind: str) -> Callable[[Exact], Tensor]:
    """Attention over what `kind` lets a query see."""

    def run(x: Exact) -> Tensor:
        seen = seen_by(kind, x["q"].shape[2], shape.window, x["q"].device)
        k, v = (repeated(x[name], shape.heads) for name in "kv")
        weights, _ = window_weights(grouped(x["q"], shape.heads), k, scale=shape.head_dim**-0.5, seen=seen)
        weights = weights.squeeze(2)
        return weights @ v / weights.sum(-1, keepdim=True)

    return run


def two_sided(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog features [softmax(xW), softmax(-xW)]: x [B, H, T, D], weight [H, D, f]."""
    y = torch.einsum("bhtd,hdf->bhtf", x, weight)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1)


def window_and_linear(shape: Shape, kind: str) -> Callable[[Exact], Tensor]:
    """LoLCATs (arXiv 2410.10254, eq. 7): one denominator for the window and the linear branch outside it."""

    def run(x: Exact) -> Tensor:
        length, device = x["q"].shape[2], x["q"].device
        seen = seen_by(kind, length, shape.window, device)
        covered = seen_by("causal", length, 0, device) & ~seen
        k, v = (repeated(x[name], shape.heads) for name in "kv")
        softmax, _ = window_weights(grouped(x["q"], shape.heads), k, scale=shape.head_dim**-0.5, seen=seen)
        fq, fk = two_sided(x["q"], x["wq"]), two_sided(k, x["wk"])
        far = linear_weights(grouped(fq, shape.heads), fk, covered=covered).squeeze(2)
        total = softmax.squeeze(2) * x["logit"].sigmoid()[:, None, None] + far
        return total @ v / total.sum(-1, keepdim=True)

    return run


def gated(shape: Shape, *, scale: float, delta: bool = False) -> Callable[[Exact], Tensor]:
    """Additive or delta-rule linear attention under log decays `g` [B, K, T] or [B, K, T, D], write strength `beta`."""

    def run(x: Exact) -> Tensor:
        heads = x["k"].shape[1]
        covered = seen_by("causal", x["q"].shape[2], 0, x["q"].device)
        k = torch.nn.functional.normalize(x["k"], dim=-1) if delta else x["k"]
        q = torch.nn.functional.normalize(x["q"], dim=-1) if delta else x["q"]
        options: dict[str, Any] = {"log_decay": x.get("g"), "beta": x.get("beta"), "covered": covered}
        weights = linear_weights(grouped(q * scale, heads), k, **options).flatten(1, 2)
        return weights @ repeated(x["v"], shape.heads)

    return run
