"""What the backward pass needs of the pairs inside a chunk, from stored features (gated_dkv_triton.py).

    P_ij = (phi(q_i) phi(k_j)) D_ij           dP_ij = (do_i v_j + e_i) D_ij          D_ij = e^{G_i - G_j} for j <= i

Kept are P times what turns do into num's gradient, and dP; with them the rest is products of matrices alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_maps import GATE_SHAPES, MAP_POINTERS, SIGNS, Mapped, map_gate_constants, options
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, pair_decay, row_decay
from .tuning import gated_map_chunk, gated_map_scores


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_scores_kernel(
    fq, fk, v, g, dout, factor, extra, reads, pairs, gates, totals, table,
    svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SIGNED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    WANT_G: tl.constexpr, SPARED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, query heads, flat). reads, pairs [B, H, NT, C, C], query by key; gates [B, H, T].

    SPARED: totals [B, H, T] are sum_i P_ij dP_ij / D_ij, of every key.
    """
    F: tl.constexpr = WIDTH * SIGNED
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
    at_q = ((b * H + h) * T + first) * F
    at_k = ((b * (H // R) + s) * T + first) * F
    scores = tl.zeros([C, C], tl.float32)
    for i in tl.range(0, (F + BF - 1) // BF):
        f = i * BF + tl.arange(0, BF)
        in_f = f < F
        qf = tl.load(fq + at_q + rows[:, None] * F + f[None, :], mask=live[:, None] & in_f[None, :], other=0.0)
        kf = tl.load(fk + at_k + rows[None, :] * F + f[:, None], mask=live[None, :] & in_f[:, None], other=0.0)
        scores = tl.dot(qf, kf, scores, input_precision=PREC)
    at = (b * H + h) * T + t
    weight = tl.load(factor + at, mask=live, other=0.0) if NORM else tl.zeros([C], tl.float32) + scale
    do = tl.load(
        dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :],
        mask=live[:, None] & (o < V)[None, :], other=0.0,
    )  # fmt: skip
    vt = tl.load(
        v + b * svb + (s // G) * svh + first * svt + rows[None, :] * svt + o[:, None],
        mask=live[None, :] & (o < V)[:, None], other=0.0,
    )  # fmt: skip
    raw = tl.dot(do, vt, input_precision=PREC) * weight[:, None]
    if NORM:
        raw += tl.load(extra + at, mask=live, other=0.0)[:, None]
    running, _ = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
    decay = pair_decay(running[:, None], running[None, :], rows[:, None] >= rows[None, :])
    scores *= decay
    tile = ((b * H + h) * NT + c) * C * C + rows[:, None] * C + rows[None, :]
    tl.store(reads + tile, (scores * weight[:, None]).to(reads.dtype.element_ty))
    tl.store(pairs + tile, (raw * decay).to(pairs.dtype.element_ty))
    if SPARED:
        tl.store(totals + at, tl.sum(scores * raw, 0), mask=live)
    if WANT_G:
        over = tl.where(rows[:, None] == rows[None, :], 0.0, scores * raw)
        crossing = tl.sum(over, 1) - tl.sum(over, 0)
        tl.store(gates + at, tl.cumsum(crossing, 0, reverse=True), mask=live)


def map_scores(
    plan: Plan,
    x: Mapped,
    features: tuple[torch.Tensor, torch.Tensor],
    dout: torch.Tensor,
    factors: tuple[torch.Tensor | None, torch.Tensor | None],
    gates: torch.Tensor | None,
    *,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """P times the factor of do, and dP: [B, H, NT, C, C], query by key. gates [B, H, T] is filled where it is given.

    Where sums are spared (Plan.spared) also what keys' features times their gradients add up to inside a chunk
    [B, H, T], of each query head.
    """
    config = gated_map_scores(plan.capability, plan.features, plan.values, x.q.dtype)
    table, _, count = plan.chunks(chunk)
    shape = (plan.batch, plan.heads, count, chunk, chunk)
    reads, pairs = (empty(shape, dtype=x.q.dtype, device=x.q.device) for _ in range(2))
    totals = None
    if plan.spared:
        totals = empty((plan.batch, plan.heads, plan.length), dtype=torch.float32, device=x.q.device)
    start(plan.found, map_scores_kernel, plan.batch * count * plan.heads, (
        *features, x.v, x.g, dout, *factors, reads, pairs, gates, totals, table,
        *x.v.stride()[:3], *plan.decay_strides(x.g), *dout.stride()[:3], plan.scale, plan.length, plan.heads, count,
    ), dict(
        G=plan.state_heads // plan.kv_heads, WANT_G=gates is not None, SPARED=plan.spared,
        **options(plan, chunk, x.q.dtype), **config,
    ))  # fmt: skip
    return reads, pairs, totals


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width, name in GATE_SHAPES:
        config = gated_map_scores(arch, SIGNS[name] * width, size, torch.bfloat16)
        launch = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, torch.bfloat16)
        constants = (
            map_gate_constants(size, width, name, chunk)
            | {"G": 1, "WANT_G": True, "SPARED": name == "learned_softmax"}
            | config
        )
        constants.pop("MAP")
        signature = gate_signature(map_scores_kernel, MAP_POINTERS, constants)
        cases.append((map_scores_kernel, signature, constants, launch, f"D {size} f {width} {name}"))
    return cases
