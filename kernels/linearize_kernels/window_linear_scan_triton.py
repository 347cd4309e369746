"""The states of the linear branch at every block: S_i = sum over blocks j <= i - LAG of phi(x_j)^T v_j.

Run forwards over keys and values it makes the memory that queries read; run backwards over queries and the gradient of
the output it makes the gradient that every key and value receives (the same sum, from the other end). A state is kept
transposed, values by features, so that features are always the columns of a tile. Where that makes too few programs,
sequences are cut into segments: each begins at zero, and readers add what it should have begun with, the sum of the
segments before it. Those sums lie behind the blocks' states.
"""

import torch
import triton
import triton.language as tl

from . import window_linear_tuning as tuning
from .window_linear_tiles import (
    PRECOMPUTED,
    SOFTMAX,
    features,
    gate_case,
    load_matrix,
    load_rows,
    project,
)


@triton.jit
def add_state(state, mass, states_ptr, masses_ptr, at, tile, inside_v, D: tl.constexpr, BF: tl.constexpr):
    """state [BV, BF] and mass [BF], plus those stored under the number `at`."""
    state += tl.load(states_ptr + at * D * BF + tile, mask=inside_v[:, None], other=0.0)
    mass += tl.load(masses_ptr + at * BF + tl.arange(0, BF))
    return state, mass


