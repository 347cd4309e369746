"""Gradients of the feature maps' weights: dW = sum over tokens of x^T dy, a tile of columns a program.

dy is computed again as in gated_map_dq_triton.py and gated_map_dk_triton.py. A program keeps its tile of dW and walks
over a share of all chunks of the batch; shares are added up afterwards, in the same order every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_dkv_triton import key_by_query
from .gated_map_dk_triton import writing_grad
from .gated_map_dq_triton import reading_grad
from .gated_maps import MAP_POINTERS, Mapped, features, map_gate_constants, phi_grad, project, row_sums, weights
from .gated_plan import ENOUGH_PROGRAMS, Plan, gate_signature
from .gated_tiles import chunk_span, pair_decay, row_decay
from .tuning import gated_map_chunk, gated_map_weights


@triton.jit(do_not_specialize=["T", "H", "NT", "jobs", "SHARES"])
def query_weight_kernel(
    q, k, v, g, q_weight, q_bias, k_weight, k_bias, q_sums, k_sums, dout, factor, extra, states, z_states, along,
    d_weight, d_bias, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, scale, T, H, NT, jobs, SHARES,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (query heads, tiles of columns, shares, flat). d_weight [SHARES, H, D, WIDTH], d_bias [SHARES, H, WIDTH]."""
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    column = pid // H % NF * BF + tl.arange(0, BF)
    share = (pid // H // NF).to(tl.int64)
    s = h // R
    rows = tl.arange(0, C)
    o = tl.arange(0, BV)
    d = tl.arange(0, BD)
    in_o, in_d, in_f = o < V, d < D, column < WIDTH
    grad_w = tl.zeros([BD, BF], tl.float32)
    grad_b = tl.zeros([BF], tl.float32)
    for job in tl.range(share, jobs, SHARES, disable_licm=True):
        c = job % NT
        b = (job // NT).to(tl.int64)
        first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
        t = first + rows
        live = (t >= begin) & (t < end)
        in_x = live[:, None] & in_d[None, :]
        in_row = live[:, None] & in_f[None, :]
        running, _ = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
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
        xk = tl.load(
            k + b * skb + (s // G) * skh + first * skt + rows[:, None] * skt + d[None, :], mask=in_x, other=0.0
        )
        wq = weights(q_weight + h * D * WIDTH, d, column, in_f, D, WIDTH)
        wk = weights(k_weight + s * D * WIDTH, d, column, in_f, D, WIDTH)
        yq = project(xq, wq, q_bias + h * WIDTH if BIAS else q_bias, column, in_f, BIAS, PREC)
        yk = project(xk, wk, k_bias + s * WIDTH if BIAS else k_bias, column, in_f, BIAS, PREC)
        slot = (b * (H // R) + s) * NT + c
        dy = tl.zeros([C, BF], tl.float32)
        for sign in tl.static_range(SIGNED):
            f = sign * WIDTH + column
            signed, qf = features(yq, row_sums(q_sums, at, sign, live, C, MAP), in_row, sign, MAP)
            ks = row_sums(k_sums, (b * (H // R) + s) * T + t, sign, live, C, MAP)
            _, kf = features(yk, ks, in_row, sign, MAP)
            tile = slot * F * V + f[None, :] * V + o[:, None]
            state = tl.load(states + tile, mask=in_f[None, :] & in_o[:, None], other=0.0)
            z = tl.load(z_states + slot * F + f, mask=in_f, other=0.0) if NORM else tl.zeros([BF], tl.float32)
            grad = reading_grad(do, state, z, weight, e, reach, C, BF, NORM, PREC)
            grad = tl.dot(pairs, kf.to(xk.dtype), grad, input_precision=PREC)
            found = phi_grad(signed, qf, grad, row_sums(along, at, sign, live, C, MAP), MAP)
            dy += found if sign == 0 else -found
        dy = tl.where(in_row, dy, 0.0)  # beyond the end y is the bias, and not every map forgets it
        grad_b += tl.sum(dy, 0)
        grad_w = tl.dot(tl.trans(xq), dy.to(xq.dtype), grad_w, input_precision=PREC)
    slot = share * H + h
    to = d_weight + slot * D * WIDTH + d[:, None] * WIDTH + column[None, :]
    tl.store(to, grad_w, mask=in_d[:, None] & in_f[None, :])
    if BIAS:
        tl.store(d_bias + slot * WIDTH + column, grad_b, mask=in_f)


@triton.jit(do_not_specialize=["T", "H", "NT", "jobs", "SHARES"])
def key_weight_kernel(
    q, k, v, g, q_weight, q_bias, k_weight, k_bias, q_sums, k_sums, dout, factor, extra, d_states, dz_states, along,
    d_weight, d_bias, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, scale, T, H, NT, jobs, SHARES,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (state heads, tiles of columns, shares, flat). d_weight [SHARES, S, D, WIDTH], d_bias [SHARES, S, WIDTH]."""
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
    S = H // R
    pid = tl.program_id(0)
    s = (pid % S).to(tl.int64)
    column = pid // S % NF * BF + tl.arange(0, BF)
    share = (pid // S // NF).to(tl.int64)
    rows = tl.arange(0, C)
    o = tl.arange(0, BV)
    d = tl.arange(0, BD)
    in_o, in_d, in_f = o < V, d < D, column < WIDTH
    seen = rows[:, None] <= rows[None, :]  # [key, query]
    grad_w = tl.zeros([BD, BF], tl.float32)
    grad_b = tl.zeros([BF], tl.float32)
    for job in tl.range(share, jobs, SHARES, disable_licm=True):
        c = job % NT
        b = (job // NT).to(tl.int64)
        first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
        t = first + rows
        live = (t >= begin) & (t < end)
        in_x = live[:, None] & in_d[None, :]
        in_v = live[:, None] & in_o[None, :]
        in_row = live[:, None] & in_f[None, :]
        running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
        write = tl.exp2(total - running)
        at_s = (b * S + s) * T + t
        vt = tl.load(
            v + b * svb + (s // G) * svh + first * svt + rows[:, None] * svt + o[None, :], mask=in_v, other=0.0
        )
        xk = tl.load(
            k + b * skb + (s // G) * skh + first * skt + rows[:, None] * skt + d[None, :], mask=in_x, other=0.0
        )
        wk = weights(k_weight + s * D * WIDTH, d, column, in_f, D, WIDTH)
        yk = project(xk, wk, k_bias + s * WIDTH if BIAS else k_bias, column, in_f, BIAS, PREC)
        slot = (b * S + s) * NT + c
        up = writing_grad(vt, d_states, dz_states, slot, column, o, write, C, BF, F, V, WIDTH, NORM, PREC)
        down = tl.zeros([C, BF], tl.float32)
        if SIGNED == 2:
            down = writing_grad(
                vt, d_states, dz_states, slot, WIDTH + column, o, write, C, BF, F, V, 2 * WIDTH, NORM, PREC
            )
        for r in tl.range(0, R, disable_licm=True):
            h = s * R + r
            at = (b * H + h) * T + t
            do = tl.load(
                dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0
            )
            raw, _weight = key_by_query(vt, do, factor, extra, at, live, scale, C, NORM, PREC)
            pairs = (raw * pair_decay(running[None, :], running[:, None], seen)).to(xk.dtype)
            xq = tl.load(q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + d[None, :], mask=in_x, other=0.0)
            wq = weights(q_weight + h * D * WIDTH, d, column, in_f, D, WIDTH)
            yq = project(xq, wq, q_bias + h * WIDTH if BIAS else q_bias, column, in_f, BIAS, PREC)
            _, qf = features(yq, row_sums(q_sums, at, 0, live, C, MAP), in_row, 0, MAP)
            up = tl.dot(pairs, qf.to(xk.dtype), up, input_precision=PREC)
            if SIGNED == 2:
                _, qf = features(yq, row_sums(q_sums, at, 1, live, C, MAP), in_row, 1, MAP)
                down = tl.dot(pairs, qf.to(xk.dtype), down, input_precision=PREC)
        signed, kf = features(yk, row_sums(k_sums, at_s, 0, live, C, MAP), in_row, 0, MAP)
        dy = phi_grad(signed, kf, up, row_sums(along, at_s, 0, live, C, MAP), MAP)
        if SIGNED == 2:
            signed, kf = features(yk, row_sums(k_sums, at_s, 1, live, C, MAP), in_row, 1, MAP)
            dy -= phi_grad(signed, kf, down, row_sums(along, at_s, 1, live, C, MAP), MAP)
        dy = tl.where(in_row, dy, 0.0)  # beyond the end y is the bias, and not every map forgets it
        grad_b += tl.sum(dy, 0)
        grad_w = tl.dot(tl.trans(xk), dy.to(xk.dtype), grad_w, input_precision=PREC)
    slot = share * S + s
    to = d_weight + slot * D * WIDTH + d[:, None] * WIDTH + column[None, :]
    tl.store(to, grad_w, mask=in_d[:, None] & in_f[None, :])
    if BIAS:
        tl.store(d_bias + slot * WIDTH + column, grad_b, mask=in_f)


def map_weight_gradients(
    plan: Plan,
    x: Mapped,
    dout: torch.Tensor,
    factors: tuple[torch.Tensor | None, torch.Tensor | None],
    states: tuple[torch.Tensor, torch.Tensor],
    d_states: tuple[torch.Tensor, torch.Tensor],
    along: tuple[torch.Tensor, torch.Tensor],
    *,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q's weight [H, D, f] and bias [H, f], and of k's; float32, biases empty where there are none."""
    table, _, count = plan.chunks(chunk)
    jobs = plan.batch * count
    width, size, device = plan.features // plan.signs, x.q.shape[3], x.q.device
    made = []
    for keys, heads, from_states, sums in (
        (False, plan.heads, states, along[0]),
        (True, plan.state_heads, d_states, along[1]),
    ):
        config = gated_map_weights(plan.capability, plan.features, plan.values, x.q.dtype, keys=keys)
        kernel = key_weight_kernel if keys else query_weight_kernel
        tiles = heads * -(-width // config["BF"])
        shares = max(1, min(jobs, -(-4 * ENOUGH_PROGRAMS // tiles)))
        d_weight = empty((shares, heads, size, width), dtype=torch.float32, device=device)
        biased = x.q_bias is not None
        d_bias = empty((shares, heads, width) if biased else (0,), dtype=torch.float32, device=device)
        kernel[(tiles * shares,)](
            *x, dout, *factors, *from_states, sums, d_weight, d_bias, table,
            *x.strides(plan), *dout.stride()[:3], plan.scale, plan.length, plan.heads, count, jobs, shares,
            BV=max(16, triton.next_power_of_2(plan.values)), **x.options(plan, chunk, table), **config,
        )  # fmt: skip
        made += [d_weight.sum(0), d_bias.sum(0) if biased else d_bias]
    return made[0], made[1], made[2], made[3]


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for kernel in (query_weight_kernel, key_weight_kernel):
        for size, width in ((64, 256), (128, 64)):
            config = gated_map_weights(arch, 2 * width, size, torch.bfloat16, keys=kernel is key_weight_kernel)
            options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
            chunk = gated_map_chunk(arch, size, torch.bfloat16, backward=True)
            constants = map_gate_constants(size, width, chunk) | {"BV": size} | config
            pointers = MAP_POINTERS | dict.fromkeys(("along", "d_weight", "d_bias"), "*fp32")
            signature = gate_signature(kernel, pointers, constants)
            cases.append((kernel, signature, constants, options, f"{kernel.__name__} D {size} f {width}"))
    return cases
