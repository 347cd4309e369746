"""Gradient of what the queries' map gives before its function, from stored features (gated_dq_triton.py).

    dphi_i = e^{G_i} (S_c do_i + z_c e_i) + sum_j dP_ij phi(k_j)        dy = phi'(y) dphi, both signs together

A softmax needs sum_f phi_f dphi_f of the whole row before any dy, of features above their floor: a first launch finds
the sums. One softmax over a denominator has sums of 0 over all features, for scaling them changes nothing; that holds
in bfloat16 where e is made of an output that was not rounded (`rest`). Features at their floor matter where a
denominator is not far above them, and there alone the launch does something.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_maps import (
    GATE_SHAPES,
    MAP_POINTERS,
    SMALL,
    SOFTMAXES,
    feature_tile,
    map_gate_constants,
    options,
    phi_grad,
    row_part,
)
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, product, row_decay
from .tuning import gated_map_chunk, gated_map_dq


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_dq_kernel(
    fq, fk, pairs, g, dout, factor, extra, states, z_states, den, along, dy, d_bias, gates, found, table,
    sgb, sgh, sgt, sdb, sdh, sdt, part, scale, T, H, NT,
    R: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    SPAN: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, DECAY: tl.constexpr,
    NORM: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr, WANT_G: tl.constexpr, SUMS: tl.constexpr,
    SPARED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, spans of columns, query heads, flat). BV covers V.

    A span is SPAN tiles of BF columns. dy [B, H, T, WIDTH], d_bias [B, H, NT, WIDTH] its sums; gates [spans, ., H, T],
    spans `part` apart. With SUMS only found [spans, B, H, T, SIGNED] is written: phi dphi, or under SPARED 0 where no
    denominator of the chunk is SMALL.
    """
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF * SPAN - 1) // (BF * SPAN)
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    span = pid // H % NF
    c = pid // H // NF % NT
    b = (pid // H // NF // NT).to(tl.int64)
    s = h // R
    slot = (b * (H // R) + s) * NT + c
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    at = (b * H + h) * T + t
    if SUMS and SPARED:
        to = found + span.to(tl.int64) * part + at
        if tl.min(tl.load(den + at, mask=live, other=1.0), 0) >= SMALL * scale:
            tl.store(to, tl.zeros([C], tl.float32), mask=live)
            return
    running, _ = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
    reach = tl.exp2(running)
    o = tl.arange(0, BV)
    weight = tl.load(factor + at, mask=live, other=0.0) if NORM else tl.zeros([C], tl.float32) + scale
    weight *= reach
    e = tl.load(extra + at, mask=live, other=0.0) * reach if NORM else tl.zeros([C], tl.float32)
    do = tl.load(
        dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :],
        mask=live[:, None] & (o < V)[None, :], other=0.0,
    )  # fmt: skip
    by_pair = tl.load(pairs + ((b * H + h) * NT + c) * C * C + rows[:, None] * C + rows[None, :])
    queries = fq + ((b * H + h) * T + first) * F
    keys = fk + ((b * (H // R) + s) * T + first) * F
    from_state = tl.zeros([C], tl.float32)  # phi(q)_i dphi(q)_i through the state
    up_sum = tl.zeros([C], tl.float32)
    down_sum = tl.zeros([C], tl.float32)
    for i in tl.range(0, SPAN):
        column = (span * SPAN + i) * BF + tl.arange(0, BF)
        in_f = column < WIDTH
        in_row = live[:, None] & in_f[None, :]
        up = feature_tile(queries, rows * F, column, in_row, 0, WIDTH)
        down = up
        if SIGNED == 2:
            down = feature_tile(queries, rows * F, column, in_row, 1, WIDTH)
        grad_y = tl.zeros([C, BF], tl.float32)
        for sign in tl.static_range(SIGNED):
            f = sign * WIDTH + column
            state = tl.load(
                states + slot * F * V + f[None, :] * V + o[:, None], mask=in_f[None, :] & (o < V)[:, None], other=0.0
            )
            kf = feature_tile(keys, rows * F, column, in_row, sign, WIDTH)
            grad = product(do, state, tl.zeros([C, BF], tl.float32), PREC) * weight[:, None]
            if NORM:
                grad += e[:, None] * tl.load(z_states + slot * F + f, mask=in_f, other=0.0)[None, :]
            own = (up if sign == 0 else down).to(tl.float32)
            if WANT_G and not SUMS:
                from_state += tl.sum(own * grad, 1)
            grad = tl.dot(by_pair, kf, grad, input_precision=PREC)
            if SUMS:
                along_row = row_part(own, grad)
                up_sum += along_row if sign == 0 else 0.0
                down_sum += along_row if sign == 1 else 0.0
            else:
                summed = tl.zeros([C, 1], tl.float32)
                if MAP == "hedgehog_softmax" or MAP == "learned_softmax":
                    summed = tl.load(along + at * SIGNED + sign, mask=live, other=0.0)[:, None]
                change = phi_grad(own, (down if sign == 0 else up).to(tl.float32), grad, summed, MAP)
                grad_y += change if sign == 0 else -change
        if not SUMS:
            to = dy + at[:, None] * WIDTH + column[None, :]
            tl.store(to, grad_y.to(dy.dtype.element_ty), mask=in_row)
            if BIAS:
                to = d_bias + ((b * H + h) * NT + c) * WIDTH + column
                tl.store(to, tl.sum(tl.where(in_row, grad_y, 0.0), 0), mask=in_f)
    if SUMS:
        to = found + (span.to(tl.int64) * part + at) * SIGNED
        tl.store(to, up_sum, mask=live)
        if SIGNED == 2:
            tl.store(to + 1, down_sum, mask=live)
    elif WANT_G:
        tl.store(gates + span.to(tl.int64) * part + at, tl.cumsum(from_state, 0, reverse=True), mask=live)


def map_query_gradients(
    plan: Plan,
    g: torch.Tensor | None,
    features: tuple[torch.Tensor, torch.Tensor],
    pairs: torch.Tensor,
    dout: torch.Tensor,
    factors: tuple[torch.Tensor | None, torch.Tensor | None],
    states: tuple[torch.Tensor, torch.Tensor],
    den: torch.Tensor,
    gates: torch.Tensor | None,
    *,
    chunk: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [B, H, T, f] in the features' dtype, and with `bias` its sums [B, H, NT, f] float32, else empty.

    gates [spans, B, H, T] are filled where they are given.
    """
    fq, fk = features
    config = gated_map_dq(plan.capability, plan.features // plan.signs, plan.values, fq.dtype)
    table, _, count = plan.chunks(chunk)
    width, rows = plan.features // plan.signs, (plan.batch, plan.heads, plan.length)
    spans = -(-width // (config["BF"] * config["SPAN"]))

    dy = empty((*rows, width), dtype=fq.dtype, device=fq.device)
    sums = (plan.batch, plan.heads, count, width) if bias else (0,)
    d_bias = empty(sums, dtype=torch.float32, device=fq.device)

    def launch(along: torch.Tensor | None, found: torch.Tensor | None, part: int, spans: int, span: int) -> None:
        start(plan.found, map_dq_kernel, plan.batch * count * spans * plan.heads, (
            fq, fk, pairs, g, dout, *factors, *states, den, along, dy, d_bias, gates, found, table,
            *plan.decay_strides(g), *dout.stride()[:3], part, plan.scale, plan.length, plan.heads, count,
        ), dict(
            MAP=plan.map, BIAS=bias, WANT_G=gates is not None, SUMS=found is not None, SPARED=plan.spared,
            **options(plan, chunk, fq.dtype), **(config | {"SPAN": span}),
        ))  # fmt: skip

    along = None
    if plan.map in SOFTMAXES:
        # Where it is spared, one program looks at a chunk's denominators and, seldom, goes over all columns.
        parts = (1, -(-width // config["BF"])) if plan.spared else (spans, config["SPAN"])
        found = empty((parts[0], *rows, plan.signs), dtype=torch.float32, device=fq.device)
        launch(None, found, plan.batch * plan.heads * plan.length, *parts)
        along = found[0] if parts[0] == 1 else found.sum(0)
    launch(along, None, 0 if gates is None else gates.stride(0), spans, config["SPAN"])
    return dy, d_bias


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width, name in GATE_SHAPES:
        config = gated_map_dq(arch, width, size, torch.bfloat16)
        launch = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, torch.bfloat16)
        constants = (
            map_gate_constants(size, width, name, chunk) | {"BIAS": True, "WANT_G": True, "SUMS": False} | config
        )
        constants |= {"SPARED": name == "learned_softmax"} | ({} if name in SOFTMAXES else {"along": None})
        signature = gate_signature(map_dq_kernel, MAP_POINTERS, constants)
        cases.append((map_dq_kernel, signature, constants, launch, f"D {size} f {width} {name}"))
    found = cases[1]
    more = found[2] | {"SUMS": True} | {"SPAN": found[2]["WIDTH"] // found[2]["BF"]}
    return [*cases, (*found[:2], more, found[3], f"{found[4]}, sums")]
