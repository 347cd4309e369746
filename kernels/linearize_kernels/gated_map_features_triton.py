"""Features of queries and keys, phi(x W + b) [B, heads, T, F], once for all kernels that read them (gated_maps.py)."""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_maps import LOG2E, SIGNS, phi, project, row_sums, weights
from .gated_plan import Plan, gate_signature
from .tuning import gated_map_features, gated_map_sums


@triton.jit(do_not_specialize=["T", "H"])
def log_sum_kernel(
    x, weight, bias, out, sxb, sxh, sxt, T, H,
    SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr,
    SIGNED: tl.constexpr, BIAS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """log sum_f exp(+-y_f) of every row, y = x W + b: out [B, H, T, SIGNED]. Grid (batch, heads, T / ROWS, flat)."""
    blocks = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    t = pid % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    at = x + b * sxb + (h // SHARE) * sxh + t[:, None] * sxt + d[None, :]
    tile = tl.load(at, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    least = tl.full([ROWS], float("-inf"), tl.float32)
    up = tl.zeros([ROWS], tl.float32)
    down = tl.zeros([ROWS], tl.float32)
    for i in tl.range(0, (WIDTH + BF - 1) // BF):
        column = i * BF + tl.arange(0, BF)
        inside = column < WIDTH
        columns = weights(weight + h * D * WIDTH, d, column, inside, D, WIDTH)
        y = project(tile, columns, bias + h * WIDTH if BIAS else bias, column, inside, BIAS, PREC) * LOG2E
        most, up = _grown(most, up, y, inside)
        if SIGNED == 2:
            least, down = _grown(least, down, -y, inside)
    to = out + ((b * H + h) * T + t) * SIGNED
    tl.store(to, (most + tl.log2(up)) / LOG2E, mask=t < T)
    if SIGNED == 2:
        tl.store(to + 1, (least + tl.log2(down)) / LOG2E, mask=t < T)


@triton.jit
def _grown(most, total, y, inside):
    """The largest of each row so far, and the sum of 2^(y - it), with some columns y [ROWS, BF] more."""
    y = tl.where(inside[None, :], y, float("-inf"))
    high = tl.maximum(most, tl.max(y, 1))
    return high, total * tl.exp2(most - high) + tl.sum(tl.exp2(y - high[:, None]), 1)


@triton.jit(do_not_specialize=["T", "H"])
def features_kernel(
    x, weight, bias, log_sums, out, sxb, sxh, sxt, T, H,
    SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr,
    SPAN: tl.constexpr, MAP: tl.constexpr, SIGNED: tl.constexpr, BIAS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, SIGNED WIDTH]. Grid (batch, heads, T / ROWS, spans of SPAN tiles of columns, flat)."""
    F: tl.constexpr = WIDTH * SIGNED
    NF: tl.constexpr = (WIDTH + BF * SPAN - 1) // (BF * SPAN)
    blocks = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    t = pid // NF % blocks * ROWS + tl.arange(0, ROWS)
    h = (pid // NF // blocks % H).to(tl.int64)
    b = (pid // NF // blocks // H).to(tl.int64)
    d = tl.arange(0, BD)
    live = t < T
    at = x + b * sxb + (h // SHARE) * sxh + t[:, None] * sxt + d[None, :]
    tile = tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    row = (b * H + h) * T + t
    for i in tl.range(0, SPAN):
        column = (pid % NF * SPAN + i) * BF + tl.arange(0, BF)
        inside = column < WIDTH
        columns = weights(weight + h * D * WIDTH, d, column, inside, D, WIDTH)
        y = project(tile, columns, bias + h * WIDTH if BIAS else bias, column, inside, BIAS, PREC)
        for sign in tl.static_range(SIGNED):
            found = phi(y if sign == 0 else -y, row_sums(log_sums, row, sign, live, ROWS, MAP, SIGNED), MAP)
            to = out + row[:, None] * F + (sign * WIDTH + column)[None, :]
            tl.store(to, found.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


def _shared(plan: Plan, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Any]:
    heads, size, width = weight.shape
    return dict(
        SHARE=heads // x.shape[1], D=size, BD=max(16, triton.next_power_of_2(size)), WIDTH=width, SIGNED=plan.signs,
        BIAS=bias is not None, PREC="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def map_log_sums(
    plan: Plan, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tag: str = ""
) -> None:
    """Fills out [B, heads, T, signs] float32 with the logs of a softmax's sums; other arguments as `map_features`."""
    heads, size, width = weight.shape
    config = gated_map_sums(plan.capability, width, size, x.dtype)
    start(plan.found, log_sum_kernel, plan.batch * heads * -(-plan.length // config["ROWS"]), (
        x, weight, bias, out, *x.stride()[:3], plan.length, heads
    ), _shared(plan, x, weight, bias) | config, tag)  # fmt: skip


def map_features(
    plan: Plan,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sums: torch.Tensor | None,
    tag: str = "",
) -> torch.Tensor:
    """Features [B, heads, T, F] in x's dtype: x [B, heads or a divisor of it, T, D], weight [heads, D, f].

    sums: of a softmax, as `map_log_sums`; tag: whose features they are, for `compiled.start`.
    """
    heads, size, width = weight.shape
    config = gated_map_features(plan.capability, width, size, x.dtype)
    out = empty((plan.batch, heads, plan.length, plan.features), dtype=x.dtype, device=x.device)
    spans = -(-width // (config["BF"] * config["SPAN"]))
    programs = plan.batch * heads * -(-plan.length // config["ROWS"]) * spans
    start(plan.found, features_kernel, programs, (
        x, weight, bias, sums, out, *x.stride()[:3], plan.length, heads
    ), _shared(plan, x, weight, bias) | dict(MAP=plan.map, **config), tag)  # fmt: skip
    return out


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width, name in ((128, 2048, "learned_softmax"), (64, 1024, "hedgehog_exp"), (128, 64, "hedgehog_exp")):
        config = gated_map_features(arch, width, size, torch.bfloat16)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            SHARE=1, D=size, BD=size, WIDTH=width, MAP=name, SIGNED=SIGNS[name], BIAS=True, PREC="tf32"
        )
        constants |= config
        pointers = {"x": "*bf16", "weight": "*bf16", "bias": "*fp32", "log_sums": "*fp32", "out": "*bf16"}
        signature = gate_signature(features_kernel, pointers, constants)
        cases.append((features_kernel, signature, constants, options, f"D {size} f {width}"))
    for size, width in ((128, 2048), (64, 2048)):
        config = gated_map_sums(arch, width, size, torch.bfloat16)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants = dict(SHARE=1, D=size, BD=size, WIDTH=width, SIGNED=1, BIAS=True, PREC="tf32") | config
        pointers = {"x": "*bf16", "weight": "*bf16", "bias": "*fp32", "out": "*fp32"}
        signature = gate_signature(log_sum_kernel, pointers, constants)
        cases.append((log_sum_kernel, signature, constants, options, f"sums, D {size} f {width}"))
    return cases
