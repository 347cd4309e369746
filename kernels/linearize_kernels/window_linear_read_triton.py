"""Outputs of window + linear attention: every block of queries reads its window and the state, in parallel.

    o_i = a_i sum_j exp(s_ij - l_i) v_j + d_i phi(q_i) S_i       l_i: log of the window's sum, or of the whole row's

With a shared denominator (LoLCATs, arXiv 2410.10254, eq. 7) a is gamma, d is 1/Z and l is the largest score plus
log Z; with two normalised branches a is the window's share, d is (1 - share) over the branch's own sum. The two sums
share one accumulator, for both factors are known before the values are read.
"""

import torch
import triton
import triton.language as tl

from . import window_linear_tuning as tuning
from .softcap_triton import GEMMA, bounded
from .window_linear_tiles import (
    NO_MAP,
    PRECOMPUTED,
    SHARED,
    SOFTMAX,
    TINY,
    WIDE,
    ask_for,
    ask_for_rows,
    features,
    find_block,
    gate_case,
    load_mass,
    load_matrix,
    load_rows,
    load_state,
    project,
    project_across,
    window_share,
)


@triton.jit
def add_begun(
    acc, phi, phi_2, states_ptr, before_at, first_v, D: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """acc [C, BV] and what the rows read of the state that their segment began with."""
    state = load_state(states_ptr, before_at, before_at, first_v, D, BV, BF, False)
    acc = tl.dot(phi, tl.trans(state), acc, input_precision="ieee")
    if PARTS == 2:
        state_2 = load_state(states_ptr, before_at + 1, before_at, first_v, D, BV, BF, False)
        acc = tl.dot(phi_2, tl.trans(state_2), acc, input_precision="ieee")
    return acc


@triton.jit
def pairs_of(
    phi, phi_2, xk_base, weight_ptr, bias_ptr, head, live, stride, DTYPE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """phi(q_i).phi(k_j) of the block's own keys, up to each query: [C, C]."""
    token = tl.arange(0, C)
    if MAP == PRECOMPUTED:
        other = tl.trans(load_rows(xk_base, live, stride, min(F, BF), BF, C))
        weights = tl.dot(phi.to(other.dtype), other, input_precision="ieee")
        if PARTS == 2:
            other = tl.trans(load_rows(xk_base + BF, live, stride, F - BF, BF, C))
            weights = tl.dot(phi_2.to(other.dtype), other, weights, input_precision="ieee")
    else:
        xk = load_rows(xk_base, live, stride, D, BD, C)
        if MAP == SOFTMAX:
            y = project_across(xk, None, None, head, F, BF, MAP)
        else:
            weight = load_matrix(weight_ptr + head * D * F, F, D, BD, F, BF)
            y = project_across(xk, weight, bias_ptr, head, F, BF, MAP)
        weights = tl.dot(phi.to(DTYPE), features(y, MAP, F, BF, 0).to(DTYPE), input_precision="ieee")
        if PARTS == 2:
            other = features(-y, MAP, F, BF, 0).to(DTYPE)
            weights = tl.dot(phi_2.to(DTYPE), other, weights, input_precision="ieee")
    return tl.where(token[:, None] >= token[None, :], weights, 0.0)


@triton.jit(do_not_specialize=["T", "BLOCKS", "BASE", "SEGMENTS", "EACH", "sinks"])
def read_kernel(
    q_ptr, k_ptr, v_ptr, xq_ptr, xk_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    states_ptr, masses_ptr, near_ptr, sink_k_ptr, sink_v_ptr, out_ptr, peak_ptr, total_ptr, table_ptr,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_xqb, s_xqh, s_xqt, s_xkb, s_xkh, s_xkt, s_nb, s_nh, s_nt,
    s_ob, s_ot, s_ksb, s_ksh, s_kst, s_vsb, s_vsh, s_vst,
    T, BLOCKS, BASE, SEGMENTS, EACH, HEADS, scale, window_weight, sinks,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, LAG: tl.constexpr, WINDOW: tl.constexpr, MIX: tl.constexpr, OWN: tl.constexpr,
    KEYS: tl.constexpr, STATES: tl.constexpr, BZ: tl.constexpr, TEAM: tl.constexpr, BOUND: tl.constexpr,
    CUT: tl.constexpr, EVEN: tl.constexpr, TABLE: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries of TEAM heads that share keys, BV values.

    KEYS, STATES: query heads a key head, a state head. xq, xk: what features are made of (q and k themselves, or
    features). near: gamma [H], gates or masses. CUT: the scan was cut; row BASE + SEGMENTS sequence + number // EACH
    of states and masses is to be added (zero in the first segment). EVEN: every sequence has whole blocks. BOUND:
    c log2(e), the bound on scores, or 0.0. PREFETCH: ask for the next head's tiles while at work on one.
    """
    VALUES: tl.constexpr = (D + BV - 1) // BV
    # Under one denominator gamma is taken into the exponent, and rows are divided by their sum at the end.
    ONE: tl.constexpr = WINDOW and MIX == SHARED and MAP != NO_MAP
    LATE: tl.constexpr = ONE and BOUND == 0.0  # scores are scaled where the largest is subtracted
    index = tl.program_id(0)
    first_v = (index % VALUES) * BV
    index = index // VALUES
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
    value = first_v + tl.arange(0, BV)
    inside_v = (value < D)[None, :]
    key_head = (team * TEAM // KEYS).to(tl.int64)
    first_t = start.to(tl.int64)
    origin = (BASE + sequence * SEGMENTS + number // EACH).to(tl.int64)
    if PREFETCH and MAP != NO_MAP:
        nearest = block * (HEADS // STATES) + team * TEAM // STATES
        ask_for(states_ptr + nearest * PARTS * D * BF, PARTS * D * BF)
    if WINDOW:
        k_base = k_ptr + row * s_kb + key_head * s_kh + first_t * s_kt
        k = load_rows(k_base, live, s_kt, D, BD, C)
        k_old = load_rows(k_base - C * s_kt, before, s_kt, D, BD, C)
    if WINDOW or LAG == 1:
        v_base = v_ptr + row * s_vb + key_head * s_vh + first_t * s_vt + token[:, None] * s_vt + value[None, :]
        v = tl.load(v_base, mask=live[:, None] & inside_v, other=0.0)
    if WINDOW:
        v_old = tl.load(v_base - C * s_vt, mask=before[:, None] & inside_v, other=0.0)
    if BZ > 0:
        slot = tl.arange(0, BZ)
        kept = slot < tl.where(number >= 2, sinks, 0)
        k_sink = load_rows(sink_k_ptr + sequence * s_ksb + key_head * s_ksh, kept, s_kst, D, BD, BZ)
        at_sink = sink_v_ptr + sequence * s_vsb + key_head * s_vsh + slot[:, None] * s_vst + value[None, :]
        v_sink = tl.load(at_sink, mask=kept[:, None] & inside_v, other=0.0)

    for member in tl.range(0, TEAM, num_stages=1, disable_licm=True):  # else all addresses are kept in registers
        head = team * TEAM + member
        wide = head.to(tl.int64)
        if PREFETCH and MAP != NO_MAP:
            ahead = tl.minimum(wide + 1, (team + 1) * TEAM - 1)
            ask_for(states_ptr + (block * (HEADS // STATES) + ahead // STATES) * PARTS * D * BF, PARTS * D * BF)
            if WINDOW and not CUT:  # registers are too few for both, or what is asked for comes too early
                ask_for_rows(q_ptr + row * s_qb + ahead * s_qh + first_t * s_qt, live, s_qt, D, BD, C)
        far = tl.zeros([C], tl.float32)  # the linear branch's sum of weights
        if WINDOW:
            # In segments no head asks for the next one's queries.
            q = load_rows(q_ptr + row * s_qb + wide * s_qh + first_t * s_qt, live, s_qt, D, BD, C, CUT)
        if MAP != NO_MAP:
            state_head = wide // STATES
            at = (block * (HEADS // STATES) + state_head) * PARTS
            before_at = (origin * (HEADS // STATES) + state_head) * PARTS
            mass = load_mass(masses_ptr, at, before_at, BF, CUT)
            if PARTS == 2:
                mass_2 = load_mass(masses_ptr, at + 1, before_at + 1, BF, CUT)
            x_base = xq_ptr + row * s_xqb + wide * s_xqh + first_t * s_xqt
            if MAP == PRECOMPUTED:
                phi = load_rows(x_base, live, s_xqt, min(F, BF), BF, C).to(tl.float32)
                phi_2 = phi
                if PARTS == 2:
                    phi_2 = load_rows(x_base + BF, live, s_xqt, F - BF, BF, C).to(tl.float32)
            else:
                if WINDOW:
                    x = q
                else:
                    x = load_rows(x_base, live, s_xqt, D, BD, C)
                if MAP == SOFTMAX:
                    y = project(x, None, None, head, F, BF, MAP)
                else:
                    weight = load_matrix(q_weight_ptr + wide * D * F, F, D, BD, F, BF)
                    y = project(x, weight, q_bias_ptr, head, F, BF, MAP)
                phi = features(y, MAP, F, BF, 1)
                phi_2 = phi
                if PARTS == 2:
                    phi_2 = features(-y, MAP, F, BF, 1)
            far += tl.sum(phi * mass[None, :], 1)
            if PARTS == 2:
                far += tl.sum(phi_2 * mass_2[None, :], 1)
            if LAG == 1:
                key_from = key_head
                if MAP == PRECOMPUTED:
                    key_from = state_head
                xk_base = xk_ptr + row * s_xkb + key_from * s_xkh + first_t * s_xkt
                weights = pairs_of(
                    phi, phi_2, xk_base, k_weight_ptr, k_bias_ptr, state_head, live, s_xkt, v_ptr.dtype.element_ty,
                    D, BD, F, BF, PARTS, C, MAP,
                )  # fmt: skip
                far += tl.sum(weights, 1)
            phi = phi.to(states_ptr.dtype.element_ty)
            phi_2 = phi_2.to(states_ptr.dtype.element_ty)

        linear = tl.zeros([C], tl.float32) + 1.0  # the linear branch's factor
        if WINDOW:
            own = tl.dot(q, tl.trans(k), input_precision="ieee")
            if not LATE:
                own, _slope = bounded(own * scale, BOUND)
            own = tl.where(token[:, None] >= token[None, :], own, float("-inf"))
            previous = tl.dot(q, tl.trans(k_old), input_precision="ieee")
            if not LATE:
                previous, _slope = bounded(previous * scale, BOUND)
            if EVEN:
                largest = tl.maximum(tl.max(own, 1), tl.where(before, tl.max(previous, 1), float("-inf")))
            else:
                previous = tl.where(before[None, :], previous, float("-inf"))
                largest = tl.maximum(tl.max(own, 1), tl.max(previous, 1))
            if BZ > 0:
                first = tl.dot(q, tl.trans(k_sink), input_precision="ieee")
                if not LATE:
                    first, _slope = bounded(first * scale, BOUND)
                first = tl.where(kept[None, :], first, float("-inf"))
                largest = tl.maximum(largest, tl.max(first, 1))
            if ONE:
                if LATE:
                    largest = largest * scale
                base = largest - tl.log2(tl.load(near_ptr + head).to(tl.float32))
                unit = scale if LATE else 1.0
                own = tl.exp2(own * unit - base[:, None])
                if EVEN:
                    base = tl.where(before, base, float("inf"))
                previous = tl.exp2(previous * unit - base[:, None])
                if BZ > 0:
                    first = tl.exp2(first * unit - base[:, None])
            else:
                own = tl.exp2(own - largest[:, None])
                base = largest
                if EVEN:
                    base = tl.where(before, base, float("inf"))
                previous = tl.exp2(previous - base[:, None])
                if BZ > 0:
                    first = tl.exp2(first - largest[:, None])
            near = tl.sum(own, 1) + tl.sum(previous, 1)
            if BZ > 0:
                near += tl.sum(first, 1)
            if MAP == NO_MAP:
                peak = largest + tl.log2(near)
                factor = 1.0 / near
            elif ONE:
                far += near
                peak = largest + tl.log2(far)
                linear = 1.0 / far
            else:
                peak = largest + tl.log2(near)
                near_at = row * s_nb + wide * s_nh + (start + token) * s_nt
                share = window_share(peak, near_ptr, near_at, live, window_weight, MIX)
                factor = share / near
                if OWN:
                    linear = tl.where(far > TINY, (1.0 - share) / far, 0.0)
                else:
                    linear = 1.0 - share
            if ONE:
                previous = previous.to(v_ptr.dtype.element_ty)
            else:
                own = own * factor[:, None]
                previous = (previous * factor[:, None]).to(v_ptr.dtype.element_ty)
            if MAP != NO_MAP and LAG == 1:
                own += weights * linear[:, None]
            own = own.to(v_ptr.dtype.element_ty)
        else:
            if OWN:
                linear = tl.where(far > TINY, 1.0 / far, 0.0)
            if LAG == 1:
                own = (weights * linear[:, None]).to(v_ptr.dtype.element_ty)

        acc = tl.zeros([C, BV], tl.float32)
        if MAP != NO_MAP:
            state = load_state(states_ptr, at, before_at, first_v, D, BV, BF, False, STATES == 1)
            if PARTS == 2:
                state_2 = load_state(states_ptr, at + 1, before_at, first_v, D, BV, BF, False, STATES == 1)
        if MAP != NO_MAP:
            acc = tl.dot(phi, tl.trans(state), acc, input_precision="ieee")
            if PARTS == 2:
                acc = tl.dot(phi_2, tl.trans(state_2), acc, input_precision="ieee")
            if not ONE:
                if CUT:  # noqa: SIM102 - the first is known when it is compiled
                    if number >= EACH:
                        acc = add_begun(acc, phi, phi_2, states_ptr, before_at, first_v, D, BV, BF, PARTS)
                acc = acc * linear[:, None]
        if WINDOW or LAG == 1:
            acc = tl.dot(own, v, acc, input_precision="ieee")
        if WINDOW:
            acc = tl.dot(previous, v_old, acc, input_precision="ieee")
        if BZ > 0:
            if not ONE:
                first = first * factor[:, None]
            acc = tl.dot(first.to(v_sink.dtype), v_sink, acc, input_precision="ieee")
        if ONE:
            if CUT:  # noqa: SIM102 - last, where registers are no longer scarce
                if number >= EACH:
                    acc = add_begun(acc, phi, phi_2, states_ptr, before_at, first_v, D, BV, BF, PARTS)
            acc = acc * linear[:, None]

        out = out_ptr + row * s_ob + first_t * s_ot + wide * D + token[:, None] * s_ot + value[None, :]
        stored = live[:, None] & inside_v
        if MAP == NO_MAP:
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=stored)
        else:  # in the L2 cache it would only be in the way of what is read again
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=stored, eviction_policy="evict_first")
        if first_v == 0:
            at_row = (row * HEADS + wide) * T + start + token
            if WINDOW and peak_ptr is not None:
                tl.store(peak_ptr + at_row, peak, mask=live)
            if MAP != NO_MAP and total_ptr is not None:
                tl.store(total_ptr + at_row, far, mask=live)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_read(arch, 128, 64, 64, torch.bfloat16)
    team = tuning.window_linear_team(arch, 4096, 4, torch.bfloat16)
    sinks = ("sink_k_ptr", "sink_v_ptr")
    small = tuning.window_linear_read(arch, 64, 64, 64, torch.bfloat16)
    large = tuning.window_linear_read(arch, 256, 64, 64, torch.bfloat16)
    gemma = {"KEYS": 2, "TEAM": 1, "BOUND": GEMMA}
    return [
        gate_case(read_kernel, rows, "shared mix", absent=sinks, TEAM=team),
        gate_case(read_kernel, rows, "shared mix, no gradients", absent=(*sinks, "peak_ptr", "total_ptr"), TEAM=team),
        gate_case(read_kernel, rows, "shared mix, scan in segments", absent=sinks, TEAM=team, CUT=True),
        gate_case(read_kernel, rows, "shared mix, blocks cut short", absent=sinks, EVEN=False, TEAM=team),
        gate_case(read_kernel, small, "mix by mass, sinks, head of 64", MIX=3, D=64, BD=64, BZ=16, TEAM=team),
        gate_case(read_kernel, rows, "window alone", absent=sinks, MAP=5, MIX=1, TEAM=team),
        gate_case(read_kernel, rows, "bounded, shared mix", absent=sinks, **gemma),
        gate_case(read_kernel, rows, "bounded, blocks cut short", absent=sinks, EVEN=False, **gemma),
        gate_case(read_kernel, rows, "bounded, window alone", absent=sinks, MAP=5, MIX=1, **gemma),
        gate_case(
            read_kernel, large, "bounded, head of 256, window alone", absent=sinks, **gemma, **WIDE, MAP=5, MIX=1
        ),
        # On Ampere that spills some 700 bytes a thread in its best tile.
        *([] if arch < 90 else [gate_case(read_kernel, large, "bounded, head of 256", absent=sinks, **gemma, **WIDE)]),
    ]
