"""The triangular system of every chunk of the gated delta rule, solved once for all right-hand sides.

Inside a chunk each write depends on those before it (WY form, arXiv 2406.06484, section 3; gated, 2412.06464, eq. 10).
With x = v - e^G k S what a token finds missing, e what is missing still after the tokens before it, and b = diag(beta):

    (I + A b) e = x,      u = b e,      A_ij = e^{G_i - G_j} k_i.k_j below the diagonal

Stored is N = -(I + A b)^-1 A, below the diagonal, in k's dtype; its entries stay below 2 in size. From it

    e = x + N b x             (I + A b)^-1 = I + N b
    dr = du + N^T b du        (I + b A)^-1 = I + b N, transposed on the way back

where what a token has of itself is not rounded, and beta = 0 is no exception. N is made of blocks of 16 tokens: forward
substitution inside a block, where it is stable whatever the keys, then products of blocks below the diagonal.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .gated_delta_tiles import LOG2E, load_rows, span_of_chunk
from .tuning import gated_delta_system


@triton.jit
def _pairs(x, y, acc, PREC: tl.constexpr):
    """acc + x y^T [16, 16]."""
    return tl.dot(x, tl.trans(y), acc, input_precision=PREC)


@triton.jit
def _length(squares):
    """1 / max(length, 1e-6) from the sum of squares [16]."""
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-6)


@triton.jit
def _rows(beta, g, g_cum, r_k, squares, sbt, sgt, i, left, before, GATED: tl.constexpr, UNIT: tl.constexpr):
    """Of 16 tokens: running log2 decay, one over the keys' lengths, beta; and the decay at the end."""
    strength = tl.load(beta + i * sbt, mask=i < left, other=0.0).to(tl.float32)
    r = tl.full([16], 1.0, tl.float32)
    if UNIT:
        r = _length(squares)
        tl.store(r_k + i, r, mask=i < left)
    running = tl.zeros([16], tl.float32)
    total = before
    if GATED:
        own = tl.load(g + i * sgt, mask=i < left, other=0.0).to(tl.float32) * LOG2E
        running = before + tl.cumsum(own, 0)
        total = before + tl.sum(own, 0)
        tl.store(g_cum + i, running, mask=i < left)
    return running, r, strength, total


@triton.jit
def _solved(pairs, g, r, beta, GATED: tl.constexpr):
    """N of one block from its products of keys [16, 16], float32."""
    i = tl.arange(0, 16)
    row, column = i[:, None], i[None, :]
    pairs = pairs * r[:, None] * r[None, :]
    # A transposed, entry (j, i), so that a row of A is a column vector and meets N without a change of layout.
    upper, lower = pairs, pairs
    if GATED:
        upper *= tl.exp2(tl.where(row < column, g[None, :] - g[:, None], float("-inf")))
        lower *= tl.exp2(tl.where(row > column, g[:, None] - g[None, :], float("-inf")))
    upper = tl.where(row < column, upper, 0.0) * beta[:, None]
    solved = tl.where(row > column, -lower, 0.0)
    for n in range(2, 16):
        of_n = tl.sum(tl.where(column == n, upper, 0.0), 1)
        solved = tl.where(row == n, solved - tl.sum(of_n[:, None] * solved, 0)[None, :], solved)
    return solved


@triton.jit
def _below(pairs, g_i, g_j, r_i, r_j, GATED: tl.constexpr):
    """Block (i, j) of A, i a later block than j, from its products of keys."""
    made = pairs * r_i[:, None] * r_j[None, :]
    if GATED:
        made *= tl.exp2(g_i[:, None] - g_j[None, :])
    return made


@triton.jit
def _both(solved, beta):
    """I + N b, which stands left of A, and I + b N, right of it, of one block."""
    i = tl.arange(0, 16)
    one = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    return one + solved * beta[None, :], one + solved * beta[:, None]


@triton.jit
def _times(x, y, ROUND: tl.constexpr):
    return tl.dot(x, y, input_precision=ROUND)


@triton.jit
def _put(system, row: tl.constexpr, column: tl.constexpr, C: tl.constexpr, block):
    i = tl.arange(0, 16)
    at = (row * 16 + i)[:, None] * C + column * 16 + i[None, :]
    tl.store(system + at, block.to(system.dtype.element_ty))


@triton.jit
def _squares(rows):
    x = rows.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit(do_not_specialize=["T", "NC"])
