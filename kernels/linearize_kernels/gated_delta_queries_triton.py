"""Gradient of the queries of the gated delta rule, all chunks at once.

    dq_i = e^{G_i} S do_i + sum_{j <= i} e^{G_i - G_j} (do_i.u_j) k_j

S is the state before the chunk, u its updates (gated_delta_scan_triton.py); under a lag the state is an earlier one and
there is no second term. For the gradient of the log decays, what the queries say of the sums G is stored:

    sum_f q_if e^{G_i} (S do_i)_f  +  sum_{j < i} X_ij  -  sum_{l > i} X_li          X_ij = P_ij do_i.u_j

The pairs that lie on one side of a token leave no trace in the sum to the chunk's end, for they are the same numbers
with both signs; from q dq and k dk, rounded each for itself, more than the small rest of them would remain. Rows of X
and the state's part together are q dq, which `take_length` asks for.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .gated_delta_tiles import (
    load_rows,
    pair_decay,
    span_of_chunk,
    store_rows,
    take_length,
    times_rows,
    times_state,
)
from .tuning import gated_delta_queries


@triton.jit(do_not_specialize=["T", "NC"])
def queries_kernel(
    q, k, scores, g_cum, r_q, r_k, d_out, states, update, d_q, along, table,
    sqb, sqh, sqt, skb, sks, skt, sdb, sdh, sdt, szb, szh, szt, T, H, NC,
    R: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LAG: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (chunks times batch times query heads).

    q [B, H, T, F]; k [B, H / R, T, F]; scores P [B, H, NC, C, C]; g_cum, r_k [B, H / R, T]; r_q [B, H, T]; d_out
    [B, H, T, V]; states [B, H / R, NC, F, V]; update [B, H / R, T, V] -> d_q (strides z), along [B, H, T] if GATED.
    """
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC % H).to(tl.int64)
    b = (pid // NC // H).to(tl.int64)
    s = h // R
    first, end, number = span_of_chunk(table, c, T, C, PACKED)
    left = end - first
    at = tl.cast(first, tl.int64)
    i = tl.arange(0, C)
    per_key = (b * (H // R) + s) * T + at
    q += b * sqb + h * sqh + at * sqt
    k += b * skb + s * sks + at * skt
    d_out += b * sdb + h * sdh + at * sdt
    d_q += b * szb + h * szh + at * szt
    states += ((b * (H // R) + s) * NC + c) * F * V
    update += per_key * V
    g = tl.zeros([C], tl.float32)
    seen = tl.full([C], 1.0, tl.float32)
    r_query = tl.full([C], 1.0, tl.float32)
    inner = tl.zeros([C], tl.float32)
    crossing = inner
    if GATED:
        g_cum += per_key
        g = tl.load(g_cum + i, mask=i < left, other=0.0)
        seen = tl.exp2(g)
    if UNIT:
        r_query = tl.load(r_q + (b * H + h) * T + at + i, mask=i < left, other=0.0)
    if LAG > 0:
        steps = number - tl.maximum(number // LAG - 1, 0) * LAG
        if left > 0:
            states -= tl.cast(steps, tl.int64) * F * V
        if GATED:
            gone = 0.0
            for m in range(0, steps):
                gone += tl.load(g_cum - m * C - 1, mask=left > 0, other=0.0)
            seen = tl.exp2(g + gone)
        d_scores = tl.zeros([C, C], update.dtype.element_ty)
    else:
        made = times_rows(d_out, sdt, update, V, i, left, V, BV, C, PREC)
        if GATED:
            own = made * tl.load(scores + ((b * H + h) * NC + c) * C * C + i[:, None] * C + i[None, :])
            inner = tl.sum(own, 1)
            crossing = inner - tl.sum(own, 0)
        made *= pair_decay(g[:, None], g[None, :], i[:, None] >= i[None, :], GATED)
        if UNIT:
            made *= tl.load(r_k + per_key + i, mask=i < left, other=0.0)[None, :]
        d_scores = made.to(update.dtype.element_ty)
    along_q = tl.zeros([C], tl.float32)  # of the state's part where there are gates, else of both
    for f in range(0, F, BF):
        channel = f + tl.arange(0, BF)
        d_rows = tl.zeros([C, BF], tl.float32)
        d_rows = times_state(d_out, sdt, seen, states, d_rows, i, left, channel, F, V, BF, BV, False, PREC)
        if GATED:
            d_rows *= seen[:, None]
            along_q += tl.sum(load_rows(q, sqt, i, left, channel, F, BF) * d_rows, 1) * r_query
        if LAG == 0:
            k_rows = load_rows(k, skt, i, left, channel, F, BF)
            d_rows = tl.dot(d_scores, k_rows, d_rows, input_precision=PREC)
        if UNIT and not GATED:
            along_q += tl.sum(load_rows(q, sqt, i, left, channel, F, BF) * d_rows, 1) * r_query
        store_rows(d_q, szt, i, left, channel, F, BF, d_rows)
    if GATED:
        tl.store(along + (b * H + h) * T + at + i, along_q + crossing, mask=i < left)
    if UNIT:
        take_length(d_q, szt, q, sqt, i, left, r_query, along_q + inner, F, BF)


def gate_cases(arch: int = 80) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations for a card, in bfloat16, for the compile gate; those for 80 fit every card."""
    signature = {
        **dict.fromkeys(("q", "k", "scores", "d_out", "states", "update", "d_q"), "*bf16"),
        **dict.fromkeys(("g_cum", "along"), "*fp32"),
        **{f"s{x}": "i32:16" for x in ("qb", "qh", "qt", "kb", "ks", "kt", "db", "dh", "dt", "zb", "zh", "zt")},
        "T": "i32", "H": "i32", "NC": "i32",
    }  # fmt: skip
    constants = dict.fromkeys(("r_q", "r_k", "table")) | {
        "R": 1, "F": 128, "V": 128, "C": 64, "LAG": 0, "GATED": True, "UNIT": False,
        "PACKED": False, "PREC": "tf32",
    }  # fmt: skip
    known = gated_delta_queries(arch, 128, 128, torch.bfloat16)
    options = {name: known.pop(name) for name in ("num_warps", "num_stages")}
    return [(queries_kernel, signature, constants | known, options, "F=128 C=64")]
