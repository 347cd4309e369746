"""One token of every head in one launch: maps, window, state, mix; ring, sinks and state change in place.

A program owns GROUP query heads of one key head and BV value channels: those slices of the state that nobody else
reads. What siblings do read is never written while they may: the ring's slot of the new token is not read by anyone
(each has the token in registers), the slot's old content left the window a block ago, and z and the position are
changed after the launch (z goes to z_next). A block that leaves the window is folded in by the launch of the block's
last token, after its reads.
"""

import triton
import triton.language as tl

from .decode_fold_triton import fold_delta, fold_linear
from .decode_maps_triton import activate, log1p_exp, log_sigmoid, project, read_head, token_score, unit
from .softcap_triton import bounded

TINY = tl.constexpr(1e-30)
NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def _window(ring_k, ring_v, ow, od, ov, seen, D: tl.constexpr, W: tl.constexpr):
    """Keys and values of the ring's slots `ow`; values are zero where not `seen`, keys are for their reader to hide.

    The slot of the new token may be half written. Loads do not wait for the position, which `seen` is made of.
    """
    inside = (ow < 2 * W)[:, None]
    keys = tl.load(ring_k + (ow[:, None] * D + od[None, :]), mask=inside & (od < D)[None, :], other=0.0)
    values = tl.load(ring_v + (ow[:, None] * D + ov[None, :]), mask=inside & (ov < D)[None, :], other=0.0)
    return keys, tl.where(seen[:, None], values, 0.0)


