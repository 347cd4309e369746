"""Gradients of gated linear attention on the query's side, every chunk and query head for itself.

With S_c the state before chunk c, do_i the gradient of num_i and e_i that of den_i (gated_out_triton.py), and
D_ij = e^{G_i - G_j} for j <= i, else 0:

    dq_i = e^{G_i} (S_c do_i + z_c e_i) + sum_j dP_ij k_j          dP_ij = (do_i v_j + e_i) D_ij
    dg_t : sum_{i >= t} q_i dq_i(state)  +  e^{G_last} <S_c, dS>   dS the gradient of the state after the chunk

The rest of dg is in gated_dkv_triton.py. A token's gate collects only what passes over it, so that a strong decay's
small gradient is no difference of large numbers.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_plan import Plan, gate_signature
from .gated_tiles import (
    TINY,
    channel_sums,
    channel_total,
    chunk_span,
    halves,
    mild,
    pair_decay,
    parted,
    product,
    row_decay,
    served,
)
from .tuning import gated_chunk, gated_dq


@triton.jit(do_not_specialize=["T", "H", "count"])
def factor_kernel(
    out, rest, den, dout, factor, extra, sob, soh, sot, sdb, sdh, sdt, scale, T, H, count,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """factor = scale / den, which makes do num's gradient; extra = -(o do) scale / den, den's. Grid (rows / ROWS).

    REST: o is the sum of out and rest.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = i < count
    b, h, t = i // T // H, i // T % H, i % T
    o = tl.arange(0, BV)
    inside = live[:, None] & (o < V)[None, :]
    at = (b * sob + h * soh + t * sot)[:, None] + o[None, :]
    y = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    if REST:
        y += tl.load(rest + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dout + (b * sdb + h * sdh + t * sdt)[:, None] + o[None, :], mask=inside, other=0.0)
    mass = tl.load(den + i, mask=live, other=1.0)
    weight = scale / tl.maximum(mass, TINY)
    along = tl.sum(y * dy.to(tl.float32), 1)
    tl.store(factor + i, weight, mask=live)
    tl.store(extra + i, tl.where(mass > TINY, -along * weight, 0.0), mask=live)


