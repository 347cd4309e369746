"""The output of gated linear attention, every chunk for itself, from the states at chunk boundaries.

    num_i = e^{G_i} q_i S_c + sum_{j <= i} e^{G_i - G_j} (q_i k_j) v_j    den_i: the same with z_c and 1 for S_c and v_j
    o_i = scale num_i, or with a denominator num_i / den_i

With a decay per channel, e^{G_i - G_j} stands inside the product q_i k_j; see `gated_tiles.halves`.

Under a lag a query reads S of the chunk before its own, and nothing else.
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
from .tuning import gated_chunk, gated_out


@triton.jit(do_not_specialize=["T", "H", "NT"])
def out_kernel(
    q, k, v, g, states, z_states, out, den, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, LAG: tl.constexpr, PACKED: tl.constexpr,
    LEVELS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, query heads, tiles of V, flat). den [B, H, T]: scale times the denominator."""
    VT: tl.constexpr = (V + BV - 1) // BV
    # Products of features may leave the range of float16; they do not once they are scaled or shares of a denominator.
    SHARES: tl.constexpr = v.dtype.element_ty == tl.float16 and not LAG
    pid = tl.program_id(0)
    tile = pid % VT
    h = (pid // VT % H).to(tl.int64)
    c = pid // VT // H % NT
    b = (pid // VT // H // NT).to(tl.int64)
    s = h // R
    first, begin, end = chunk_span(c, table, T, C, LAG, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    o = tile * BV + tl.arange(0, BV)
    in_o = o < V
    g_base = b * sgb + s * sgh
    first_q = first + C * LAG
    tq = first_q + rows
    read = (tq >= begin) & (tq < end)
    if DECAY != "channel":
        running, total = row_decay(g, g_base, sgt, t, live, C, DECAY)
        if LAG:
            running, _ = row_decay(g, g_base, sgt, tq, read, C, DECAY)
            running += total

    slot = (b * (H // R) + s) * NT + c
    acc = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    mass = tl.zeros([C], tl.float32)
    for i in range(0, (F + BF - 1) // BF):
        f = i * BF + tl.arange(0, BF)
        in_f = f < F
        qf = tl.load(
            q + b * sqb + h * sqh + first_q * sqt + rows[:, None] * sqt + f[None, :],
            mask=read[:, None] & in_f[None, :],
            other=0.0,
        )
        state = tl.load(
            states + slot * F * V + f[:, None] * V + o[None, :], mask=in_f[:, None] & in_o[None, :], other=0.0
        )
        if DECAY == "channel":
            sums = channel_sums(g, g_base, first_q, sgt, rows, read, f, in_f)
            reach = sums + channel_total(g, g_base, first, begin, end, sgt, f, in_f, C)[None, :] if LAG else sums
            reader = qf.to(tl.float32) * tl.exp2(reach)
            acc = product(reader.to(qf.dtype), state, acc, PREC)
        else:
            reader = qf.to(tl.float32)
            acc = product(qf, state, acc, PREC)
        if NORM:
            zf = tl.load(z_states + slot * F + f, mask=in_f, other=0.0)
            mass += tl.sum(reader * zf[None, :], 1)
        if not LAG:
            kf = tl.load(
                k + b * skb + s * skh + first * skt + rows[:, None] * skt + f[None, :],
                mask=live[:, None] & in_f[None, :], other=0.0,
            )  # fmt: skip
            if DECAY == "channel":
                total = channel_total(g, g_base, first, begin, end, sgt, f, in_f, C)
                if mild(total, qf.dtype):
                    grown, shrunk = parted(sums, total)
                    later = (qf.to(tl.float32) * grown).to(qf.dtype)
                    earlier = (kf.to(tl.float32) * shrunk).to(kf.dtype)
                    part = tl.dot(later, tl.trans(earlier), input_precision=PREC)
                    scores += tl.where(rows[:, None] >= rows[None, :], part, 0.0)
                else:
                    own = tl.sum(qf.to(tl.float32) * kf.to(tl.float32), 1)
                    scores += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
                    for level in tl.range(0, LEVELS, num_stages=1):
                        near = halves(sums, g, g_base, first, end, sgt, f, in_f, level, C)
                        later = (qf.to(tl.float32) * near).to(qf.dtype)
                        earlier = (kf.to(tl.float32) * near).to(kf.dtype)
                        part = tl.dot(later, tl.trans(earlier), input_precision=PREC)
                        scores += tl.where(served(rows[:, None], rows[None, :], level), part, 0.0)
            else:
                scores = tl.dot(qf, tl.trans(kf), scores, input_precision=PREC)
    if DECAY != "channel":
        decay = tl.exp2(running)
        acc = acc * decay[:, None]
        mass = mass * decay
        scores *= pair_decay(running[:, None], running[None, :], rows[:, None] >= rows[None, :])
    if not LAG:
        vt = tl.load(
            v + b * svb + (s // G) * svh + first * svt + rows[:, None] * svt + o[None, :],
            mask=live[:, None] & in_o[None, :], other=0.0,
        )  # fmt: skip
        if SHARES:
            factor = tl.zeros([C], tl.float32) + scale
            if NORM:
                factor = scale / tl.maximum((mass + tl.sum(scores, 1)) * scale, TINY)
            acc = tl.dot((scores * factor[:, None]).to(vt.dtype), vt, acc * factor[:, None], input_precision=PREC)
        else:
            acc = tl.dot(scores.to(vt.dtype), vt, acc, input_precision=PREC)
        mass += tl.sum(scores, 1)
    if not SHARES:
        acc = acc * scale
    if NORM:
        mass = mass * scale
        if not SHARES:
            acc = acc / tl.maximum(mass, TINY)[:, None]
        if tile == 0:
            tl.store(den + (b * H + h) * T + tq, mass, mask=read)
    at = out + b * sob + h * soh + first_q * sot + rows[:, None] * sot + o[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=read[:, None] & in_o[None, :])


def outputs(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    states: torch.Tensor,
    z_states: torch.Tensor,
    *,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, H, T, V] over memory [B, T, H, V], and scale times the denominators [B, H, T] (empty without them)."""
    config = gated_out(plan.capability, plan.features, plan.values, q.dtype, plan.decay, norm=plan.norm)
    table, _, count = plan.chunks(chunk)
    shape = (plan.batch, plan.length, plan.heads, plan.values)
    out = empty(shape, dtype=v.dtype, device=q.device).transpose(1, 2)
    den = empty((plan.batch, plan.heads, plan.length) if plan.norm else (0,), dtype=torch.float32, device=q.device)
    tiles = -(-plan.values // config["BV"])
    out_kernel[(plan.batch * count * plan.heads * tiles,)](
        q, k, v, g, states, z_states, out, den, table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *plan.decay_strides(g), *out.stride()[:3],
        plan.scale, plan.length, plan.heads, count,
        R=plan.readers, G=plan.state_heads // plan.kv_heads, F=plan.features, V=plan.values, C=chunk,
        DECAY=plan.decay, NORM=plan.norm, LAG=plan.lag, PACKED=table is not None,
        LEVELS=chunk.bit_length() - 1, PREC="ieee" if q.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
    return out, den


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for features, values, decay, norm in (
        (128, 128, "scalar", False),
        (128, 128, "channel", False),
        (512, 64, "scalar", True),
    ):
        config = gated_out(arch, features, values, torch.bfloat16, decay, norm=norm)
        chunk = gated_chunk(arch, features, values, torch.bfloat16, decay, backward=False)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            R=1, G=1, F=features, V=values, C=chunk, LEVELS=chunk.bit_length() - 1,
            DECAY=decay, NORM=norm, LAG=False, PACKED=False, PREC="tf32", table=None, **config,
        )  # fmt: skip
        pointers = dict.fromkeys(("q", "k", "v", "out", "states"), "*bf16")
        pointers |= dict.fromkeys(("g", "z_states", "den"), "*fp32")
        signature = gate_signature(out_kernel, pointers, constants)
        cases.append((out_kernel, signature, constants, options, f"{decay} F {features} V {values} norm {norm}"))
    return cases
