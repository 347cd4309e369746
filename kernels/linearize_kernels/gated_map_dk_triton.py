"""Gradient of the keys before their feature map (gated_dkv_triton.py, gated_maps.py), every chunk for itself.

State heads may share a key-value head: each maps the same keys with its own weights, and what they send back is added
up in the program.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_dkv_triton import key_by_query
from .gated_maps import MAP_POINTERS, Mapped, features, map_gate_constants, phi_grad, project, row_sums, weights
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, pair_decay, product, row_decay
from .tuning import gated_map_chunk, gated_map_dk


@triton.jit
def writing_grad(
    vt, d_states, dz_states, slot, f, o, write, C: tl.constexpr, BF: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    END: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradient of key features f < END through the state: e^{G_last - G_j} (dS v_j + dz) [C, BF]."""
    inside = f < END
    tile = slot * F * V + f[None, :] * V + o[:, None]
    d_state = tl.load(d_states + tile, mask=inside[None, :] & (o < V)[:, None], other=0.0)
    grad = product(vt, d_state, tl.zeros([C, BF], tl.float32), PREC)
    if NORM:
        grad += tl.load(dz_states + slot * F + f, mask=inside, other=0.0)[None, :]
    return grad * write[:, None]


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_dk_kernel(
    q, k, v, g, q_weight, q_bias, k_weight, k_bias, q_sums, k_sums, dout, factor, extra, d_states, dz_states,
    dk, along, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, key-value heads, flat). BV covers V. along [B, S, T, 2] (softmax)."""
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
    PASSES: tl.constexpr = 2 if MAP == "hedgehog_softmax" else 1
    HK = H // (R * G)
    S = H // R
    pid = tl.program_id(0)
    hk = (pid % HK).to(tl.int64)
    c = pid // HK % NT
    b = (pid // HK // NT).to(tl.int64)
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    o = tl.arange(0, BV)
    d = tl.arange(0, BD)
    in_o = o < V
    in_v = live[:, None] & in_o[None, :]
    in_x = live[:, None] & (d < D)[None, :]
    seen = rows[:, None] <= rows[None, :]  # [key, query]
    vt = tl.load(v + b * svb + hk * svh + first * svt + rows[:, None] * svt + o[None, :], mask=in_v, other=0.0)
    xk = tl.load(k + b * skb + hk * skh + first * skt + rows[:, None] * skt + d[None, :], mask=in_x, other=0.0)
    x_grad = tl.zeros([C, BD], tl.float32)

    for j in tl.range(0, G, disable_licm=True):
        s = hk * G + j
        slot = (b * S + s) * NT + c
        at_s = (b * S + s) * T + t
        running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
        write = tl.exp2(total - running)
        pairs = tl.zeros([C, C], vt.dtype)  # dP, of one query head at a time
        if R == 1:
            at = (b * H + s) * T + t
            do = tl.load(
                dout + b * sdb + s * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0
            )
            raw, _weight = key_by_query(vt, do, factor, extra, at, live, scale, C, NORM, PREC)
            pairs = (raw * pair_decay(running[None, :], running[:, None], seen)).to(do.dtype)
        along_up = tl.zeros([C], tl.float32)  # phi dphi of a row, by sign
        along_down = tl.zeros([C], tl.float32)
        for turn in tl.static_range(PASSES):
            for i in tl.range(0, NF, disable_licm=True):
                column = i * BF + tl.arange(0, BF)
                in_f = column < WIDTH
                in_row = live[:, None] & in_f[None, :]
                wk = weights(k_weight + s * D * WIDTH, d, column, in_f, D, WIDTH)
                yk = project(xk, wk, k_bias + s * WIDTH if BIAS else k_bias, column, in_f, BIAS, PREC)
                up = writing_grad(vt, d_states, dz_states, slot, column, o, write, C, BF, F, V, WIDTH, NORM, PREC)
                down = tl.zeros([C, BF], tl.float32)
                if SIGNED == 2:
                    down = writing_grad(
                        vt, d_states, dz_states, slot, WIDTH + column, o, write, C, BF, F, V, 2 * WIDTH, NORM, PREC
                    )
                for r in tl.range(0, R, disable_licm=True):
                    h = s * R + r
                    at = (b * H + h) * T + t
                    if R > 1:
                        do = tl.load(
                            dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :],
                            mask=in_v, other=0.0,
                        )  # fmt: skip
                        raw, _weight = key_by_query(vt, do, factor, extra, at, live, scale, C, NORM, PREC)
                        pairs = (raw * pair_decay(running[None, :], running[:, None], seen)).to(do.dtype)
                    xq = tl.load(
                        q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + d[None, :], mask=in_x, other=0.0
                    )
                    wq = weights(q_weight + h * D * WIDTH, d, column, in_f, D, WIDTH)
                    yq = project(xq, wq, q_bias + h * WIDTH if BIAS else q_bias, column, in_f, BIAS, PREC)
                    _, qf = features(yq, row_sums(q_sums, at, 0, live, C, MAP), in_row, 0, MAP)
                    up = tl.dot(pairs, qf.to(xk.dtype), up, input_precision=PREC)
                    if SIGNED == 2:
                        _, qf = features(yq, row_sums(q_sums, at, 1, live, C, MAP), in_row, 1, MAP)
                        down = tl.dot(pairs, qf.to(xk.dtype), down, input_precision=PREC)
                signed, kf = features(yk, row_sums(k_sums, at_s, 0, live, C, MAP), in_row, 0, MAP)
                if turn + 1 < PASSES:
                    along_up += tl.sum(kf * up, 1)
                dy = phi_grad(signed, kf, up, along_up[:, None], MAP)
                if SIGNED == 2:
                    signed, kf = features(yk, row_sums(k_sums, at_s, 1, live, C, MAP), in_row, 1, MAP)
                    if turn + 1 < PASSES:
                        along_down += tl.sum(kf * down, 1)
                    dy -= phi_grad(signed, kf, down, along_down[:, None], MAP)
                if turn + 1 == PASSES:
                    x_grad = tl.dot(dy.to(xk.dtype), tl.trans(wk), x_grad, input_precision=PREC)
        if PASSES == 2:
            tl.store(along + at_s * 2, along_up, mask=live)
            tl.store(along + at_s * 2 + 1, along_down, mask=live)
    to = dk + b * sob + hk * soh + first * sot + rows[:, None] * sot + d[None, :]
    tl.store(to, x_grad.to(dk.dtype.element_ty), mask=in_x)


def map_key_gradients(
    plan: Plan,
    x: Mapped,
    dout: torch.Tensor,
    factors: tuple[torch.Tensor | None, torch.Tensor | None],
    d_states: tuple[torch.Tensor, torch.Tensor],
    *,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk as k, and phi dphi [B, S, T, 2] of a softmax (else empty)."""
    config = gated_map_dk(plan.capability, plan.features, plan.values, x.q.dtype)
    table, _, count = plan.chunks(chunk)
    batch, length, device = plan.batch, plan.length, x.q.device
    dk = empty((batch, length, plan.kv_heads, x.k.shape[3]), dtype=x.k.dtype, device=device).transpose(1, 2)
    softmax = plan.map == "hedgehog_softmax"
    along = empty((batch, plan.state_heads, length, 2) if softmax else (0,), dtype=torch.float32, device=device)
    map_dk_kernel[(batch * count * plan.kv_heads,)](
        *x, dout, *factors, *d_states, dk, along, table, *x.strides(plan), *dout.stride()[:3], *dk.stride()[:3],
        plan.scale, length, plan.heads, count,
        BV=max(16, triton.next_power_of_2(plan.values)), **x.options(plan, chunk, table), **config,
    )  # fmt: skip
    return dk, along


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width in ((64, 256), (128, 64)):
        config = gated_map_dk(arch, 2 * width, size, torch.bfloat16)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, size, torch.bfloat16, backward=True)
        constants = map_gate_constants(size, width, chunk) | {"BV": size} | config
        pointers = MAP_POINTERS | {"dk": "*bf16", "along": "*fp32"}
        signature = gate_signature(map_dk_kernel, pointers, constants)
        cases.append((map_dk_kernel, signature, constants, options, f"D {size} f {width}"))
    return cases
