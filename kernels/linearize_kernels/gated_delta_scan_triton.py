"""The states of the gated delta rule, chunk after chunk, and the outputs that read them.

    x = v - e^G k S       e = x + N (beta x)       u = beta e       o = e^G q S + P u
    S <- e^{G_last} S + sum_j e^{G_last - G_j} k_j u_j^T

N solves the chunk's triangular system (gated_delta_system_triton.py), P are its scores (gated_delta_scores_triton.py).
Sequential in the chunks, parallel in sequences, heads and tiles of V. With OUT the outputs are made where the state
already is, so that no state goes to memory; for the backward pass KEEP stores the states and u instead, and makes the
gradient of beta, dr.e (dr: gated_delta_reverse_triton.py), while e is exact.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .gated_delta_tiles import load_rows, row_factors, span_of_sequence, store_rows
from .tuning import gated_delta_scan


@triton.jit
def _read_later(q, o, state, g_cum, r_q, sqh, sqt, soh, sot, T, n, chunks, i, left, channel, column, R: tl.constexpr,
                F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                LAG: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Outputs that read the state before chunk n, which begins a block: the block after next's, and the first block's.

    Pointers at the first token of chunk n, after which `left` tokens follow.
    """
    gone = 0.0
    for m in range(0, tl.minimum(2 * LAG, chunks - n)):
        rest = left - m * C
        at = tl.cast(m, tl.int64) * C
        if (n == 0) | (m >= LAG):
            weight = tl.full([C], 1.0, tl.float32)
            if GATED:
                weight = tl.exp2(gone + tl.load(g_cum + at + i, mask=i < rest, other=0.0))
            for r in tl.static_range(R):
                row = weight
                if UNIT:
                    row = weight * tl.load(r_q + r * T + at + i, mask=i < rest, other=0.0)
                q_rows = load_rows(q + r * sqh + at * sqt, sqt, i, rest, channel, F, BF)
                out = tl.dot(q_rows, state, input_precision=PREC) * row[:, None]
                store_rows(o + r * soh + at * sot, sot, i, rest, column, V, BV, out)
        if GATED:
            gone += tl.load(g_cum + at + tl.minimum(rest, C) - 1)


