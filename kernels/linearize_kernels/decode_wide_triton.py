"""Decode for maps too wide for one program: the features of every head, then the state in tiles of features.

    f, e = phi(W_k k), phi(W_q q)                       every matrix is read once, for up to 16 sequences at a time
    S <- e^g S + f v^T,  z <- e^g z + f                 every row of the state is read and written once, by one program
    parts = e S,  masses = e z                          of each tile; decode_kernel adds them up and mixes in the window

For maps that act on each feature alone, added to a state that holds every token; and for learned_softmax, of which the
first launch leaves logits with the largest, and the sum of exponentials, of each tile: the second puts those together.
Shapes as in decode.py.
"""

import triton
import triton.language as tl

from .decode_maps_triton import FLOOR, activate, exact_dot, log1p_exp, read_head, token_score


@triton.jit
def _put(
    y, bias, to, peaks, of, end, factor,
    F: tl.constexpr, SIGNS: tl.constexpr, MAP: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Store the features of y [.., BF] at outputs `of` below `end`: none, or all F. Of a softmax, y and its sums."""
    in_f = of < F
    if BIASED:
        y += tl.load(bias + of, mask=in_f, other=0.0).to(tl.float32)
    if MAP == "learned_softmax":
        axis: tl.constexpr = len(y.shape) - 1
        seen = tl.where(in_f, y, float("-inf"))
        peak = tl.max(seen, axis, keep_dims=True)
        one = tl.arange(0, 1) if axis == 0 else tl.arange(0, 1)[None, :]
        tl.store(peaks + one, peak, mask=one < end)
        tl.store(peaks + 1 + one, tl.sum(tl.exp(seen - peak), axis, keep_dims=True), mask=one < end)
        tl.store(to + of, y, mask=of < end)
    else:
        f_a, f_b = activate(y, in_f, MAP)
        tl.store(to + of, f_a * factor, mask=of < end)
        if SIGNS == 2:
            tl.store(to + F + of, f_b * factor, mask=of < end)


@triton.jit
def _shares(y, peaks, inside, CUTS: tl.constexpr, CP: tl.constexpr):
    """learned_softmax of logits y, some of a row, from the CUTS pairs at `peaks` that features_kernel left for it."""
    at = tl.arange(0, CP)
    largest = tl.load(peaks + 2 * at, mask=at < CUTS, other=float("-inf"))
    total = tl.load(peaks + 2 * at + 1, mask=at < CUTS, other=0.0)
    top = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - top), 0)
    return tl.where(inside, tl.maximum(tl.exp(y - top) / total, FLOOR), 0.0)


@triton.jit(do_not_specialize=["B", "H", "S"])
def features_kernel(
    q, k, inputs, cos, sin, features, peaks, gates,
    q_weight, q_bias, k_weight, k_bias, decay, decay_bias, a_log,
    sqb, sqh, skb, skh, sxb, scb, B, H, S,
    SCALE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, SIGNS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, KEYS: tl.constexpr,
    MAP: tl.constexpr, BIASED: tl.constexpr, QUERY_SCALED: tl.constexpr, UNROTATE: tl.constexpr, DECAY: tl.constexpr,
    DT_GAIN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (TILES, then one a sequence for its gates; S + H heads; groups of ROWS sequences).

    features: [B, S + H, N] float32, those of keys first; peaks: [B, S + H, TILES, 2], of learned_softmax. gates:
    [B, S, 2], what the state keeps and the gain of what is written. KEYS: state heads that share a key head. BF
    outputs of a map at a time. Fewer than 16 ROWS are multiplied one by one, in float32; more by tensor cores. EARLY:
    the next launch may begin.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    N: tl.constexpr = F * SIGNS
    tile = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.program_id(2) * ROWS
    if tile < TILES:
        od = tl.arange(0, DP)
        of = tile * BF + tl.arange(0, BF)
        at = od[:, None] * F + of[None, :]
        inside = (od < D)[:, None] & (of < F)[None, :]
        if head < S:
            w = tl.load(k_weight + head.to(tl.int64) * (D * F) + at, mask=inside, other=0.0)
            x, bias = k + head // KEYS * skh, k_bias + head * F
        else:
            w = tl.load(q_weight + (head - S).to(tl.int64) * (D * F) + at, mask=inside, other=0.0)
            x, bias = q + (head - S) * sqh, q_bias + (head - S) * F
        stride = tl.where(head < S, skb, sqb)
        factor = tl.where(head < S, 1.0, SCALE if QUERY_SCALED else 1.0)
        if ROWS < 16:
            for r in tl.static_range(ROWS):
                each = tl.minimum(start + r, B - 1).to(tl.int64)  # a row that does not exist is the last, never stored
                value = read_head(x + each * stride, od, cos + each * scb, sin + each * scb, D, UNROTATE)
                y = tl.sum(w.to(tl.float32) * value[:, None], 0)
                row = each * (S + H) + head
                to, top = features + row * N, peaks + (row * TILES + tile) * 2
                _put(y, bias, to, top, of, tl.where(start + r < B, F, 0), factor, F, SIGNS, MAP, BIASED)
        else:
            rows = start + tl.arange(0, ROWS)
            b = tl.minimum(rows, B - 1).to(tl.int64)[:, None]
            c, d = cos, sin
            if UNROTATE:
                c, d = cos + b * scb, sin + b * scb
            values = read_head(x + b * stride, od[None, :], c, d, D, UNROTATE)
            if w.dtype == tl.bfloat16:
                y = exact_dot(values, w)
            else:
                y = tl.dot(values, w.to(tl.float32), input_precision="tf32x3")
            line = b * (S + H) + head
            to, top = features + line * N, peaks + (line * TILES + tile) * 2
            _put(y, bias, to, top, of[None, :], tl.where(rows < B, F, 0)[:, None], factor, F, SIGNS, MAP, BIASED)
    else:
        one = start + tile - TILES
        if head < tl.where(one < B, S, 0):
            gain = 1.0
            if DECAY == "fixed":
                g = tl.load(decay + head).to(tl.float32)
            else:
                token = inputs + one.to(tl.int64) * sxb
                gain = log1p_exp(token_score(token, decay + head * C, decay_bias + head, C, CT))
                g = -tl.exp(tl.load(a_log + head).to(tl.float32)) * gain
            gate = gates + (one * S + head) * 2
            tl.store(gate, tl.exp(g))
            if DT_GAIN:
                tl.store(gate + 1, gain)


@triton.jit(do_not_specialize=["H", "S"])
def state_kernel(
    v, features, peaks, gates, state, z, z_next, parts, masses, svb, svh, H, S,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, SIGNS: tl.constexpr, TILES: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, DECAY: tl.constexpr, DT_GAIN: tl.constexpr, HAS_Z: tl.constexpr,
    MAP: tl.constexpr, CUTS: tl.constexpr, CP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (TILES, B S). parts: [B, H, TILES, D] float32, masses: [B, H, TILES]; R query heads read a state.

    CUTS: into how many tiles features_kernel cut a row; CP: the power of two that covers it. EARLY: it may begin before
    features_kernel has ended, so that nothing but what is older is read before the wait.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    N: tl.constexpr = F * SIGNS
    tile = tl.program_id(0)
    b = (tl.program_id(1) // S).to(tl.int64)
    s = tl.program_id(1) % S
    od = tl.arange(0, DP)
    of = tile * BF + tl.arange(0, BF)
    in_d, in_f = od < D, of < F
    state_h = state + (b * S + s) * (N * D)
    at = of[:, None] * D + od[None, :]
    inside = in_f[:, None] & in_d[None, :]
    keys = features + (b * (S + H) + s) * N
    queries = features + (b * (S + H) + S + s * R) * N
    v_new = tl.load(v + b * svb + (s * R // G) * svh + od, mask=in_d, other=0.0).to(tl.float32)
    s_a = tl.load(state_h + at, mask=inside, other=0.0)
    if SIGNS == 2:
        s_b = tl.load(state_h + (at + F * D), mask=inside, other=0.0)
    if HAS_Z:
        z_h, z_next_h = z + (b * S + s) * N, z_next + (b * S + s) * N
        z_a = tl.load(z_h + of, mask=in_f, other=0.0)
        if SIGNS == 2:
            z_b = tl.load(z_h + F + of, mask=in_f, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    f_a = tl.load(keys + of, mask=in_f, other=0.0)
    if MAP == "learned_softmax":
        f_a = _shares(f_a, peaks + (b * (S + H) + s) * (2 * CUTS), in_f, CUTS, CP)
    if SIGNS == 2:
        f_b = tl.load(keys + F + of, mask=in_f, other=0.0)
    keep = 1.0
    if DECAY != "none":
        keep = tl.load(gates + (b * S + s) * 2)
        if DT_GAIN:
            gain = tl.load(gates + (b * S + s) * 2 + 1)
            f_a *= gain
            if SIGNS == 2:
                f_b *= gain

    s_a = s_a * keep + f_a[:, None] * v_new[None, :]
    tl.store(state_h + at, s_a, mask=inside)
    if SIGNS == 2:
        s_b = s_b * keep + f_b[:, None] * v_new[None, :]
        tl.store(state_h + (at + F * D), s_b, mask=inside)
    if HAS_Z:
        z_a = z_a * keep + f_a
        tl.store(z_next_h + of, z_a, mask=in_f)
        if SIGNS == 2:
            z_b = z_b * keep + f_b
            tl.store(z_next_h + F + of, z_b, mask=in_f)

    for r in tl.static_range(R):
        e_a = tl.load(queries + r * N + of, mask=in_f, other=0.0)
        if MAP == "learned_softmax":
            e_a = _shares(e_a, peaks + (b * (S + H) + S + s * R + r) * (2 * CUTS), in_f, CUTS, CP)
        read = e_a[:, None] * s_a
        if SIGNS == 2:
            e_b = tl.load(queries + r * N + F + of, mask=in_f, other=0.0)
            read += e_b[:, None] * s_b
        to = (b * H + s * R + r) * TILES + tile
        tl.store(parts + to * D + od, tl.sum(read, 0), mask=in_d)
        if HAS_Z:
            mass = e_a * z_a
            if SIGNS == 2:
                mass += e_b * z_b
            tl.store(masses + to, tl.sum(mass, 0))
