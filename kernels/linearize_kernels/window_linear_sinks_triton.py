"""Gradients of the sinks: the first tokens of a sequence, which every later block of queries reads by softmax."""

import torch
import triton
import triton.language as tl

from . import window_linear_tuning as tuning
from .softcap_triton import GEMMA, bounded
from .window_linear_tiles import LN2, NO_MAP, SHARED, gate_case, load_columns, load_rows, store_columns


@triton.jit(do_not_specialize=["T", "PIECES", "EACH", "sinks"])
def sink_pairs_kernel(
    q_ptr, do_ptr, sink_k_ptr, sink_v_ptr, level_ptr, row_ptr, shift_ptr, pick_ptr, dk_ptr, dv_ptr,
    sequences_ptr, s_qb, s_qh, s_qt, s_db, s_dh, s_dt, s_ksb, s_ksh, s_kst, s_vsb, s_vsh, s_vst,
    T, HEADS, PIECES, EACH, scale, sinks,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, MIX: tl.constexpr,
    KEYS: tl.constexpr, BZ: tl.constexpr, BOUND: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: EACH blocks of queries of one head and sequence, BN channels. BOUND: as in read_kernel.

    Writes dk, dv [N, PIECES, H, BZ, D] float32, to be summed over pieces and over the query heads of a key head.
    """
    SLICES: tl.constexpr = (D + BN - 1) // BN
    index = tl.program_id(0)
    first_n = (index % SLICES) * BN
    index = index // SLICES
    head = index % HEADS
    index = index // HEADS
    piece = index % PIECES
    sequence = (index // PIECES).to(tl.int64)
    if TABLE:
        row = tl.load(sequences_ptr + sequence * 4).to(tl.int64)
        low = tl.load(sequences_ptr + sequence * 4 + 1)
        high = tl.load(sequences_ptr + sequence * 4 + 2)
    else:
        row = sequence
        low = head * 0
        high = low + T
    count = (high - low + C - 1) // C
    token = tl.arange(0, C)
    slot = tl.arange(0, BZ)
    kept = slot < sinks
    wide = head.to(tl.int64)
    key_head = (head // KEYS).to(tl.int64)
    k = load_rows(sink_k_ptr + sequence * s_ksb + key_head * s_ksh, kept, s_kst, D, BD, BZ)
    v = load_rows(sink_v_ptr + sequence * s_vsb + key_head * s_vsh, kept, s_vst, D, BD, BZ)
    dk = tl.zeros([BZ, BN], tl.float32)
    dv = tl.zeros([BZ, BN], tl.float32)
    for number in range(tl.maximum(piece * EACH, 2), tl.minimum(piece * EACH + EACH, count)):
        start = low + number * C
        live = start + token < high
        first_t = start.to(tl.int64)
        at_row = (row * HEADS + wide) * T + start + token
        q_base = q_ptr + row * s_qb + wide * s_qh + first_t * s_qt
        do_base = do_ptr + row * s_db + wide * s_dh + first_t * s_dt
        level = tl.load(level_ptr + at_row, mask=live, other=float("inf"))
        q = load_rows(q_base, live, s_qt, D, BD, C)
        s, slope = bounded(tl.dot(k, tl.trans(q), input_precision="ieee") * scale, BOUND)
        p = tl.exp2(s - level[None, :])
        p = tl.where(kept[:, None], p, 0.0)
        do = load_columns(do_base, live, s_dt, first_n, D, BN, C)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        do = load_rows(do_base, live, s_dt, D, BD, C)
        shift = tl.load(shift_ptr + at_row, mask=live, other=0.0)
        p = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - shift[None, :])
        if MAP != NO_MAP and MIX == SHARED:
            r = tl.load(row_ptr + at_row, mask=live, other=0.0)
            pick = tl.load(pick_ptr + at_row, mask=live, other=-1)
            p -= tl.where(pick[None, :] == 2 * C + slot[:, None], r[None, :], 0.0)
        if BOUND > 0.0:
            p *= slope
        q = load_columns(q_base, live, s_qt, first_n, D, BN, C)
        dk = tl.dot((p * (scale * LN2)).to(q.dtype), q, dk, input_precision="ieee")
    at = ((sequence * PIECES + piece) * HEADS + head) * BZ * D
    every = slot >= 0
    store_columns(dk_ptr + at, dk, every, D, first_n, D, BN, BZ)
    store_columns(dv_ptr + at, dv, every, D, first_n, D, BN, BZ)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_queries(arch, 128, 64, 64, torch.bfloat16)
    held = tuning.window_linear_queries(arch, 128, 64, 64, torch.bfloat16, bounded=True)
    return [
        gate_case(sink_pairs_kernel, rows, "shared mix", BZ=16),
        gate_case(sink_pairs_kernel, held, "bounded, shared mix", BZ=16, KEYS=2, BOUND=GEMMA),
    ]
