"""Gradients of gated linear attention on the keys' side, every chunk and key-value head for itself.

With dS, dz the gradient of the state after the chunk, do_i that of num_i, e_i that of den_i (gated_out_triton.py), and
D_ij = e^{G_i - G_j} for j <= i, else 0:

    P_ij = (q_i k_j) D_ij                  dP_ij = (do_i v_j + e_i) D_ij
    dk_j = e^{G_last - G_j} (dS v_j + dz) + sum_i dP_ij q_i
    dv_j = e^{G_last - G_j} dS^T k_j      + sum_i P_ij do_i
    dg_t : sum_{i >= t > j} P_ij (do_i v_j + e_i)  +  sum_{j < t} k_j dk_j(state)

Both matrices are computed key by query: the transpose of a product's result is wrong on Hopper.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, pair_decay, product, row_decay, sum_before
from .tuning import gated_chunk, gated_dkv


@triton.jit
def key_by_query(vt, do, factor, extra, at, live, scale, C: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr):
    """(do_i v_j + e_i) [key, query], and the factors that turn `do` into num's gradient [C]."""
    weight = tl.load(factor + at, mask=live, other=0.0) if NORM else tl.zeros([C], tl.float32) + scale
    raw = tl.dot(vt, tl.trans(do), input_precision=PREC) * weight[None, :]
    if NORM:
        raw += tl.load(extra + at, mask=live, other=0.0)[None, :]
    return raw, weight