def system_kernel(
    k, beta, g, system, g_cum, r_k, table, skb, sks, skt, sbb, sbs, sbt, sgb, sgs, sgt, T, S, NC,
    F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, PREC: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Grid (chunks times batch times state heads).

    k [B, S, T, F]; beta, g [B, S, T] -> system N [B, S, NC, C, C] in k's dtype; g_cum [B, S, T] running log2 decays of
    the chunk, if GATED; r_k [B, S, T] one over the keys' lengths, if UNIT.
    """
    pid = tl.program_id(0)
    c = pid % NC
    b = (pid // NC // S).to(tl.int64)
    s = (pid // NC % S).to(tl.int64)
    first, end, _ = span_of_chunk(table, c, T, C, PACKED)
    left = end - first
    at = tl.cast(first, tl.int64)
    k += b * skb + s * sks + at * skt
    beta += b * sbb + s * sbs + at * sbt
    if GATED:
        g += b * sgb + s * sgs + at * sgt
        g_cum += (b * S + s) * T + at
    if UNIT:
        r_k += (b * S + s) * T + at
    system += pid.to(tl.int64) * C * C
    i1 = tl.arange(0, 16)
    i2, i3, i4 = i1 + 16, i1 + 32, i1 + 48
    zero = tl.zeros([16, 16], tl.float32)
    nothing = tl.zeros([16], tl.float32)
    a11, a21, a22, a31, a32, a33, a41, a42, a43, a44 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    n1, n2, n3, n4 = nothing, nothing, nothing, nothing
    for f in range(0, F, BF):  # products of keys, all blocks at once
        channel = f + tl.arange(0, BF)
        k1 = load_rows(k, skt, i1, left, channel, F, BF)
        a11 = _pairs(k1, k1, a11, PREC)
        if UNIT:
            n1 += _squares(k1)
        if C >= 32:
            k2 = load_rows(k, skt, i2, left, channel, F, BF)
            a21 = _pairs(k2, k1, a21, PREC)
            a22 = _pairs(k2, k2, a22, PREC)
            if UNIT:
                n2 += _squares(k2)
        if C >= 64:
            k3 = load_rows(k, skt, i3, left, channel, F, BF)
            a31 = _pairs(k3, k1, a31, PREC)
            a32 = _pairs(k3, k2, a32, PREC)
            a33 = _pairs(k3, k3, a33, PREC)
            k4 = load_rows(k, skt, i4, left, channel, F, BF)
            a41 = _pairs(k4, k1, a41, PREC)
            a42 = _pairs(k4, k2, a42, PREC)
            a43 = _pairs(k4, k3, a43, PREC)
            a44 = _pairs(k4, k4, a44, PREC)
            if UNIT:
                n3 += _squares(k3)
                n4 += _squares(k4)

    g1, r1, b1, total = _rows(beta, g, g_cum, r_k, n1, sbt, sgt, i1, left, 0.0, GATED, UNIT)
    m11 = _solved(a11, g1, r1, b1, GATED)
    _put(system, 0, 0, C, m11)
    if C >= 32:
        _, right1 = _both(m11, b1)
        g2, r2, b2, total = _rows(beta, g, g_cum, r_k, n2, sbt, sgt, i2, left, total, GATED, UNIT)
        m22 = _solved(a22, g2, r2, b2, GATED)
        left2, right2 = _both(m22, b2)
        m21 = -_times(left2, _times(_below(a21, g2, g1, r2, r1, GATED), right1, ROUND), ROUND)
        _put(system, 0, 1, C, zero)
        _put(system, 1, 0, C, m21)
        _put(system, 1, 1, C, m22)
    if C >= 64:
        m21 *= b2[:, None]  # from here on right of A
        g3, r3, b3, total = _rows(beta, g, g_cum, r_k, n3, sbt, sgt, i3, left, total, GATED, UNIT)
        m33 = _solved(a33, g3, r3, b3, GATED)
        left3, right3 = _both(m33, b3)
        a32 = _below(a32, g3, g2, r3, r2, GATED)
        m32 = -_times(left3, _times(a32, right2, ROUND), ROUND)
        part = _times(_below(a31, g3, g1, r3, r1, GATED), right1, ROUND) + _times(a32, m21, ROUND)
        m31 = -_times(left3, part, ROUND)
        _put(system, 0, 2, C, zero)
        _put(system, 1, 2, C, zero)
        _put(system, 2, 0, C, m31)
        _put(system, 2, 1, C, m32)
        _put(system, 2, 2, C, m33)
        m31 *= b3[:, None]
        m32 *= b3[:, None]
        g4, r4, b4, total = _rows(beta, g, g_cum, r_k, n4, sbt, sgt, i4, left, total, GATED, UNIT)
        m44 = _solved(a44, g4, r4, b4, GATED)
        left4, _ = _both(m44, b4)
        a43 = _below(a43, g4, g3, r4, r3, GATED)
        a42 = _below(a42, g4, g2, r4, r2, GATED)
        a41 = _below(a41, g4, g1, r4, r1, GATED)
        m43 = -_times(left4, _times(a43, right3, ROUND), ROUND)
        m42 = -_times(left4, _times(a42, right2, ROUND) + _times(a43, m32, ROUND), ROUND)
        part = _times(a41, right1, ROUND) + _times(a42, m21, ROUND) + _times(a43, m31, ROUND)
        _put(system, 0, 3, C, zero)
        _put(system, 1, 3, C, zero)
        _put(system, 2, 3, C, zero)
        _put(system, 3, 0, C, -_times(left4, part, ROUND))
        _put(system, 3, 1, C, m42)
        _put(system, 3, 2, C, m43)
        _put(system, 3, 3, C, m44)


def gate_cases(arch: int = 80) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations for a card, in bfloat16, for the compile gate; those for 80 fit every card."""
    signature = {
        "k": "*bf16", "beta": "*fp32", "g": "*fp32", "system": "*bf16", "g_cum": "*fp32", "r_k": "*fp32",
        **{f"s{x}{y}": "i32:16" for x in "k" for y in "bst"}, **{f"s{x}{y}": "i32" for x in "bg" for y in "bst"},
        "T": "i32", "S": "i32", "NC": "i32",
    }  # fmt: skip
    constants = {"table": None, "F": 128, "C": 64, "GATED": True, "UNIT": False, "PACKED": False,
                 "PREC": "tf32", "ROUND": "tf32"}  # fmt: skip
    known = gated_delta_system(arch, 128, torch.bfloat16)
    options = {name: known.pop(name) for name in ("num_warps", "num_stages")}
    return [(system_kernel, signature, constants | known, options, "F=128 C=64")]