@triton.jit(do_not_specialize=["T", "H", "NT"])
def dq_kernel(
    q, k, v, g, dout, factor, extra, states, z_states, d_states, dz_states, dq, dg_read, dg_pass, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, LAG: tl.constexpr, PACKED: tl.constexpr,
    WANT_G: tl.constexpr, LEVELS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, query heads, flat). BV covers V. dg_read, dg_pass [B, H, T]: at the readers, at the chunk.

    With a decay per channel dg_read [B, H, T, F] is q_i dq_i by channel, a token with itself left out.
    """
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    c = pid // H % NT
    b = (pid // H // NT).to(tl.int64)
    s = h // R
    first, begin, end = chunk_span(c, table, T, C, LAG, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    first_q = first + C * LAG
    tq = first_q + rows
    read = (tq >= begin) & (tq < end)
    o = tl.arange(0, BV)
    in_o = o < V
    g_base = b * sgb + s * sgh
    if DECAY != "channel":
        running, total = row_decay(g, g_base, sgt, t, live, C, DECAY)
        ahead = running
        if LAG:
            ahead, _ = row_decay(g, g_base, sgt, tq, read, C, DECAY)
            ahead += total
        reach = tl.exp2(ahead)[:, None]
    at = (b * H + h) * T + tq
    weight = tl.load(factor + at, mask=read, other=0.0) if NORM else tl.zeros([C], tl.float32) + scale
    e = tl.load(extra + at, mask=read, other=0.0) if NORM else tl.zeros([C], tl.float32)
    do = tl.load(
        dout + b * sdb + h * sdh + first_q * sdt + rows[:, None] * sdt + o[None, :],
        mask=read[:, None] & in_o[None, :], other=0.0,
    )  # fmt: skip
    if not LAG:
        vt = tl.load(
            v + b * svb + (s // G) * svh + first * svt + rows[None, :] * svt + o[:, None],
            mask=live[None, :] & in_o[:, None], other=0.0,
        )  # fmt: skip
        pairs = tl.dot(do, vt, input_precision=PREC) * weight[:, None] + e[:, None]
        if DECAY == "channel":
            own = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)
        else:
            pairs *= pair_decay(running[:, None], running[None, :], rows[:, None] >= rows[None, :])
        pairs = pairs.to(do.dtype)

    slot = (b * (H // R) + s) * NT + c
    from_state = tl.zeros([C], tl.float32)  # q_i dq_i through the state
    through = tl.zeros([BF], tl.float32)  # <S_c, dS>, by feature
    for i in range(0, (F + BF - 1) // BF):
        f = i * BF + tl.arange(0, BF)
        in_f = f < F
        in_q = read[:, None] & in_f[None, :]
        tile = f[None, :] * V + o[:, None]
        in_tile = in_f[None, :] & in_o[:, None]
        state = tl.load(states + slot * F * V + tile, mask=in_tile, other=0.0)
        if DECAY == "channel":
            sums = channel_sums(g, g_base, first_q, sgt, rows, read, f, in_f)
            ahead = sums + channel_total(g, g_base, first, begin, end, sgt, f, in_f, C)[None, :] if LAG else sums
            reach = tl.exp2(ahead)
        grad = product(do, state, tl.zeros([C, BF], tl.float32), PREC) * weight[:, None]
        if NORM:
            z = tl.load(z_states + slot * F + f, mask=in_f, other=0.0)
            grad += e[:, None] * z[None, :]
        grad *= reach
        if WANT_G:
            qf = tl.load(q + b * sqb + h * sqh + first_q * sqt + rows[:, None] * sqt + f[None, :], mask=in_q, other=0.0)
            if DECAY != "channel":
                from_state += tl.sum(qf.to(tl.float32) * grad, 1)
                if h % R == 0:
                    d_state = tl.load(d_states + slot * F * V + tile, mask=in_tile, other=0.0)
                    through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
                    if NORM:
                        through += z * tl.load(dz_states + slot * F + f, mask=in_f, other=0.0)
        if not LAG:
            kf = tl.load(
                k + b * skb + s * skh + first * skt + rows[:, None] * skt + f[None, :],
                mask=live[:, None] & in_f[None, :], other=0.0,
            )  # fmt: skip
            if DECAY == "channel":
                total = channel_total(g, g_base, first, begin, end, sgt, f, in_f, C)
                if mild(total, kf.dtype):
                    grown, shrunk = parted(sums, total)
                    earlier = (kf.to(tl.float32) * shrunk).to(kf.dtype)
                    kept = tl.where(rows[:, None] > rows[None, :], pairs, 0.0)
                    grad += tl.dot(kept, earlier, input_precision=PREC) * grown
                else:
                    for level in tl.range(0, LEVELS, num_stages=1):
                        near = halves(sums, g, g_base, first, end, sgt, f, in_f, level, C)
                        earlier = (kf.to(tl.float32) * near).to(kf.dtype)
                        kept = tl.where(served(rows[:, None], rows[None, :], level), pairs, 0.0)
                        grad += tl.dot(kept, earlier, input_precision=PREC) * near
            else:
                grad = tl.dot(pairs, kf, grad, input_precision=PREC)
        if WANT_G and DECAY == "channel":
            to = dg_read + (b * H + h) * T * F + tq[:, None] * F + f[None, :]
            tl.store(to, qf.to(tl.float32) * grad, mask=in_q)
        if DECAY == "channel" and not LAG:
            grad += own[:, None] * kf.to(tl.float32)
        to = dq + b * sob + h * soh + first_q * sot + rows[:, None] * sot + f[None, :]
        tl.store(to, grad.to(dq.dtype.element_ty), mask=in_q)
    if WANT_G and DECAY != "channel":
        passed = tl.sum(through, 0) * tl.exp2(total)
        later = tl.cumsum(from_state, 0, reverse=True)
        if LAG:
            tl.store(dg_read + at, later, mask=read)
            tl.store(dg_pass + (b * H + h) * T + t, tl.zeros_like(later) + tl.sum(from_state, 0) + passed, mask=live)
        else:
            tl.store(dg_read + at, later + passed, mask=read)


def factors(
    plan: Plan, out: torch.Tensor, den: torch.Tensor, dout: torch.Tensor, rest: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What turns the output's gradient into num's, and den's gradient, both [B, H, T]; None without a denominator.

    rest: what rounding took off the output, if it was kept; its strides are the output's.
    """
    if not plan.norm:
        return None, None
    factor, extra = (empty(tuple(den.shape), dtype=torch.float32, device=out.device) for _ in range(2))
    count, rows = den.numel(), 32
    factor_kernel[(-(-count // rows),)](
        out, rest, den, dout, factor, extra, *out.stride()[:3], *dout.stride()[:3],
        plan.scale, plan.length, plan.heads, count, V=plan.values, BV=triton.next_power_of_2(plan.values), ROWS=rows,
        REST=rest is not None, num_warps=4,
    )  # fmt: skip
    return factor, extra


def query_gradients(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    dout: torch.Tensor,
    factor: torch.Tensor | None,
    extra: torch.Tensor | None,
    states: tuple[torch.Tensor, torch.Tensor],
    d_states: tuple[torch.Tensor, torch.Tensor],
    *,
    chunk: int,
    want_g: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq as q, and the query side's part of dg [B, S, T] float32 (empty unless wanted), or q dq [B, H, T, F]."""
    config = gated_dq(plan.capability, plan.features, plan.values, q.dtype, plan.decay)
    table, _, count = plan.chunks(chunk)
    batch, length, heads = plan.batch, plan.length, plan.heads
    dq = empty((batch, length, heads, plan.features), dtype=q.dtype, device=q.device).transpose(1, 2)
    channel = plan.decay == "channel"
    shape = (batch, heads, length, plan.features) if channel else (batch, heads, length)
    read = empty(shape if want_g else (0,), dtype=torch.float32, device=q.device)
    # Under a lag a chunk's gates also collect from the next chunk's readers, which another program knows.
    split = plan.lag and not channel
    passed = torch.zeros_like(read) if split else read
    dq_kernel[(batch * count * heads,)](
        q, k, v, g, dout, factor, extra, *states, *d_states, dq, read, passed, table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *plan.decay_strides(g), *dout.stride()[:3], *dq.stride()[:3],
        plan.scale, length, heads, count, R=plan.readers, G=plan.state_heads // plan.kv_heads, F=plan.features,
        V=plan.values, BV=max(16, triton.next_power_of_2(plan.values)), C=chunk, DECAY=plan.decay, NORM=plan.norm,
        LAG=plan.lag, PACKED=table is not None, WANT_G=want_g, LEVELS=chunk.bit_length() - 1,
        PREC="ieee" if q.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
    if channel or not want_g:
        return dq, read
    dg = read + passed if split else read
    return dq, dg if plan.readers == 1 else dg.unflatten(1, (plan.state_heads, -1)).sum(2)


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for features, values, decay, norm in (
        (128, 128, "scalar", False),
        (128, 128, "channel", False),
        (512, 64, "scalar", True),
    ):
        config = gated_dq(arch, features, values, torch.bfloat16, decay)
        chunk = gated_chunk(arch, features, values, torch.bfloat16, decay, backward=True)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            R=1, G=1, F=features, V=values, BV=values, C=chunk, LEVELS=chunk.bit_length() - 1,
            DECAY=decay, NORM=norm, LAG=False, PACKED=False, WANT_G=True, PREC="tf32", table=None, **config,
        )  # fmt: skip
        pointers = dict.fromkeys(("q", "k", "v", "dout", "states", "d_states", "dq"), "*bf16")
        pointers |= dict.fromkeys(("g", "factor", "extra", "z_states", "dz_states", "dg_read", "dg_pass"), "*fp32")
        signature = gate_signature(dq_kernel, pointers, constants)
        cases.append((dq_kernel, signature, constants, options, f"{decay} F {features} V {values} norm {norm}"))
    return cases