@triton.jit
def decode_kernel(
    q, k, v, q_lin, k_lin, inputs, cos, sin, out,
    state, z, z_next, position, ring_k, ring_v, ring_g, ring_beta, sink_k, sink_v,
    q_weight, q_bias, k_weight, k_bias, decay, decay_bias, a_log, beta_weight, beta_bias, mix_weight, mix_bias,
    window_logit, linear_scale, norm_weight, parts, masses,
    sqb, sqh, skb, skh, svb, svh, sxb, scb, H, HK, S,
    SCALE: tl.constexpr, BOUND: tl.constexpr, WINDOW_WEIGHT: tl.constexpr, POWER: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr,
    W: tl.constexpr, SLOTS: tl.constexpr, PART: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr,
    C: tl.constexpr, CT: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    MAP: tl.constexpr, KEY_MAP: tl.constexpr, LEARNED: tl.constexpr, BIASED: tl.constexpr, UNIT: tl.constexpr,
    QUERY_SCALED: tl.constexpr, UNROTATE: tl.constexpr, OWN: tl.constexpr, WRITE: tl.constexpr, LAGGED: tl.constexpr,
    DECAY: tl.constexpr, DT_GAIN: tl.constexpr, NEGATIVE: tl.constexpr, NORM: tl.constexpr, MIX: tl.constexpr,
    PARTS: tl.constexpr, PP: tl.constexpr, HOLD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of value channels, B H / GROUP). Shapes in decode.py; D channels, F outputs of the map a sign.

    PARTS: 0, or into how many tiles decode_wide_triton cut the features; it has read the state, its sums are here.
    PP: the power of two that covers PARTS. EARLY: it may begin before those sums are there, and waits for them.
    HOLD: the window's tokens are loaded first and stay in registers for all R heads; else after the state was read,
    with fewer registers and more latency. BOUND: on the window's scores; 0.0: none.
    """
    N: tl.constexpr = F * SIGNS
    HAS_Z: tl.constexpr = (NORM == "shared") or (NORM == "own")
    tile = tl.program_id(0)
    groups = H // GROUP
    b = (tl.program_id(1) // groups).to(tl.int64)
    first = tl.program_id(1) % groups * GROUP
    hk = first // G
    od = tl.arange(0, DP)
    ov = tile * BV + tl.arange(0, BV)
    of = tl.arange(0, FP)
    in_d, in_v, in_f = od < D, ov < D, of < F
    p = tl.load(position + b)
    k_new = tl.load(k + b * skb + hk * skh + od, mask=in_d, other=0.0)
    v_new = tl.load(v + b * svb + hk * svh + ov, mask=in_v, other=0.0)
    v_f = v_new.to(tl.float32)
    x = inputs + b * sxb
    if UNROTATE:
        cos += b * scb
        sin += b * scb

    # Written by one program of all that hold the same: limits, for the interpreter mistakes a mask of scalars.
    first_f = tl.where(tile == 0, F, 0)
    lead_d = tl.where(first % G + tile == 0, D, 0)
    lead_v = tl.where(first % G == 0, D, 0)

    if W > 0:
        block = p // W
        previous = tl.where(block >= 1, 1 - block % 2, -1)  # half of the ring with the block before this one, if any
        ow = tl.arange(0, SLOTS)
        seen = ((ow // W == block % 2) & (ow % W < p % W)) | (ow // W == previous)
        slot = p % (2 * W)
        rows = (b * HK + hk) * (2 * W * D)
        if Z > 0:
            oz = tl.arange(0, ZP)
            far = (oz < Z) & (oz // W < block - 1)
            sinks = (b * HK + hk) * (Z * D)

    for i in range(GROUP // R):
        s = first // R + i
        head = b * S + s  # state head in the whole batch
        # Scalars in front of small tiles of offsets: pointers of 64 bits would fill the registers.
        state_h = state + head * (N * D)
        z_h, z_next_h = z + head * N, z_next + head * N
        # Loads first, and none that waits for the position: a token's time is little more than theirs.
        if WRITE != "none" and PARTS == 0:
            at = of[:, None] * D + ov[None, :]
            inside = in_f[:, None] & in_v[None, :]
            s_a = tl.load(state_h + at, mask=inside, other=0.0)
            if SIGNS == 2:
                s_b = tl.load(state_h + (at + F * D), mask=inside, other=0.0)
            if HAS_Z:
                z_a = tl.load(z_h + of, mask=in_f, other=0.0)
                if SIGNS == 2:
                    z_b = tl.load(z_h + F + of, mask=in_f, other=0.0)
        if W > 0 and HOLD:
            keys, values = _window(ring_k + rows, ring_v + rows, ow, od, ov, seen, D, W)
        if W > 0 and Z > 0:
            s_keys = tl.load(
                sink_k + sinks + (oz[:, None] * D + od[None, :]), mask=far[:, None] & in_d[None, :], other=0.0
            )
            s_values = tl.load(
                sink_v + sinks + (oz[:, None] * D + ov[None, :]), mask=far[:, None] & in_v[None, :], other=0.0
            )

        if WRITE != "none" and PARTS == 0:
            g_a = tl.zeros([1], tl.float32)
            g_b = g_a
            gain = 1.0
            if DECAY == "fixed":
                g_a += tl.load(decay + s).to(tl.float32)
                g_b = g_a
            elif DECAY == "scalar":
                gain = log1p_exp(token_score(x, decay + s * C, decay_bias + s, C, CT))
                g_a -= tl.exp(tl.load(a_log + s).to(tl.float32)) * gain
                g_b = g_a
            elif DECAY == "channel":
                g_a = tl.load(decay + head * N + of, mask=in_f, other=0.0)
                g_b = g_a
                if SIGNS == 2:
                    g_b = tl.load(decay + head * N + F + of, mask=in_f, other=0.0)
            k_head = k + b * skb + hk * skh
            if OWN:
                k_head = k_lin + head * D
            if DECAY == "key":
                g_a = tl.where(in_f, POWER * log_sigmoid(read_head(k_head, of, cos, sin, D, UNROTATE)), 0.0)
                g_b = g_a
            beta = 1.0
            if WRITE == "delta":
                beta = tl.sigmoid(token_score(x, beta_weight + s * C, beta_bias + s, C, CT))
                if NEGATIVE:
                    beta *= 2.0

            if LAGGED:
                now_a, now_b = g_a, g_b
                # What the state holds was last decayed at the end of the block before the previous one.
                if DECAY == "channel":
                    for start in tl.static_range(0, SLOTS, 32 if SLOTS > 32 else SLOTS):
                        part = start + tl.arange(0, 32 if SLOTS > 32 else SLOTS)
                        past = ((part // W == block % 2) & (part % W < p % W)) | (part // W == previous)
                        gates = ring_g + head * (2 * W * N) + (part[None, :] * N + of[:, None])
                        mask = past[None, :] & in_f[:, None]
                        g_a += tl.sum(tl.load(gates, mask=mask, other=0.0), 1)
                        if SIGNS == 2:
                            g_b += tl.sum(tl.load(gates + F, mask=mask, other=0.0), 1)
                elif DECAY != "none":
                    g_a += tl.sum(tl.load(ring_g + head * (2 * W) + ow, mask=seen, other=0.0), 0)
                    g_b = g_a
                past_a, past_b = tl.exp(g_a), tl.exp(g_b)
            else:
                keep_a, keep_b = tl.exp(g_a), tl.exp(g_b)
                f_a, f_b = activate(
                    project(k_head, k_weight + s * D * F, k_bias + s * F, cos, sin, D, DP, F, FP,
                            LEARNED and KEY_MAP == MAP, BIASED and KEY_MAP == MAP, UNROTATE),
                    in_f, KEY_MAP,
                )  # fmt: skip
                if UNIT:
                    f_a, f_b = unit(f_a, f_b, SIGNS)
                if DT_GAIN:
                    f_a *= gain
                    f_b *= gain
                s_a *= keep_a[:, None]
                if SIGNS == 2:
                    s_b *= keep_b[:, None]
                written = v_f
                if WRITE == "delta":
                    held = f_a[:, None] * s_a
                    if SIGNS == 2:
                        held += f_b[:, None] * s_b
                    written = (v_f - tl.sum(held, 0)) * beta
                s_a += f_a[:, None] * written[None, :]
                tl.store(state_h + at, s_a, mask=inside)
                if SIGNS == 2:
                    s_b += f_b[:, None] * written[None, :]
                    tl.store(state_h + (at + F * D), s_b, mask=inside)
                if HAS_Z:
                    z_a = z_a * keep_a + f_a
                    tl.store(z_next_h + of, z_a, mask=of < first_f)
                    if SIGNS == 2:
                        z_b = z_b * keep_b + f_b
                        tl.store(z_next_h + F + of, z_b, mask=of < first_f)

        for r in range(R):
            h = s * R + r
            q_head = q + b * sqb + h * sqh
            if WRITE != "none" and PARTS == 0:
                mapped = q_head
                if OWN:
                    mapped = q_lin + (b * H + h) * D
                e_a, e_b = activate(
                    project(mapped, q_weight + h * D * F, q_bias + h * F, cos, sin, D, DP, F, FP, LEARNED, BIASED,
                            UNROTATE),
                    in_f, MAP,
                )  # fmt: skip
                if UNIT:
                    e_a, e_b = unit(e_a, e_b, SIGNS)
                if QUERY_SCALED:
                    e_a *= SCALE
                    e_b *= SCALE
                if LAGGED:
                    e_a *= past_a
                    e_b *= past_b
                read = e_a[:, None] * s_a
                if SIGNS == 2:  # one sum over both signs: a sum across warps costs more than its additions
                    read += e_b[:, None] * s_b
                linear = tl.sum(read, 0)
                if HAS_Z:
                    weighed = e_a * z_a
                    if SIGNS == 2:
                        weighed += e_b * z_b
                    mass = tl.sum(weighed, 0)
            result = tl.zeros([BV], tl.float32)
            if W > 0:
                if not HOLD:  # late, when the state's registers are free, and for every head
                    keys, values = _window(ring_k + rows, ring_v + rows, ow, od, ov, seen, D, W)
                q_f = tl.load(q_head + od, mask=in_d, other=0.0).to(tl.float32)
                scores, _slope = bounded(tl.sum(keys.to(tl.float32) * q_f[None, :], 1) * SCALE, BOUND)
                scores = tl.where(seen, scores, float("-inf"))
                score, _slope = bounded(tl.sum(k_new.to(tl.float32) * q_f, 0) * SCALE, BOUND)
                largest = tl.maximum(tl.max(scores, 0), score)
                if Z > 0:
                    far_scores, _slope = bounded(tl.sum(s_keys.to(tl.float32) * q_f[None, :], 1) * SCALE, BOUND)
                    far_scores = tl.where(far, far_scores, float("-inf"))
                    largest = tl.maximum(largest, tl.max(far_scores, 0))
                weights = tl.exp(scores - largest)
                weight = tl.exp(score - largest)
                total = tl.sum(weights, 0) + weight
                result = tl.sum(weights[:, None] * values.to(tl.float32), 0) + weight * v_f
                if Z > 0:
                    far_weights = tl.exp(far_scores - largest)
                    total += tl.sum(far_weights, 0)
                    result += tl.sum(far_weights[:, None] * s_values.to(tl.float32), 0)
            share = WINDOW_WEIGHT
            if W > 0 and (MIX == "gate" or MIX == "mass"):
                share = token_score(x, mix_weight + h * C, mix_bias + h, C, CT)
                if MIX == "mass":
                    share = tl.log(total) + largest - share
                share = tl.sigmoid(share)
            if PARTS > 0:
                if EARLY:
                    tl.extra.cuda.gdc_wait()
                op = tl.arange(0, PP)
                at_p = (b * H + h) * PARTS + op
                part = tl.load(
                    parts + (at_p[:, None] * D + ov[None, :]), mask=(op < PARTS)[:, None] & in_v[None, :], other=0.0
                )
                linear = tl.sum(part, 0)
                mass = 0.0
                if HAS_Z:
                    mass = tl.sum(tl.load(masses + at_p, mask=op < PARTS, other=0.0), 0)
            if WRITE != "none":
                if NORM == "own":
                    linear /= tl.maximum(mass, TINY)
                elif NORM == "norm":
                    square = tl.sum(tl.where(in_v, linear * linear, 0.0), 0) / D
                    factor = tl.load(norm_weight + h * D + ov, mask=in_v, other=0.0).to(tl.float32)
                    linear = linear * tl.rsqrt(square + NORM_EPS) * factor
                elif NORM == "scale":
                    linear *= tl.load(linear_scale + h).to(tl.float32)
                if W == 0:
                    result = linear
                elif NORM == "shared":
                    gamma = tl.sigmoid(tl.load(window_logit + h).to(tl.float32))
                    result = (gamma * result + linear) / (gamma * total + mass)
                else:
                    result = share * (result / total) + (1.0 - share) * linear
            else:
                result /= total
            tl.store(out + (b * H + h) * D + ov, result.to(out.dtype.element_ty), mask=in_v)

        if LAGGED:
            slots = head * (2 * W)
            one = tl.arange(0, 1)
            if DECAY == "channel":
                tl.store(ring_g + (slots + slot) * N + of, now_a, mask=of < first_f)
                if SIGNS == 2:
                    tl.store(ring_g + (slots + slot) * N + F + of, now_b, mask=of < first_f)
            elif DECAY != "none":
                tl.store(ring_g + slots + slot + one, now_a, mask=one < first_f)
            if WRITE == "delta":
                tl.store(ring_beta + slots + slot + one, beta + 0.0 * one, mask=one < first_f)
            if tl.where(block >= 1, p % W, -1) == W - 1:
                old = (block - 1) % 2 * W
                sinks_left = Z - (block - 1) * W  # tokens of the block that stay in the softmax branch
                if WRITE == "delta":
                    fold_delta(
                        state, ring_k, ring_v, ring_g, ring_beta, k_weight, k_bias, cos, sin, a_log,
                        s, rows + old * D, slots + old, head, ov, sinks_left,
                        D, DP, F, FP, SIGNS, W, MAP, LEARNED, BIASED, UNIT, DECAY, DT_GAIN,
                    )  # fmt: skip
                else:
                    fold_linear(
                        state, z, z_next, ring_k, ring_v, ring_g, k_weight, k_bias, a_log,
                        s, rows + old * D, slots + old, head, ov, first_f, sinks_left,
                        D, DP, F, FP, SIGNS, W, PART, MAP, LEARNED, BIASED, DECAY, DT_GAIN, HAS_Z,
                    )  # fmt: skip
            elif HAS_Z:
                tl.store(z_next_h + of, z_a, mask=of < first_f)
                if SIGNS == 2:
                    tl.store(z_next_h + F + of, z_b, mask=of < first_f)

    if W > 0:
        tl.store(ring_k + rows + slot * D + od, k_new, mask=od < lead_d)
        tl.store(ring_v + rows + slot * D + ov, v_new, mask=ov < lead_v)
        if Z > 0:
            tl.store(sink_k + sinks + p * D + od, k_new, mask=od < tl.where(p < Z, lead_d, 0))
            tl.store(sink_v + sinks + p * D + ov, v_new, mask=ov < tl.where(p < Z, lead_v, 0))
