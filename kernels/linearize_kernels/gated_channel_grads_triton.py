"""Gradients of queries, keys and gates of gated linear attention with a decay per channel, all chunks at once.

With S_c before and dS after a chunk (gated_channel_scan_triton.py) and dP_ij = scale do_i v_j for j <= i, else 0:

    dq_if = e^{G_if} scale (S do_i)_f + sum_j dP_ij k_jf e^{G_if - G_jf}
    dk_jf = e^{G_last,f - G_jf} (dS v_j)_f + sum_i dP_ij q_if e^{G_if - G_jf}
    dg_tf = sum_{i >= t} (q_if dq_if - k_jf dk_jf(chunk)) + sum_{j < t} k_jf dk_jf(state) + e^{G_last,f} <S_c, dS>_f

A pair that lies on one side of t leaves the sum for dg: both of its sides are made of the same rounded factors.

Chunks that forget little and chunks that forget much (`gated_tiles.mild`) have a launch each, and each program of it
looks whether it is meant: both ways in one kernel would take more registers than a thread has.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, decays, meet, mild, parted, served, sum_before
from .tuning import gated_chunk, gated_grads, gated_grads_span


@triton.jit
def chunk_gradients(
    q, k, v, g, dout, states, d_states, dq, dk, dg, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, S, NT,
    b, c, s, f,
    G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, WANT_G: tl.constexpr, MILD: tl.constexpr, LEVELS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Channels f of chunk c of row b and head s: dq, dk and dg."""
    slot = (b * S + s) * NT + c
    first, begin, end = chunk_span(c, table, T, C, False, PACKED)
    rows = tl.arange(0, C)
    live = (first + rows >= begin) & (first + rows < end)
    o = tl.arange(0, BV)
    in_f, in_o = f < F, o < V
    mask = live[:, None] & in_f[None, :]
    in_v = live[:, None] & in_o[None, :]
    in_tile = in_f[None, :] & in_o[:, None]
    tile = slot * F * V + f[None, :] * V + o[:, None]

    vt = tl.load(v + b * svb + s // G * svh + first * svt + rows[:, None] * svt + o[None, :], mask=in_v, other=0.0)
    do = tl.load(dout + b * sdb + s * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0)
    by_query = tl.dot(do, tl.trans(vt), input_precision=PREC) * scale
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], by_query, 0.0), 1)
    by_query = tl.where(rows[:, None] > rows[None, :], by_query, 0.0).to(do.dtype)
    # Made again the other way round: the transpose of a product's result is no safe operand on Hopper.
    by_key = tl.dot(vt, tl.trans(do), input_precision=PREC) * scale
    by_key = tl.where(rows[:, None] < rows[None, :], by_key, 0.0).to(do.dtype)
    tl.debug_barrier()  # or the compiler loads everything first, and runs out of registers
    state = tl.load(states + tile, mask=in_tile, other=0.0)
    d_state = tl.load(d_states + tile, mask=in_tile, other=0.0)
    d_q = tl.dot(do, state, input_precision=PREC) * scale
    d_k = tl.dot(vt, d_state, input_precision=PREC)
    through = tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    tl.debug_barrier()
    sums, total = decays(g + b * sgb + s * sgh + first * sgt, sgt, rows, f, mask)
    qf = tl.load(q + b * sqb + s * sqh + first * sqt + rows[:, None] * sqt + f[None, :], mask=mask, other=0.0)
    kf = tl.load(k + b * skb + s * skh + first * skt + rows[:, None] * skt + f[None, :], mask=mask, other=0.0)
    d_q *= tl.exp2(sums)
    d_k *= tl.exp2(total[None, :] - sums)
    crossing = qf.to(tl.float32) * d_q
    passed = kf.to(tl.float32) * d_k
    d_q += own[:, None] * kf.to(tl.float32)
    d_k += own[:, None] * qf.to(tl.float32)
    if MILD:
        grown, shrunk = parted(sums, total)
        later = (qf.to(tl.float32) * grown).to(qf.dtype)
        earlier = (kf.to(tl.float32) * shrunk).to(kf.dtype)
        from_keys = tl.dot(by_query, earlier, input_precision=PREC)
        from_queries = tl.dot(by_key, later, input_precision=PREC)
        crossing += later.to(tl.float32) * from_keys - earlier.to(tl.float32) * from_queries
        d_q += from_keys * grown
        d_k += from_queries * shrunk
    else:
        for level in tl.range(0, LEVELS, num_stages=1):
            near = meet(sums, level)
            earlier = (kf.to(tl.float32) * near).to(kf.dtype)
            kept = tl.where(served(rows[:, None], rows[None, :], level), by_query, 0.0)
            from_keys = tl.dot(kept, earlier, input_precision=PREC) * near
            crossing += qf.to(tl.float32) * from_keys
            d_q += from_keys
        for level in tl.range(0, LEVELS, num_stages=1):
            near = meet(sums, level)
            later = (qf.to(tl.float32) * near).to(qf.dtype)
            kept = tl.where(served(rows[None, :], rows[:, None], level), by_key, 0.0)
            from_queries = tl.dot(kept, later, input_precision=PREC) * near
            crossing -= kf.to(tl.float32) * from_queries
            d_k += from_queries
    at = b * sob + s * soh + first * sot + rows[:, None] * sot + f[None, :]
    tl.store(dq + at, d_q.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + at, d_k.to(dk.dtype.element_ty), mask=mask)
    if WANT_G:
        gates = tl.cumsum(crossing, 0, reverse=True) + sum_before(passed) + (through * tl.exp2(total))[None, :]
        tl.store(dg + ((b * S + s) * T + first) * F + rows[:, None] * F + f[None, :], gates, mask=mask)


