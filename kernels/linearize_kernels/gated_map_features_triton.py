"""Features of queries and keys, phi(x W + b) [B, heads, T, F], once for all kernels that read them (gated_maps.py)."""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_maps import LOG2E, SOFTMAXES, phi, project, row_sums, weights
from .gated_plan import Plan, gate_signature
from .tuning import gated_map_features


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


@triton.jit(do_not_specialize=["T", "H"])
def features_kernel(
    x, weight, bias, log_sums, out, sxb, sxh, sxt, T, H,
    SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr,
    MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, SIGNED WIDTH]. Grid (batch, heads, T / ROWS, tiles of columns, flat)."""
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
    blocks = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    column = pid % NF * BF + tl.arange(0, BF)
    t = pid // NF % blocks * ROWS + tl.arange(0, ROWS)
    h = (pid // NF // blocks % H).to(tl.int64)
    b = (pid // NF // blocks // H).to(tl.int64)
    d = tl.arange(0, BD)
    live, inside = t < T, column < WIDTH
    at = x + b * sxb + (h // SHARE) * sxh + t[:, None] * sxt + d[None, :]
    tile = tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    columns = weights(weight + h * D * WIDTH, d, column, inside, D, WIDTH)
    y = project(tile, columns, bias + h * WIDTH if BIAS else bias, column, inside, BIAS, PREC)
    row = (b * H + h) * T + t
    for sign in tl.static_range(SIGNED):
        found = phi(y if sign == 0 else -y, row_sums(log_sums, row, sign, live, ROWS, MAP), MAP)
        to = out + row[:, None] * F + (sign * WIDTH + column)[None, :]
        tl.store(to, found.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


def map_features(
    plan: Plan, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tag: str = ""
) -> torch.Tensor:
    """Features [B, heads, T, F] in x's dtype: x [B, heads or a divisor of it, T, D], weight [heads, D, f].

    tag: whose features they are, for `compiled.start`.
    """
    heads, size, width = weight.shape
    known = (x, weight, bias)
    places = (*x.stride()[:3], plan.length, heads)
    shared = dict(
        SHARE=heads // x.shape[1], D=size, BD=max(16, triton.next_power_of_2(size)), WIDTH=width,
        BIAS=bias is not None, PREC="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    sums = None
    if plan.map in SOFTMAXES:
        sums = empty((plan.batch, heads, plan.length, 2), dtype=torch.float32, device=x.device)
        tile = max(16, min(64, triton.next_power_of_2(width)))
        start(plan.found, log_sum_kernel, plan.batch * heads * -(-plan.length // 64), (
            *known, sums, *places, 0
        ), dict(BF=tile, ROWS=64, num_warps=4, **shared), tag)  # fmt: skip
    config = gated_map_features(plan.capability, width, size, x.dtype)
    out = empty((plan.batch, heads, plan.length, plan.features), dtype=x.dtype, device=x.device)
    programs = plan.batch * heads * -(-plan.length // config["ROWS"]) * -(-width // config["BF"])
    start(plan.found, features_kernel, programs, (
        *known, sums, out, *places
    ), dict(MAP=plan.map, SIGNED=plan.signs, **shared, **config), tag)  # fmt: skip
    return out


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width in ((64, 1024), (128, 64)):
        config = gated_map_features(arch, width, size, torch.bfloat16)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            SHARE=1, D=size, BD=size, WIDTH=width, MAP="hedgehog_exp", SIGNED=2, BIAS=True, PREC="tf32", log_sums=None
        )
        constants |= config
        pointers = {"x": "*bf16", "weight": "*bf16", "bias": "*fp32", "out": "*bf16"}
        signature = gate_signature(features_kernel, pointers, constants)
        cases.append((features_kernel, signature, constants, options, f"D {size} f {width}"))
    return cases
