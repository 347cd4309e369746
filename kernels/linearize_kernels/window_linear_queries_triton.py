"""Gradients of queries: what they get through the window, plus what their map's gradient brings.

    P_ij = a_i exp(s_ij - l_i)      ds_ij = P_ij (do_i.v_j - e_i) - [j is the largest score of i] r_i

e_i is do_i.o_i under the row's denominator; r_i only under a shared one (window_linear_maps_triton.py).
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .window_linear_tiles import (
    LN2,
    MASS,
    NO_MAP,
    PRECOMPUTED,
    SHARED,
    find_block,
    gate_case,
    load_columns,
    load_rows,
    store_columns,
    through_map,
    window_share,
)


@triton.jit
def scores_of(q, base, live, stride, seen, scale, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """Scores against C keys, in base 2; -inf where not seen."""
    k = load_rows(base, live, stride, D, BD, C)
    return tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def values_of(do, base, live, stride, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """do.v of C values."""
    v = load_rows(base, live, stride, D, BD, C)
    return tl.dot(do, tl.trans(v), input_precision="ieee")


@triton.jit(do_not_specialize=["T", "BLOCKS", "sinks"])
def query_pairs_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dy_ptr, q_weight_ptr, near_ptr, sink_k_ptr, sink_v_ptr,
    peak_ptr, d_peak_ptr, row_ptr, shift_ptr, pick_ptr, far_ptr, level_ptr, dq_ptr, table_ptr,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt, s_nb, s_nh, s_nt, s_gb, s_gt,
    s_ksb, s_ksh, s_kst, s_vsb, s_vsh, s_vst,
    T, BLOCKS, HEADS, scale, window_weight, sinks,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, WINDOW: tl.constexpr, MIX: tl.constexpr,
    KEYS: tl.constexpr, BZ: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries of one head, BN channels of dq [B, T, H, D].

    Writes level = l - log2 a, and: pick, the place of each row's largest score, from the block before on, and r to far
    (shared); or shift = e and far, the gradient of gate or mass, from row, which is do.o of the linear branch (split).
    d_peak: gradient of the log-sum-exp (window alone).
    """
    SLICES: tl.constexpr = (D + BN - 1) // BN
    index = tl.program_id(0)
    first_n = (index % SLICES) * BN
    index = index // SLICES
    head = index % HEADS
    block = (index // HEADS).to(tl.int64)
    row, low, high, number, sequence = find_block(block, table_ptr, T, BLOCKS, TABLE)
    if row < 0:
        return
    token = tl.arange(0, C)
    start = low + number * C
    live = start + token < high
    wide = head.to(tl.int64)
    first_t = start.to(tl.int64)
    at_row = (row * HEADS + wide) * T + start + token
    dq = tl.zeros([C, BN], tl.float32)

    if WINDOW:
        key_head = (head // KEYS).to(tl.int64)
        k_base = k_ptr + row * s_kb + key_head * s_kh + first_t * s_kt
        v_base = v_ptr + row * s_vb + key_head * s_vh + first_t * s_vt
        k_old = k_base - C * s_kt
        v_old = v_base - C * s_vt
        if BZ > 0:
            k_first = sink_k_ptr + sequence * s_ksb + key_head * s_ksh
            v_first = sink_v_ptr + sequence * s_vsb + key_head * s_vsh
            kept = tl.arange(0, BZ) < tl.where(number >= 2, sinks, 0)
        before = start - C + token >= low
        below = token[:, None] >= token[None, :]
        q = load_rows(q_ptr + row * s_qb + wide * s_qh + first_t * s_qt, live, s_qt, D, BD, C)
        do = load_rows(do_ptr + row * s_db + wide * s_dh + first_t * s_dt, live, s_dt, D, BD, C)
        peak = tl.load(peak_ptr + at_row, mask=live, other=0.0)
        if MAP == NO_MAP:
            share = tl.zeros([C], tl.float32) + 1.0
        else:
            near_at = head
            if MIX != SHARED:
                near_at = row * s_nb + wide * s_nh + (start + token) * s_nt
            share = window_share(peak, near_ptr, near_at, live, window_weight, MIX)
        level = peak - tl.log2(share)
        if first_n == 0:
            tl.store(level_ptr + at_row, level, mask=live)

        if MAP != NO_MAP and MIX == SHARED:
            shift = tl.load(shift_ptr + at_row, mask=live, other=0.0)
        else:
            # e is a sum over the row, so the row is read twice.
            p = tl.exp2(scores_of(q, k_base, live, s_kt, below, scale, D, BD, C) - peak[:, None])
            shift = tl.sum(p * values_of(do, v_base, live, s_vt, D, BD, C), 1)
            p = tl.exp2(scores_of(q, k_old, before, s_kt, before[None, :], scale, D, BD, C) - peak[:, None])
            shift += tl.sum(p * values_of(do, v_old, before, s_vt, D, BD, C), 1)
            if BZ > 0:
                p = tl.exp2(scores_of(q, k_first, kept, s_kst, kept[None, :], scale, D, BD, BZ) - peak[:, None])
                shift += tl.sum(p * values_of(do, v_first, kept, s_vst, D, BD, BZ), 1)
            if MAP != NO_MAP:
                got = shift - tl.load(row_ptr + at_row, mask=live, other=0.0)
                if MIX == MASS:
                    shift -= (1.0 - share) * got
                    got = -share * (1.0 - share) * got
                if far_ptr is not None:  # noqa: SIM102 - the first is known when it is compiled
                    if first_n == 0:
                        tl.store(far_ptr + at_row, got, mask=live)
            elif d_peak_ptr is not None:
                shift -= tl.load(d_peak_ptr + at_row, mask=live, other=0.0)
            if first_n == 0:
                tl.store(shift_ptr + at_row, shift, mask=live)

        s = scores_of(q, k_base, live, s_kt, below, scale, D, BD, C)
        if MAP != NO_MAP and MIX == SHARED:
            top = tl.max(s, 1)
            pick = tl.argmax(s, 1) + C
        p = tl.exp2(s - level[:, None])
        ds = p * (values_of(do, v_base, live, s_vt, D, BD, C) - shift[:, None])
        if MAP != NO_MAP and MIX == SHARED:
            weight = tl.sum(p, 1)
            direct = tl.sum(ds, 1)
        k = load_columns(k_base, live, s_kt, first_n, D, BN, C)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        s = scores_of(q, k_old, before, s_kt, before[None, :], scale, D, BD, C)
        if MAP != NO_MAP and MIX == SHARED:
            pick = tl.where(tl.max(s, 1) > top, tl.argmax(s, 1), pick)
            top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - level[:, None])
        ds = p * (values_of(do, v_old, before, s_vt, D, BD, C) - shift[:, None])
        if MAP != NO_MAP and MIX == SHARED:
            weight += tl.sum(p, 1)
            direct += tl.sum(ds, 1)
        k = load_columns(k_old, before, s_kt, first_n, D, BN, C)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if BZ > 0:
            s = scores_of(q, k_first, kept, s_kst, kept[None, :], scale, D, BD, BZ)
            if MAP != NO_MAP and MIX == SHARED:
                pick = tl.where(tl.max(s, 1) > top, tl.argmax(s, 1) + 2 * C, pick)
            p = tl.exp2(s - level[:, None])
            ds = p * (values_of(do, v_first, kept, s_vst, D, BD, BZ) - shift[:, None])
            if MAP != NO_MAP and MIX == SHARED:
                weight += tl.sum(p, 1)
                direct += tl.sum(ds, 1)
            k = load_columns(k_first, kept, s_kst, first_n, D, BN, BZ)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if MAP != NO_MAP and MIX == SHARED:
            # r is also the sum of ds; each way loses digits where its own branch has nearly all of the weight.
            r = tl.load(row_ptr + at_row, mask=live, other=0.0)
            r = tl.where(weight < 0.5, direct, r)
            if first_n == 0:
                tl.store(far_ptr + at_row, r, mask=live)
                tl.store(pick_ptr + at_row, pick, mask=live)
            column = first_n + tl.arange(0, BN)
            near = live & (pick < 2 * C)
            at = k_base + (pick - C)[:, None] * s_kt + column[None, :]
            dq -= r[:, None] * tl.load(at, mask=near[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
            if BZ > 0:
                near = live & (pick >= 2 * C)
                at = k_first + (pick - 2 * C)[:, None] * s_kst + column[None, :]
                dq -= r[:, None] * tl.load(at, mask=near[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
        dq = dq * (scale * LN2)

    if MAP != NO_MAP and MAP != PRECOMPUTED:
        dy_base = dy_ptr + ((row * HEADS + wide) * T + first_t) * F
        dq = through_map(dq, dy_base, q_weight_ptr, wide, live, first_n, D, BN, F, BF, C, MAP)
    store_columns(dq_ptr + row * s_gb + first_t * s_gt + wide * D, dq, live, s_gt, first_n, D, BN, C)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_queries(arch, 128, 64, 64, torch.bfloat16)
    sinks = ("sink_k_ptr", "sink_v_ptr", "d_peak_ptr")
    return [
        gate_case(query_pairs_kernel, rows, "shared mix", absent=sinks),
        gate_case(query_pairs_kernel, rows, "mix by mass", absent=sinks, MIX=3),
        gate_case(query_pairs_kernel, rows, "window alone", absent=sinks[:2], MAP=5, MIX=1),
    ]