@triton.jit(do_not_specialize=["T", "H", "NT"])
def dkv_kernel(
    q, k, v, g, dout, factor, extra, d_states, dz_states, dk, dv, dg, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, swb, swh, swt,
    scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, LAG: tl.constexpr, PACKED: tl.constexpr,
    WANT_G: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, key-value heads, flat). BV covers V. dg [B, S, T]."""
    NF: tl.constexpr = (F + BF - 1) // BF
    HK = H // (R * G)
    S = H // R
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
    seen = rows[:, None] <= rows[None, :]  # [key, query]
    vt = tl.load(v + b * svb + hk * svh + first * svt + rows[:, None] * svt + o[None, :], mask=in_v, other=0.0)
    v_grad = tl.zeros([C, BV], tl.float32)

    for j in tl.range(0, G, disable_licm=True):
        s = hk * G + j
        slot = (b * S + s) * NT + c
        g_base = b * sgb + s * sgh
        running, total = row_decay(g, g_base, sgt, t, live, C, DECAY)
        write = tl.exp2(total - running)[:, None]
        decay = pair_decay(running[None, :], running[:, None], seen)
        crossing = tl.zeros([C], tl.float32)  # row sums less column sums of P (do v + e)
        to_state = tl.zeros([C], tl.float32)  # k_j dk_j through the state
        k_base = k + b * skb + s * skh + first * skt
        pairs = tl.zeros([C, C], vt.dtype)  # dP of the last query head
        if not LAG:
            for r in tl.range(0, R, disable_licm=True):
                h = s * R + r
                scores = tl.zeros([C, C], tl.float32)
                for i in tl.range(0, NF, disable_licm=True):
                    f = i * BF + tl.arange(0, BF)
                    in_f = f < F
                    kf = tl.load(
                        k_base + rows[:, None] * skt + f[None, :], mask=live[:, None] & in_f[None, :], other=0.0
                    )
                    qf = tl.load(
                        q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + f[None, :],
                        mask=live[:, None] & in_f[None, :], other=0.0,
                    )  # fmt: skip
                    scores = tl.dot(kf, tl.trans(qf), scores, input_precision=PREC)
                do = tl.load(
                    dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0
                )
                at = (b * H + h) * T + t
                raw, weight = key_by_query(vt, do, factor, extra, at, live, scale, C, NORM, PREC)
                scores *= decay
                v_grad = tl.dot((scores * weight[None, :]).to(do.dtype), do, v_grad, input_precision=PREC)
                if WANT_G:
                    over = tl.where(rows[:, None] == rows[None, :], 0.0, scores * raw)
                    crossing += tl.sum(over, 0) - tl.sum(over, 1)
                pairs = (raw * decay).to(do.dtype)

        for i in tl.range(0, NF, disable_licm=True):
            f = i * BF + tl.arange(0, BF)
            in_f = f < F
            in_k = live[:, None] & in_f[None, :]
            d_state = tl.load(
                d_states + slot * F * V + f[:, None] * V + o[None, :], mask=in_f[:, None] & in_o[None, :], other=0.0
            )
            kf = tl.load(k_base + rows[:, None] * skt + f[None, :], mask=in_k, other=0.0)
            grad = product(vt, tl.trans(d_state), tl.zeros([C, BF], tl.float32), PREC)
            v_grad = product((kf.to(tl.float32) * write).to(kf.dtype), d_state, v_grad, PREC)
            if NORM:
                grad += tl.load(dz_states + slot * F + f, mask=in_f, other=0.0)[None, :]
            grad *= write
            if WANT_G:
                to_state += tl.sum(kf.to(tl.float32) * grad, 1)
            if not LAG:
                for r in tl.range(0, R, disable_licm=True):
                    h = s * R + r
                    if R > 1:
                        do = tl.load(
                            dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :],
                            mask=in_v, other=0.0,
                        )  # fmt: skip
                        at = (b * H + h) * T + t
                        raw, _ = key_by_query(vt, do, factor, extra, at, live, scale, C, NORM, PREC)
                        pairs = (raw * decay).to(do.dtype)
                    qf = tl.load(
                        q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + f[None, :], mask=in_k, other=0.0
                    )
                    grad = tl.dot(pairs, qf, grad, input_precision=PREC)
            to = dk + b * sob + s * soh + first * sot + rows[:, None] * sot + f[None, :]
            tl.store(to, grad.to(dk.dtype.element_ty), mask=in_k)
        if WANT_G:
            passed = sum_before(to_state) + tl.cumsum(crossing, 0, reverse=True)
            tl.store(dg + (b * S + s) * T + t, passed, mask=live)
    to = dv + b * swb + hk * swh + first * swt + rows[:, None] * swt + o[None, :]
    tl.store(to, v_grad.to(dv.dtype.element_ty), mask=in_v)


def key_gradients(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    dout: torch.Tensor,
    factor: torch.Tensor | None,
    extra: torch.Tensor | None,
    d_states: tuple[torch.Tensor, torch.Tensor],
    *,
    chunk: int,
    want_g: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dk and dv in their inputs' dtypes, and the keys' part of dg [B, S, T] float32 (empty unless wanted)."""
    many = plan.heads > plan.kv_heads
    config = gated_dkv(plan.capability, plan.features, plan.values, q.dtype, plan.decay, many=many)
    table, _, count = plan.chunks(chunk)
    batch, length = plan.batch, plan.length

    def like(x: torch.Tensor) -> torch.Tensor:
        return empty((batch, length, x.shape[1], x.shape[3]), dtype=x.dtype, device=x.device).transpose(1, 2)

    dk, dv = like(k), like(v)
    shape = (batch, plan.state_heads, length)
    dg = empty(shape if want_g else (0,), dtype=torch.float32, device=q.device)
    dkv_kernel[(batch * count * plan.kv_heads,)](
        q, k, v, g, dout, factor, extra, *d_states, dk, dv, dg, table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *plan.decay_strides(g), *dout.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3], plan.scale, length, plan.heads, count,
        R=plan.readers, G=plan.state_heads // plan.kv_heads, F=plan.features, V=plan.values,
        BV=max(16, triton.next_power_of_2(plan.values)), C=chunk, DECAY=plan.decay, NORM=plan.norm, LAG=plan.lag,
        PACKED=table is not None, WANT_G=want_g,
        PREC="ieee" if q.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
    return dk, dv, dg


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for features, values, decay, norm, states in (
        (128, 128, "scalar", False, 1),
        (128, 128, "scalar", False, 4),
        (512, 64, "scalar", True, 4),
    ):
        config = gated_dkv(arch, features, values, torch.bfloat16, decay, many=states > 1)
        chunk = gated_chunk(arch, features, values, torch.bfloat16, decay, backward=True)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            R=1, G=states, F=features, V=values, BV=values, C=chunk,
            DECAY=decay, NORM=norm, LAG=False, PACKED=False, WANT_G=True, PREC="tf32", table=None, **config,
        )  # fmt: skip
        pointers = dict.fromkeys(("q", "k", "v", "dout", "d_states", "dk", "dv"), "*bf16")
        pointers |= dict.fromkeys(("g", "factor", "extra", "dz_states", "dg"), "*fp32")
        signature = gate_signature(dkv_kernel, pointers, constants)
        cases.append(
            (dkv_kernel, signature, constants, options, f"{decay} F {features} V {values} norm {norm} states {states}")
        )
    return cases
