"""Gradients of keys and of values, over the query heads that share them.

    dv_j = sum_i P_ij do_i + sum_i d_i phi(q_i).phi(k_j) do_i
    dk_j = scale sum_i ds_ij q_i + dy_j W^T                       ds as in window_linear_queries_triton.py

What comes through the states is added up before (here, or in window_linear_far_triton.py). Scores are computed with
the keys down, so that P^T and ds^T are what the products need: a product's result is never turned over.
"""

import torch
import triton
import triton.language as tl

from . import window_linear_tuning as tuning
from .softcap_triton import GEMMA, bounded
from .window_linear_tiles import (
    LN2,
    NO_MAP,
    PRECOMPUTED,
    SHARED,
    SOFTMAX,
    WIDE,
    features,
    find_block,
    gate_case,
    load_columns,
    load_matrix,
    load_part,
    load_rows,
    load_state,
    project,
    project_across,
    store_columns,
    through_map,
)


@triton.jit
def key_features(
    k, given, weight_ptr, bias_ptr, head, written, stride,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """Both parts of phi(k), float32, zero where nothing is written; the second is the first where there is one."""
    if MAP == PRECOMPUTED:
        phi = load_part(given, written, stride, 0, F, BF, C).to(tl.float32)
        phi_2 = phi
        if PARTS == 2:
            phi_2 = load_part(given, written, stride, 1, F, BF, C).to(tl.float32)
    else:
        if MAP == SOFTMAX:
            y = project(k, None, None, head, F, BF, MAP)
        else:
            y = project(k, load_matrix(weight_ptr + head * D * F, F, D, BD, F, BF), bias_ptr, head, F, BF, MAP)
        phi = tl.where(written[:, None], features(y, MAP, F, BF, 1), 0.0)
        phi_2 = phi
        if PARTS == 2:
            phi_2 = tl.where(written[:, None], features(-y, MAP, F, BF, 1), 0.0)
    return phi, phi_2


@triton.jit
def across_queries(
    phi, phi_2, q_base, weight_ptr, bias_ptr, head, live, stride, DTYPE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """phi(k_j).phi(q_i) with keys down and queries across: [C, C]."""
    if MAP == PRECOMPUTED:
        queries = tl.trans(load_part(q_base, live, stride, 0, F, BF, C))
        weights = tl.dot(phi.to(DTYPE), queries, input_precision="ieee")
        if PARTS == 2:
            queries = tl.trans(load_part(q_base, live, stride, 1, F, BF, C))
            weights = tl.dot(phi_2.to(DTYPE), queries, weights, input_precision="ieee")
    else:
        q = load_rows(q_base, live, stride, D, BD, C)
        if MAP == SOFTMAX:
            y = project_across(q, None, None, head, F, BF, MAP)
        else:
            weight = load_matrix(weight_ptr + head * D * F, F, D, BD, F, BF)
            y = project_across(q, weight, bias_ptr, head, F, BF, MAP)
        weights = tl.dot(phi.to(DTYPE), features(y, MAP, F, BF, 0).to(DTYPE), input_precision="ieee")
        if PARTS == 2:
            queries = features(-y, MAP, F, BF, 0).to(DTYPE)
            weights = tl.dot(phi_2.to(DTYPE), queries, weights, input_precision="ieee")
    return weights


@triton.jit(do_not_specialize=["T", "BLOCKS", "BASE", "SEGMENTS", "EACH", "sinks"])
def value_states_kernel(
    k_ptr, xq_ptr, xk_ptr, do_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    states_ptr, row_scale_ptr, dv_ptr, table_ptr,
    s_kb, s_kh, s_kt, s_xqb, s_xqh, s_xqt, s_xkb, s_xkh, s_xkt, s_db, s_dh, s_dt, s_gb, s_gt,
    T, BLOCKS, BASE, SEGMENTS, EACH, KEY_HEADS, sinks,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, LAG: tl.constexpr,
    KEYS: tl.constexpr, STATES: tl.constexpr, CUT: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: a block of one key head, BN channels of dv [B, T, HK, D]: the linear branch's part.

    states: gradients of the states; CUT, BASE, SEGMENTS, EACH as in read_kernel. KEYS: query heads a key head; STATES:
    query heads a state head, 1 or KEYS.
    """
    SLICES: tl.constexpr = (D + BN - 1) // BN
    index = tl.program_id(0)
    first_n = (index % SLICES) * BN
    index = index // SLICES
    key_head = (index % KEY_HEADS).to(tl.int64)
    block = (index // KEY_HEADS).to(tl.int64)
    row, low, high, number, sequence = find_block(block, table_ptr, T, BLOCKS, TABLE)
    if row < 0:
        return
    token = tl.arange(0, C)
    start = low + number * C
    live = start + token < high
    written = live & (number * C + token >= sinks)
    first_t = start.to(tl.int64)
    origin = (BASE + sequence * SEGMENTS + number // EACH).to(tl.int64)
    k = load_rows(k_ptr + row * s_kb + key_head * s_kh + first_t * s_kt, live, s_kt, D, BD, C)
    dv = tl.zeros([C, BN], tl.float32)

    if STATES == 1 or LAG == 1:
        for member in tl.range(0, KEYS, num_stages=1):
            head = key_head * KEYS + member
            state_head = head // STATES
            if STATES == 1:
                at = (block * (KEY_HEADS * KEYS) + head) * PARTS
                before_at = (origin * (KEY_HEADS * KEYS) + head) * PARTS
                state = tl.trans(load_state(states_ptr, at, before_at, first_n, D, BN, BF, CUT))
                if PARTS == 2:
                    state_2 = tl.trans(load_state(states_ptr, at + 1, before_at + 1, first_n, D, BN, BF, CUT))
            phi, phi_2 = key_features(
                k, xk_ptr + row * s_xkb + state_head * s_xkh + first_t * s_xkt, k_weight_ptr, k_bias_ptr, state_head,
                written, s_xkt, D, BD, F, BF, PARTS, C, MAP,
            )  # fmt: skip
            if STATES == 1:
                dv = tl.dot(phi.to(state.dtype), state, dv, input_precision="ieee")
                if PARTS == 2:
                    dv = tl.dot(phi_2.to(state.dtype), state_2, dv, input_precision="ieee")
            if LAG == 1:
                q_base = xq_ptr + row * s_xqb + head * s_xqh + first_t * s_xqt
                weights = across_queries(
                    phi, phi_2, q_base, q_weight_ptr, q_bias_ptr, head, live, s_xqt, k.dtype, D, BD, F, BF, PARTS, C,
                    MAP,
                )  # fmt: skip
                at_row = (row * (KEY_HEADS * KEYS) + head) * T + start + token
                weights = weights * tl.load(row_scale_ptr + at_row, mask=live, other=0.0)[None, :]
                weights = tl.where(token[:, None] <= token[None, :], weights, 0.0)
                do = load_columns(do_ptr + row * s_db + head * s_dh + first_t * s_dt, live, s_dt, first_n, D, BN, C)
                dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
    if STATES > 1:
        phi, phi_2 = key_features(
            k, xk_ptr + row * s_xkb + key_head * s_xkh + first_t * s_xkt, k_weight_ptr, k_bias_ptr, key_head,
            written, s_xkt, D, BD, F, BF, PARTS, C, MAP,
        )  # fmt: skip
        at = (block * KEY_HEADS + key_head) * PARTS
        before_at = (origin * KEY_HEADS + key_head) * PARTS
        state = tl.trans(load_state(states_ptr, at, before_at, first_n, D, BN, BF, CUT))
        dv = tl.dot(phi.to(state.dtype), state, dv, input_precision="ieee")
        if PARTS == 2:
            state = tl.trans(load_state(states_ptr, at + 1, before_at + 1, first_n, D, BN, BF, CUT))
            dv = tl.dot(phi_2.to(state.dtype), state, dv, input_precision="ieee")
    store_columns(dv_ptr + row * s_gb + first_t * s_gt + key_head * D, dv, live, s_gt, first_n, D, BN, C)


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def key_pairs_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dy_ptr, k_weight_ptr, level_ptr, row_ptr, shift_ptr, pick_ptr, dk_ptr, dv_ptr,
    table_ptr, s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt, s_gb, s_gt,
    T, BLOCKS, KEY_HEADS, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    C: tl.constexpr, BQ: tl.constexpr, MAP: tl.constexpr, WINDOW: tl.constexpr, MIX: tl.constexpr,
    KEYS: tl.constexpr, STATES: tl.constexpr, BOUND: tl.constexpr, EVEN: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: a block of one key head, BN channels of dk and dv [B, T, HK, D]; dv has the states' part already.

    BOUND: as in read_kernel. EVEN: every sequence has whole blocks.
    """
    SLICES: tl.constexpr = (D + BN - 1) // BN
    index = tl.program_id(0)
    first_n = (index % SLICES) * BN
    index = index // SLICES
    key_head = (index % KEY_HEADS).to(tl.int64)
    block = (index // KEY_HEADS).to(tl.int64)
    row, low, high, number, _ = find_block(block, table_ptr, T, BLOCKS, TABLE)
    if row < 0:
        return
    token = tl.arange(0, C)
    query = tl.arange(0, BQ)
    start = low + number * C
    live = start + token < high
    first_t = start.to(tl.int64)
    at = row * s_gb + first_t * s_gt + key_head * D
    dk = tl.zeros([C, BN], tl.float32)

    if WINDOW:
        if MAP == NO_MAP:
            dv = tl.zeros([C, BN], tl.float32)
        else:
            dv = load_columns(dv_ptr + at, live, s_gt, first_n, D, BN, C).to(tl.float32)
        k = load_rows(k_ptr + row * s_kb + key_head * s_kh + first_t * s_kt, live, s_kt, D, BD, C)
        v = load_rows(v_ptr + row * s_vb + key_head * s_vh + first_t * s_vt, live, s_vt, D, BD, C)
        # Queries of the same block, from each key on, and all those of the next, BQ at a time. Rows that are not
        # there have an infinite level, and so no weight.
        for step in tl.range(0, KEYS * (2 * C // BQ), disable_licm=True):
            ahead = step % (2 * C // BQ) * BQ
            head = key_head * KEYS + step // (2 * C // BQ)
            after = ahead + query
            if EVEN:
                q_live = tl.zeros([BQ], tl.int32) + (start + ahead) < high  # all of them, or none
            else:
                q_live = start + after < high
            at_row = (row * (KEY_HEADS * KEYS) + head) * T + start + ahead
            if EVEN:
                at_row = tl.multiple_of(at_row, 16)
            at_row += query
            q_base = q_ptr + row * s_qb + head * s_qh + (first_t + ahead) * s_qt
            do_base = do_ptr + row * s_db + head * s_dh + (first_t + ahead) * s_dt
            q = load_rows(q_base, q_live, s_qt, D, BD, BQ)
            do = load_rows(do_base, q_live, s_dt, D, BD, BQ)
            level = tl.load(level_ptr + at_row, mask=q_live, other=float("inf"))
            s, slope = bounded(tl.dot(k, tl.trans(q), input_precision="ieee") * scale, BOUND)
            p = tl.exp2(s - level[None, :])
            p = tl.where(token[:, None] <= after[None, :], p, 0.0)
            got = tl.dot(v, tl.trans(do), input_precision="ieee")
            if BN != BD:
                q = load_columns(q_base, q_live, s_qt, first_n, D, BN, BQ)
                do = load_columns(do_base, q_live, s_dt, first_n, D, BN, BQ)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            shift = tl.load(shift_ptr + at_row, mask=q_live, other=0.0)
            p = p * (got - shift[None, :])
            if MAP != NO_MAP and MIX == SHARED:
                r = tl.load(row_ptr + at_row, mask=q_live, other=0.0)
                pick = tl.load(pick_ptr + at_row, mask=q_live, other=-1)
                pick -= (1 - ahead // C) * C
                p -= tl.where(pick[None, :] == token[:, None], r[None, :], 0.0)
            if BOUND > 0.0:
                p *= slope
            dk = tl.dot(p.to(q.dtype), q, dk, input_precision="ieee")
        dk = dk * (scale * LN2)
        store_columns(dv_ptr + at, dv, live, s_gt, first_n, D, BN, C)
    if MAP != NO_MAP and MAP != PRECOMPUTED:
        for member in range(0, KEYS // STATES):
            head = key_head * (KEYS // STATES) + member
            dy_base = dy_ptr + ((row * (KEY_HEADS * KEYS // STATES) + head) * T + first_t) * F
            dk = through_map(dk, dy_base, k_weight_ptr, head, live, first_n, D, BN, F, BF, C, MAP)
    store_columns(dk_ptr + at, dk, live, s_gt, first_n, D, BN, C)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_values(arch, 128, 64, 64, torch.bfloat16)
    keys = tuning.window_linear_keys(arch, 128, 64, 64, torch.bfloat16, even=True)
    rough = tuning.window_linear_keys(arch, 128, 64, 64, torch.bfloat16)
    held = tuning.window_linear_keys(arch, 128, 64, 64, torch.bfloat16, bounded=True)
    large = tuning.window_linear_keys(arch, 256, 64, 64, torch.bfloat16, bounded=True)
    wide = tuning.window_linear_values(arch, 256, 64, 64, torch.bfloat16)
    gemma = {"EVEN": False, "KEYS": 2, "BOUND": GEMMA}
    return [
        gate_case(key_pairs_kernel, keys, "keys, shared mix"),
        gate_case(key_pairs_kernel, rough, "keys, window alone", MAP=5, MIX=1),
        gate_case(key_pairs_kernel, held, "keys, bounded, shared mix", **gemma),
        gate_case(key_pairs_kernel, held, "keys, bounded, window alone", MAP=5, MIX=1, **gemma),
        gate_case(key_pairs_kernel, large, "bounded, head of 256", **gemma, **WIDE),
        gate_case(value_states_kernel, rows, "values"),
        gate_case(value_states_kernel, wide, "values, head of 256", **WIDE),
        gate_case(value_states_kernel, rows, "values, a state for four heads", STATES=4),
    ]
