"""The block that leaves the window enters the state: the decode kernel's work once in W tokens.

    S <- e^{G_W} S + sum_j e^{G_W - G_j} k_j v_j^T                                           additive, as chunk_linear
    S <- e^{g_j} S + beta_j k_j (v_j - k_j e^{g_j} S)^T, token by token                      delta rule

G is the running sum of the block's log decays. Features are made transposed, [F, tokens], as W^T K^T: the product with
the values then needs no transpose of an accumulator.
"""

import triton
import triton.language as tl

from .decode_maps_triton import activate, exact_dot, project, unit


@triton.jit
def fold_linear(
    state, z, z_next, ring_k, ring_v, ring_g, weight, bias, a_log,
    s, rows, slots, head, ov, first_f, sinks_left,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr, W: tl.constexpr,
    PART: tl.constexpr, MAP: tl.constexpr, LEARNED: tl.constexpr, BIASED: tl.constexpr, DECAY: tl.constexpr,
    DT_GAIN: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """Add the W tokens from ring offset `rows` (gates: slot `slots`) to the value channels `ov` of state head `head`.

    PART tokens at a time: a whole block at once would take the registers from the reads of every other step.
    """
    N: tl.constexpr = F * SIGNS
    od, of = tl.arange(0, DP), tl.arange(0, FP)
    in_d, in_f, in_v = od < D, of < F, ov < D
    at = state + head * (N * D) + (of[:, None] * D + ov[None, :])
    inside = in_f[:, None] & in_v[None, :]
    s_a = tl.load(at, mask=inside, other=0.0)
    s_b = tl.load(at + F * D, mask=inside, other=0.0) if SIGNS == 2 else s_a
    z_a = tl.zeros([FP], tl.float32)
    z_b = z_a
    if HAS_Z:
        z_a = tl.load(z + head * N + of, mask=in_f, other=0.0)
        if SIGNS == 2:
            z_b = tl.load(z + head * N + F + of, mask=in_f, other=0.0)

    for start in range(0, W, PART):
        ot = start + tl.arange(0, PART)
        in_t = ot < W
        keys = tl.load(ring_k + rows + (ot[None, :] * D + od[:, None]), mask=in_d[:, None] & in_t[None, :], other=0.0)
        if LEARNED:
            w = tl.load(
                weight + s * D * F + (od[None, :] * F + of[:, None]), mask=in_d[None, :] & in_f[:, None], other=0.0
            )
            if w.dtype == keys.dtype and w.dtype != tl.float32:
                y = tl.dot(w, keys)
            else:
                y = exact_dot(w.to(tl.float32), keys)
            if BIASED:
                y += tl.load(bias + s * F + of, mask=in_f, other=0.0).to(tl.float32)[:, None]
        else:
            y = keys.to(tl.float32)
        f_a, f_b = activate(y, in_f[:, None], MAP)

        written = (in_t & (ot >= sinks_left)).to(tl.float32)
        if DECAY == "channel":
            gates = ring_g + slots * N + (ot[None, :] * N + of[:, None])
            g_a = tl.load(gates, mask=in_f[:, None] & in_t[None, :], other=0.0)
            f_a *= tl.exp(tl.sum(g_a, 1)[:, None] - tl.cumsum(g_a, 1))
            keep_a = tl.exp(tl.sum(g_a, 1))
            s_a *= keep_a[:, None]
            z_a *= keep_a
            if SIGNS == 2:
                g_b = tl.load(gates + F, mask=in_f[:, None] & in_t[None, :], other=0.0)
                f_b *= tl.exp(tl.sum(g_b, 1)[:, None] - tl.cumsum(g_b, 1))
                keep_b = tl.exp(tl.sum(g_b, 1))
                s_b *= keep_b[:, None]
                z_b *= keep_b
        elif DECAY != "none":
            g = tl.load(ring_g + slots + ot, mask=in_t, other=0.0)
            written *= tl.exp(tl.sum(g, 0) - tl.cumsum(g, 0))
            if DT_GAIN:
                written *= -g * tl.exp(-tl.load(a_log + s).to(tl.float32))
            keep = tl.exp(tl.sum(g, 0))
            s_a *= keep
            s_b *= keep
            z_a *= keep
            z_b *= keep
        f_a *= written[None, :]
        values = tl.load(ring_v + rows + (ot[:, None] * D + ov[None, :]), mask=in_t[:, None] & in_v[None, :], other=0.0)
        s_a += exact_dot(f_a, values)
        if HAS_Z:
            z_a += tl.sum(f_a, 1)
        if SIGNS == 2:
            f_b *= written[None, :]
            s_b += exact_dot(f_b, values)
            if HAS_Z:
                z_b += tl.sum(f_b, 1)

    tl.store(at, s_a, mask=inside)
    if SIGNS == 2:
        tl.store(at + F * D, s_b, mask=inside)
    if HAS_Z:
        tl.store(z_next + head * N + of, z_a, mask=of < first_f)
        if SIGNS == 2:
            tl.store(z_next + head * N + F + of, z_b, mask=of < first_f)


@triton.jit
def fold_delta(
    state, ring_k, ring_v, ring_g, ring_beta, weight, bias, cos, sin, a_log,
    s, rows, slots, head, ov, sinks_left,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr, W: tl.constexpr,
    MAP: tl.constexpr, LEARNED: tl.constexpr, BIASED: tl.constexpr, UNIT: tl.constexpr, DECAY: tl.constexpr,
    DT_GAIN: tl.constexpr,
):  # fmt: skip
    """As fold_linear, under the delta rule: every write depends on the one before it."""
    N: tl.constexpr = F * SIGNS
    of = tl.arange(0, FP)
    in_f, in_v = of < F, ov < D
    at = state + head * (N * D) + (of[:, None] * D + ov[None, :])
    inside = in_f[:, None] & in_v[None, :]
    s_a = tl.load(at, mask=inside, other=0.0)
    s_b = s_a
    if SIGNS == 2:
        s_b = tl.load(at + F * D, mask=inside, other=0.0)
    for t in range(W):
        f_a, f_b = activate(
            project(ring_k + rows + t * D, weight + s * D * F, bias + s * F, cos, sin, D, DP, F, FP, LEARNED, BIASED,
                    False),
            in_f, MAP,
        )  # fmt: skip
        if UNIT:
            f_a, f_b = unit(f_a, f_b, SIGNS)
        beta = tl.load(ring_beta + slots + t) * (t >= sinks_left).to(tl.float32)
        if DECAY != "none":
            g = tl.load(ring_g + slots + t)
            s_a *= tl.exp(g)
            s_b *= tl.exp(g)
            if DT_GAIN:
                f_a *= -g * tl.exp(-tl.load(a_log + s).to(tl.float32))
                f_b *= -g * tl.exp(-tl.load(a_log + s).to(tl.float32))
        written = tl.load(ring_v + rows + t * D + ov, mask=in_v, other=0.0).to(tl.float32)
        written -= tl.sum(f_a[:, None] * s_a, 0)
        if SIGNS == 2:
            written -= tl.sum(f_b[:, None] * s_b, 0)
        written *= beta
        s_a += f_a[:, None] * written[None, :]
        if SIGNS == 2:
            s_b += f_b[:, None] * written[None, :]
    tl.store(at, s_a, mask=inside)
    if SIGNS == 2:
        tl.store(at + F * D, s_b, mask=inside)
