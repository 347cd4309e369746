"""Gradient of the queries before their feature map (gated_dq_triton.py, gated_maps.py), every chunk for itself.

Features and their gradients exist for one tile of columns at a time: dx = sum over tiles of dy W^T. A softmax needs
sum_f phi_f dphi_f of the whole row before any dy: a first pass over the tiles, whose sums the weights' kernel reads.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_maps import MAP_POINTERS, Mapped, features, map_gate_constants, phi_grad, project, row_sums, weights
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, pair_decay, product, row_decay
from .tuning import gated_map_chunk, gated_map_dq


@triton.jit
def reading_grad(do, state, z, weight, e, reach, C: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr,
                 PREC: tl.constexpr):  # fmt: skip
    """Gradient of query features through the state: e^{G_i} (S_c do_i + z_c e_i), state as [BV, BF]."""
    grad = product(do, state, tl.zeros([C, BF], tl.float32), PREC) * weight[:, None]
    if NORM:
        grad += e[:, None] * z[None, :]
    return grad * reach[:, None]


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_dq_kernel(
    q, k, v, g, q_weight, q_bias, k_weight, k_bias, q_sums, k_sums, dout, factor, extra, states, z_states, d_states,
    dz_states, dq, dg_read, along, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, WANT_G: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, query heads, flat). BV covers V. dg_read [B, H, T]; along [B, H, T, 2] (softmax)."""
    F: tl.constexpr = WIDTH * SIGNED
    PASSES: tl.constexpr = 2 if MAP == "hedgehog_softmax" else 1
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    c = pid // H % NT
    b = (pid // H // NT).to(tl.int64)
    s = h // R
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    o = tl.arange(0, BV)
    d = tl.arange(0, BD)
    in_o = o < V
    in_x = live[:, None] & (d < D)[None, :]
    running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
    reach = tl.exp2(running)
    at = (b * H + h) * T + t
    weight = tl.load(factor + at, mask=live, other=0.0) if NORM else tl.zeros([C], tl.float32) + scale
    e = tl.load(extra + at, mask=live, other=0.0) if NORM else tl.zeros([C], tl.float32)
    do = tl.load(
        dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :],
        mask=live[:, None] & in_o[None, :], other=0.0,
    )  # fmt: skip
    vt = tl.load(
        v + b * svb + (s // G) * svh + first * svt + rows[None, :] * svt + o[:, None],
        mask=live[None, :] & in_o[:, None], other=0.0,
    )  # fmt: skip
    pairs = tl.dot(do, vt, input_precision=PREC) * weight[:, None] + e[:, None]
    pairs = (pairs * pair_decay(running[:, None], running[None, :], rows[:, None] >= rows[None, :])).to(do.dtype)
    xq = tl.load(q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + d[None, :], mask=in_x, other=0.0)
    xk = tl.load(k + b * skb + (s // G) * skh + first * skt + rows[:, None] * skt + d[None, :], mask=in_x, other=0.0)

    slot = (b * (H // R) + s) * NT + c
    from_state = tl.zeros([C], tl.float32)  # phi(q)_i dphi(q)_i through the state
    through = tl.zeros([BF], tl.float32)  # <S_c, dS>, by feature
    up = tl.zeros([C], tl.float32)  # phi dphi of a row, by sign
    down = tl.zeros([C], tl.float32)
    grad_x = tl.zeros([C, BD], tl.float32)
    for turn in tl.static_range(PASSES):
        for i in tl.range(0, (WIDTH + BF - 1) // BF, disable_licm=True):
            column = i * BF + tl.arange(0, BF)
            in_f = column < WIDTH
            in_row = live[:, None] & in_f[None, :]
            wq = weights(q_weight + h * D * WIDTH, d, column, in_f, D, WIDTH)
            wk = weights(k_weight + s * D * WIDTH, d, column, in_f, D, WIDTH)
            yq = project(xq, wq, q_bias + h * WIDTH if BIAS else q_bias, column, in_f, BIAS, PREC)
            yk = project(xk, wk, k_bias + s * WIDTH if BIAS else k_bias, column, in_f, BIAS, PREC)
            dy = tl.zeros([C, BF], tl.float32)
            for sign in tl.static_range(SIGNED):
                f = sign * WIDTH + column
                signed, qf = features(yq, row_sums(q_sums, at, sign, live, C, MAP), in_row, sign, MAP)
                ks = row_sums(k_sums, (b * (H // R) + s) * T + t, sign, live, C, MAP)
                _, kf = features(yk, ks, in_row, sign, MAP)
                tile = slot * F * V + f[None, :] * V + o[:, None]
                in_tile = in_f[None, :] & in_o[:, None]
                state = tl.load(states + tile, mask=in_tile, other=0.0)
                z = tl.load(z_states + slot * F + f, mask=in_f, other=0.0) if NORM else tl.zeros([BF], tl.float32)
                grad = reading_grad(do, state, z, weight, e, reach, C, BF, NORM, PREC)
                if WANT_G and turn == 0:
                    from_state += tl.sum(qf * grad, 1)
                    if h % R == 0:
                        d_state = tl.load(d_states + tile, mask=in_tile, other=0.0)
                        through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
                        if NORM:
                            through += z * tl.load(dz_states + slot * F + f, mask=in_f, other=0.0)
                grad = tl.dot(pairs, kf.to(xk.dtype), grad, input_precision=PREC)
                if turn + 1 < PASSES:
                    if sign == 0:
                        up += tl.sum(qf * grad, 1)
                    else:
                        down += tl.sum(qf * grad, 1)
                else:
                    found = phi_grad(signed, qf, grad, (up if sign == 0 else down)[:, None], MAP)
                    dy += found if sign == 0 else -found
            if turn + 1 == PASSES:
                grad_x = tl.dot(dy.to(xq.dtype), tl.trans(wq), grad_x, input_precision=PREC)
    to = dq + b * sob + h * soh + first * sot + rows[:, None] * sot + d[None, :]
    tl.store(to, grad_x.to(dq.dtype.element_ty), mask=in_x)
    if PASSES == 2:
        tl.store(along + at * 2, up, mask=live)
        tl.store(along + at * 2 + 1, down, mask=live)
    if WANT_G:
        passed = tl.sum(through, 0) * tl.exp2(total)
        tl.store(dg_read + at, tl.cumsum(from_state, 0, reverse=True) + passed, mask=live)


def map_query_gradients(
    plan: Plan,
    x: Mapped,
    dout: torch.Tensor,
    factors: tuple[torch.Tensor | None, torch.Tensor | None],
    states: tuple[torch.Tensor, torch.Tensor],
    d_states: tuple[torch.Tensor, torch.Tensor],
    *,
    chunk: int,
    want_g: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq as q, the query side's part of dg [B, S, T] (empty unless wanted), and phi dphi [B, H, T, 2] of a softmax."""
    config = gated_map_dq(plan.capability, plan.features, plan.values, x.q.dtype)
    table, _, count = plan.chunks(chunk)
    batch, length, heads, device = plan.batch, plan.length, plan.heads, x.q.device
    dq = empty((batch, length, heads, x.q.shape[3]), dtype=x.q.dtype, device=device).transpose(1, 2)
    read = empty((batch, heads, length) if want_g else (0,), dtype=torch.float32, device=device)
    softmax = plan.map == "hedgehog_softmax"
    along = empty((batch, heads, length, 2) if softmax else (0,), dtype=torch.float32, device=device)
    map_dq_kernel[(batch * count * heads,)](
        *x, dout, *factors, *states, *d_states, dq, read, along, table,
        *x.strides(plan), *dout.stride()[:3], *dq.stride()[:3], plan.scale, length, heads, count,
        BV=max(16, triton.next_power_of_2(plan.values)), WANT_G=want_g, **x.options(plan, chunk, table), **config,
    )  # fmt: skip
    if want_g and plan.readers > 1:
        read = read.unflatten(1, (plan.state_heads, -1)).sum(2)
    return dq, read, along


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width in ((64, 256), (128, 64)):
        config = gated_map_dq(arch, 2 * width, size, torch.bfloat16)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, size, torch.bfloat16, backward=True)
        constants = map_gate_constants(size, width, chunk) | {"BV": size, "WANT_G": True} | config
        pointers = MAP_POINTERS | {"dq": "*bf16", "dg_read": "*fp32", "along": "*fp32"}
        signature = gate_signature(map_dq_kernel, pointers, constants)
        cases.append((map_dq_kernel, signature, constants, options, f"D {size} f {width}"))
    return cases
