"""The output of gated linear attention whose features are computed on the way (gated_out_triton.py, gated_maps.py)."""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_maps import (
    LOG2E,
    MAP_POINTERS,
    Mapped,
    features,
    map_gate_constants,
    project,
    row_sums,
    weights,
)
from .gated_plan import Plan, gate_signature
from .gated_tiles import TINY, chunk_span, pair_decay, product, row_decay
from .tuning import gated_map_chunk, gated_map_out


@triton.jit(do_not_specialize=["T", "H", "count"])
def log_sum_kernel(
    x, weight, bias, out, sxb, sxh, sxt, T, H, count,
    SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """log sum_f exp(+-y_f) of every row, y = x W + b: out [B, H, T, 2]. Grid (batch, heads, T / ROWS, flat)."""
    blocks = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    t = pid % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    at = x + b * sxb + (h // SHARE) * sxh + t[:, None] * sxt + d[None, :]
    tile = tl.load(at, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    least = tl.full([ROWS], float("inf"), tl.float32)
    up = tl.zeros([ROWS], tl.float32)
    down = tl.zeros([ROWS], tl.float32)
    for i in range(0, (WIDTH + BF - 1) // BF):
        column = i * BF + tl.arange(0, BF)
        inside = column < WIDTH
        columns = weights(weight + h * D * WIDTH, d, column, inside, D, WIDTH)
        y = project(tile, columns, bias + h * WIDTH if BIAS else bias, column, inside, BIAS, PREC)
        high = tl.maximum(most, tl.max(tl.where(inside[None, :], y, float("-inf")), 1))
        low = tl.minimum(least, tl.min(tl.where(inside[None, :], y, float("inf")), 1))
        rising = tl.where(inside[None, :], tl.exp2((y - high[:, None]) * LOG2E), 0.0)
        falling = tl.where(inside[None, :], tl.exp2((low[:, None] - y) * LOG2E), 0.0)
        up = up * tl.exp2((most - high) * LOG2E) + tl.sum(rising, 1)
        down = down * tl.exp2((low - least) * LOG2E) + tl.sum(falling, 1)
        most, least = high, low
    to = out + ((b * H + h) * T + t) * 2
    tl.store(to, most + tl.log(up), mask=t < T)
    tl.store(to + 1, tl.log(down) - least, mask=t < T)


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_out_kernel(
    q, k, v, g, q_weight, q_bias, k_weight, k_bias, q_sums, k_sums, states, z_states, out, den, table,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr,
    BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, query heads, tiles of V, flat). den [B, H, T]: scale times the denominator."""
    VT: tl.constexpr = (V + BV - 1) // BV
    F: tl.constexpr = WIDTH * SIGNED
    pid = tl.program_id(0)
    tile = pid % VT
    h = (pid // VT % H).to(tl.int64)
    c = pid // VT // H % NT
    b = (pid // VT // H // NT).to(tl.int64)
    s = h // R
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    o = tile * BV + tl.arange(0, BV)
    d = tl.arange(0, BD)
    in_o = o < V
    in_x = live[:, None] & (d < D)[None, :]
    xq = tl.load(q + b * sqb + h * sqh + first * sqt + rows[:, None] * sqt + d[None, :], mask=in_x, other=0.0)
    xk = tl.load(k + b * skb + (s // G) * skh + first * skt + rows[:, None] * skt + d[None, :], mask=in_x, other=0.0)

    slot = (b * (H // R) + s) * NT + c
    acc = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    mass = tl.zeros([C], tl.float32)
    for i in tl.range(0, (WIDTH + BF - 1) // BF, disable_licm=True):
        column = i * BF + tl.arange(0, BF)
        in_f = column < WIDTH
        in_row = live[:, None] & in_f[None, :]
        wq = weights(q_weight + h * D * WIDTH, d, column, in_f, D, WIDTH)
        wk = weights(k_weight + s * D * WIDTH, d, column, in_f, D, WIDTH)
        yq = project(xq, wq, q_bias + h * WIDTH if BIAS else q_bias, column, in_f, BIAS, PREC)
        yk = project(xk, wk, k_bias + s * WIDTH if BIAS else k_bias, column, in_f, BIAS, PREC)
        for sign in tl.static_range(SIGNED):
            f = sign * WIDTH + column
            qs = row_sums(q_sums, (b * H + h) * T + t, sign, live, C, MAP)
            ks = row_sums(k_sums, (b * (H // R) + s) * T + t, sign, live, C, MAP)
            _, qf = features(yq, qs, in_row, sign, MAP)
            _, kf = features(yk, ks, in_row, sign, MAP)
            at = slot * F * V + f[:, None] * V + o[None, :]
            state = tl.load(states + at, mask=in_f[:, None] & in_o[None, :], other=0.0)
            acc = product(qf.to(xq.dtype), state, acc, PREC)
            scores = tl.dot(qf.to(xq.dtype), tl.trans(kf.to(xq.dtype)), scores, input_precision=PREC)
            if NORM:
                zf = tl.load(z_states + slot * F + f, mask=in_f, other=0.0)
                mass += tl.sum(qf * zf[None, :], 1)
    running, _ = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
    decay = tl.exp2(running)
    scores *= pair_decay(running[:, None], running[None, :], rows[:, None] >= rows[None, :])
    vt = tl.load(
        v + b * svb + (s // G) * svh + first * svt + rows[:, None] * svt + o[None, :],
        mask=live[:, None] & in_o[None, :], other=0.0,
    )  # fmt: skip
    acc = tl.dot(scores.to(vt.dtype), vt, acc * decay[:, None], input_precision=PREC) * scale
    if NORM:
        mass = (mass * decay + tl.sum(scores, 1)) * scale
        acc = acc / tl.maximum(mass, TINY)[:, None]
        if tile == 0:
            tl.store(den + (b * H + h) * T + t, mass, mask=live)
    to = out + b * sob + h * soh + first * sot + rows[:, None] * sot + o[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None] & in_o[None, :])


def log_sums(plan: Plan, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """log of the sums of exp(+-(x W + b)), [B, heads, T, 2] float32; None where the map has no softmax."""
    if plan.map != "hedgehog_softmax":
        return None
    heads, size, width = weight.shape
    out = empty((plan.batch, heads, plan.length, 2), dtype=torch.float32, device=x.device)
    log_sum_kernel[(plan.batch * heads * -(-plan.length // 64),)](
        x, weight, bias, out, *x.stride()[:3], plan.length, heads, 0, SHARE=heads // x.shape[1], D=size,
        BD=max(16, triton.next_power_of_2(size)), WIDTH=width, BF=max(16, min(64, triton.next_power_of_2(width))),
        ROWS=64, BIAS=bias is not None, PREC="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return out


def map_outputs(
    plan: Plan, x: Mapped, states: torch.Tensor, z_states: torch.Tensor, *, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gated_out_triton.outputs`."""
    config = gated_map_out(plan.capability, plan.features, plan.values, x.q.dtype)
    table, _, count = plan.chunks(chunk)
    shape = (plan.batch, plan.length, plan.heads, plan.values)
    out = empty(shape, dtype=x.v.dtype, device=x.q.device).transpose(1, 2)
    den = empty((plan.batch, plan.heads, plan.length) if plan.norm else (0,), dtype=torch.float32, device=x.q.device)
    tiles = -(-plan.values // config["BV"])
    map_out_kernel[(plan.batch * count * plan.heads * tiles,)](
        *x, states, z_states, out, den, table, *x.strides(plan), *out.stride()[:3],
        plan.scale, plan.length, plan.heads, count, **x.options(plan, chunk, table), **config,
    )  # fmt: skip
    return out, den


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width in ((64, 256), (128, 64)):
        config = gated_map_out(arch, 2 * width, size, torch.bfloat16)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, size, torch.bfloat16, backward=False)
        constants = map_gate_constants(size, width, chunk) | config
        pointers = MAP_POINTERS | {"out": "*bf16", "den": "*fp32"}
        signature = gate_signature(map_out_kernel, pointers, constants)
        cases.append((map_out_kernel, signature, constants, options, f"D {size} f {width}"))
    return cases
