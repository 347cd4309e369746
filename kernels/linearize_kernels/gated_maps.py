"""Feature maps inside kernels: phi(x W + b), and the slope of a map from its features alone.

A map with two signs gives phi(y) and phi(-y), y = x W + b. The formulas are those of the feature maps of a mixer: their
limits and floors are part of what a model learned with.

    hedgehog_exp      exp(clamp(y, -15, 15))        hedgehog_softmax   max(softmax(y), 1e-12)
    relu              max(y, 1e-6)                  crelu              max(y, 0)            linear   y
    learned_softmax   as hedgehog_softmax, of one sign

Features are kept in the inputs' dtype, in which tensor cores multiply them. What a map has cut off is told by a feature
at its limit or floor, so that y itself is needed no more.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .gated_plan import Plan, Slice

LOG2E = tl.constexpr(1.4426950408889634)
EXP_LIMIT = tl.constexpr(15.0)
SOFTMAX_FLOOR = tl.constexpr(1e-12)
RELU_FLOOR = tl.constexpr(1e-6)
# Limits and floors as every dtype rounds them lie on the far side of these, and what is inside by 2 % on this one.
EXP_INSIDE = tl.constexpr(3269000.0)
SOFTMAX_INSIDE = tl.constexpr(1.01e-12)
RELU_INSIDE = tl.constexpr(1.02e-6)
SMALL = tl.constexpr(1e-4)
"""Below it a denominator is not far from what floors make of it: of 10^5 tokens and 10^-12 each, at most 10^-7."""
SIGNS = {"hedgehog_exp": 2, "hedgehog_softmax": 2, "crelu": 2, "learned_softmax": 1, "relu": 1, "linear": 1}
"""Maps that the kernels know, and how many signs each has."""
SOFTMAXES = ("hedgehog_softmax", "learned_softmax")
"""Maps that need sums of a whole row."""


@triton.jit
def phi(y, log_sum, MAP: tl.constexpr):
    """Features of y, which has its sign already; log_sum broadcasts against it (softmax: log of the row's sum)."""
    if MAP == "hedgehog_exp":
        return tl.exp2(tl.minimum(tl.maximum(y, -EXP_LIMIT), EXP_LIMIT) * LOG2E)
    elif MAP == "hedgehog_softmax" or MAP == "learned_softmax":
        return tl.maximum(tl.exp2((y - log_sum) * LOG2E), SOFTMAX_FLOOR)
    elif MAP == "relu":
        return tl.maximum(y, RELU_FLOOR)
    elif MAP == "crelu":
        return tl.maximum(y, 0.0)
    else:
        return y


@triton.jit
def phi_grad(own, other, grad, along, MAP: tl.constexpr):
    """Gradient of y, which has its sign already, from that of its features.

    own, other: features of this sign and of the other; along: a row's sum of `row_part` (softmax).
    """
    if MAP == "hedgehog_exp":
        return tl.where(tl.maximum(own, other) < EXP_INSIDE, own * grad, 0.0)
    elif MAP == "hedgehog_softmax" or MAP == "learned_softmax":
        return own * (tl.where(own > SOFTMAX_INSIDE, grad, 0.0) - along)
    elif MAP == "relu":
        return tl.where(own > RELU_INSIDE, grad, 0.0)
    elif MAP == "crelu":
        return tl.where(own > 0, grad, 0.0)
    else:
        return grad


@triton.jit
def row_part(own, grad):
    """What some columns add to `along` of phi_grad, for each row: a feature at its floor has no slope.

    Such features are tiny, yet their gradients need not be: where a query's codes are those of no key, its denominator
    is as small as they are.
    """
    return tl.sum(tl.where(own > SOFTMAX_INSIDE, own * grad, 0.0), 1)


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
def row_sums(sums, place, sign, live, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr):
    """What a softmax needs of rows [C, 1]: sums [rows, SIGNED] at `place`."""
    found = tl.zeros([C, 1], tl.float32)
    if MAP == "hedgehog_softmax" or MAP == "learned_softmax":
        found = tl.load(sums + place * SIGNED + sign, mask=live, other=0.0)[:, None]
    return found


@triton.jit
def feature_tile(of, rows, column, inside, sign, WIDTH: tl.constexpr):
    """Stored features of some rows [C] (offsets of their first) and columns of one sign: [C, BF], 0 outside."""
    return tl.load(of + rows[:, None] + (sign * WIDTH + column)[None, :], mask=inside, other=0.0)


@triton.jit
def two_columns(features, vector, acc, PREC: tl.constexpr):
    """acc [A, 16] + features [A, B] times a vector [B] float32, spread over columns of which only the sum matters.

    In bfloat16 the vector is the sum of two columns, which keep 16 of its bits; float16 has not its range.
    """
    place = tl.arange(0, 16)[None, :]
    if features.dtype == tl.bfloat16:
        high = vector.to(tl.bfloat16)
        low = (vector - high.to(tl.float32)).to(tl.bfloat16)
        tile = tl.where(place == 0, high[:, None], tl.where(place == 1, low[:, None], 0.0))
        return tl.dot(features, tile.to(tl.bfloat16), acc)
    tile = tl.where(place == 0, vector[:, None], 0.0)
    return tl.dot(features.to(tl.float32), tile, acc, input_precision=PREC)


class Mapped(NamedTuple):
    """What is mapped, and by what."""

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

    def part(self, at: Slice) -> "Mapped":
        """Views of one slice's heads and rows of the batch."""
        if at.whole:
            return self
        weights = [None if w is None else w[heads] for w, heads in zip(self[4:], (at.heads,) * 2 + (at.states,) * 2)]
        return Mapped(at.of_heads(self.q), at.of_keys(self.k), at.of_keys(self.v), at.of_gates(self.g), *weights)  # type: ignore[arg-type]


def options(plan: Plan, chunk: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants that the kernels from features share."""
    return dict(
        R=plan.readers, WIDTH=plan.features // plan.signs, V=plan.values,
        BV=max(16, triton.next_power_of_2(plan.values)), C=chunk, SIGNED=plan.signs, DECAY=plan.decay, NORM=plan.norm,
        PACKED=plan.cu_seqlens is not None, PREC="ieee" if dtype == torch.float32 else "tf32",
    )  # fmt: skip


GATE_SHAPES = (
    (64, 2048, "learned_softmax"),
    (128, 2048, "learned_softmax"),
    (128, 1024, "hedgehog_exp"),
    (128, 64, "hedgehog_exp"),
)
"""Head size, width and map of what the compile gate builds, the default recipe's first."""


def map_gate_constants(size: int, width: int, name: str, chunk: int) -> dict[str, Any]:
    """Constants of the kernels with maps for the compile gate: four query heads on a state."""
    return dict(
        R=4, WIDTH=width, V=size, BV=size, C=chunk, MAP=name, SIGNED=SIGNS[name], DECAY="scalar", NORM=True,
        PACKED=False, PREC="tf32", table=None,
    )  # fmt: skip


MAP_POINTERS = dict.fromkeys(
    ("v", "fq", "fk", "dout", "states", "d_states", "reads", "pairs", "dy"), "*bf16"
) | dict.fromkeys(
    ("g", "factor", "extra", "den", "z_states", "dz_states", "gates", "totals", "along", "found", "d_bias"), "*fp32"
)
"""Types of the arguments that the kernels with maps share, for the compile gate."""
