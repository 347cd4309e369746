"""Decode for maps too wide for one program: the features of every head, then the state in tiles of features.

    f, e = phi(W_k k), phi(W_q q)                       every matrix is read once, for up to 16 sequences at a time
    S <- e^g S + f v^T,  z <- e^g z + f                 every row of the state is read and written once, by one program
    parts = e S,  masses = e z                          of each tile; decode_kernel adds them up and mixes in the window

For maps that act on each feature alone, added to a state that holds every token. Shapes as in decode.py.
"""

import triton
import triton.language as tl

from .decode_maps_triton import activate, exact_dot, log1p_exp, read_head, token_score


@triton.jit
def features_kernel(
    q, k, inputs, cos, sin, features, gates,
    q_weight, q_bias, k_weight, k_bias, decay, decay_bias, a_log,
    sqb, sqh, skb, skh, sxb, scb, B, H, S,
    SCALE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, SIGNS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, KEYS: tl.constexpr,
    MAP: tl.constexpr, BIASED: tl.constexpr, QUERY_SCALED: tl.constexpr, UNROTATE: tl.constexpr, DECAY: tl.constexpr,
    DT_GAIN: tl.constexpr,
):  # fmt: skip
    """Grid (TILES, then one a sequence for its gates; S + H heads; groups of ROWS sequences).

    features: [B, S + H, N] float32, those of keys first. gates: [B, S, 2], what the state keeps and the gain of what
    is written. KEYS: state heads that share a key head. BF outputs of a map at a time.
    """
    N: tl.constexpr = F * SIGNS
    tile = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.program_id(2) * ROWS
    if tile < TILES:
        row = start + tl.arange(0, ROWS)
        b = tl.minimum(row, B - 1).to(tl.int64)[:, None]  # rows that do not exist are read as the last, never stored
        od = tl.arange(0, DP)
        of = tile * BF + tl.arange(0, BF)
        in_f = (of < F)[None, :]
        at = od[:, None] * F + of[None, :]
        inside = (od < D)[:, None] & in_f
        c, d = cos, sin
        if UNROTATE:
            c, d = cos + b * scb, sin + b * scb
        if head < S:
            w = tl.load(k_weight + head.to(tl.int64) * (D * F) + at, mask=inside, other=0.0)
            x = read_head(k + b * skb + (head // KEYS) * skh, od[None, :], c, d, D, UNROTATE)
        else:
            w = tl.load(q_weight + (head - S).to(tl.int64) * (D * F) + at, mask=inside, other=0.0)
            x = read_head(q + b * sqb + (head - S) * sqh, od[None, :], c, d, D, UNROTATE)
        y = exact_dot(x, w)
        if BIASED:
            if head < S:
                bias = tl.load(k_bias + head * F + of, mask=of < F, other=0.0)
            else:
                bias = tl.load(q_bias + (head - S) * F + of, mask=of < F, other=0.0)
            y += bias.to(tl.float32)[None, :]
        f_a, f_b = activate(y, in_f, MAP)
        if QUERY_SCALED:
            factor = tl.where(head < S, 1.0, SCALE)
            f_a *= factor
            f_b *= factor
        to = features + (b * (S + H) + head) * N + of[None, :]
        stored = (row < B)[:, None] & in_f
        tl.store(to, f_a, mask=stored)
        if SIGNS == 2:
            tl.store(to + F, f_b, mask=stored)
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


@triton.jit
def state_kernel(
    v, features, gates, state, z, z_next, parts, masses, svb, svh, H, S,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, SIGNS: tl.constexpr, TILES: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, DECAY: tl.constexpr, DT_GAIN: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """Grid (TILES, B S). parts: [B, H, TILES, D] float32, masses: [B, H, TILES]; R query heads read a state."""
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
    f_a = tl.load(keys + of, mask=in_f, other=0.0)
    if SIGNS == 2:
        s_b = tl.load(state_h + (at + F * D), mask=inside, other=0.0)
        f_b = tl.load(keys + F + of, mask=in_f, other=0.0)
    if HAS_Z:
        z_h, z_next_h = z + (b * S + s) * N, z_next + (b * S + s) * N
        z_a = tl.load(z_h + of, mask=in_f, other=0.0)
        if SIGNS == 2:
            z_b = tl.load(z_h + F + of, mask=in_f, other=0.0)
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

    for r in range(R):
        e_a = tl.load(queries + r * N + of, mask=in_f, other=0.0)
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