@triton.jit(do_not_specialize=["T", "S", "NT"])
def grads_kernel(
    q, k, v, g, totals, dout, states, d_states, dq, dk, dg, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, S, NT,
    G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SPAN: tl.constexpr, PACKED: tl.constexpr, WANT_G: tl.constexpr, MILD: tl.constexpr, LEVELS: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, SPAN chunks, heads, tiles of F, flat). BV covers V. totals [B, S, NT, F]; dq, dk share strides; dg
    [B, S, T, F] float32. SPAN: 1 where MILD; else programs, of which most leave at once, are fewer.
    """
    FT: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    f = pid % FT * BF + tl.arange(0, BF)
    s = (pid // FT % S).to(tl.int64)
    spans = (NT + SPAN - 1) // SPAN
    begin = pid // FT // S % spans * SPAN
    b = (pid // FT // S // spans).to(tl.int64)
    # What prepare_kernel made of them, so that both launches are of one mind.
    if MILD:
        if mild(tl.load(totals + ((b * S + s) * NT + begin) * F + f, mask=f < F, other=0.0), q.dtype.element_ty):
            chunk_gradients(
                q, k, v, g, dout, states, d_states, dq, dk, dg, table, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
                sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, S, NT, b, begin, s, f,
                G, F, V, BV, C, PACKED, WANT_G, MILD, LEVELS, PREC,
            )  # fmt: skip
    else:
        totals += (b * S + s) * NT * F
        those = begin + tl.arange(0, SPAN)
        known = (those < NT)[:, None] & (f < F)[None, :]
        least = tl.min(tl.load(totals + those[:, None] * F + f[None, :], mask=known, other=0.0), 0)
        if not mild(least, q.dtype.element_ty):
            for i in tl.range(0, tl.minimum(SPAN, NT - begin), num_stages=1, disable_licm=True):
                c = begin + i
                if not mild(tl.load(totals + c * F + f, mask=f < F, other=0.0), q.dtype.element_ty):
                    chunk_gradients(
                        q, k, v, g, dout, states, d_states, dq, dk, dg, table, sqb, sqh, sqt, skb, skh, skt, svb, svh,
                        svt, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, scale, T, S, NT, b, c, s, f,
                        G, F, V, BV, C, PACKED, WANT_G, MILD, LEVELS, PREC,
                    )  # fmt: skip


def channel_gradients(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    totals: torch.Tensor,
    d_out: torch.Tensor,
    states: torch.Tensor,
    d_states: torch.Tensor,
    *,
    chunk: int,
    want_g: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq and dk in q's dtype, and dg [B, S, T, F] float32 (empty unless wanted)."""
    table, _, count = plan.chunks(chunk)
    shape = (plan.batch, plan.length, plan.heads, plan.features)
    dq, dk = (empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2) for _ in range(2))
    wanted = (plan.batch, plan.heads, plan.length, plan.features) if want_g else (0,)
    dg = empty(wanted, dtype=torch.float32, device=q.device)
    for way in (True, False):
        config = gated_grads(plan.capability, plan.features, plan.values, q.dtype, mild=way)
        programs = plan.batch * count * plan.heads * -(-plan.features // config["BF"])
        span = 1 if way else gated_grads_span(plan.capability, programs, count)
        grads_kernel[(programs // count * -(-count // span),)](
            q, k, v, g, totals, d_out, states, d_states, dq, dk, dg, table,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:3], *d_out.stride()[:3], *dq.stride()[:3],
            plan.scale, plan.length, plan.heads, count, G=plan.heads // plan.kv_heads, F=plan.features, V=plan.values,
            BV=max(16, triton.next_power_of_2(plan.values)), C=chunk, SPAN=span, PACKED=table is not None,
            WANT_G=want_g, MILD=way, LEVELS=chunk.bit_length() - 1,
            PREC="ieee" if q.dtype == torch.float32 else "tf32", **config,
        )  # fmt: skip
    return dq, dk, dg


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configuration in bfloat16 on a card of capability `arch`, for the compile gate."""
    chunk = gated_chunk(arch, 128, 128, torch.bfloat16, "channel", backward=True)
    pointers = dict.fromkeys(("q", "k", "v", "dout", "states", "d_states", "dq", "dk"), "*bf16")
    pointers |= dict.fromkeys(("g", "totals", "dg"), "*fp32")
    cases = []
    for way in (True, False):
        config = gated_grads(arch, 128, 128, torch.bfloat16, mild=way)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            G=1, F=128, V=128, BV=128, C=chunk, SPAN=1 if way else 16, PACKED=False, WANT_G=True,
            MILD=way, LEVELS=chunk.bit_length() - 1,
            PREC="tf32", table=None, **config,
        )  # fmt: skip
        signature = gate_signature(grads_kernel, pointers, constants)
        cases.append((grads_kernel, signature, constants, options, f"F 128 V 128 mild {way}"))
    return cases
