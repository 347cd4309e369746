"""Gradients of queries: what they get through the window, plus what their map's gradient brings.

    P_ij = a_i exp(s_ij - l_i)      ds_ij = P_ij (do_i.v_j - e_i) - [j is the largest score of i] r_i

e_i is do_i.o_i under the row's denominator; r_i only under a shared one (window_linear_maps_triton.py). Where scores
are bounded (softcap_triton.py), this is the gradient of bounded ones, and s gets it times the slope.
"""

import torch
import triton
import triton.language as tl

from . import window_linear_tuning as tuning
from .softcap_triton import GEMMA, bounded
from .window_linear_tiles import (
    LN2,
    MASS,
    NO_MAP,
    PRECOMPUTED,
    SHARED,
    WIDE,
    find_block,
    gate_case,
    load_columns,
    load_rows,
    store_columns,
    through_map,
    window_share,
)


@triton.jit
def highest(s, first: tl.constexpr, top, pick):
    """top and pick [C], the largest of a row's scores and its place, after the scores s that begin at place `first`."""
    places = first + tl.arange(0, s.shape[1])
    found = tl.max(s, 1)
    place = tl.min(tl.where(s == found[:, None], places[None, :], 1 << 20), 1)
    return tl.maximum(top, found), tl.where(found > top, place, pick)


@triton.jit
def bounded_pairs(s, got, seen, base, BOUND: tl.constexpr):
    """Of one tile of scores s without the bound, and do.v: P slope and P slope (do.v); of rows, sums of P and P (do.v).

    Slopes are multiplied in before the rows' sums are known, for registers to keep them in are few.
    """
    s, slope = bounded(s, BOUND)
    p = tl.where(seen, tl.exp2(s - base[:, None]), 0.0)
    weight = tl.sum(p, 1)
    gain = tl.sum(p * got, 1)
    p *= slope
    return p, p * got, weight, gain


