"""Gradients of keys and the log decay of the gated delta rule, all chunks at once.

From the states S before and their gradients dS after each chunk, the updates u and their gradients dr
(gated_delta_reverse_triton.py), with dP_ij = e^{G_i - G_j} do_i.u_j and dA_ij = -e^{G_i - G_j} dr_i.u_j:

    dk_j = e^{G_last - G_j} dS u_j - beta_j e^{G_j} S dr_j
           + sum_{i >= j} dP_ij q_i + sum_{i > j} beta_i dA_ij k_i + beta_j sum_{i < j} dA_ji k_i
    dg_t = e^{G_last} <S, dS> + sum_{j < t} k_j.(e^{G_last - G_j} dS u_j)
           + sum_{i >= t} (c_i - beta_i e^{G_i} k_i.(S dr_i) + sum_{j < i} Y_ij - sum_{l > i} Y_li)

c_i is what the queries carry (gated_delta_queries_triton.py), Y_ij = beta_i dA_ij k_i.k_j. Each gate collects only what
passes over it, so that nothing large is taken from something as large.

Transposed products are computed, never made by transposing a product: on Hopper that is no safe operand of tl.dot
(triton #6124). Channels are worked on in tiles of BF.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .gated_delta_tiles import (
    load_rows,
    load_state,
    pair_decay,
    row_factors,
    span_of_chunk,
    store_rows,
    take_length,
    times_rows,
    times_state,
)
from .gated_tiles import sum_before
from .tuning import gated_delta_keys


@triton.jit
def _by_scores(d_out, sdt, update, g, r_q, i, left, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
               GATED: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """dP transposed [C, C], row j for its key, times the queries' r_q."""
    made = times_rows(update, V, d_out, sdt, i, left, V, BV, C, PREC)
    made *= pair_decay(g[None, :], g[:, None], i[:, None] <= i[None, :], GATED) * r_q[None, :]
    return made.to(update.dtype.element_ty)


