"""Feature maps inside kernels: phi(x W + b) tile by tile, so that no tensor of features is ever written.

A map with two signs gives phi(y) and phi(-y), y = x W + b. The formulas are those of the feature maps of a mixer: their
limits and floors are part of what a model learned with.

    hedgehog_exp      exp(clamp(y, -15, 15))        hedgehog_softmax   max(softmax(y), 1e-12)
    relu              max(y, 1e-6)                  crelu              max(y, 0)            linear   y
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .gated_plan import Plan

LOG2E = tl.constexpr(1.4426950408889634)
EXP_LIMIT = tl.constexpr(15.0)
SOFTMAX_FLOOR = tl.constexpr(1e-12)
RELU_FLOOR = tl.constexpr(1e-6)
SIGNS = {"hedgehog_exp": 2, "hedgehog_softmax": 2, "crelu": 2, "relu": 1, "linear": 1}
"""Maps that the kernels know, and how many signs each has."""


@triton.jit
def phi(y, log_sum, MAP: tl.constexpr):
    """Features of y, which has its sign already; log_sum broadcasts against it (softmax: log of the row's sum)."""
    if MAP == "hedgehog_exp":
        return tl.exp2(tl.minimum(tl.maximum(y, -EXP_LIMIT), EXP_LIMIT) * LOG2E)
    elif MAP == "hedgehog_softmax":
        return tl.maximum(tl.exp2((y - log_sum) * LOG2E), SOFTMAX_FLOOR)
    elif MAP == "relu":
        return tl.maximum(y, RELU_FLOOR)
    elif MAP == "crelu":
        return tl.maximum(y, 0.0)
    else:
        return y


@triton.jit
def phi_grad(y, features, grad, along, MAP: tl.constexpr):
    """Gradient of y, which has its sign already; along: a row's sum of features times their gradients (softmax)."""
    if MAP == "hedgehog_exp":
        return tl.where(tl.abs(y) <= EXP_LIMIT, features * grad, 0.0)
    elif MAP == "hedgehog_softmax":
        return features * (tl.where(features > SOFTMAX_FLOOR, grad, 0.0) - along)
    elif MAP == "relu":
        return tl.where(y >= RELU_FLOOR, grad, 0.0)
    elif MAP == "crelu":
        return tl.where(y > 0, grad, 0.0)
    else:
        return grad


@triton.jit
def weights(w, d, column, in_column, D: tl.constexpr, WIDTH: tl.constexpr):
    """Some columns of W [D, WIDTH]: [BD, BF]."""
    return tl.load(w + d[:, None] * WIDTH + column[None, :], mask=(d < D)[:, None] & in_column[None, :], other=0.0)


@triton.jit
def project(x, tile, bias, column, in_column, BIAS: tl.constexpr, PREC: tl.constexpr):
    """y = x W + b for some columns: x [C, BD], tile [BD, BF] in x's dtype, bias [WIDTH] float32; [C, BF] float32."""
    y = tl.dot(x, tile, input_precision=PREC)
    if BIAS:
        y += tl.load(bias + column, mask=in_column, other=0.0)[None, :]
    return y


@triton.jit
def row_sums(sums, place, sign, live, C: tl.constexpr, MAP: tl.constexpr):
    """What a softmax needs of rows [C, 1]: sums [rows, 2] at `place`."""
    found = tl.zeros([C, 1], tl.float32)
    if MAP == "hedgehog_softmax":
        found = tl.load(sums + place * 2 + sign, mask=live, other=0.0)[:, None]
    return found


@triton.jit
def features(y, log_sum, inside, SIGN: tl.constexpr, MAP: tl.constexpr):
    """y with its sign, and its features, 0 outside."""
    signed = y if SIGN == 0 else -y
    return signed, tl.where(inside, phi(signed, log_sum, MAP), 0.0)


class Mapped(NamedTuple):
    """Inputs of the kernels whose features are computed on the way, in the order of their arguments."""

    q: torch.Tensor
    """[B, H, T, D]"""
    k: torch.Tensor
    """[B, HK, T, D]"""
    v: torch.Tensor
    """[B, HK, T, V]"""
    g: torch.Tensor | None
    q_weight: torch.Tensor
    """[H, D, f] in q's dtype"""
    q_bias: torch.Tensor | None
    """[H, f] float32, as k_bias; both or neither"""
    k_weight: torch.Tensor
    """[S, D, f]"""
    k_bias: torch.Tensor | None
    q_sums: torch.Tensor | None
    """Of a softmax: logs of the rows' sums [B, H, T, 2]."""
    k_sums: torch.Tensor | None
    """[B, S, T, 2]"""

    def strides(self, plan: Plan) -> tuple[int, ...]:
        """Strides of q, k, v and g over batch, head and token."""
        parts = [x.stride()[:3] for x in (self.q, self.k, self.v)]
        return (*parts[0], *parts[1], *parts[2], *plan.decay_strides(self.g))

    def options(self, plan: Plan, chunk: int, table: torch.Tensor | None) -> dict[str, Any]:
        """Constants of the kernels, but for their tiles."""
        size = self.q.shape[3]
        return dict(
            R=plan.readers, G=plan.state_heads // plan.kv_heads, D=size, BD=max(16, triton.next_power_of_2(size)),
            WIDTH=plan.features // plan.signs, V=plan.values, C=chunk, MAP=plan.map, SIGNED=plan.signs,
            BIAS=self.q_bias is not None, DECAY=plan.decay, NORM=plan.norm, PACKED=table is not None,
            PREC="ieee" if self.q.dtype == torch.float32 else "tf32",
        )  # fmt: skip


def map_gate_constants(size: int, width: int, chunk: int) -> dict[str, Any]:
    """Constants of the default recipe's kernels for the compile gate: four state heads on a key-value head."""
    return dict(
        R=1, G=4, D=size, BD=size, WIDTH=width, V=size, C=chunk, MAP="hedgehog_exp", SIGNED=2, BIAS=True,
        DECAY="scalar", NORM=True, PACKED=False, PREC="tf32", table=None, q_sums=None, k_sums=None,
    )  # fmt: skip


MAP_POINTERS = dict.fromkeys(
    ("q", "k", "v", "q_weight", "k_weight", "dout", "states", "d_states"), "*bf16"
) | dict.fromkeys(("g", "q_bias", "k_bias", "factor", "extra", "z_states", "dz_states"), "*fp32")
"""Types of the arguments that the kernels with maps share, for the compile gate."""
