"""What gated linear attention with a decay per channel knows of every chunk before its states are scanned.

    q^_i = scale q_i e^{G_i}      k^_j = k_j e^{G_last - G_j}      P_ij = scale sum_f q_if k_jf e^{G_if - G_jf}, j <= i

With these a chunk is o = q^ S + P v, S <- e^{G_last} S + k^^T v (gated_channel_scan_triton.py): all that decays cost is
paid here, where every chunk is for itself. A chunk that forgets little is parted at its middle, others level by level
(`gated_tiles.parted`, `gated_tiles.halves`). The backward pass is given P, which is half of the work.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, decays, meet, mild, parted, served
from .tuning import gated_chunk, gated_prepare


@triton.jit(do_not_specialize=["T", "H", "NT"])
def prepare_kernel(
    q, k, g, queries, keys, totals, scores, table, sqb, sqh, sqt, skb, skh, skt, sgb, sgh, sgt, scale, T, H, NT,
    F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr,
    LEVELS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, heads, flat). queries q^, keys k^ [B, H, T, F]; totals: G_last, base 2, [B, H, NT, F];
    scores P [B, H, NT, C, C], zero above the diagonal; PAIRS: whether they are wanted.
    """
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    c = pid // H % NT
    b = (pid // H // NT).to(tl.int64)
    first, begin, end = chunk_span(c, table, T, C, False, PACKED)
    rows = tl.arange(0, C)
    live = (first + rows >= begin) & (first + rows < end)
    q += b * sqb + h * sqh + first * sqt
    k += b * skb + h * skh + first * skt
    g += b * sgb + h * sgh + first * sgt
    queries += ((b * H + h) * T + first) * F
    keys += ((b * H + h) * T + first) * F
    totals += ((b * H + h) * NT + c) * F
    made = tl.zeros([C, C], tl.float32)
    for i in tl.range(0, (F + BF - 1) // BF, disable_licm=True):
        f = i * BF + tl.arange(0, BF)
        in_f = f < F
        mask = live[:, None] & in_f[None, :]
        sums, total = decays(g, sgt, rows, f, mask)
        qf = tl.load(q + rows[:, None] * sqt + f[None, :], mask=mask, other=0.0).to(tl.float32)
        kf = tl.load(k + rows[:, None] * skt + f[None, :], mask=mask, other=0.0).to(tl.float32)
        at = rows[:, None] * F + f[None, :]
        tl.store(queries + at, (qf * tl.exp2(sums) * scale).to(queries.dtype.element_ty), mask=mask)
        tl.store(keys + at, (kf * tl.exp2(total[None, :] - sums)).to(keys.dtype.element_ty), mask=mask)
        tl.store(totals + f, total, mask=in_f)
        if PAIRS:
            if mild(total, q.dtype.element_ty):
                grown, shrunk = parted(sums, total)
                later = (qf * grown).to(q.dtype.element_ty)
                earlier = (kf * shrunk).to(k.dtype.element_ty)
                part = tl.dot(later, tl.trans(earlier), input_precision=PREC)
                made += tl.where(rows[:, None] >= rows[None, :], part, 0.0)
            else:
                made += tl.where(rows[:, None] == rows[None, :], tl.sum(qf * kf, 1)[:, None], 0.0)
                for level in tl.range(0, LEVELS, num_stages=1):
                    near = meet(sums, level)
                    later = (qf * near).to(q.dtype.element_ty)
                    earlier = (kf * near).to(k.dtype.element_ty)
                    part = tl.dot(later, tl.trans(earlier), input_precision=PREC)
                    made += tl.where(served(rows[:, None], rows[None, :], level), part, 0.0)
    if PAIRS:
        to = scores + ((b * H + h) * NT + c) * C * C + rows[:, None] * C + rows[None, :]
        tl.store(to, (made * scale).to(scores.dtype.element_ty))


def prepare(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, *, chunk: int, scores: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q^ and k^ [B, H, T, F], what chunks forget [B, H, NT, F] float32, and P [B, H, NT, C, C], if it is not given."""
    table, _, count = plan.chunks(chunk)

    def made(*shape: int, dtype: torch.dtype = q.dtype) -> torch.Tensor:
        return empty(shape, dtype=dtype, device=q.device)

    queries = made(plan.batch, plan.heads, plan.length, plan.features)
    keys = made(*queries.shape)
    totals = made(plan.batch, plan.heads, count, plan.features, dtype=torch.float32)
    wanted = scores is None
    if scores is None:
        scores = made(plan.batch, plan.heads, count, chunk, chunk)
    prepare_kernel[(plan.batch * count * plan.heads,)](
        q, k, g, queries, keys, totals, scores, table,
        *q.stride()[:3], *k.stride()[:3], *g.stride()[:3], plan.scale, plan.length, plan.heads, count,
        F=plan.features, C=chunk, PAIRS=wanted, PACKED=table is not None, LEVELS=chunk.bit_length() - 1,
        PREC="ieee" if q.dtype == torch.float32 else "tf32",
        **gated_prepare(plan.capability, plan.features, q.dtype, pairs=wanted),
    )  # fmt: skip
    return queries, keys, totals, scores


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configuration in bfloat16 on a card of capability `arch`, for the compile gate."""
    chunk = gated_chunk(arch, 128, 128, torch.bfloat16, "channel", backward=False)
    pointers = dict.fromkeys(("q", "k", "queries", "keys", "scores"), "*bf16") | dict.fromkeys(("g", "totals"), "*fp32")
    cases = []
    for pairs in (True, False):
        config = gated_prepare(arch, 128, torch.bfloat16, pairs=pairs)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            F=128, C=chunk, PAIRS=pairs, PACKED=False, LEVELS=chunk.bit_length() - 1, PREC="tf32", table=None, **config
        )
        signature = gate_signature(prepare_kernel, pointers, constants)
        cases.append((prepare_kernel, signature, constants, options, f"F 128, pairs {pairs}"))
    return cases