@triton.jit(do_not_specialize=["T", "NC"])
def keys_kernel(
    q, k, beta, g_cum, r_q, r_k, d_out, states, d_states, update, d_right, along_q, d_k, d_g, table, sqb, sqh, sqt, skb,
    sks, skt, sbb, sbs, sbt, sdb, sdh, sdt, szb, szs, szt, T, S, NC,
    R: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LAG: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (chunks times batch times state heads).

    q [B, S R, T, F]; k [B, S, T, F]; beta, g_cum, r_k [B, S, T]; r_q, along_q [B, S R, T]; d_out [B, S R, T, V];
    states, d_states [B, S, NC, F, V]; update, d_right [B, S, T, V] -> d_k (strides z), and d_g [B, S, T] if GATED:
    under LAG without the queries' part (gated_delta_decay_triton.py adds it).
    """
    pid = tl.program_id(0)
    c = pid % NC
    s = (pid // NC % S).to(tl.int64)
    b = (pid // NC // S).to(tl.int64)
    first, end, _ = span_of_chunk(table, c, T, C, PACKED)
    left = end - first
    at = tl.cast(first, tl.int64)
    i = tl.arange(0, C)
    per_key = (b * S + s) * T + at
    q += b * sqb + s * R * sqh + at * sqt
    k += b * skb + s * sks + at * skt
    beta += b * sbb + s * sbs + at * sbt
    d_out += b * sdb + s * R * sdh + at * sdt
    d_k += b * szb + s * szs + at * szt
    states += ((b * S + s) * NC + c) * F * V
    d_states += ((b * S + s) * NC + c) * F * V
    update += per_key * V
    d_right += per_key * V
    per_query = (b * S + s) * R * T + at
    if GATED:
        g_cum += per_key
    if UNIT:
        r_k += per_key
        r_q += per_query
    strength = tl.load(beta + i * sbt, mask=i < left, other=0.0).to(tl.float32)
    g, g_last, read, write = row_factors(g_cum, r_k, i, left, C, GATED, UNIT)
    r_key = tl.full([C], 1.0, tl.float32)
    r_query = tl.full([C], 1.0, tl.float32)
    if UNIT:
        r_key = tl.load(r_k + i, mask=i < left, other=0.0)
        read /= tl.where(r_key > 0, r_key, 1.0)
        write /= tl.where(r_key > 0, r_key, 1.0)

    by_scores = tl.zeros([C, C], update.dtype.element_ty)
    if LAG == 0 and R == 1:
        if UNIT:
            r_query = tl.load(r_q + i, mask=i < left, other=0.0)
        by_scores = _by_scores(d_out, sdt, update, g, r_query, i, left, V, BV, C, GATED, PREC)
    made = times_rows(d_right, V, update, V, i, left, V, BV, C, PREC)
    made *= pair_decay(g[:, None], g[None, :], i[:, None] > i[None, :], GATED) * -r_key[None, :]
    d_lower = made.to(update.dtype.element_ty)
    crossing = tl.zeros([C], tl.float32)
    if GATED:
        made *= times_rows(k, skt, k, skt, i, left, F, BF, C, PREC) * (strength * r_key)[:, None]
        crossing = tl.sum(made, 1) - tl.sum(made, 0)
    made = times_rows(update, V, d_right, V, i, left, V, BV, C, PREC)
    made *= pair_decay(g[None, :], g[:, None], i[:, None] < i[None, :], GATED) * -(strength * r_key)[None, :]
    d_lower_t = made.to(update.dtype.element_ty)

    # Sums over channels of a key and its gradient, after each part has been added to it.
    along_state = tl.zeros([C], tl.float32)
    along_before = tl.zeros([C], tl.float32)
    along = tl.zeros([C], tl.float32)
    kept = 0.0
    # Unrolled: in a loop ptxas before 13.4 overwrites the registers of a left factor that outlives the turn.
    for f in tl.static_range(0, F, BF):
        channel = f + tl.arange(0, BF)
        k_rows = load_rows(k, skt, i, left, channel, F, BF)
        d_rows = tl.zeros([C, BF], tl.float32)
        d_rows = times_state(d_right, V, -read, states, d_rows, i, left, channel, F, V, BF, BV, True, PREC)
        if GATED:
            along_state += tl.sum(k_rows * r_key[:, None] * d_rows, 1)
        d_rows = tl.dot(d_lower, k_rows, d_rows, input_precision=PREC)
        d_rows *= strength[:, None]
        d_rows = tl.dot(d_lower_t, k_rows, d_rows, input_precision=PREC)
        if LAG == 0:
            for r in tl.static_range(R):
                q_rows = load_rows(q + r * sqh, sqt, i, left, channel, F, BF)
                if R > 1:
                    if UNIT:
                        r_query = tl.load(r_q + (r * T + i), mask=i < left, other=0.0)
                    by_scores = _by_scores(d_out + r * sdh, sdt, update, g, r_query, i, left, V, BV, C, GATED, PREC)
                d_rows = tl.dot(by_scores, q_rows, d_rows, input_precision=PREC)
        if GATED:
            along_before += tl.sum(k_rows * r_key[:, None] * d_rows, 1)
        d_rows = times_state(update, V, write, d_states, d_rows, i, left, channel, F, V, BF, BV, GATED, PREC)
        if GATED or UNIT:
            along += tl.sum(k_rows * r_key[:, None] * d_rows, 1)
        store_rows(d_k, szt, i, left, channel, F, BF, d_rows)
        if GATED:
            for tile in range(0, V, BV):
                column = tile + tl.arange(0, BV)
                state = load_state(states, channel, column, F, V, BF, BV).to(tl.float32)
                kept += tl.sum(state * load_state(d_states, channel, column, F, V, BF, BV))
    if UNIT:
        take_length(d_k, szt, k, skt, i, left, r_key, along, F, BF)
    if GATED:
        carried = strength * along_state + crossing
        if LAG == 0:
            for r in tl.static_range(R):
                carried += tl.load(along_q + per_query + (r * T + i), mask=i < left, other=0.0)
        carried = tl.cumsum(carried, 0, reverse=True) + sum_before(along - along_before)
        tl.store(d_g + per_key + i, carried + kept * tl.exp2(g_last), mask=i < left)


def gate_cases(arch: int = 80) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations for a card, in bfloat16, for the compile gate; those for 80 fit every card."""
    signature = {
        **dict.fromkeys(("q", "k", "d_out", "states", "d_states", "update", "d_right", "d_k"), "*bf16"),
        **dict.fromkeys(("beta", "g_cum", "along_q", "d_g"), "*fp32"),
        **{f"s{x}{y}": "i32:16" for x in "qd" for y in "bht"}, **{f"s{x}{y}": "i32:16" for x in "kz" for y in "bst"},
        **{f"sb{x}": "i32" for x in "bst"}, "T": "i32", "S": "i32", "NC": "i32",
    }  # fmt: skip
    constants = dict.fromkeys(("r_q", "r_k", "table")) | {
        "R": 1, "F": 128, "V": 128, "C": 64, "LAG": 0, "GATED": True, "UNIT": False,
        "PACKED": False, "PREC": "tf32",
    }  # fmt: skip
    known = gated_delta_keys(arch, 128, 128, torch.bfloat16)
    options = {name: known.pop(name) for name in ("num_warps", "num_stages")}
    return [(keys_kernel, signature, constants | known, options, "F=128 C=64")]
