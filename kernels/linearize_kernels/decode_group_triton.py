"""One token of LoLCATs' mixer for the query heads of one key head together: what a batch that fills a card takes.

decode_step_triton.py gives every head a program, which reads the window once for each: at 16 sequences the traffic
between L2 and multiprocessors is twice what comes from memory. Here the heads of a group read the ring once, their
scores are one product of tensor cores, and their states stream through shared memory one after the other, loads of the
next under way while one is summed. For a lagged additive state without decay and a denominator shared with the window;
who writes what, and when, is as there.
"""

from typing import Any

import triton
import triton.language as tl

from .decode_fold_triton import fold_linear
from .decode_maps_triton import activate, exact_dot, project


@triton.jit(do_not_specialize=["B", "H", "HK"])
def ready_kernel(
    q, k, position, ring_k, q_weight, q_bias, features, shares, sqb, sqh, skb, skh, B, H, HK,
    SCALE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr,
    W: tl.constexpr, SLOTS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr,
    LEARNED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Grid (B HK + H times groups of ROWS sequences). features: of queries [B, H, N]; shares: e^{score - largest} of
    the ring's slots and then of the new token [B, H, SLOTS + 1]; both float32.
    """
    N: tl.constexpr = F * SIGNS
    pid = tl.program_id(0)
    od = tl.arange(0, DP)
    in_d = od < D
    if pid < B * HK:
        ow = tl.arange(0, SLOTS)
        row = tl.arange(0, GP)
        one = (pid // HK).to(tl.int64)
        hk = pid % HK
        heads = hk * G + row
        in_g = row < G
        at_k = ring_k + (one * HK + hk) * (2 * W * D) + (ow[:, None] * D + od[None, :])
        keys = tl.load(at_k, mask=(ow < 2 * W)[:, None] & in_d[None, :], other=0.0)
        queries = tl.load(
            q + one * sqb + heads[:, None] * sqh + od[None, :], mask=in_g[:, None] & in_d[None, :], other=0.0
        )
        k_new = tl.load(k + one * skb + hk * skh + od, mask=in_d, other=0.0)
        p = tl.load(position + one)
        block = p // W
        previous = tl.where(block >= 1, 1 - block % 2, -1)
        seen = ((ow // W == block % 2) & (ow % W < p % W)) | (ow // W == previous)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
        scores = tl.where(seen[None, :], scores, float("-inf"))
        score = tl.sum(queries.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * SCALE
        largest = tl.maximum(tl.max(scores, 1), score)
        at_s = shares + (one * H + heads) * (SLOTS + 1)
        tl.store(at_s[:, None] + ow[None, :], tl.exp(scores - largest[:, None]), mask=in_g[:, None])
        tl.store(at_s + SLOTS, tl.exp(score - largest), mask=in_g)
    else:
        h = (pid - B * HK) % H
        rows = (pid - B * HK) // H * ROWS + tl.arange(0, ROWS)
        b = tl.minimum(rows, B - 1).to(tl.int64)  # rows that do not exist are read as the last, never stored
        of = tl.arange(0, FP)
        in_f = of < F
        if LEARNED:
            x = tl.load(q + b[:, None] * sqb + h * sqh + od[None, :], mask=in_d[None, :], other=0.0)
            at = q_weight + h * D * F + (od[:, None] * F + of[None, :])
            w = tl.load(at, mask=in_d[:, None] & in_f[None, :], other=0.0)
            if w.dtype == x.dtype:
                y = tl.dot(x, w, input_precision="ieee")
            else:
                y = exact_dot(x.to(tl.float32), w)
            if BIASED:
                y += tl.load(q_bias + h * F + of, mask=in_f, other=0.0).to(tl.float32)[None, :]
        else:
            y = tl.load(q + b[:, None] * sqb + h * sqh + of[None, :], mask=in_f[None, :], other=0.0).to(tl.float32)
        e_a, e_b = activate(tl.trans(y), in_f[:, None], MAP)
        to = features + (b * H + h)[None, :] * N + of[:, None]
        stored = (rows < B)[None, :] & in_f[:, None]
        tl.store(to, e_a, mask=stored)
        if SIGNS == 2:
            tl.store(to + F, e_b, mask=stored)


@triton.jit(do_not_specialize=["H", "HK"])
def group_kernel(
    q, k, v, features, shares, out, state, z, z_next, position, ring_k, ring_v, q_weight, q_bias, k_weight, k_bias,
    window_logit, sqb, sqh, skb, skh, svb, svh, H, HK,
    SCALE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, SIGNS: tl.constexpr,
    W: tl.constexpr, SLOTS: tl.constexpr, PART: tl.constexpr, BV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    MAP: tl.constexpr, KEY_MAP: tl.constexpr, LEARNED: tl.constexpr, BIASED: tl.constexpr,
    STAGES: tl.constexpr, HOLD: tl.constexpr, READY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of value channels, B HK). G query heads a key head, padded to GP rows. Shapes in decode.py."""
    N: tl.constexpr = F * SIGNS
    tile = tl.program_id(0)
    b = (tl.program_id(1) // HK).to(tl.int64)
    hk = tl.program_id(1) % HK
    first = hk * G
    od = tl.arange(0, DP)
    ov = tile * BV + tl.arange(0, BV)
    of = tl.arange(0, FP)
    ow = tl.arange(0, SLOTS)
    row = tl.arange(0, GP)
    in_d, in_v, in_f, in_g = od < D, ov < D, of < F, row < G
    first_f = tl.where(tile == 0, F, 0)

    p = tl.load(position + b)
    rows = (b * HK + hk) * (2 * W * D)
    slots = (ow < 2 * W)[:, None]
    if HOLD:
        if not READY:
            keys = tl.load(ring_k + rows + (ow[:, None] * D + od[None, :]), mask=slots & in_d[None, :], other=0.0)
        values = tl.load(ring_v + rows + (ow[:, None] * D + ov[None, :]), mask=slots & in_v[None, :], other=0.0)
    k_new = tl.load(k + b * skb + hk * skh + od, mask=in_d, other=0.0)
    v_new = tl.load(v + b * svb + hk * svh + ov, mask=in_v, other=0.0)
    block = p // W
    previous = tl.where(block >= 1, 1 - block % 2, -1)
    seen = ((ow // W == block % 2) & (ow % W < p % W)) | (ow // W == previous)

    at = of[:, None] * D + ov[None, :]
    inside = in_f[:, None] & in_v[None, :]
    linear = tl.zeros([GP, BV], tl.float32)
    mass = tl.zeros([GP], tl.float32)
    for r in tl.range(0, G, num_stages=STAGES):
        h = first + r
        head = b * H + h
        s_a = tl.load(state + head * (N * D) + at, mask=inside, other=0.0)
        z_a = tl.load(z + head * N + of, mask=in_f, other=0.0)
        if SIGNS == 2:
            s_b = tl.load(state + head * (N * D) + (at + F * D), mask=inside, other=0.0)
            z_b = tl.load(z + head * N + F + of, mask=in_f, other=0.0)
        if READY:
            e_a = tl.load(features + head * N + of, mask=in_f, other=0.0)
            if SIGNS == 2:
                e_b = tl.load(features + head * N + F + of, mask=in_f, other=0.0)
        else:
            x = q + b * sqb + h * sqh
            y = project(x, q_weight + h * D * F, q_bias + h * F, q, q, D, DP, F, FP, LEARNED, BIASED, False)
            e_a, e_b = activate(y, in_f, MAP)
        read = e_a[:, None] * s_a
        weighed = e_a * z_a
        if SIGNS == 2:
            read += e_b[:, None] * s_b
            weighed += e_b * z_b
        linear = tl.where((row == r)[:, None], tl.sum(read, 0)[None, :], linear)
        mass = tl.where(row == r, tl.sum(weighed, 0), mass)
        tl.store(z_next + head * N + of, z_a, mask=of < first_f)
        if SIGNS == 2:
            tl.store(z_next + head * N + F + of, z_b, mask=of < first_f)

    if not HOLD:
        if not READY:
            keys = tl.load(ring_k + rows + (ow[:, None] * D + od[None, :]), mask=slots & in_d[None, :], other=0.0)
        values = tl.load(ring_v + rows + (ow[:, None] * D + ov[None, :]), mask=slots & in_v[None, :], other=0.0)
    if READY:
        at_s = shares + (b * H + first + row) * (SLOTS + 1)
        weights = tl.load(at_s[:, None] + ow[None, :], mask=in_g[:, None], other=0.0)
        weight = tl.load(at_s + SLOTS, mask=in_g, other=1.0)
    else:
        queries = tl.load(
            q + b * sqb + (first + row)[:, None] * sqh + od[None, :], mask=in_g[:, None] & in_d[None, :], other=0.0
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
        scores = tl.where(seen[None, :], scores, float("-inf"))
        score = tl.sum(queries.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * SCALE
        largest = tl.maximum(tl.max(scores, 1), score)
        weights = tl.exp(scores - largest[:, None])
        weight = tl.exp(score - largest)
    total = tl.sum(weights, 1) + weight
    near = exact_dot(weights, tl.where(seen[:, None], values, 0.0))
    near += weight[:, None] * v_new.to(tl.float32)[None, :]
    gamma = tl.sigmoid(tl.load(window_logit + first + row, mask=in_g, other=0.0).to(tl.float32))
    result = (gamma[:, None] * near + linear) / (gamma * total + mass)[:, None]
    to = out + (b * H + first + row)[:, None] * D + ov[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=in_g[:, None] & in_v[None, :])

    if tl.where(block >= 1, p % W, -1) == W - 1:
        old = (block - 1) % 2 * W
        for r in range(0, G):
            fold_linear(
                state, z, z_next, ring_k, ring_v, z, k_weight, k_bias, z,
                first + r, rows + old * D, 0, b * H + first + r, ov, first_f, 0,
                D, DP, F, FP, SIGNS, W, PART, KEY_MAP, LEARNED, BIASED, "none", False, True,
            )  # fmt: skip

    slot = p % (2 * W)
    tl.store(ring_k + rows + slot * D + od, k_new, mask=od < tl.where(tile == 0, D, 0))
    tl.store(ring_v + rows + slot * D + ov, v_new, mask=in_v)


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configuration of a LoLCATs layer in bfloat16, for the compile gate."""
    from .tuning import decode_group

    known = decode_group(arch, 128, 64, 128)
    assert known is not None
    options = {name: known.pop(name) for name in ("num_warps", "num_stages")}
    shared: dict[str, Any] = {
        "SCALE": 128**-0.5, "D": 128, "DP": 128, "F": 64, "FP": 64, "SIGNS": 2, "W": 64, "SLOTS": 128,
        "G": 4, "GP": 16, "MAP": "hedgehog_softmax", "LEARNED": True, "BIASED": False,
    }  # fmt: skip
    constants = shared | {"PART": 16, "KEY_MAP": "hedgehog_softmax", **known}
    exact = dict.fromkeys(("state", "z", "z_next", "features", "shares"), "*fp32") | {"position": "*i64"}
    exact |= dict.fromkeys(("B", "H", "HK"), "i32")
    exact |= dict.fromkeys(("sqb", "sqh", "skb", "skh", "svb", "svh"), "i32:16")
    cases = []
    for kernel, own, how, label in (
        (group_kernel, constants, options, "lolcats"),
        (ready_kernel, shared | {"ROWS": 16}, {"num_warps": 4, "num_stages": 1}, "lolcats, ready"),
    ):
        types = {name: exact.get(name, "*bf16") for name in kernel.arg_names if name not in own}
        cases.append((kernel, types, own, how, label))
    return cases
