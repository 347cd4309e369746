"""Gradients of gated linear attention on the keys' side, with a decay per channel.

As in gated_dkv_triton.py, but the decay e^{G_i - G_j} stands inside the products over channels (`gated_tiles.halves`):

    P_ij  = sum_f q_if k_jf e^{G_if - G_jf}      dP_ij = do_i v_j + e_i            for j <= i, else 0
    dv_j  = dS^T (e^{G_last - G_j} k_j) + sum_i P_ij do_i
    dk_jf = e^{G_last,f - G_jf} (dS v_j + dz)_f + sum_i dP_ij e^{G_if - G_jf} q_if
    dg_tf = sum_{i >= t} q_if dq_if - sum_{j >= t} k_jf dk_jf(chunk) + sum_{j < t} k_jf dk_jf(state)
            + e^{G_last,f} <S_c, dS>_f             a token's pair with itself left out of dq and dk

Values need all channels of the scores, keys and gates one tile of channels each: two kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_dkv_triton import key_by_query
from .gated_plan import Plan, gate_signature
from .gated_tiles import channel_sums, channel_total, chunk_span, halves, mild, parted, product, served, sum_before
from .tuning import gated_chunk, gated_dkv


@triton.jit(do_not_specialize=["T", "H", "NT"])
def dv_kernel(
    q, k, g, dout, factor, d_states, dv, table,
    sqb, sqh, sqt, skb, skh, skt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, NORM: tl.constexpr, LAG: tl.constexpr, PACKED: tl.constexpr, LEVELS: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, key-value heads, flat). BV covers V."""
    HK = H // (R * G)
    pid = tl.program_id(0)
    hk = (pid % HK).to(tl.int64)
    c = pid // HK % NT
    b = (pid // HK // NT).to(tl.int64)
    first, begin, end = chunk_span(c, table, T, C, LAG, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    o = tl.arange(0, BV)
    in_o = o < V
    in_v = live[:, None] & in_o[None, :]
    v_grad = tl.zeros([C, BV], tl.float32)
    for r in tl.range(0, G * R, disable_licm=True):
        h = hk * (G * R) + r
        s = h // R
        slot = (b * (H // R) + s) * NT + c
        g_base = b * sgb + s * sgh
        scores = tl.zeros([C, C], tl.float32)
        for i in tl.range(0, (F + BF - 1) // BF, disable_licm=True):
            f = i * BF + tl.arange(0, BF)
            in_f = f < F
            in_k = live[:, None] & in_f[None, :]
            kf = tl.load(k + b * skb + s * skh + first * skt + rows[:, None] * skt + f[None, :], mask=in_k, other=0.0)
            sums = channel_sums(g, g_base, first, sgt, rows, live, f, in_f)
            total = channel_total(g, g_base, first, begin, end, sgt, f, in_f, C)
            if r % R == 0:
                written = (kf.to(tl.float32) * tl.exp2(total[None, :] - sums)).to(kf.dtype)
                d_state = tl.load(
                    d_states + slot * F * V + f[:, None] * V + o[None, :], mask=in_f[:, None] & in_o[None, :], other=0.0
                )
                v_grad = product(written, d_state, v_grad, PREC)
            if not LAG:
                qf = tl.load(
                    q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + f[None, :], mask=in_k, other=0.0
                )
                if mild(total, kf.dtype):
                    grown, shrunk = parted(sums, total)
                    later = (qf.to(tl.float32) * grown).to(qf.dtype)
                    earlier = (kf.to(tl.float32) * shrunk).to(kf.dtype)
                    part = tl.dot(earlier, tl.trans(later), input_precision=PREC)
                    scores += tl.where(rows[None, :] >= rows[:, None], part, 0.0)
                else:
                    own = tl.sum(qf.to(tl.float32) * kf.to(tl.float32), 1)
                    scores += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
                    for level in tl.range(0, LEVELS, num_stages=1):
                        near = halves(sums, g, g_base, first, end, sgt, f, in_f, level, C)
                        later = (qf.to(tl.float32) * near).to(qf.dtype)
                        earlier = (kf.to(tl.float32) * near).to(kf.dtype)
                        part = tl.dot(earlier, tl.trans(later), input_precision=PREC)
                        scores += tl.where(served(rows[None, :], rows[:, None], level), part, 0.0)
        if not LAG:
            at = (b * H + h) * T + t
            weight = tl.load(factor + at, mask=live, other=0.0) if NORM else tl.zeros([C], tl.float32) + scale
            do = tl.load(
                dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0
            )
            v_grad = tl.dot((scores * weight[None, :]).to(do.dtype), do, v_grad, input_precision=PREC)
    to = dv + b * sob + hk * soh + first * sot + rows[:, None] * sot + o[None, :]
    tl.store(to, v_grad.to(dv.dtype.element_ty), mask=in_v)


@triton.jit(do_not_specialize=["T", "H", "NT"])
def dk_kernel(
    q, k, v, g, dout, factor, extra, states, z_states, d_states, dz_states, dk, dg, dg_read, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, NORM: tl.constexpr, LAG: tl.constexpr, PACKED: tl.constexpr, WANT_G: tl.constexpr,
    LEVELS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, state heads, tiles of F, flat). BV covers V. dg [B, S, T, F]; dg_read [B, H, T, F]: q dq."""
    FT: tl.constexpr = (F + BF - 1) // BF
    S = H // R
    pid = tl.program_id(0)
    f = pid % FT * BF + tl.arange(0, BF)
    s = (pid // FT % S).to(tl.int64)
    c = pid // FT // S % NT
    b = (pid // FT // S // NT).to(tl.int64)
    slot = (b * S + s) * NT + c
    first, begin, end = chunk_span(c, table, T, C, LAG, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    o = tl.arange(0, BV)
    in_f, in_o = f < F, o < V
    in_k = live[:, None] & in_f[None, :]
    in_v = live[:, None] & in_o[None, :]
    in_tile = in_f[None, :] & in_o[:, None]
    tile = slot * F * V + f[None, :] * V + o[:, None]
    g_base = b * sgb + s * sgh
    sums = channel_sums(g, g_base, first, sgt, rows, live, f, in_f)
    total = channel_total(g, g_base, first, begin, end, sgt, f, in_f, C)
    vt = tl.load(v + b * svb + (s // G) * svh + first * svt + rows[:, None] * svt + o[None, :], mask=in_v, other=0.0)
    inner = tl.zeros([C, BF], tl.float32)  # dk from later tokens of the chunk
    grad = tl.zeros([C, BF], tl.float32)  # from the token itself, then from the state
    if not LAG:
        for r in tl.range(0, R, disable_licm=True):
            h = s * R + r
            do = tl.load(
                dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0
            )
            raw, _ = key_by_query(vt, do, factor, extra, (b * H + h) * T + t, live, scale, C, NORM, PREC)
            qf = tl.load(q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + f[None, :], mask=in_k, other=0.0)
            own = tl.sum(tl.where(rows[:, None] == rows[None, :], raw, 0.0), 1)
            grad += own[:, None] * qf.to(tl.float32)
            pairs = raw.to(qf.dtype)
            if mild(total, qf.dtype):
                grown, shrunk = parted(sums, total)
                later = (qf.to(tl.float32) * grown).to(qf.dtype)
                kept = tl.where(rows[None, :] > rows[:, None], pairs, 0.0)
                inner += tl.dot(kept, later, input_precision=PREC) * shrunk
            else:
                for level in tl.range(0, LEVELS, num_stages=1):
                    near = halves(sums, g, g_base, first, end, sgt, f, in_f, level, C)
                    later = (qf.to(tl.float32) * near).to(qf.dtype)
                    kept = tl.where(served(rows[None, :], rows[:, None], level), pairs, 0.0)
                    inner += tl.dot(kept, later, input_precision=PREC) * near

    kf = tl.load(k + b * skb + s * skh + first * skt + rows[:, None] * skt + f[None, :], mask=in_k, other=0.0)
    d_state = tl.load(d_states + tile, mask=in_tile, other=0.0)
    from_state = product(vt, d_state, tl.zeros([C, BF], tl.float32), PREC)
    if NORM:
        dz = tl.load(dz_states + slot * F + f, mask=in_f, other=0.0)
        from_state += dz[None, :]
    from_state *= tl.exp2(total[None, :] - sums)
    to = dk + b * sob + s * soh + first * sot + rows[:, None] * sot + f[None, :]
    tl.store(to, (grad + inner + from_state).to(dk.dtype.element_ty), mask=in_k)
    if WANT_G:
        through = tl.sum(tl.load(states + tile, mask=in_tile, other=0.0).to(tl.float32) * d_state.to(tl.float32), 0)
        if NORM:
            through += tl.load(z_states + slot * F + f, mask=in_f, other=0.0) * dz
        gates = sum_before(kf.to(tl.float32) * from_state) + (through * tl.exp2(total))[None, :]
        inner = -inner * kf.to(tl.float32)
        for r in tl.range(0, R, disable_licm=True):
            from_q = dg_read + (b * H + s * R + r) * T * F + f[None, :]
            inner += tl.load(from_q + t[:, None] * F, mask=in_k, other=0.0)
            if LAG:
                ahead = t + C
                in_q = ((ahead >= begin) & (ahead < end))[:, None] & in_f[None, :]
                gates += tl.sum(tl.load(from_q + ahead[:, None] * F, mask=in_q, other=0.0), 0)[None, :]
        gates += tl.cumsum(inner, 0, reverse=True)
        tl.store(dg + (b * S + s) * T * F + t[:, None] * F + f[None, :], gates, mask=in_k)


def channel_gradients(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    dout: torch.Tensor,
    factor: torch.Tensor | None,
    extra: torch.Tensor | None,
    states: tuple[torch.Tensor, torch.Tensor],
    d_states: tuple[torch.Tensor, torch.Tensor],
    *,
    chunk: int,
    dg_read: torch.Tensor,
    want_g: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dk and dv in their inputs' dtypes, and dg [B, S, T, F] float32 (empty unless wanted) from q dq [B, H, T, F]."""
    config = gated_dkv(plan.capability, plan.features, plan.values, q.dtype, "channel", many=False)
    table, _, count = plan.chunks(chunk)
    batch, length = plan.batch, plan.length

    def like(x: torch.Tensor) -> torch.Tensor:
        return empty((batch, length, x.shape[1], x.shape[3]), dtype=x.dtype, device=x.device).transpose(1, 2)

    dk, dv = like(k), like(v)
    shape = (batch, plan.state_heads, length, plan.features)
    dg = empty(shape if want_g else (0,), dtype=torch.float32, device=q.device)
    options: dict[str, Any] = dict(
        R=plan.readers, G=plan.state_heads // plan.kv_heads, F=plan.features, V=plan.values,
        BV=max(16, triton.next_power_of_2(plan.values)), C=chunk, NORM=plan.norm, LAG=plan.lag,
        PACKED=table is not None, LEVELS=chunk.bit_length() - 1,
        PREC="ieee" if q.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
    sizes = plan.scale, length, plan.heads, count
    dv_kernel[(batch * count * plan.kv_heads,)](
        q, k, g, dout, factor, d_states[0], dv, table,
        *q.stride()[:3], *k.stride()[:3], *g.stride()[:3], *dout.stride()[:3], *dv.stride()[:3], *sizes, **options,
    )  # fmt: skip
    tiles = -(-plan.features // config["BF"])
    dk_kernel[(batch * count * plan.state_heads * tiles,)](
        q, k, v, g, dout, factor, extra, *states, *d_states, dk, dg, dg_read, table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:3], *dout.stride()[:3], *dk.stride()[:3],
        *sizes, WANT_G=want_g, **options,
    )  # fmt: skip
    return dk, dv, dg


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    config = gated_dkv(arch, 128, 128, torch.bfloat16, "channel", many=False)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    chunk = gated_chunk(arch, 128, 128, torch.bfloat16, "channel", backward=True)
    constants: dict[str, Any] = dict(
        R=1, G=1, F=128, V=128, BV=128, C=chunk, NORM=False, LAG=False, PACKED=False, LEVELS=chunk.bit_length() - 1,
        PREC="tf32", table=None, **config,
    )  # fmt: skip
    pointers = dict.fromkeys(("q", "k", "dout", "d_states", "dv"), "*bf16") | {"g": "*fp32", "factor": "*fp32"}
    values = (dv_kernel, gate_signature(dv_kernel, pointers, constants), constants, options, "dv F 128 V 128")
    pointers = dict.fromkeys(("q", "k", "v", "dout", "states", "d_states", "dk"), "*bf16")
    pointers |= dict.fromkeys(("g", "factor", "extra", "z_states", "dz_states", "dg", "dg_read"), "*fp32")
    constants = constants | {"WANT_G": True}
    keys = (dk_kernel, gate_signature(dk_kernel, pointers, constants), constants, options, "dk F 128 V 128")
    return [values, keys]