@triton.jit(do_not_specialize=["T", "BLOCKS", "sinks"])
def query_pairs_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dy_ptr, q_weight_ptr, near_ptr, sink_k_ptr, sink_v_ptr,
    peak_ptr, d_peak_ptr, row_ptr, shift_ptr, pick_ptr, far_ptr, level_ptr, dq_ptr, table_ptr,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt, s_nb, s_nh, s_nt, s_gb, s_gt,
    s_ksb, s_ksh, s_kst, s_vsb, s_vsh, s_vst,
    T, BLOCKS, HEADS, scale, window_weight, sinks,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, WINDOW: tl.constexpr, MIX: tl.constexpr,
    KEYS: tl.constexpr, BZ: tl.constexpr, TEAM: tl.constexpr, BOUND: tl.constexpr, EVEN: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries of TEAM heads that share keys, BN channels of dq [B, T, H, D].

    Writes level = l - log2 a, and: pick, the place of each row's largest score, from the block before on, and r to far
    (shared); or shift = e and far, the gradient of gate or mass, from row, which is do.o of the linear branch (split).
    d_peak: gradient of the log-sum-exp (window alone). BOUND: as in read_kernel. EVEN: every sequence has
    whole blocks.
    """
    SLICES: tl.constexpr = (D + BN - 1) // BN
    ONE: tl.constexpr = MAP != NO_MAP and MIX == SHARED
    index = tl.program_id(0)
    first_n = (index % SLICES) * BN
    index = index // SLICES
    team = index % (HEADS // TEAM)
    block = (index // (HEADS // TEAM)).to(tl.int64)
    row, low, high, number, sequence = find_block(block, table_ptr, T, BLOCKS, TABLE)
    if row < 0:
        return
    token = tl.arange(0, C)
    start = low + number * C
    if EVEN:
        live = tl.zeros([C], tl.int32) + start < high
        before = tl.zeros([C], tl.int32) + start > low
    else:
        live = start + token < high
        before = start - C + token >= low
    below = token[:, None] >= token[None, :]
    first_t = start.to(tl.int64)
    if WINDOW:
        key_head = (team * TEAM // KEYS).to(tl.int64)
        k_base = k_ptr + row * s_kb + key_head * s_kh + first_t * s_kt
        v_base = v_ptr + row * s_vb + key_head * s_vh + first_t * s_vt
        k = load_rows(k_base, live, s_kt, D, BD, C)
        k_last = load_rows(k_base - C * s_kt, before, s_kt, D, BD, C)
        v = load_rows(v_base, live, s_vt, D, BD, C)
        v_last = load_rows(v_base - C * s_vt, before, s_vt, D, BD, C)
        k_part = k
        k_last_part = k_last
        if BN != BD:
            k_part = load_columns(k_base, live, s_kt, first_n, D, BN, C)
            k_last_part = load_columns(k_base - C * s_kt, before, s_kt, first_n, D, BN, C)
        if BZ > 0:
            k_first = sink_k_ptr + sequence * s_ksb + key_head * s_ksh
            kept = tl.arange(0, BZ) < tl.where(number >= 2, sinks, 0)
            k_sink = load_rows(k_first, kept, s_kst, D, BD, BZ)
            v_sink = load_rows(sink_v_ptr + sequence * s_vsb + key_head * s_vsh, kept, s_vst, D, BD, BZ)
            k_sink_part = k_sink
            if BN != BD:
                k_sink_part = load_columns(k_first, kept, s_kst, first_n, D, BN, BZ)

    for member in tl.range(0, TEAM, num_stages=1, disable_licm=True):  # else all addresses are kept in registers
        head = team * TEAM + member
        wide = head.to(tl.int64)
        at_row = (row * HEADS + wide) * T + start + token
        dq = tl.zeros([C, BN], tl.float32)

        if WINDOW:
            q = load_rows(q_ptr + row * s_qb + wide * s_qh + first_t * s_qt, live, s_qt, D, BD, C)
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
            own = tl.where(below, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            old = tl.where(before[None, :], tl.dot(q, tl.trans(k_last), input_precision="ieee") * scale, float("-inf"))
            if BZ > 0:
                far = tl.dot(q, tl.trans(k_sink), input_precision="ieee") * scale
                far = tl.where(kept[None, :], far, float("-inf"))
            if ONE:
                top = tl.zeros([C], tl.float32) - float("inf")
                pick = tl.zeros([C], tl.int32)
                top, pick = highest(own, C, top, pick)
                top, pick = highest(old, 0, top, pick)
                if BZ > 0:
                    top, pick = highest(far, 2 * C, top, pick)

            do = load_rows(do_ptr + row * s_db + wide * s_dh + first_t * s_dt, live, s_dt, D, BD, C)
            got_own = tl.dot(do, tl.trans(v), input_precision="ieee")
            got_old = tl.dot(do, tl.trans(v_last), input_precision="ieee")
            base = level if ONE else peak
            if ONE and BOUND > 0.0:
                shift = tl.load(shift_ptr + at_row, mask=live, other=0.0)
                got_own -= shift[:, None]
                got_old -= shift[:, None]
            if BOUND > 0.0:
                own, got_own, weight, gain = bounded_pairs(own, got_own, below, base, BOUND)
                old, got_old, more, gained = bounded_pairs(old, got_old, before[None, :], base, BOUND)
                weight += more
                gain += gained
            else:
                own = tl.exp2(own - base[:, None])
                old = tl.exp2(old - base[:, None])
            if BZ > 0:
                got_far = tl.dot(do, tl.trans(v_sink), input_precision="ieee")
                if BOUND > 0.0:
                    if ONE:
                        got_far -= shift[:, None]
                    far, got_far, more, gained = bounded_pairs(far, got_far, kept[None, :], base, BOUND)
                    weight += more
                    gain += gained
                else:
                    far = tl.exp2(far - base[:, None])
            if ONE:
                shift = tl.load(shift_ptr + at_row, mask=live, other=0.0)
            else:
                if BOUND > 0.0:
                    shift = gain
                else:
                    shift = tl.sum(own * got_own, 1) + tl.sum(old * got_old, 1)
                    if BZ > 0:
                        shift += tl.sum(far * got_far, 1)
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

            if BOUND > 0.0 and ONE:
                own, old = got_own, got_old
                if BZ > 0:
                    far = got_far
            elif BOUND > 0.0:
                own = got_own - own * shift[:, None]
                old = got_old - old * shift[:, None]
                if BZ > 0:
                    far = got_far - far * shift[:, None]
                if MAP != NO_MAP:
                    own *= share[:, None]
                    old *= share[:, None]
                    if BZ > 0:
                        far *= share[:, None]
            else:
                if ONE:
                    weight = tl.sum(own, 1) + tl.sum(old, 1)
                elif MAP != NO_MAP:
                    own *= share[:, None]
                    old *= share[:, None]
                own *= got_own - shift[:, None]
                old *= got_old - shift[:, None]
                if BZ > 0:
                    if MAP != NO_MAP and MIX != SHARED:
                        far *= share[:, None]
                    if ONE:
                        weight += tl.sum(far, 1)
                    far *= got_far - shift[:, None]
            if ONE:
                # r is also the sum of ds; each way loses digits where its own branch has nearly all of the weight.
                if BOUND > 0.0:
                    direct = gain
                else:
                    direct = tl.sum(own, 1) + tl.sum(old, 1)
                    if BZ > 0:
                        direct += tl.sum(far, 1)
                r = tl.load(row_ptr + at_row, mask=live, other=0.0)
                r = tl.where(weight < 0.5, direct, r)
                if first_n == 0:
                    tl.store(far_ptr + at_row, r, mask=live)
                    tl.store(pick_ptr + at_row, pick, mask=live)
                if BOUND > 0.0:
                    _top, slope = bounded(top, BOUND)
                    r *= slope
                own -= tl.where(pick[:, None] == C + token[None, :], r[:, None], 0.0)
                old -= tl.where(pick[:, None] == token[None, :], r[:, None], 0.0)
                if BZ > 0:
                    far -= tl.where(pick[:, None] == 2 * C + tl.arange(0, BZ)[None, :], r[:, None], 0.0)
            dq = tl.dot(own.to(k.dtype), k_part, dq, input_precision="ieee")
            dq = tl.dot(old.to(k.dtype), k_last_part, dq, input_precision="ieee")
            if BZ > 0:
                dq = tl.dot(far.to(k_sink.dtype), k_sink_part, dq, input_precision="ieee")
            dq = dq * (scale * LN2)

        if MAP != NO_MAP and MAP != PRECOMPUTED:
            dy_base = dy_ptr + ((row * HEADS + wide) * T + first_t) * F
            dq = through_map(dq, dy_base, q_weight_ptr, wide, live, first_n, D, BN, F, BF, C, MAP)
        store_columns(dq_ptr + row * s_gb + first_t * s_gt + wide * D, dq, live, s_gt, first_n, D, BN, C)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_queries(arch, 128, 64, 64, torch.bfloat16)
    team = tuning.window_linear_team(arch, 4096, 4, torch.bfloat16)
    sinks = ("sink_k_ptr", "sink_v_ptr", "d_peak_ptr")
    held = tuning.window_linear_queries(arch, 128, 64, 64, torch.bfloat16, bounded=True)
    large = tuning.window_linear_queries(arch, 256, 64, 64, torch.bfloat16, bounded=True)
    gemma = {"EVEN": False, "KEYS": 2, "TEAM": 1, "BOUND": GEMMA}
    return [
        gate_case(query_pairs_kernel, rows, "shared mix", absent=sinks, EVEN=False, TEAM=team),
        gate_case(query_pairs_kernel, rows, "mix by mass", absent=sinks, MIX=3, TEAM=team),
        gate_case(query_pairs_kernel, rows, "window alone", absent=sinks[:2], MAP=5, MIX=1, TEAM=team),
        gate_case(query_pairs_kernel, held, "bounded, shared mix", absent=sinks, **gemma),
        gate_case(query_pairs_kernel, held, "bounded, window alone", absent=sinks[:2], MAP=5, MIX=1, **gemma),
        gate_case(query_pairs_kernel, large, "bounded, head of 256", absent=sinks, **gemma, **WIDE),
    ]
