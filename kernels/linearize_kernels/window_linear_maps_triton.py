"""Gradients of the feature maps, for queries and for keys, and of the maps' weights: no product of the window.

With o_i = sum_j A_ij v_j, e_i = do_i.o_i where one denominator serves the row and d_i the linear branch's factor:

    dphi(q_i) = d_i (S_i do_i - e_i z_i)      dphi(k_j) = dS_j v_j - dz_j

A row's weights times their gradients sum to zero under a shared denominator, so what the window's scores get in all is
r_i = -phi(q_i).dphi(q_i): gamma needs no window, and neither does the score that was the largest (it was subtracted,
but the linear branch was not scaled with it: its gradient is -r_i).
"""

import torch
import triton
import triton.language as tl

from . import window_linear_tuning as tuning
from .window_linear_tiles import (
    GATE,
    MASS,
    PRECOMPUTED,
    SHARED,
    SOFTMAX,
    TINY,
    features,
    features_backward,
    find_block,
    gate_case,
    load_mass,
    load_matrix,
    load_part,
    load_rows,
    load_state,
    project,
    store_rows,
    window_share,
)


@triton.jit
def against_states(
    rows, states_ptr, masses_ptr, at, before, D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """[C, BD] times one part's state [BD, BF], and its mass [BF]."""
    state = load_state(states_ptr, at, before, 0, D, BD, BF, CUT)
    mass = load_mass(masses_ptr, at, before, BF, CUT)
    return tl.dot(rows.to(state.dtype), state, input_precision="ieee"), mass


@triton.jit
def projected(
    base, weight_ptr, bias_ptr, head, live, stride,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """x W + b of the rows at `base` [C, BF]; zeros where the caller gave the features."""
    if MAP == PRECOMPUTED:
        y = tl.zeros([C, BF], tl.float32)
    elif MAP == SOFTMAX:
        y = project(load_rows(base, live, stride, D, BD, C), None, None, head, F, BF, MAP)
    else:
        weight = load_matrix(weight_ptr + head.to(tl.int64) * D * F, F, D, BD, F, BF)
        y = project(load_rows(base, live, stride, D, BD, C), weight, bias_ptr, head, F, BF, MAP)
    return y


@triton.jit
def numbered_features(
    y, base, live, stride, part, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """The features of part number `part`, which may be known as late as in a loop."""
    if MAP == PRECOMPUTED:
        column = part * BF + tl.arange(0, BF)
        at = base + tl.arange(0, C)[:, None] * stride + column[None, :]
        phi = tl.load(at, mask=live[:, None] & (column < F)[None, :], other=0.0).to(tl.float32)
    else:
        phi = features(y * (1.0 - 2.0 * part), MAP, F, BF, 1)
    return phi


@triton.jit
def query_part(
    y, yk, do, pairs, causal, x_base, xk_base, states_ptr, masses_ptr, at, before, live, s_xqt, s_xkt, part,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr, LAG: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One part of phi(q), of S do, and of the keys' sum up to each row, which e multiplies."""
    du, mass = against_states(do, states_ptr, masses_ptr, at + part, before + part, D, BD, BF, CUT)
    phi = numbered_features(y, x_base, live, s_xqt, part, F, BF, C, MAP)
    below = mass[None, :]
    if LAG == 1:
        keys = numbered_features(yk, xk_base, live, s_xkt, part, F, BF, C, MAP).to(pairs.dtype)
        du = tl.dot(pairs, keys, du, input_precision="ieee")
        below = tl.dot(causal.to(pairs.dtype), keys, tl.zeros([C, BF], tl.float32) + below, input_precision="ieee")
    return phi, du, below


@triton.jit
def query_gradient(
    r, dy, factor, weigh, y, yk, do, pairs, causal, x_base, xk_base, states_ptr, masses_ptr, dy_base, at, before, live,
    s_xqt, s_xkt, part,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr, LAG: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Add one part to r [C] and dy [C, BF]; gradients of features that the caller gave are stored."""
    phi, du, below = query_part(
        y, yk, do, pairs, causal, x_base, xk_base, states_ptr, masses_ptr, at, before, live, s_xqt, s_xkt, part,
        D, BD, F, BF, C, MAP, LAG, CUT,
    )  # fmt: skip
    dphi = factor[:, None] * (du - weigh[:, None] * below)
    r -= tl.sum(phi * dphi, 1)
    if MAP == PRECOMPUTED:
        column = part * BF + tl.arange(0, BF)
        to = dy_base + tl.arange(0, C)[:, None] * F + column[None, :]
        tl.store(to, dphi.to(dy_base.dtype.element_ty), mask=live[:, None] & (column < F)[None, :])
    else:
        side = 1.0 - 2.0 * part
        dy += side * features_backward(y * side, phi, dphi, MAP)
    return r, dy


@triton.jit(do_not_specialize=["T", "BLOCKS", "BASE", "SEGMENTS", "EACH"])
def query_maps_kernel(
    xq_ptr, xk_ptr, v_ptr, do_ptr, out_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    states_ptr, masses_ptr, near_ptr, peak_ptr, total_ptr,
    dy_ptr, row_scale_ptr, row_mass_ptr, row_ptr, shift_ptr, table_ptr,
    s_xqb, s_xqh, s_xqt, s_xkb, s_xkh, s_xkt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt, s_ob, s_ot, s_nb, s_nh, s_nt,
    T, BLOCKS, BASE, SEGMENTS, EACH, HEADS, window_weight,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, LAG: tl.constexpr, WINDOW: tl.constexpr, MIX: tl.constexpr, OWN: tl.constexpr,
    KEYS: tl.constexpr, STATES: tl.constexpr, ALONE: tl.constexpr, CUT: tl.constexpr, EVEN: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries of one head. Writes dy [B, H, T, F] and, for each row,

    row_scale = d, row_mass = d e (what the state's gradient needs), shift = do.o (shared denominator), and in row:
    r (shared), the gradient of the gate or mass (ALONE: no window kernel follows), else do.o of the linear branch.
    ALONE and shared: no shift, and r summed over the block, [H, G].
    EVEN: every sequence has whole blocks. CUT, BASE, SEGMENTS, EACH: as in read_kernel.
    """
    index = tl.program_id(0)
    head = index % HEADS
    block = (index // HEADS).to(tl.int64)
    row, low, high, number, sequence = find_block(block, table_ptr, T, BLOCKS, TABLE)
    if row < 0:
        return
    token = tl.arange(0, C)
    start = low + number * C
    if EVEN:
        live = tl.zeros([C], tl.int32) + start < high
    else:
        live = start + token < high
    wide = head.to(tl.int64)
    first_t = start.to(tl.int64)
    key_head = (head // KEYS).to(tl.int64)
    state_head = (head // STATES).to(tl.int64)
    at = (block * (HEADS // STATES) + state_head) * PARTS
    origin = (BASE + sequence * SEGMENTS + number // EACH).to(tl.int64)
    before_at = (origin * (HEADS // STATES) + state_head) * PARTS
    at_row = (row * HEADS + wide) * T + start + token

    do = load_rows(do_ptr + row * s_db + wide * s_dh + first_t * s_dt, live, s_dt, D, BD, C)
    x_base = xq_ptr + row * s_xqb + wide * s_xqh + first_t * s_xqt
    y = projected(x_base, q_weight_ptr, q_bias_ptr, head, live, s_xqt, D, BD, F, BF, C, MAP)
    causal = token[:, None] >= token[None, :]
    pairs = causal
    yk = y
    xk_base = xk_ptr
    if LAG == 1:
        v = load_rows(v_ptr + row * s_vb + key_head * s_vh + first_t * s_vt, live, s_vt, D, BD, C)
        causal = causal & live[None, :]
        pairs = tl.where(causal, tl.dot(do, tl.trans(v), input_precision="ieee"), 0.0).to(v.dtype)
        if MAP == PRECOMPUTED:
            xk_base += row * s_xkb + state_head * s_xkh + first_t * s_xkt
        else:
            xk_base += row * s_xkb + key_head * s_xkh + first_t * s_xkt
        yk = projected(xk_base, k_weight_ptr, k_bias_ptr, state_head, live, s_xkt, D, BD, F, BF, C, MAP)

    # The row's own numbers: factor d and e. One denominator knows them from the output; of two, the linear branch's
    # must be read first.
    total = tl.load(total_ptr + at_row, mask=live, other=0.0)
    if MIX == SHARED or not WINDOW or ALONE:
        out = load_rows(out_ptr + row * s_ob + first_t * s_ot + wide * D, live, s_ot, D, BD, C)
        shift = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if WINDOW and MIX == SHARED:
        factor = tl.where(live, 1.0 / total, 0.0)
        weigh = shift
        if not ALONE:
            tl.store(shift_ptr + at_row, shift, mask=live)
    elif not WINDOW:
        factor = tl.where(total > TINY, 1.0 / total, 0.0) if OWN else total * 0.0 + 1.0
        weigh = shift if OWN else total * 0.0
    else:
        near_at = row * s_nb + wide * s_nh + (start + token) * s_nt
        peak = tl.load(peak_ptr + at_row, mask=live, other=0.0)
        share = window_share(peak, near_ptr, near_at, live, window_weight, MIX)
        got = tl.zeros([C], tl.float32)  # do . (sum of linear weights times values)
        if LAG == 2:
            for part in tl.range(0, PARTS, num_stages=1, disable_licm=True):
                phi, du, _keys = query_part(
                    y, yk, do, pairs, causal, x_base, xk_base, states_ptr, masses_ptr, at, before_at, live, s_xqt,
                    s_xkt, part, D, BD, F, BF, C, MAP, LAG, CUT,
                )  # fmt: skip
                got += tl.sum(phi * du, 1)
        else:
            for part in tl.static_range(PARTS):
                phi, du, _keys = query_part(
                    y, yk, do, pairs, causal, x_base, xk_base, states_ptr, masses_ptr, at, before_at, live, s_xqt,
                    s_xkt, part, D, BD, F, BF, C, MAP, LAG, CUT,
                )  # fmt: skip
                got += tl.sum(phi * du, 1)
        if OWN:
            inverse = tl.where(total > TINY, 1.0 / total, 0.0)
            factor = (1.0 - share) * inverse
            got = got * inverse
            weigh = got
        else:
            factor = 1.0 - share
            weigh = share * 0.0
        if ALONE:
            if MIX == MASS:
                got = -(1.0 - share) * (shift - got)
            elif MIX == GATE:
                got = tl.where(share > TINY, (shift - got) / share, 0.0)
        tl.store(row_ptr + at_row, got, mask=live)
    tl.store(row_scale_ptr + at_row, factor, mask=live)
    tl.store(row_mass_ptr + at_row, factor * weigh, mask=live)

    r = tl.zeros([C], tl.float32)
    dy = tl.zeros([C, BF], tl.float32)
    dy_base = dy_ptr + ((row * HEADS + wide) * T + first_t) * F
    if LAG == 2:  # a loop takes fewer registers; `pairs` would have to outlive it, which ptxas before 13.4 gets wrong
        for part in tl.range(0, PARTS, num_stages=1, disable_licm=True):
            r, dy = query_gradient(
                r, dy, factor, weigh, y, yk, do, pairs, causal, x_base, xk_base, states_ptr, masses_ptr, dy_base, at,
                before_at, live, s_xqt, s_xkt, part, D, BD, F, BF, C, MAP, LAG, CUT,
            )  # fmt: skip
    else:
        for part in tl.static_range(PARTS):
            r, dy = query_gradient(
                r, dy, factor, weigh, y, yk, do, pairs, causal, x_base, xk_base, states_ptr, masses_ptr, dy_base, at,
                before_at, live, s_xqt, s_xkt, part, D, BD, F, BF, C, MAP, LAG, CUT,
            )  # fmt: skip
    if WINDOW and MIX == SHARED:
        if ALONE:
            tl.store(row_ptr + wide * (tl.num_programs(0) // HEADS) + block, tl.sum(r, 0))
        else:
            tl.store(row_ptr + at_row, r, mask=live)
    if MAP != PRECOMPUTED:
        store_rows(dy_base, dy, live, F, F, BF, C)


@triton.jit(do_not_specialize=["T", "BLOCKS", "BASE", "SEGMENTS", "EACH", "sinks"])
def key_maps_kernel(
    xq_ptr, xk_ptr, v_ptr, do_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    states_ptr, masses_ptr, row_scale_ptr, row_mass_ptr, dy_ptr, table_ptr,
    s_xqb, s_xqh, s_xqt, s_xkb, s_xkh, s_xkt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt,
    T, BLOCKS, BASE, SEGMENTS, EACH, STATE_HEADS, sinks,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, LAG: tl.constexpr, SHARING: tl.constexpr, STATES: tl.constexpr,
    CUT: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: a block of keys of one state head; writes dy [B, S, T, F].

    states, masses: gradients; CUT, BASE, SEGMENTS, EACH as in read_kernel. SHARING: state heads a key head; STATES:
    query heads a state head.
    """
    index = tl.program_id(0)
    head = index % STATE_HEADS
    block = (index // STATE_HEADS).to(tl.int64)
    row, low, high, number, sequence = find_block(block, table_ptr, T, BLOCKS, TABLE)
    if row < 0:
        return
    token = tl.arange(0, C)
    start = low + number * C
    live = start + token < high
    wide = head.to(tl.int64)
    first_t = start.to(tl.int64)
    key_head = (head // SHARING).to(tl.int64)
    at = (block * STATE_HEADS + wide) * PARTS
    before_at = ((BASE + sequence * SEGMENTS + number // EACH).to(tl.int64) * STATE_HEADS + wide) * PARTS

    v = load_rows(v_ptr + row * s_vb + key_head * s_vh + first_t * s_vt, live, s_vt, D, BD, C)
    if MAP == PRECOMPUTED:
        x_base = xk_ptr + row * s_xkb + wide * s_xkh + first_t * s_xkt
        y = tl.zeros([C, BF], tl.float32)
        phi = load_part(x_base, live, s_xkt, 0, F, BF, C).to(tl.float32)
        if PARTS == 2:
            phi_2 = load_part(x_base, live, s_xkt, 1, F, BF, C).to(tl.float32)
    else:
        x = load_rows(xk_ptr + row * s_xkb + key_head * s_xkh + first_t * s_xkt, live, s_xkt, D, BD, C)
        if MAP == SOFTMAX:
            y = project(x, None, None, head, F, BF, MAP)
        else:
            y = project(x, load_matrix(k_weight_ptr + wide * D * F, F, D, BD, F, BF), k_bias_ptr, head, F, BF, MAP)
        phi = features(y, MAP, F, BF, 1)
        if PARTS == 2:
            phi_2 = features(-y, MAP, F, BF, 1)
    dphi, mass = against_states(v, states_ptr, masses_ptr, at, before_at, D, BD, BF, CUT)
    dphi -= mass[None, :]
    if PARTS == 2:
        dphi_2, mass = against_states(v, states_ptr, masses_ptr, at + 1, before_at + 1, D, BD, BF, CUT)
        dphi_2 -= mass[None, :]
    if LAG == 1:
        for member in range(0, STATES):
            reader = wide * STATES + member
            do = load_rows(do_ptr + row * s_db + reader * s_dh + first_t * s_dt, live, s_dt, D, BD, C)
            at_row = (row * STATE_HEADS * STATES + reader) * T + start + token
            scale = tl.load(row_scale_ptr + at_row, mask=live, other=0.0)
            heavy = tl.load(row_mass_ptr + at_row, mask=live, other=0.0)
            pairs = tl.dot(v, tl.trans(do), input_precision="ieee") * scale[None, :] - heavy[None, :]
            pairs = tl.where(token[:, None] <= token[None, :], pairs, 0.0).to(v.dtype)
            q_base = xq_ptr + row * s_xqb + reader * s_xqh + first_t * s_xqt
            if MAP == PRECOMPUTED:
                queries = load_part(q_base, live, s_xqt, 0, F, BF, C)
                if PARTS == 2:
                    queries_2 = load_part(q_base, live, s_xqt, 1, F, BF, C)
            else:
                xq = load_rows(q_base, live, s_xqt, D, BD, C)
                if MAP == SOFTMAX:
                    yq = project(xq, None, None, head, F, BF, MAP)
                else:
                    weight = load_matrix(q_weight_ptr + reader * D * F, F, D, BD, F, BF)
                    yq = project(xq, weight, q_bias_ptr, reader, F, BF, MAP)
                queries = features(yq, MAP, F, BF, 1).to(v.dtype)
                if PARTS == 2:
                    queries_2 = features(-yq, MAP, F, BF, 1).to(v.dtype)
            dphi = tl.dot(pairs, queries, dphi, input_precision="ieee")
            if PARTS == 2:
                dphi_2 = tl.dot(pairs, queries_2, dphi_2, input_precision="ieee")

    written = (live & (number * C + token >= sinks))[:, None]
    dy_base = dy_ptr + ((row * STATE_HEADS + wide) * T + first_t) * F
    if MAP == PRECOMPUTED:
        store_rows(dy_base, tl.where(written, dphi, 0.0), live, F, min(F, BF), BF, C)
        if PARTS == 2:
            store_rows(dy_base + BF, tl.where(written, dphi_2, 0.0), live, F, F - BF, BF, C)
    else:
        dy = features_backward(y, phi, dphi, MAP)
        if PARTS == 2:
            dy -= features_backward(-y, phi_2, dphi_2, MAP)
        store_rows(dy_base, tl.where(written, dy, 0.0), live, F, F, BF, C)


@triton.jit(do_not_specialize=["T", "BLOCKS", "COUNT", "EACH"])
def weight_grad_kernel(
    x_ptr, dy_ptr, grads_ptr, bias_grads_ptr, table_ptr, s_xb, s_xh, s_xt,
    T, BLOCKS, HEADS, COUNT, EACH,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, SHARING: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """dW_h = sum over tokens of x^T dy, for EACH of COUNT blocks: grads [pieces, H, D, F] float32, to be summed."""
    index = tl.program_id(0)
    head = index % HEADS
    piece = index // HEADS
    wide = head.to(tl.int64)
    key_head = (head // SHARING).to(tl.int64)
    token = tl.arange(0, C)
    grad = tl.zeros([BD, BF], tl.float32)
    bias_grad = tl.zeros([BF], tl.float32)
    for block in range(piece * EACH, tl.minimum(piece * EACH + EACH, COUNT)):
        row, low, high, number, _ = find_block(block, table_ptr, T, BLOCKS, TABLE)
        start = low + number * C
        live = start + token < tl.where(row >= 0, high, low)
        first_t = start.to(tl.int64)
        x = load_rows(x_ptr + row * s_xb + key_head * s_xh + first_t * s_xt, live, s_xt, D, BD, C)
        dy = load_rows(dy_ptr + ((row * HEADS + wide) * T + first_t) * F, live, F, F, BF, C)
        grad = tl.dot(tl.trans(x), dy, grad, input_precision="ieee")
        if bias_grads_ptr is not None:
            bias_grad += tl.sum(dy.to(tl.float32), 0)
    at = piece.to(tl.int64) * HEADS + head
    channel = tl.arange(0, BD)
    feature = tl.arange(0, BF)
    mask = (channel < D)[:, None] & (feature < F)[None, :]
    tl.store(grads_ptr + at * D * F + channel[:, None] * F + feature[None, :], grad, mask=mask)
    if bias_grads_ptr is not None:
        tl.store(bias_grads_ptr + at * F + feature, bias_grad, mask=feature < F)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_maps(arch, 128, 64, 64, torch.bfloat16)
    weights = tuning.window_linear_weights(arch, 128, 64, 64, torch.bfloat16)
    return [
        gate_case(query_maps_kernel, rows, "queries, shared mix"),
        gate_case(query_maps_kernel, rows, "queries, shared mix, scan in segments", CUT=True),
        gate_case(query_maps_kernel, rows, "queries, mix by mass", MIX=3, ALONE=False),
        gate_case(key_maps_kernel, rows, "keys"),
        gate_case(weight_grad_kernel, weights, "weights"),
    ]
