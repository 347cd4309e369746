"""Gradients that reach keys and values through the states: of the keys' features, and the linear branch's part of dv.

    dphi(k_j) = dS_j v_j - dz_j        dv_j = sum over query heads of phi(k_j) dS_j

For a branch that reads only what the window cannot see (lag 2): its keys meet no query of their own block. Both sums
read dS, the largest tensor of the backward pass, so one kernel makes them from one reading.
"""

import torch
import triton
import triton.language as tl

from . import window_linear_tuning as tuning
from .window_linear_tiles import (
    PRECOMPUTED,
    SOFTMAX,
    features,
    features_backward,
    find_block,
    gate_case,
    load_mass,
    load_matrix,
    load_rows,
    load_state,
    project,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "BLOCKS", "BASE", "SEGMENTS", "EACH", "sinks"])
def far_keys_kernel(
    xk_ptr, v_ptr, k_weight_ptr, k_bias_ptr, states_ptr, masses_ptr, dy_ptr, dv_ptr, table_ptr,
    s_xkb, s_xkh, s_xkt, s_vb, s_vh, s_vt, s_gb, s_gt,
    T, BLOCKS, BASE, SEGMENTS, EACH, STATE_HEADS, sinks,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, SHARING: tl.constexpr, TEAM: tl.constexpr, VALUES: tl.constexpr,
    CUT: tl.constexpr, EVEN: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: a block of keys, and TEAM of the state heads that share them. Writes dy [B, S, T, F].

    states, masses: gradients; CUT, BASE, SEGMENTS, EACH as in read_kernel. VALUES: also dv [B, T, HK, D]; the team is
    then all that share a key head (SHARING).
    EVEN: every sequence has whole blocks.
    """
    index = tl.program_id(0)
    team = index % (STATE_HEADS // TEAM)
    block = (index // (STATE_HEADS // TEAM)).to(tl.int64)
    row, low, high, number, sequence = find_block(block, table_ptr, T, BLOCKS, TABLE)
    if row < 0:
        return
    token = tl.arange(0, C)
    start = low + number * C
    if EVEN:
        live = tl.zeros([C], tl.int32) + start < high
    else:
        live = start + token < high
    written = (live & (number * C + token >= sinks))[:, None]
    first_t = start.to(tl.int64)
    origin = (BASE + sequence * SEGMENTS + number // EACH).to(tl.int64)
    key_head = (team * TEAM // SHARING).to(tl.int64)
    v = load_rows(v_ptr + row * s_vb + key_head * s_vh + first_t * s_vt, live, s_vt, D, BD, C)
    x_base = xk_ptr + row * s_xkb + first_t * s_xkt
    if MAP != PRECOMPUTED:
        x = load_rows(x_base + key_head * s_xkh, live, s_xkt, D, BD, C)
    if VALUES:
        dv = tl.zeros([C, BD], tl.float32)

    for member in tl.range(0, TEAM, num_stages=1, disable_licm=True):  # else all addresses are kept in registers
        head = (team * TEAM + member).to(tl.int64)
        at = (block * STATE_HEADS + head) * PARTS
        before_at = (origin * STATE_HEADS + head) * PARTS
        if MAP == PRECOMPUTED:
            y = tl.zeros([C, BF], tl.float32)
        elif MAP == SOFTMAX:
            y = project(x, None, None, head, F, BF, MAP)
        else:
            y = project(x, load_matrix(k_weight_ptr + head * D * F, F, D, BD, F, BF), k_bias_ptr, head, F, BF, MAP)
        dy = tl.zeros([C, BF], tl.float32)
        dy_base = dy_ptr + ((row * STATE_HEADS + head) * T + first_t) * F
        for part in tl.range(0, PARTS, num_stages=1, disable_licm=True):
            column = part * BF + tl.arange(0, BF)
            state = load_state(states_ptr, at + part, before_at + part, 0, D, BD, BF, False)
            if CUT:  # noqa: SIM102 - the first is known when it is compiled
                if number // EACH < SEGMENTS - 1:  # nothing comes after the last
                    state += load_state(states_ptr, before_at + part, at, 0, D, BD, BF, False)
            dphi = tl.dot(v, state, input_precision="ieee")
            dphi -= load_mass(masses_ptr, at + part, before_at + part, BF, CUT)[None, :]
            if MAP == PRECOMPUTED:
                places = token[:, None] * s_xkt + column[None, :]
                given = live[:, None] & (column < F)[None, :]
                phi = tl.load(x_base + head * s_xkh + places, mask=given, other=0.0).to(tl.float32)
                places = token[:, None] * F + column[None, :]
                tl.store(dy_base + places, tl.where(written, dphi, 0.0).to(dy_ptr.dtype.element_ty), mask=given)
            else:
                side = 1.0 - 2.0 * part
                phi = features(y * side, MAP, F, BF, 1)
                dy += side * features_backward(y * side, phi, dphi, MAP)
            if VALUES:
                dv = tl.dot(phi.to(v.dtype), tl.trans(state), dv, input_precision="ieee")
        if MAP != PRECOMPUTED:
            store_rows(dy_base, tl.where(written, dy, 0.0), live, F, F, BF, C)
    if VALUES:
        dv_base = dv_ptr + row * s_gb + first_t * s_gt + key_head * D
        store_rows(dv_base, tl.where(written, dv, 0.0), live, s_gt, D, BD, C)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_far(arch, 128, 64, 64, torch.bfloat16)
    alone = tuning.window_linear_far(arch, 128, 64, 64, torch.bfloat16, alone=True)
    return [
        gate_case(far_keys_kernel, rows, "keys and values", VALUES=True),
        gate_case(far_keys_kernel, alone, "keys", VALUES=False),
        gate_case(far_keys_kernel, rows, "keys and values, scan in segments", VALUES=True, CUT=True),
        gate_case(far_keys_kernel, alone, "keys, scan in segments", VALUES=False, CUT=True),
        gate_case(far_keys_kernel, rows, "keys and values, a state for four heads", VALUES=True, SHARING=1, TEAM=1),
    ]
