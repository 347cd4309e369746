"""From dy, the gradient before a map's function, to its inputs and weights: dx = dy W^T, dW = x^T dy.

Sums over tokens are cut into shares, which are added up afterwards, in the same order every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_plan import ENOUGH_PROGRAMS, Plan, gate_signature
from .tuning import gated_map_inputs, gated_map_weights


@triton.jit(do_not_specialize=["T", "H"])
def input_kernel(
    dy, weight, dx, syb, syh, syt, sxb, sxh, sxt, T, H,
    SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """dx [B, H, T, D], of heads that SHARE maps read. Grid (batch, heads, T / ROWS, flat)."""
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
    blocks = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    t = pid % blocks * ROWS + tl.arange(0, ROWS)
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    d = tl.arange(0, BD)
    live, in_d = t < T, d < D
    acc = tl.zeros([ROWS, BD], tl.float32)
    for i in tl.range(0, SHARE * NF):
        head = h * SHARE + i // NF
        column = i % NF * BF + tl.arange(0, BF)
        in_f = column < WIDTH
        tile = tl.load(
            dy + b * syb + head * syh + t[:, None] * syt + column[None, :],
            mask=live[:, None] & in_f[None, :], other=0.0,
        )  # fmt: skip
        turned = tl.load(
            weight + head * D * WIDTH + d[None, :] * WIDTH + column[:, None],
            mask=in_d[None, :] & in_f[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(tile, turned, acc, input_precision=PREC)
    to = dx + b * sxb + h * sxh + t[:, None] * sxt + d[None, :]
    tl.store(to, acc.to(dx.dtype.element_ty), mask=live[:, None] & in_d[None, :])


@triton.jit
def job_rows(job, ends, T, N, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Row of the batch, first token, and which of the job's tokens belong to a sequence."""
    blocks = tl.cdiv(T, ROWS)
    first = job % blocks * ROWS
    t = first + tl.arange(0, ROWS)
    live = t < T
    if PACKED:
        live = (t >= tl.load(ends)) & (t < tl.load(ends + N))
    return (job // blocks).to(tl.int64), first, live


@triton.jit(do_not_specialize=["T", "H", "N", "jobs", "SHARES"])
def weight_kernel(
    x, dy, d_weight, ends, sxb, sxh, sxt, syb, syh, syt, T, H, N, jobs, SHARES,
    SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """d_weight [SHARES, H, D, WIDTH], of all tokens. Grid (shares, maps, tiles of columns, flat)."""
    NF: tl.constexpr = (WIDTH + BF - 1) // BF
    pid = tl.program_id(0)
    column = pid % NF * BF + tl.arange(0, BF)
    h = (pid // NF % H).to(tl.int64)
    share = (pid // NF // H).to(tl.int64)
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    in_d, in_f = d < D, column < WIDTH
    acc = tl.zeros([BD, BF], tl.float32)
    for job in tl.range(share, jobs, SHARES):
        b, first, live = job_rows(job, ends, T, N, ROWS, PACKED)
        turned = tl.load(
            x + b * sxb + (h // SHARE) * sxh + first * sxt + rows[None, :] * sxt + d[:, None],
            mask=live[None, :] & in_d[:, None], other=0.0,
        )  # fmt: skip
        tile = tl.load(
            dy + b * syb + h * syh + first * syt + rows[:, None] * syt + column[None, :],
            mask=live[:, None] & in_f[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(turned, tile, acc, input_precision=PREC)
    to = d_weight + (share * H + h) * D * WIDTH + d[:, None] * WIDTH + column[None, :]
    tl.store(to, acc, mask=in_d[:, None] & in_f[None, :])


def _sizes(size: int, width: int, heads: int, inputs: int) -> dict[str, int]:
    return dict(SHARE=heads // inputs, D=size, BD=max(16, triton.next_power_of_2(size)), WIDTH=width)


def input_gradient(plan: Plan, dy: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor, tag: str = "") -> None:
    """Fills dx [B, H, T, D] with dy W^T: dy [B, maps, T, f], weight [maps, D, f]; maps of one head follow another."""
    maps, size, width = weight.shape
    batch, heads, length, _ = dx.shape
    config = gated_map_inputs(plan.capability, size, width, dx.dtype)
    start(plan.found, input_kernel, batch * heads * -(-length // config["ROWS"]), (
        dy, weight, dx, *dy.stride()[:3], *dx.stride()[:3], length, heads,
    ), dict(
        PREC="ieee" if dx.dtype == torch.float32 else "tf32", **_sizes(size, width, maps, heads), **config,
    ), tag)  # fmt: skip


def weight_gradient(plan: Plan, x: torch.Tensor, dy: torch.Tensor, tag: str = "") -> torch.Tensor:
    """x^T dy in shares whose sum it is, [shares, maps, D, f] float32: x [B, H, T, D], dy [B, maps, T, f]."""
    maps, size, width = dy.shape[1], x.shape[3], dy.shape[3]
    config = gated_map_weights(plan.capability, size, width, x.dtype)
    ends, last = plan.cu_seqlens, 0 if plan.cu_seqlens is None else plan.cu_seqlens.shape[0] - 1
    jobs = plan.batch * -(-plan.length // config["ROWS"])
    tiles = maps * -(-width // config["BF"])
    shares = max(1, min(jobs, 2 * ENOUGH_PROGRAMS // tiles))
    part = empty((shares, maps, size, width), dtype=torch.float32, device=x.device)
    start(plan.found, weight_kernel, shares * tiles, (
        x, dy, part, ends, *x.stride()[:3], *dy.stride()[:3], plan.length, maps, last, jobs, shares,
    ), dict(
        PACKED=ends is not None, PREC="ieee" if x.dtype == torch.float32 else "tf32",
        **_sizes(size, width, maps, x.shape[1]), **config,
    ), tag)  # fmt: skip
    return part


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    pointers = dict.fromkeys(("x", "dy", "weight", "dx"), "*bf16") | {"d_weight": "*fp32"}
    for size, width in ((128, 1024), (64, 1024)):
        for kernel, tuned in ((weight_kernel, gated_map_weights), (input_kernel, gated_map_inputs)):
            config = tuned(arch, size, width, torch.bfloat16)
            launch = {name: config.pop(name) for name in ("num_warps", "num_stages")}
            constants: dict[str, Any] = _sizes(size, width, 1, 1) | {"PACKED": False, "PREC": "tf32", "ends": None}
            constants = {name: x for name, x in (constants | config).items() if name in kernel.arg_names}
            signature = gate_signature(kernel, pointers, constants)
            cases.append((kernel, signature, constants, launch, f"{kernel.__name__} D {size} f {width}"))
    return cases