@triton.jit
def put_state(
    state, mass, states_ptr, masses_ptr, at, tile, inside_v, slice_v, D: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """Store them there, the mass once for all slices of the values."""
    tl.store(states_ptr + at * D * BF + tile, state.to(states_ptr.dtype.element_ty), mask=inside_v[:, None])
    if slice_v == 0:
        tl.store(masses_ptr + at * BF + tl.arange(0, BF), mass)


@triton.jit
def bounds(sequence, sequences_ptr, T, TABLE: tl.constexpr):
    """First token and end of a sequence."""
    if TABLE:
        low = tl.load(sequences_ptr + sequence * 4 + 1)
        high = tl.load(sequences_ptr + sequence * 4 + 2)
    else:
        low = sequence * 0
        high = low + T
    return low, high


@triton.jit(do_not_specialize=["T", "BASE", "SEGMENTS", "PER_SEGMENT"])
def join_kernel(
    part_ptr, part_mass_ptr, states_ptr, masses_ptr, last_ptr, last_mass_ptr, sequences_ptr,
    T, BASE, SEGMENTS, PER_SEGMENT,
    D: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr, TILES: tl.constexpr,
    BACKWARDS: tl.constexpr, LAST: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: BV values of one part of one state head, one sequence. What each segment should have begun with.

    part, part_mass: sums of the segments. Written to rows BASE + segment of states and masses; LAST: and added to last,
    which has the segment's own sum. TILES: state heads times parts.
    """
    VALUES: tl.constexpr = (D + BV - 1) // BV
    index = tl.program_id(0)
    slice_v = index % VALUES
    index = index // VALUES
    one = index % TILES
    sequence = (index // TILES).to(tl.int64)
    value = slice_v * BV + tl.arange(0, BV)
    inside_v = value < D
    tile = value[:, None] * BF + tl.arange(0, BF)[None, :]
    low, high = bounds(sequence, sequences_ptr, T, TABLE)
    final = ((high - low) // C if LAG == 2 else (high - low + C - 1) // C) // PER_SEGMENT
    state = tl.zeros([BV, BF], tl.float32)
    mass = tl.zeros([BF], tl.float32)
    for step in range(0, SEGMENTS):
        segment = SEGMENTS - 1 - step if BACKWARDS else step
        at = (sequence * SEGMENTS + segment) * TILES + one
        to = at + BASE.to(tl.int64) * TILES
        put_state(state, mass, states_ptr, masses_ptr, to, tile, inside_v, slice_v, D, BF)
        if LAST:  # noqa: SIM102 - the first is known when it is compiled
            if segment == final:
                chunk = sequence * TILES + one
                end, end_mass = add_state(state, mass, last_ptr, last_mass_ptr, chunk, tile, inside_v, D, BF)
                put_state(end, end_mass, last_ptr, last_mass_ptr, chunk, tile, inside_v, slice_v, D, BF)
        state, mass = add_state(state, mass, part_ptr, part_mass_ptr, at, tile, inside_v, D, BF)


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
    GROUP: tl.constexpr, BY_DOT: tl.constexpr, EVEN: tl.constexpr,
    BACKWARDS: tl.constexpr, CUT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """One program: one part of the features, BV values, one state head, one segment.

    SHARING, V_SHARING: state heads that read one head of x, or of v (keys under several query heads). GROUP: heads of
    x that are added into one state (gradients of several query heads). CUT: also write the segment's sum, to part and
    part_mass [N, SEGMENTS, S, parts, D, BF]. BY_DOT: sum the mass in the data's dtype (its sums in float32), as the
    state. EVEN: every sequence has whole blocks, and no sinks.
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
    low, high = bounds(sequence, sequences_ptr, T, TABLE)
    if TABLE:
        row = tl.load(sequences_ptr + sequence * 4).to(tl.int64)
        place = tl.load(sequences_ptr + sequence * 4 + 3).to(tl.int64)
    else:
        row = sequence.to(tl.int64)
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
    chunk = (sequence.to(tl.int64) * STATE_HEADS + head) * PARTS + part  # of first and last
    state = tl.zeros([BV, BF], tl.float32)
    mass = tl.zeros([BF], tl.float32)
    if FIRST:  # noqa: SIM102 - the first is known when it is compiled
        if segment == 0:
            state, mass = add_state(state, mass, first_ptr, first_mass_ptr, chunk, tile, inside_v, D, BF)
    side = 1.0 - 2.0 * part if PARTS == 2 else 1.0
    if GROUP == 1 and MAP != SOFTMAX and MAP != PRECOMPUTED:
        kept = load_matrix(weight_ptr + head.to(tl.int64) * D * F, F, D, BD, F, BF)
        kept = (kept * side).to(kept.dtype)  # the second part's map is that of -W
    if BY_DOT:
        top = tl.arange(0, 16)[:, None] == 0
        sums = tl.where(top, mass[None, :], 0.0)  # the mass is its first row

    for step in range(0, (end - begin) * GROUP):
        offset = step // GROUP
        reader = head * GROUP + step % GROUP if BACKWARDS else head // SHARING
        giver = reader if BACKWARDS else head // V_SHARING
        number = end - 1 - offset if BACKWARDS else begin + offset
        source = number + LAG if BACKWARDS else number - LAG
        start_t = low + source * C
        t = start_t + token
        if EVEN:
            first = tl.zeros([C], tl.int32) + start_t
            live = (first >= low) & (first < high)  # all of them, or none
        else:
            live = (t >= low) & (t < high)
        x_base = x_ptr + row * s_xb + reader.to(tl.int64) * s_xh + start_t.to(tl.int64) * s_xt
        if MAP == PRECOMPUTED:
            column = part * BF + feature
            phi = tl.load(
                x_base + token[:, None] * s_xt + column[None, :], mask=live[:, None] & (column < F)[None, :], other=0.0
            ).to(tl.float32)
        else:
            x = load_rows(x_base, live, s_xt, D, BD, C)
            if MAP == SOFTMAX:
                y = project(x, None, None, reader, F, BF, MAP)
            elif GROUP == 1:
                y = tl.dot(x, kept, input_precision="ieee")
                if bias_ptr is not None:
                    y += side * tl.load(bias_ptr + head * F + feature, mask=feature < F, other=0.0)[None, :]
            else:
                weight = load_matrix(weight_ptr + reader.to(tl.int64) * D * F, F, D, BD, F, BF)
                y = project(x, weight, bias_ptr, reader, F, BF, MAP) * side
            phi = features(y, MAP, F, BF, 1)
        written_rows = live if BACKWARDS or EVEN else live & (t >= low + sinks)
        written = tl.load(
            v_ptr + row * s_vb + giver.to(tl.int64) * s_vh + start_t.to(tl.int64) * s_vt
            + token[:, None] * s_vt + value[None, :], mask=written_rows[:, None] & inside_v[None, :], other=0.0,
        )  # fmt: skip
        if BACKWARDS:
            at_row = (row * ROW_HEADS + reader) * T + start_t
            if EVEN:
                at_row = tl.multiple_of(at_row, 16)
            at_row += token
            scale = tl.load(row_scale_ptr + at_row, mask=live, other=0.0)
            heavy = tl.load(row_mass_ptr + at_row, mask=live, other=0.0)
            if BY_DOT:
                heavy = tl.where(scale > 0.0, heavy / scale, 0.0)
        else:
            heavy = ((t >= low + sinks) & (t < high)).to(tl.float32)
        if not BY_DOT:
            mass += tl.sum(phi * heavy[:, None], 0)
        if BACKWARDS:
            phi = phi * scale[:, None]
        phi = phi.to(written.dtype)
        if BY_DOT:  # tensor cores add up a column in fewer steps than threads do
            sums = tl.dot(tl.where(top, heavy[None, :], 0.0).to(phi.dtype), phi, sums, input_precision="ieee")
        state = tl.dot(tl.trans(written), phi, state, input_precision="ieee")
        if step % GROUP == GROUP - 1:
            if BY_DOT:
                mass = tl.sum(sums, 0)
            if number < count:
                at = ((place + number) * STATE_HEADS + head) * PARTS + part
                put_state(state, mass, states_ptr, masses_ptr, at, tile, inside_v, slice_v, D, BF)
            if LAST:  # noqa: SIM102 - the first is known when it is compiled
                if number == final:
                    put_state(state, mass, last_ptr, last_mass_ptr, chunk, tile, inside_v, slice_v, D, BF)
    if CUT:
        if BY_DOT:
            mass = tl.sum(sums, 0)
        at = ((sequence * SEGMENTS + segment).to(tl.int64) * STATE_HEADS + head) * PARTS + part
        put_state(state, mass, part_ptr, part_mass_ptr, at, tile, inside_v, slice_v, D, BF)


def gate_cases(arch: int = 90):  # type: ignore[no-untyped-def]
    """Default configurations in bfloat16, for the compile gate."""
    rows = tuning.window_linear_scan(arch, 128, 64, 64, torch.bfloat16)
    absent = ("first_ptr", "first_mass_ptr", "last_ptr", "last_mass_ptr")
    whole = (*absent, "part_ptr", "part_mass_ptr")
    rowless = ("row_scale_ptr", "row_mass_ptr")
    joined = tuning.window_linear_join(arch, 128)
    return [
        gate_case(scan_kernel, rows, "forwards", absent=(*whole, *rowless)),
        gate_case(scan_kernel, rows, "forwards, in segments", absent=(*absent, *rowless), CUT=True),
        gate_case(scan_kernel, rows, "backwards", absent=whole, BACKWARDS=True),
        gate_case(scan_kernel, rows, "backwards, in segments", absent=absent, BACKWARDS=True, CUT=True),
        gate_case(join_kernel, joined, "segments", absent=absent, TILES=64),
    ]
