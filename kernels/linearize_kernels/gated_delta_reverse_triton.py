"""The gradient of the gated delta rule's state, chunk after chunk from the end, and of what it writes.

With dS the gradient of the state after a chunk and do of its outputs (notation of gated_delta_scan_triton.py):

    du = P^T do + e^{G_last - G} k dS       dr = du + N^T (beta du)       dv = dx = beta dr
    dS <- e^{G_last} dS + (e^G q)^T do - (e^G k)^T dx

dr is the gradient of u through all that follows it in the chunk. The mirror image of the forward scan.

Under a lag nothing but the state carries gradients to a chunk, so that its rounding would be most of the error: the
gradient of the state is read in two parts, and dr is stored in two.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .gated_delta_tiles import load_rows, row_factors, span_of_sequence, store_rows
from .tuning import gated_delta_reverse


@triton.jit
def _later_readers(q, d_out, d_state, g_cum, r_q, sqh, sqt, sdh, sdt, T, n, chunks, i, left, channel, column,
                   R: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
                   C: tl.constexpr, LAG: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr,
                   PREC: tl.constexpr):  # fmt: skip
    """Add what the readers of the state before chunk n, which begins a block, say of it; see `_read_later`."""
    gone = 0.0
    for m in range(0, tl.minimum(2 * LAG, chunks - n)):
        rest = left - m * C
        at = tl.cast(m, tl.int64) * C
        if (n > 0) & (m < LAG):
            rest = 0  # these tokens see a state before this one
        weight = tl.full([C], 1.0, tl.float32)
        if GATED:
            weight = tl.exp2(gone + tl.load(g_cum + at + i, mask=i < rest, other=0.0))
        for r in tl.static_range(R):
            row = weight
            if UNIT:
                row = weight * tl.load(r_q + r * T + at + i, mask=i < rest, other=0.0)
            q_rows = load_rows(q + r * sqh + at * sqt, sqt, i, rest, channel, F, BF)
            d_rows = load_rows(d_out + r * sdh + at * sdt, sdt, i, rest, column, V, BV)
            weighted = (d_rows * row[:, None]).to(q_rows.dtype)
            d_state = tl.dot(tl.trans(q_rows), weighted, d_state, input_precision=PREC)
        if GATED:
            gone += tl.load(g_cum + at + tl.minimum(left - m * C, C) - 1)
    return d_state


@triton.jit(do_not_specialize=["T", "NC"])
def reverse_kernel(
    q, k, beta, system, scores, g_cum, r_q, r_k, d_out, d_last, d_states, d_right, d_rest, d_v, d_first, offsets,
    chunk_offsets, stops, sqb, sqh, sqt, skb, sks, skt, sbb, sbs, sbt, sdb, sdh, sdt, szb, szs, szt, T, S, NC,
    R: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LAG: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (sequences times state heads times tiles of V).

    q [B, S R, T, F]; k [B, S, T, F]; beta, g_cum, r_k [B, S, T]; r_q [B, S R, T]; system [B, S, NC, C, C]; scores
    [B, S R, NC, C, C]; d_out [B, S R, T, V]; d_last, the gradient of last_state, and d_first [N, S, F, V] float32;
    d_states [B, S, NC, F, V], each after its chunk; d_right dr, d_rest what its rounding took away, or None
    [B, S, T, V]; d_v [B, S, T, V] strided as z.
    """
    VT: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % VT
    s = (tl.program_id(0) // VT % S).to(tl.int64)
    n = (tl.program_id(0) // VT // S).to(tl.int64)
    b = n * 0 if PACKED else n
    first, length, chunk = span_of_sequence(offsets, chunk_offsets, n, T, PACKED)
    chunks = tl.cdiv(length, C)
    at = tl.cast(first, tl.int64) + tl.cast(chunks, tl.int64) * C  # one past the last chunk: the loop steps back first
    slot = (b * S + s) * NC + chunk + chunks
    channel = tl.arange(0, BF)
    column = tile * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    cell = channel[:, None] * V + column[None, :]
    in_state = (channel < F)[:, None] & (column < V)[None, :]

    q += b * sqb + s * R * sqh + at * sqt
    k += b * skb + s * sks + at * skt
    beta += b * sbb + s * sbs + at * sbt
    d_out += b * sdb + s * R * sdh + at * sdt
    d_v += b * szb + s * szs + at * szt
    system += slot * C * C
    d_states += slot * F * V
    d_right += ((b * S + s) * T + at) * V
    if d_rest is not None:
        d_rest += ((b * S + s) * T + at) * V
    if LAG == 0:
        scores += ((b * S + s) * R * NC + chunk + chunks) * C * C
    if GATED:
        g_cum += (b * S + s) * T + at
    if UNIT:
        r_q += (b * S + s) * R * T + at
        r_k += (b * S + s) * T + at

    d_state = tl.zeros([BF, BV], tl.float32)
    if HAS_LAST:
        d_last += (n * S + s) * F * V
        if stops is None:
            d_state = tl.load(d_last + cell, mask=in_state, other=0.0)
        else:
            stop = tl.load(stops + n)
            d_state = tl.load(d_last + cell, mask=in_state & (stop + 0 * channel >= chunks)[:, None], other=0.0)
    for back in range(0, chunks):
        c = chunks - 1 - back
        left = length - c * C
        q -= C * sqt
        k -= C * skt
        beta -= C * sbt
        d_out -= C * sdt
        d_v -= C * szt
        system -= C * C
        d_states -= F * V
        d_right -= C * V
        if d_rest is not None:
            d_rest -= C * V
        if LAG == 0:
            scores -= C * C
        if GATED:
            g_cum -= C
        if UNIT:
            r_q -= C
            r_k -= C
        k_rows = load_rows(k, skt, i, left, channel, F, BF)
        solve = tl.load(system + i[:, None] * C + i[None, :])
        strength = tl.load(beta + i * sbt, mask=i < left, other=0.0).to(tl.float32)
        g, g_last, read, write = row_factors(g_cum, r_k, i, left, C, GATED, UNIT)

        rounded = d_state.to(k_rows.dtype)
        tl.store(d_states + cell, rounded, mask=in_state)
        d_update = tl.dot(k_rows, rounded, input_precision=PREC)
        if d_rest is not None:
            rest = (d_state - rounded.to(tl.float32)).to(k_rows.dtype)
            d_update = tl.dot(k_rows, rest, d_update, input_precision=PREC)
        d_update *= write[:, None]
        if GATED:
            d_state *= tl.exp2(g_last)
        if LAG == 0:
            for r in tl.static_range(R):
                q_rows = load_rows(q + r * sqh, sqt, i, left, channel, F, BF)
                d_rows = load_rows(d_out + r * sdh, sdt, i, left, column, V, BV)
                own = tl.load(scores + r * NC * C * C + i[:, None] * C + i[None, :])
                d_update = tl.dot(tl.trans(own), d_rows, d_update, input_precision=PREC)
                if GATED:
                    d_rows = (d_rows * tl.exp2(g)[:, None]).to(d_rows.dtype)
                if UNIT:
                    d_rows = (d_rows * tl.load(r_q + r * T + i, mask=i < left, other=0.0)[:, None]).to(d_rows.dtype)
                d_state = tl.dot(tl.trans(q_rows), d_rows, d_state, input_precision=PREC)
        weighted = (d_update * strength[:, None]).to(solve.dtype)
        right = tl.dot(tl.trans(solve), weighted, d_update, input_precision=PREC)
        store_rows(d_right, V, i, left, column, V, BV, right)
        if d_rest is not None:
            store_rows(d_rest, V, i, left, column, V, BV, right - right.to(k_rows.dtype).to(tl.float32))
        d_x = right * strength[:, None]
        store_rows(d_v, szt, i, left, column, V, BV, d_x)
        d_state = tl.dot(tl.trans(k_rows), (d_x * -read[:, None]).to(k_rows.dtype), d_state, input_precision=PREC)
        if LAG > 0:  # noqa: SIM102 - the inner condition is known at run time only
            if c % LAG == 0:
                d_state = _later_readers(
                    q, d_out, d_state, g_cum, r_q, sqh, sqt, sdh, sdt, T, c, chunks, i, left, channel, column, R, F, V,
                    BF, BV, C, LAG, GATED, UNIT, PREC,
                )  # fmt: skip
        if HAS_LAST and stops is not None:
            d_state += tl.load(d_last + cell, mask=in_state & (stop + 0 * channel == c)[:, None], other=0.0)
    if HAS_FIRST:
        tl.store(d_first + (n * S + s) * F * V + cell, d_state, mask=in_state)


def gate_cases(arch: int = 80) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations for a card, in bfloat16, for the compile gate; those for 80 fit every card."""
    signature = {
        **dict.fromkeys(("q", "k", "system", "scores", "d_out", "d_states", "d_right", "d_rest", "d_v"), "*bf16"),
        **dict.fromkeys(("beta", "g_cum", "d_last", "d_first"), "*fp32"),
        **{f"s{x}": "i32:16" for x in ("qb", "qh", "qt", "kb", "ks", "kt", "db", "dh", "dt", "zb", "zs", "zt")},
        **{f"sb{x}": "i32" for x in "bst"}, "T": "i32", "S": "i32", "NC": "i32",
    }  # fmt: skip
    constants = dict.fromkeys(("r_q", "r_k", "d_last", "d_rest", "d_first", "offsets", "chunk_offsets", "stops")) | {
        "R": 1, "F": 128, "V": 128, "BF": 128, "C": 64, "LAG": 0, "GATED": True, "UNIT": False,
        "HAS_FIRST": False, "HAS_LAST": False, "PACKED": False, "PREC": "tf32",
    }  # fmt: skip
    known = gated_delta_reverse(arch, 128, 128, torch.bfloat16, programs=512)
    options = {name: known.pop(name) for name in ("num_warps", "num_stages")}
    return [(reverse_kernel, signature, constants | known, options, "F=128 C=64")]
