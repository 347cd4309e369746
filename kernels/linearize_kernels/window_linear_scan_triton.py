"""The states of the linear branch at every block: S_i = sum over blocks j <= i - LAG of phi(x_j)^T v_j.

Run forwards over keys and values it makes the memory that queries read; run backwards over queries and the gradient of
the output it makes the gradient that every key and value receives (the same sum, from the other end). A state is kept
transposed, values by features, so that features are always the columns of a tile. Long sequences are cut into
segments: one pass adds up each segment, a second starts every segment from the sum of those before it.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .window_linear_tiles import (
    PRECOMPUTED,
    SOFTMAX,
    features,
    gate_case,
    load_matrix,
    load_rows,
    project,
)


@triton.jit(do_not_specialize=["T", "BLOCKS", "SEGMENTS", "PER_SEGMENT", "ROW_HEADS", "sinks"])
def scan_kernel(
    x_ptr, v_ptr, weight_ptr, bias_ptr,  # what makes features, what is written, the map
    row_scale_ptr, row_mass_ptr,  # backwards: factors of each row's features in the state and in its mass
    first_ptr, first_mass_ptr, part_ptr, part_mass_ptr,
    states_ptr, masses_ptr, last_ptr, last_mass_ptr, sequences_ptr,
    s_xb, s_xh, s_xt, s_vb, s_vh, s_vt,
    T, BLOCKS, SEGMENTS, PER_SEGMENT, STATE_HEADS, ROW_HEADS, sinks,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PARTS: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, LAG: tl.constexpr, SHARING: tl.constexpr, V_SHARING: tl.constexpr,
    GROUP: tl.constexpr,
    BACKWARDS: tl.constexpr, TOTALS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: one part of the features, BV values, one state head, one segment.

    SHARING, V_SHARING: state heads that read one head of x, or of v (keys under several query heads). GROUP: heads of
    x that are added into one state (gradients of several query heads). TOTALS: only add up the segment, into part and
    part_mass.
    """
    VALUES: tl.constexpr = (D + BV - 1) // BV
    index = tl.program_id(0)
    part = index % PARTS
    index = index // PARTS
    slice_v = index % VALUES
    index = index // VALUES
    head = index % STATE_HEADS
    index = index // STATE_HEADS
    segment = index % SEGMENTS
    sequence = index // SEGMENTS
    if TABLE:
        row = tl.load(sequences_ptr + sequence * 4).to(tl.int64)
        low = tl.load(sequences_ptr + sequence * 4 + 1)
        high = tl.load(sequences_ptr + sequence * 4 + 2)
        place = tl.load(sequences_ptr + sequence * 4 + 3).to(tl.int64)
    else:
        row = sequence.to(tl.int64)
        low = sequence * 0
        high = low + T
        place = row * BLOCKS
    count = (high - low + C - 1) // C
    final = (high - low) // C if LAG == 2 else count
    steps = tl.maximum(count, final + 1) if LAST else count
    begin = segment * PER_SEGMENT
    end = tl.minimum(begin + PER_SEGMENT, steps)

    token = tl.arange(0, C)
    value = slice_v * BV + tl.arange(0, BV)
    feature = tl.arange(0, BF)
    inside_v = value < D
    # One state: [D, BF] values by features; one mass: [BF].
    tile = value[:, None] * BF + feature[None, :]
    size: tl.constexpr = D * BF
    chunk = (sequence.to(tl.int64) * STATE_HEADS + head) * PARTS + part  # of first and last
    state = tl.zeros([BV, BF], tl.float32)
    mass = tl.zeros([BF], tl.float32)
    if FIRST:
        state += tl.load(first_ptr + chunk * size + tile, mask=inside_v[:, None], other=0.0)
        mass += tl.load(first_mass_ptr + chunk * BF + feature)
    if not TOTALS:
        # The other segments' sums, those before this one; running backwards, those after it.
        start = segment + 1 if BACKWARDS else segment * 0
        stop = SEGMENTS if BACKWARDS else segment
        for other in range(start, stop):
            at = ((sequence * SEGMENTS + other).to(tl.int64) * STATE_HEADS + head) * PARTS + part
            state += tl.load(part_ptr + at * size + tile, mask=inside_v[:, None], other=0.0)
            mass += tl.load(part_mass_ptr + at * BF + feature)
    side = 1.0 - 2.0 * part if PARTS == 2 else 1.0
    if GROUP == 1 and MAP != SOFTMAX and MAP != PRECOMPUTED:
        kept = load_matrix(weight_ptr + head.to(tl.int64) * D * F, F, D, BD, F, BF)

    for step in range(0, (end - begin) * GROUP):
        offset = step // GROUP
        reader = head * GROUP + step % GROUP if BACKWARDS else head // SHARING
        giver = reader if BACKWARDS else head // V_SHARING
        number = end - 1 - offset if BACKWARDS else begin + offset
        source = number + LAG if BACKWARDS else number - LAG
        start_t = low + source * C
        t = start_t + token
        live = (t >= low) & (t < high)
        x_base = x_ptr + row * s_xb + reader.to(tl.int64) * s_xh + start_t.to(tl.int64) * s_xt
        if MAP == PRECOMPUTED:
            column = part * BF + feature
            phi = tl.load(
                x_base + token[:, None] * s_xt + column[None, :], mask=live[:, None] & (column < F)[None, :], other=0.0
            ).to(tl.float32)
        else:
            x = load_rows(x_base, live, s_xt, D, BD, C)
            if GROUP == 1 and MAP != SOFTMAX:
                y = project(x, kept, bias_ptr, head, F, BF, MAP)
            elif MAP != SOFTMAX:
                weight = load_matrix(weight_ptr + reader.to(tl.int64) * D * F, F, D, BD, F, BF)
                y = project(x, weight, bias_ptr, reader, F, BF, MAP)
            else:
                y = project(x, None, None, reader, F, BF, MAP)
            phi = features(y * side, MAP, F, BF, 1)
        written = tl.load(
            v_ptr + row * s_vb + giver.to(tl.int64) * s_vh + start_t.to(tl.int64) * s_vt
            + token[:, None] * s_vt + value[None, :], mask=live[:, None] & inside_v[None, :], other=0.0,
        )  # fmt: skip
        if BACKWARDS:
            at_row = (row * ROW_HEADS + reader) * T + t
            scale = tl.load(row_scale_ptr + at_row, mask=live, other=0.0)
            heavy = tl.load(row_mass_ptr + at_row, mask=live, other=0.0)
            mass += tl.sum(phi * heavy[:, None], 0)
            phi = phi * scale[:, None]
        else:
            live = live & (t >= low + sinks)
            phi = tl.where(live[:, None], phi, 0.0)
            mass += tl.sum(phi, 0)
        state = tl.dot(tl.trans(written), phi.to(written.dtype), state, input_precision="ieee")
        if not TOTALS and step % GROUP == GROUP - 1:
            if number < count:
                at = ((place + number) * STATE_HEADS + head) * PARTS + part
                tl.store(states_ptr + at * size + tile, state.to(states_ptr.dtype.element_ty), mask=inside_v[:, None])
                if slice_v == 0:
                    tl.store(masses_ptr + at * BF + feature, mass)
            if LAST:  # noqa: SIM102 - the first is known when it is compiled
                if number == final:
                    tl.store(last_ptr + chunk * size + tile, state, mask=inside_v[:, None])
                    if slice_v == 0:
                        tl.store(last_mass_ptr + chunk * BF + feature, mass)
    if TOTALS:
        at = ((sequence * SEGMENTS + segment).to(tl.int64) * STATE_HEADS + head) * PARTS + part
        tl.store(part_ptr + at * size + tile, state, mask=inside_v[:, None])
        if slice_v == 0:
            tl.store(part_mass_ptr + at * BF + feature, mass)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_scan(arch, 128, 64, 64, torch.bfloat16)
    absent = ("first_ptr", "first_mass_ptr", "last_ptr", "last_mass_ptr")
    forth = gate_case(scan_kernel, rows, "forwards", absent=(*absent, "row_scale_ptr", "row_mass_ptr"))
    return [forth, gate_case(scan_kernel, rows, "backwards", absent=absent, BACKWARDS=True)]
