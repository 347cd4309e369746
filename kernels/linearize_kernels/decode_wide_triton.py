"""Decode for maps too wide for one program: the features of every head, then the state in tiles of features.

    f, e = phi(W_k k), phi(W_q q)                       every matrix is read once, for up to 16 sequences at a time
    S <- e^g S + f v^T,  z <- e^g z + f                 every row of the state is read and written once, by one program
    parts = e S,  masses = e z                          of each tile; decode_kernel adds them up and mixes in the window

For maps that act on each feature alone, added to a state that holds every token; and for learned_softmax, of which the
first launch leaves logits with the largest, and the sum of exponentials, of each tile: the second puts those together.
A program of the second goes over several tiles of a state, so that sums across threads, and what parts are, stay few.
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
def _softmax_of(peaks, row, live, CUTS: tl.constexpr, CP: tl.constexpr):
    """Largest logit and one over the sum of exponentials of rows, from the CUTS pairs that features_kernel left.

    row: [R], whose first pair is at 2 CUTS row; `live`: which of them there are.
    """
    at = tl.arange(0, CP)
    inside = live[:, None] & (at < CUTS)[None, :]
    place = peaks + row[:, None] * (2 * CUTS) + 2 * at[None, :]
    largest = tl.load(place, mask=inside, other=float("-inf"))
    total = tl.load(place + 1, mask=inside, other=0.0)
    top = tl.where(live, tl.max(largest, 1), 0.0)
    return top, 1.0 / tl.sum(tl.where(live[:, None], total * tl.exp(largest - top[:, None]), 1.0), 1)


@triton.jit(do_not_specialize=["B", "H", "S"])
def features_kernel(
    q, k, inputs, cos, sin, features, peaks, gates,
    q_weight, q_bias, k_weight, k_bias, decay, decay_bias, a_log,
    sqb, sqh, skb, skh, sxb, scb, B, H, S,
    SCALE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, SIGNS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, KEYS: tl.constexpr,
    MAP: tl.constexpr, BIASED: tl.constexpr, QUERY_SCALED: tl.constexpr, UNROTATE: tl.constexpr, DECAY: tl.constexpr,
    DT_GAIN: tl.constexpr, EARLY: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (TILES, then one a sequence for its gates; S + H heads; groups of ROWS sequences).

    features: [B, S + H, N] float32, those of keys first; peaks: [B, S + H, TILES, 2], of learned_softmax. gates:
    [B, S, 2], what the state keeps and the gain of what is written. KEYS: state heads that share a key head. BF
    outputs of a map at a time. Fewer than 16 ROWS are multiplied one by one, in float32; more by tensor cores. EARLY:
    the next launch may begin. WAIT: q and k are made by the launch before, which may not have ended; weights are older.
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
        if WAIT:
            tl.extra.cuda.gdc_wait()
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
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, BF: tl.constexpr, EACH: tl.constexpr, SPLITS: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, G: tl.constexpr, DECAY: tl.constexpr, DT_GAIN: tl.constexpr,
    HAS_Z: tl.constexpr, MAP: tl.constexpr, CUTS: tl.constexpr, CP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, B S). parts: [B, H, SPLITS, D] float32, masses: [B, H, SPLITS]; R query heads read a state.

    A program goes over EACH tiles of BF features and loads the next while it reads one. CUTS: into how many tiles
    features_kernel cut a row. RP, CP: powers of two that cover R and CUTS. EARLY: it may begin before features_kernel
    has ended, so that nothing but what is older is read before the wait.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    b = (tl.program_id(1) // S).to(tl.int64)
    s = tl.program_id(1) % S
    od = tl.arange(0, DP)
    orow = tl.arange(0, RP)
    in_d, in_r = od < D, orow < R
    of = split * (EACH * BF) + tl.arange(0, BF)
    end = tl.minimum((split + 1) * (EACH * BF), N)
    head = b * S + s
    state_h = state + head * (N * D)
    v_new = tl.load(v + b * svb + (s * R // G) * svh + od, mask=in_d, other=0.0).to(tl.float32)
    tile = tl.load(state_h + (of[:, None] * D + od[None, :]), mask=(of < end)[:, None] & in_d[None, :], other=0.0)
    z_tile = tl.zeros([BF], tl.float32)
    if HAS_Z:
        z_tile = tl.load(z + head * N + of, mask=of < end, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    keep = 1.0
    gain = 1.0
    if DECAY != "none":
        keep = tl.load(gates + head * 2)
        if DT_GAIN:
            gain = tl.load(gates + head * 2 + 1)
    key = b * (S + H) + s + tl.arange(0, 1)
    query = b * (S + H) + S + s * R + orow
    if MAP == "learned_softmax":
        top_k, share_k = _softmax_of(peaks, key, key >= 0, CUTS, CP)
        top_q, share_q = _softmax_of(peaks, query, in_r, CUTS, CP)

    read = tl.zeros([RP, DP], tl.float32)
    mass = tl.zeros([RP, BF], tl.float32)
    for _ in range(EACH):
        now, z_now = tile, z_tile
        in_f = of < end
        later = of + BF
        tile = tl.load(
            state_h + (later[:, None] * D + od[None, :]), mask=(later < end)[:, None] & in_d[None, :], other=0.0
        )
        inside = in_r[:, None] & in_f[None, :]
        f = tl.load(features + key * N + of, mask=in_f, other=0.0)
        e = tl.load(features + (query[:, None] * N + of[None, :]), mask=inside, other=0.0)
        if MAP == "learned_softmax":
            f = tl.where(in_f, tl.maximum(tl.exp(f - top_k) * share_k, FLOOR), 0.0)
            e = tl.where(inside, tl.maximum(tl.exp(e - top_q[:, None]) * share_q[:, None], FLOOR), 0.0)
        f *= gain
        now = now * keep + f[:, None] * v_new[None, :]
        tl.store(state_h + (of[:, None] * D + od[None, :]), now, mask=in_f[:, None] & in_d[None, :])
        read += tl.sum(e[:, :, None] * now[None, :, :], 1)
        if HAS_Z:
            z_now = z_now * keep + f
            tl.store(z_next + head * N + of, z_now, mask=in_f)
            mass += e * z_now[None, :]
            z_tile = tl.load(z + head * N + later, mask=later < end, other=0.0)
        of = later
    to = (b * H + s * R + orow) * SPLITS + split
    tl.store(parts + (to[:, None] * D + od[None, :]), read, mask=in_r[:, None] & in_d[None, :])
    if HAS_Z:
        tl.store(masses + to, tl.sum(mass, 1), mask=in_r)
