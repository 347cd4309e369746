"""One token of LoLCATs' mixer in two launches: what many programs would repeat, then one stream over the states.

    near_kernel: features of every query; the window's softmax of all query heads of a key head, which share its tokens
    far_kernel:  e S and e z of every head, the shared denominator, and, once in W tokens, the block that enters

In one launch (decode_step_triton.py) every query head reads the window by itself, and more goes from L2 to the
multiprocessors than from memory to L2. Here a program of the second launch does little but wait for its tile of the
state, and on cards that can it asks for that before the first launch is over. For a lagged additive state without
decay and a denominator shared with the window; who writes what, and when, is as there.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .decode_maps_triton import activate, exact_dot
from .softcap_triton import bounded

FOLD_TILE = tl.constexpr(32)
"""Head channels of a projection that are multiplied at once where a block enters the state."""


@triton.jit
def _projected(
    x, weight, bias, h, of, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, COLUMNS: tl.constexpr,
    LEARNED: tl.constexpr, BIASED: tl.constexpr, TILE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """W^T x + b of head h, [FP, COLUMNS] float32: x addresses of vectors [COLUMNS, D], weight [H, D, F].

    TILE channels at a time, for registers are few. Without a projection x itself. WAIT: x may be there only after the
    launch before this one.
    """
    if LEARNED:
        y = tl.zeros([FP, COLUMNS], tl.float32)
        for start in tl.static_range(0, DP, TILE):
            od = start + tl.arange(0, TILE)
            inside = (od < D)[None, :] & (of < F)[:, None]
            w = tl.load(weight + h * D * F + (od[None, :] * F + of[:, None]), mask=inside, other=0.0)
            if WAIT and start == 0:
                tl.extra.cuda.gdc_wait()
            column = tl.load(x[None, :] + od[:, None], mask=(od < D)[:, None], other=0.0)
            if w.dtype == column.dtype and w.dtype != tl.float32:
                y = tl.dot(w, column, y)
            else:
                y += exact_dot(w.to(tl.float32), column)
        if BIASED:
            y += tl.load(bias + h * F + of, mask=of < F, other=0.0).to(tl.float32)[:, None]
    else:
        if WAIT:
            tl.extra.cuda.gdc_wait()
        y = tl.load(x[None, :] + of[:, None], mask=(of < F)[:, None], other=0.0).to(tl.float32)
    return y


@triton.jit
def _fold(
    state, z, z_next, ring_k, ring_v, weight, bias, h, start, first_f,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr, W: tl.constexpr,
    PART: tl.constexpr, BV: tl.constexpr, VT: tl.constexpr, MAP: tl.constexpr, LEARNED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """Add the W tokens of the ring's half at ring_k, ring_v to BV value channels from `start`, VT at a time.

    PART tokens at a time, of which all features are made at once: the state stays in memory, for registers are few.
    """
    TILE: tl.constexpr = FOLD_TILE if DP > FOLD_TILE else DP  # min() would be no constant in Triton 3.5
    of = tl.arange(0, FP)
    in_f = of < F
    z_a = tl.load(z + of, mask=in_f, other=0.0)
    z_b = tl.load(z + F + of, mask=in_f, other=0.0) if SIGNS == 2 else z_a
    for first in tl.static_range(0, W, PART):
        ot = first + tl.arange(0, PART)
        in_t = ot < W
        x = ring_k + tl.where(in_t, ot, 0) * D
        y = _projected(x, weight, bias, h, of, D, DP, F, FP, PART, LEARNED, BIASED, TILE, False)
        f_a, f_b = activate(y, in_f[:, None], MAP)
        f_a, f_b = tl.where(in_t[None, :], f_a, 0.0), tl.where(in_t[None, :], f_b, 0.0)
        z_a += tl.sum(f_a, 1)
        z_b += tl.sum(f_b, 1)
        for column in tl.static_range(0, BV, VT):
            ov = start + column + tl.arange(0, VT)
            in_v = ov < D
            values = tl.load(ring_v + (ot[:, None] * D + ov[None, :]), mask=in_t[:, None] & in_v[None, :], other=0.0)
            at = state + (of[:, None] * D + ov[None, :])
            inside = in_f[:, None] & in_v[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) + exact_dot(f_a, values), mask=inside)
            if SIGNS == 2:
                at += F * D
                tl.store(at, tl.load(at, mask=inside, other=0.0) + exact_dot(f_b, values), mask=inside)
    tl.store(z_next + of, z_a, mask=of < first_f)
    if SIGNS == 2:
        tl.store(z_next + F + of, z_b, mask=of < first_f)


@triton.jit(do_not_specialize=["B", "H", "HK"])
def near_kernel(
    q, k, v, position, ring_k, ring_v, q_weight, q_bias, window_logit, features, near, masses,
    sqb, sqh, skb, skh, svb, svh, B, H, HK,
    SCALE: tl.constexpr, BOUND: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr,
    W: tl.constexpr, SLOTS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr,
    LEARNED: tl.constexpr, BIASED: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid B HK + H times groups of ROWS sequences. Writes features [B, H, N], near [B, H, D] and masses [B, H],
    float32: the window's sum of values and of weights, times its share. BOUND: on scores, 0.0: none. TILE: head
    channels of a projection at once. EARLY: it may begin before the launch before it has ended, and the next before it
    has: until the wait it reads what steps before left, and writes nothing.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    N: tl.constexpr = F * SIGNS
    pid = tl.program_id(0)
    od = tl.arange(0, DP)
    in_d = od < D
    if pid < B * HK:
        one = (pid // HK).to(tl.int64)
        hk = pid % HK
        ow = tl.arange(0, SLOTS)
        og = tl.arange(0, GP)
        heads = hk * G + og
        in_g = (og < G)[:, None]
        ring = (one * HK + hk) * (2 * W * D)
        at = ring + (ow[:, None] * D + od[None, :])
        inside = (ow < 2 * W)[:, None] & in_d[None, :]
        keys = tl.load(ring_k + at, mask=inside, other=0.0)
        values = tl.load(ring_v + at, mask=inside, other=0.0)
        gamma = tl.sigmoid(tl.load(window_logit + heads, mask=og < G, other=0.0).to(tl.float32))
        p = tl.load(position + one)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        queries = tl.load(q + one * sqb + heads[:, None] * sqh + od[None, :], mask=in_g & in_d[None, :], other=0.0)
        k_new = tl.load(k + one * skb + hk * skh + od, mask=in_d, other=0.0)
        v_new = tl.load(v + one * svb + hk * svh + od, mask=in_d, other=0.0)
        block = p // W
        previous = tl.where(block >= 1, 1 - block % 2, -1)
        seen = ((ow // W == block % 2) & (ow % W < p % W)) | (ow // W == previous)

        scores, _slope = bounded(tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE, BOUND)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        score, _slope = bounded(tl.sum(queries.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * SCALE, BOUND)
        largest = tl.maximum(tl.max(scores, 1), score)
        weights = tl.exp(scores - largest[:, None])
        weight = tl.exp(score - largest)
        total = tl.sum(weights, 1) + weight
        # The slot of the new token may hold anything: its weight is zero, which nan would not heed.
        result = exact_dot(weights, tl.where(seen[:, None], values, 0.0))
        result += weight[:, None] * v_new.to(tl.float32)[None, :]
        at_near = near + (one * H + heads)[:, None] * D + od[None, :]
        tl.store(at_near, gamma[:, None] * result, mask=in_g & in_d[None, :])
        tl.store(masses + one * H + heads, gamma * total, mask=og < G)

        slot = ring + p % (2 * W) * D
        tl.store(ring_k + slot + od, k_new, mask=in_d)
        tl.store(ring_v + slot + od, v_new, mask=in_d)
    else:
        h = (pid - B * HK) % H
        rows = (pid - B * HK) // H * ROWS + tl.arange(0, ROWS)
        b = tl.minimum(rows, B - 1).to(tl.int64)  # rows that do not exist are read as the last, never stored
        of = tl.arange(0, FP)
        in_f = of < F
        y = _projected(
            q + b * sqb + h * sqh, q_weight, q_bias, h, of, D, DP, F, FP, ROWS, LEARNED, BIASED, TILE, EARLY
        )  # fmt: skip
        e_a, e_b = activate(y, in_f[:, None], MAP)
        to = features + (b * H + h)[None, :] * N + of[:, None]
        stored = (rows < B)[None, :] & in_f[:, None]
        tl.store(to, e_a, mask=stored)
        if SIGNS == 2:
            tl.store(to + F, e_b, mask=stored)


@triton.jit(do_not_specialize=["H", "HK"])
def far_kernel(
    features, near, masses, out, state, z, z_next, position, ring_k, ring_v, k_weight, k_bias, H, HK,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr, NP: tl.constexpr,
    W: tl.constexpr, PART: tl.constexpr, BV: tl.constexpr, VT: tl.constexpr, G: tl.constexpr,
    KEY_MAP: tl.constexpr, LEARNED: tl.constexpr, BIASED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BV value channels, B H). Shapes in decode.py; NP covers N. EARLY: it may begin before near_kernel
    has ended, so that nothing but what is older is read before the wait; the next launch may begin, too.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    N: tl.constexpr = F * SIGNS
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    on = tl.arange(0, NP)
    ov = tile * BV + tl.arange(0, BV)
    in_n, in_v = on < N, ov < D
    at = on[:, None] * D + ov[None, :]
    held = tl.load(state + head * (N * D) + at, mask=in_n[:, None] & in_v[None, :], other=0.0)
    z_held = tl.load(z + head * N + on, mask=in_n, other=0.0)
    p = tl.load(position + head // H)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    e = tl.load(features + head * N + on, mask=in_n, other=0.0)
    top = tl.load(near + head * D + ov, mask=in_v, other=0.0)
    bottom = tl.load(masses + head)
    top += tl.sum(e[:, None] * held, 0)
    bottom += tl.sum(e * z_held, 0)
    tl.store(out + head * D + ov, (top / bottom).to(out.dtype.element_ty), mask=in_v)

    if tl.where(p // W >= 1, p % W, -1) == W - 1:
        h = (head % H).to(tl.int32)
        rows = (head // H * HK + h // G) * (2 * W * D) + (p // W - 1) % 2 * (W * D)
        _fold(
            state + head * (N * D), z + head * N, z_next + head * N, ring_k + rows, ring_v + rows, k_weight, k_bias,
            h, tile * BV, tl.where(tile == 0, F, 0), D, DP, F, FP, SIGNS, W, PART, BV, VT, KEY_MAP, LEARNED, BIASED,
        )  # fmt: skip
    else:
        tl.store(z_next + head * N + on, z_held, mask=on < tl.where(tile == 0, N, 0))


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations of a LoLCATs layer at the size of Llama-3-8B, for the compile gate."""
    from .decode_triton import lolcats_rule, split_constants

    exact = dict.fromkeys(("state", "z", "z_next", "features", "near", "masses"), "*fp32") | {"position": "*i64"}
    exact |= dict.fromkeys(("B", "H", "HK"), "i32")
    exact |= dict.fromkeys(("sqb", "sqh", "skb", "skh", "svb", "svh"), "i32:16")
    cases = []
    sizes: dict[str, Any] = {"heads": 32, "batch": 16, "card": arch, "dtype": torch.bfloat16}
    found = split_constants(lolcats_rule(), head_dim=128, kv_heads=8, **sizes)
    held = split_constants(lolcats_rule(softcap=50.0), head_dim=128, kv_heads=16, **sizes)
    assert found is not None and held is not None
    for kernel, name, made, options in (
        (far_kernel, "far", *found["far"]),
        (near_kernel, "near", *found["near"]),
        (near_kernel, "near, bounded", *held["near"]),
    ):
        for weights in ("*bf16", "*fp32"):
            types = {x: exact.get(x, "*bf16") for x in kernel.arg_names if x not in made}
            types |= {x: weights for x in types if x.endswith(("weight", "bias"))}
            plain = {x: y for x, y in options.items() if x != "launch_pdl"}
            cases.append((kernel, types, made, plain, f"lolcats, {name}, weights {weights}"))
    return cases