@triton.jit(do_not_specialize=["T", "NC"])
def scan_kernel(
    q, k, v, beta, system, scores, g_cum, r_q, r_k, first_state, d_right, d_rest, o, states, update, d_beta, last_state,
    offsets, chunk_offsets, stops, sqb, sqh, sqt, skb, sks, skt, svb, svh, svt, sbb, sbs, sbt, sob, soh, sot, T, S, NC,
    R: tl.constexpr, GV: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LAG: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr, OUT: tl.constexpr,
    KEEP: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (sequences times state heads times tiles of V).

    q [B, S R, T, F]; k [B, S, T, F]; v [B, S / GV, T, V]; beta, g_cum, r_k [B, S, T]; r_q [B, S R, T]; system
    [B, S, NC, C, C]; scores [B, S R, NC, C, C]; first_state, last_state [N, S, F, V] float32; o [B, S R, T, V]; states
    [B, S, NC, F, V], each before its chunk; update u [B, S, T, V]; with KEEP also d_right and what its rounding took
    away, d_rest, or None [B, S, T, V] -> d_beta [B, S, tiles of V, T], to be added up. stops [N]: before which chunk
    last_state is taken; None: at the end. LAG: chunks a block, of whose states only the block after next reads the
    first; 0: none.
    """
    VT: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % VT
    s = (tl.program_id(0) // VT % S).to(tl.int64)
    n = (tl.program_id(0) // VT // S).to(tl.int64)
    b = n * 0 if PACKED else n
    first, length, chunk = span_of_sequence(offsets, chunk_offsets, n, T, PACKED)
    at = tl.cast(first, tl.int64)
    chunks = tl.cdiv(length, C)
    channel = tl.arange(0, BF)
    column = tile * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    cell = channel[:, None] * V + column[None, :]
    in_state = (channel < F)[:, None] & (column < V)[None, :]

    k += b * skb + s * sks + at * skt
    v += b * svb + s // GV * svh + at * svt
    beta += b * sbb + s * sbs + at * sbt
    system += ((b * S + s) * NC + chunk) * C * C
    if OUT:
        q += b * sqb + s * R * sqh + at * sqt
        o += b * sob + s * R * soh + at * sot
        if LAG == 0:
            scores += ((b * S + s) * R * NC + chunk) * C * C
    if GATED:
        g_cum += (b * S + s) * T + at
    if UNIT:
        r_k += (b * S + s) * T + at
        if OUT:
            r_q += (b * S + s) * R * T + at
    if KEEP:
        update += ((b * S + s) * T + at) * V
        d_right += ((b * S + s) * T + at) * V
        if d_rest is not None:
            d_rest += ((b * S + s) * T + at) * V
        d_beta += ((b * S + s) * VT + tile) * T + at
        states += ((b * S + s) * NC + chunk) * F * V

    state = tl.zeros([BF, BV], tl.float32)
    if HAS_FIRST:
        state = tl.load(first_state + (n * S + s) * F * V + cell, mask=in_state, other=0.0)
    stop = chunks
    if HAS_LAST:
        last_state += (n * S + s) * F * V
        if stops is not None:
            stop = tl.load(stops + n)
    for c in range(0, chunks):
        left = length - c * C
        k_rows = load_rows(k, skt, i, left, channel, F, BF)
        v_rows = load_rows(v, svt, i, left, column, V, BV)
        solve = tl.load(system + i[:, None] * C + i[None, :])
        strength = tl.load(beta + i * sbt, mask=i < left, other=0.0).to(tl.float32)
        g, g_last, read, write = row_factors(g_cum, r_k, i, left, C, GATED, UNIT)

        if HAS_LAST and stops is not None:  # noqa: SIM102
            if c == stop:
                tl.store(last_state + cell, state, mask=in_state)
        rounded = state.to(k_rows.dtype)
        if KEEP:
            tl.store(states + cell, rounded, mask=in_state)
            states += F * V
        x = v_rows - tl.dot(k_rows, rounded, input_precision=PREC) * read[:, None]
        # e, which beta makes the update of; its own weight goes into what is made of it.
        u = tl.dot(solve, (x * strength[:, None]).to(solve.dtype), x, input_precision=PREC)
        u_rows = (u * strength[:, None]).to(k_rows.dtype)
        if KEEP:
            right = load_rows(d_right, V, i, left, column, V, BV)
            if d_rest is not None:
                right = right.to(tl.float32) + load_rows(d_rest, V, i, left, column, V, BV)
                d_rest += C * V
            tl.store(d_beta + i, tl.sum(u * right, 1), mask=i < left)
            d_right += C * V
            d_beta += C
            store_rows(update, V, i, left, column, V, BV, u_rows)
            update += C * V
        write *= strength
        # Before the outputs: they need neither the new state nor u in float32, so that fewer registers are held.
        if GATED:
            state *= tl.exp2(g_last)
        state = tl.dot(tl.trans(k_rows), (u * write[:, None]).to(k_rows.dtype), state, input_precision=PREC)
        if OUT:
            if LAG == 0:
                for r in tl.static_range(R):
                    q_rows = load_rows(q + r * sqh, sqt, i, left, channel, F, BF)
                    own = tl.load(scores + r * NC * C * C + i[:, None] * C + i[None, :])
                    out = tl.dot(q_rows, rounded, input_precision=PREC)
                    if GATED:
                        out *= tl.exp2(g)[:, None]
                    if UNIT:
                        out *= tl.load(r_q + (r * T + i), mask=i < left, other=0.0)[:, None]
                    out = tl.dot(own, u_rows, out, input_precision=PREC)
                    store_rows(o + r * soh, sot, i, left, column, V, BV, out)
            elif c % LAG == 0:
                _read_later(
                    q, o, rounded, g_cum, r_q, sqh, sqt, soh, sot, T, c, chunks, i, left, channel, column, R,
                    F, V, BF, BV, C, LAG, GATED, UNIT, PREC,
                )  # fmt: skip
            q += C * sqt
            o += C * sot
            if LAG == 0:
                scores += C * C
        k += C * skt
        v += C * svt
        beta += C * sbt
        system += C * C
        if GATED:
            g_cum += C
        if UNIT:
            r_k += C
            if OUT:
                r_q += C
    if HAS_LAST:  # noqa: SIM102
        if stop >= chunks:
            tl.store(last_state + cell, state, mask=in_state)


def gate_cases(arch: int = 80) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations for a card, in bfloat16, for the compile gate; those for 80 fit every card."""
    signature = {
        **dict.fromkeys(("q", "k", "v", "system", "scores", "d_right", "d_rest", "o", "states", "update"), "*bf16"),
        **dict.fromkeys(("beta", "g_cum", "first_state", "d_beta", "last_state"), "*fp32"),
        **{f"s{x}": "i32:16" for x in ("qb", "qh", "qt", "kb", "ks", "kt", "vb", "vh", "vt", "ob", "oh", "ot")},
        **{f"sb{x}": "i32" for x in "bst"}, "T": "i32", "S": "i32", "NC": "i32",
    }  # fmt: skip
    shape = {"R": 1, "GV": 4, "F": 128, "V": 128, "BF": 128, "C": 64, "LAG": 0, "GATED": True, "UNIT": False,
             "PACKED": False, "PREC": "tf32", "r_q": None, "r_k": None, "offsets": None, "chunk_offsets": None,
             "stops": None, "HAS_FIRST": False}  # fmt: skip
    cases = []
    for label, readers, absent in (
        ("outputs", 1, ("states", "update", "d_right", "d_rest", "d_beta")),
        ("outputs, four query heads a state", 4, ("states", "update", "d_right", "d_rest", "d_beta")),
        ("states", 1, ("last_state", "o", "q", "scores", "d_rest")),
    ):
        out = label.startswith("outputs")
        known = gated_delta_scan(arch, 128, 128, torch.bfloat16, programs=512, out=out, readers=readers)
        options = {name: known.pop(name) for name in ("num_warps", "num_stages")}
        own = shape | dict.fromkeys(absent) | known | {"R": readers, "OUT": out, "KEEP": not out, "HAS_LAST": out}
        cases.append((scan_kernel, signature, own, options, label))
    return cases
