"""Gradient of the values, and the keys' part of the gates', with maps inside (gated_dkv_triton.py, gated_maps.py).

What crosses a token through the state needs k_j dk_j(state), which is v_j dv_j(state) and the denominator's share.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_dkv_triton import key_by_query
from .gated_maps import MAP_POINTERS, Mapped, features, map_gate_constants, project, row_sums, weights
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, pair_decay, product, row_decay, sum_before
from .tuning import gated_map_chunk, gated_map_dv


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_dv_kernel(
    q, k, v, g, q_weight, q_bias, k_weight, k_bias, q_sums, k_sums, dout, factor, extra, d_states, dz_states,
    dv, dg, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, WANT_G: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, key-value heads, flat). BV covers V. dg [B, S, T]."""
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
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
    v_grad = tl.zeros([C, BV], tl.float32)

    for j in tl.range(0, G, disable_licm=True):
        s = hk * G + j
        slot = (b * S + s) * NT + c
        at_s = (b * S + s) * T + t
        running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
        write = tl.exp2(total - running)
        crossing = tl.zeros([C], tl.float32)  # row sums less column sums of P (do v + e)
        to_state = tl.zeros([C], tl.float32)  # phi(k)_j dphi(k)_j through the state
        from_state = tl.zeros([C, BV], tl.float32)
        for i in tl.range(0, NF, disable_licm=True):
            column = i * BF + tl.arange(0, BF)
            in_f = column < WIDTH
            in_row = live[:, None] & in_f[None, :]
            wk = weights(k_weight + s * D * WIDTH, d, column, in_f, D, WIDTH)
            yk = project(xk, wk, k_bias + s * WIDTH if BIAS else k_bias, column, in_f, BIAS, PREC)
            for sign in tl.static_range(SIGNED):
                _, kf = features(yk, row_sums(k_sums, at_s, sign, live, C, MAP), in_row, sign, MAP)
                f = sign * WIDTH + column
                tile = slot * F * V + f[:, None] * V + o[None, :]
                d_state = tl.load(d_states + tile, mask=in_f[:, None] & in_o[None, :], other=0.0)
                from_state = product((kf * write[:, None]).to(xk.dtype), d_state, from_state, PREC)
                if WANT_G and NORM:
                    dz = tl.load(dz_states + slot * F + f, mask=in_f, other=0.0)
                    to_state += tl.sum(kf * dz[None, :], 1) * write
        v_grad += from_state
        if WANT_G:
            to_state += tl.sum(from_state * vt.to(tl.float32), 1)

        for r in tl.range(0, R, disable_licm=True):
            h = s * R + r
            at = (b * H + h) * T + t
            q_at = q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + d[None, :]
            xq = tl.load(q_at, mask=in_x, other=0.0)
            scores = tl.zeros([C, C], tl.float32)
            for i in tl.range(0, NF, disable_licm=True):
                column = i * BF + tl.arange(0, BF)
                in_f = column < WIDTH
                in_row = live[:, None] & in_f[None, :]
                wq = weights(q_weight + h * D * WIDTH, d, column, in_f, D, WIDTH)
                wk = weights(k_weight + s * D * WIDTH, d, column, in_f, D, WIDTH)
                yq = project(xq, wq, q_bias + h * WIDTH if BIAS else q_bias, column, in_f, BIAS, PREC)
                yk = project(xk, wk, k_bias + s * WIDTH if BIAS else k_bias, column, in_f, BIAS, PREC)
                for sign in tl.static_range(SIGNED):
                    _, qf = features(yq, row_sums(q_sums, at, sign, live, C, MAP), in_row, sign, MAP)
                    _, kf = features(yk, row_sums(k_sums, at_s, sign, live, C, MAP), in_row, sign, MAP)
                    scores = tl.dot(kf.to(xk.dtype), tl.trans(qf.to(xk.dtype)), scores, input_precision=PREC)
            do = tl.load(
                dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0
            )
            raw, weight = key_by_query(vt, do, factor, extra, at, live, scale, C, NORM, PREC)
            scores *= pair_decay(running[None, :], running[:, None], seen)
            v_grad = tl.dot((scores * weight[None, :]).to(do.dtype), do, v_grad, input_precision=PREC)
            if WANT_G:
                over = tl.where(rows[:, None] == rows[None, :], 0.0, scores * raw)
                crossing += tl.sum(over, 0) - tl.sum(over, 1)
        if WANT_G:
            passed = sum_before(to_state) + tl.cumsum(crossing, 0, reverse=True)
            tl.store(dg + at_s, passed, mask=live)
    to = dv + b * sob + hk * soh + first * sot + rows[:, None] * sot + o[None, :]
    tl.store(to, v_grad.to(dv.dtype.element_ty), mask=in_v)


def map_value_gradients(
    plan: Plan,
    x: Mapped,
    dout: torch.Tensor,
    factors: tuple[torch.Tensor | None, torch.Tensor | None],
    d_states: tuple[torch.Tensor, torch.Tensor],
    *,
    chunk: int,
    want_g: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dv as v, and the keys' part of dg [B, S, T] float32 (empty unless wanted)."""
    config = gated_map_dv(plan.capability, plan.features, plan.values, x.q.dtype)
    table, _, count = plan.chunks(chunk)
    batch, length, device = plan.batch, plan.length, x.q.device
    dv = empty((batch, length, plan.kv_heads, plan.values), dtype=x.v.dtype, device=device).transpose(1, 2)
    dg = empty((batch, plan.state_heads, length) if want_g else (0,), dtype=torch.float32, device=device)
    map_dv_kernel[(batch * count * plan.kv_heads,)](
        *x, dout, *factors, *d_states, dv, dg, table, *x.strides(plan), *dout.stride()[:3], *dv.stride()[:3],
        plan.scale, length, plan.heads, count,
        BV=max(16, triton.next_power_of_2(plan.values)), WANT_G=want_g, **x.options(plan, chunk, table), **config,
    )  # fmt: skip
    return dv, dg


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width in ((64, 256), (128, 64)):
        config = gated_map_dv(arch, 2 * width, size, torch.bfloat16)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, size, torch.bfloat16, backward=True)
        constants = map_gate_constants(size, width, chunk) | {"BV": size, "WANT_G": True} | config
        pointers = MAP_POINTERS | {"dv": "*bf16", "dg": "*fp32"}
        signature = gate_signature(map_dv_kernel, pointers, constants)
        cases.append((map_dv_kernel, signature, constants, options, f"D {size} f {width}"))
    return cases
