"""Gradient of what the keys' map gives before its function, from stored features (gated_dkv_triton.py).

    dphi_j = e^{G_last - G_j} (dS v_j + dz) + sum_i dP_ij phi(q_i)      dy = phi'(y) dphi, both signs together

A softmax needs sum_f phi_f dphi_f of the whole row before any dy, of features above their floor: a first launch finds
the sums. One softmax over a denominator has them from gated_map_dv_triton.py, features at their floor counted; these
matter where a query that reads the key has a denominator not far above floors, and there alone the launch does more
than copy.
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
from .gated_tiles import chunk_span, product, row_decay, sum_before
from .tuning import gated_map_chunk, gated_map_dk


@triton.jit
def writing_grad(
    vt, d_states, dz_states, slot, f, in_f, o, write, C: tl.constexpr, BF: tl.constexpr, F: tl.constexpr,
    V: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradient of some key features through the state: e^{G_last - G_j} (dS v_j + dz) [C, BF]."""
    tile = slot * F * V + f[None, :] * V + o[:, None]
    d_state = tl.load(d_states + tile, mask=in_f[None, :] & (o < V)[:, None], other=0.0)
    grad = product(vt, d_state, tl.zeros([C, BF], tl.float32), PREC)
    if NORM:
        grad += tl.load(dz_states + slot * F + f, mask=in_f, other=0.0)[None, :]
    return grad * write[:, None]


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_dk_kernel(
    fq, fk, pairs, v, g, d_states, dz_states, totals, ends, along, dy, d_bias, gates, found, table,
    svb, svh, svt, sgb, sgh, sgt, part, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, BIAS: tl.constexpr, WANT_G: tl.constexpr, SUMS: tl.constexpr, SPARED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, tiles of columns, state heads, flat). BV covers V.

    dy [B, S, T, WIDTH], d_bias [B, S, NT, WIDTH] its sums; gates [tiles, ., S, T], tiles `part` apart. With SUMS only
    found [tiles, B, S, T, SIGNED] is written: phi dphi, or under SPARED, by the first tile, totals [B, S, T] in a chunk
    at or after ends [B, S].
    """
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
    S = H // R
    pid = tl.program_id(0)
    s = (pid % S).to(tl.int64)
    tile = pid // S % NF
    c = pid // S // NF % NT
    b = (pid // S // NF // NT).to(tl.int64)
    slot = (b * S + s) * NT + c
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    at = (b * S + s) * T + t
    if SUMS and SPARED:  # noqa: SIM102 (known when compiled, and then not)
        if tl.load(ends + b * S + s) <= first:
            known = tl.load(totals + at, mask=live & (rows * 0 + tile == 0), other=0.0)
            tl.store(found + tile.to(tl.int64) * part + at, known, mask=live)
            return
    o = tl.arange(0, BV)
    column = tile * BF + tl.arange(0, BF)
    in_f = column < WIDTH
    in_row = live[:, None] & in_f[None, :]

    up = tl.zeros([C, BF], tl.float32)
    down = tl.zeros([C, BF], tl.float32)
    for r in tl.range(0, R):
        h = s * R + r
        from_query = tl.load(pairs + ((b * H + h) * NT + c) * C * C + rows[None, :] * C + rows[:, None])
        queries = ((b * H + h) * T + first) * F + rows * F
        qf = feature_tile(fq, queries, column, in_row, 0, WIDTH)
        up = tl.dot(from_query, qf, up, input_precision=PREC)
        if SIGNED == 2:
            qf = feature_tile(fq, queries, column, in_row, 1, WIDTH)
            down = tl.dot(from_query, qf, down, input_precision=PREC)

    running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
    write = tl.exp2(total - running)
    vt = tl.load(
        v + b * svb + (s // G) * svh + first * svt + rows[:, None] * svt + o[None, :],
        mask=live[:, None] & (o < V)[None, :], other=0.0,
    )  # fmt: skip
    to_state = tl.zeros([C], tl.float32)  # phi(k)_j dphi(k)_j through the state
    grad_y = tl.zeros([C, BF], tl.float32)
    for sign in tl.static_range(SIGNED):
        f = sign * WIDTH + column
        grad = writing_grad(vt, d_states, dz_states, slot, f, in_f, o, write, C, BF, F, V, NORM, PREC)
        own = feature_tile(fk, at * F, column, in_row, sign, WIDTH).to(tl.float32)
        if WANT_G:
            to_state += tl.sum(own * grad, 1)
        grad += up if sign == 0 else down
        if SUMS:
            to = found + (tile.to(tl.int64) * part + at) * SIGNED + sign
            tl.store(to, row_part(own, grad), mask=live)
        else:
            other = own
            if MAP == "hedgehog_exp":
                other = feature_tile(fk, at * F, column, in_row, 1 - sign, WIDTH).to(tl.float32)
            summed = tl.zeros([C, 1], tl.float32)
            if MAP == "hedgehog_softmax" or MAP == "learned_softmax":
                summed = tl.load(along + at * SIGNED + sign, mask=live, other=0.0)[:, None]
            change = phi_grad(own, other, grad, summed, MAP)
            grad_y += change if sign == 0 else -change
    if not SUMS:
        tl.store(dy + at[:, None] * WIDTH + column[None, :], grad_y.to(dy.dtype.element_ty), mask=in_row)
        if BIAS:
            tl.store(d_bias + slot * WIDTH + column, tl.sum(tl.where(in_row, grad_y, 0.0), 0), mask=in_f)
        if WANT_G:
            tl.store(gates + tile.to(tl.int64) * part + at, sum_before(to_state), mask=live)


def map_key_gradients(
    plan: Plan,
    v: torch.Tensor,
    g: torch.Tensor | None,
    features: tuple[torch.Tensor, torch.Tensor],
    pairs: torch.Tensor,
    d_states: tuple[torch.Tensor, torch.Tensor],
    known: tuple[torch.Tensor | None, torch.Tensor | None],
    gates: torch.Tensor | None,
    *,
    chunk: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [B, S, T, f] in the features' dtype, and with `bias` its sums [B, S, NT, f] float32, else empty.

    gates [tiles, B, S, T] are filled where they are given. known: where sums are spared, those of gated_map_dv_triton
    [B, S, T], and `small_ends` [B, S].
    """
    fq, fk = features
    width = plan.features // plan.signs
    config = gated_map_dk(plan.capability, width, plan.values, fq.dtype)
    table, _, count = plan.chunks(chunk)
    rows = (plan.batch, plan.state_heads, plan.length)
    tiles = -(-width // config["BF"])
    dy = empty((*rows, width), dtype=fk.dtype, device=fk.device)
    sums = (plan.batch, plan.state_heads, count, width) if bias else (0,)
    d_bias = empty(sums, dtype=torch.float32, device=fk.device)

    def launch(along: torch.Tensor | None, found: torch.Tensor | None, part: int) -> None:
        start(plan.found, map_dk_kernel, plan.batch * count * tiles * plan.state_heads, (
            fq, fk, pairs, v, g, *d_states, *known, along, dy, d_bias, gates, found, table,
            *v.stride()[:3], *plan.decay_strides(g), part, plan.length, plan.heads, count,
        ), dict(
            G=plan.state_heads // plan.kv_heads, MAP=plan.map, BIAS=bias, WANT_G=gates is not None,
            SUMS=found is not None, SPARED=plan.spared, **options(plan, chunk, fq.dtype), **config,
        ))  # fmt: skip

    along = None
    if plan.map in SOFTMAXES:
        found = empty((tiles, *rows, plan.signs), dtype=torch.float32, device=fq.device)
        launch(None, found, plan.batch * plan.state_heads * plan.length)
        along = found.sum(0)
    launch(along, None, 0 if gates is None else gates.stride(0))
    return dy, d_bias


def small_ends(plan: Plan, den: torch.Tensor) -> torch.Tensor:
    """Where the last small one of scaled denominators [B, H, T] ends, of a state's readers [B, S] int32; 0: nowhere."""
    small = (den < SMALL.value * plan.scale).unflatten(1, (plan.state_heads, -1)).any(2)
    return (small * torch.arange(1, plan.length + 1, dtype=torch.int32, device=den.device)).amax(-1)


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width, name in GATE_SHAPES:
        config = gated_map_dk(arch, width, size, torch.bfloat16)
        launch = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, torch.bfloat16)
        constants = (
            map_gate_constants(size, width, name, chunk)
            | {"G": 1, "BIAS": True, "WANT_G": True, "SUMS": False}
            | config
        )
        constants |= {"SPARED": name == "learned_softmax"} | ({} if name in SOFTMAXES else {"along": None})
        signature = gate_signature(map_dk_kernel, MAP_POINTERS | {"ends": "*i32"}, constants)
        cases.append((map_dk_kernel, signature, constants, launch, f"D {size} f {width} {name}"))
    found = cases[1]
    more = found[2] | {"SUMS": True}
    return [*cases, (*found[:2], more, found[3], f"{found[4]}, sums")]
