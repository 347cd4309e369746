"""`rms_norm`: some rows a program, each held in registers whole."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .backend import empty, unseen
from .compiled import found_for, start
from .tuning import rms_norm_backward_programs, rms_norm_rows


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, rows,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """One program: R rows of D channels, contiguous; BD covers D."""
    kind = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    channel = tl.arange(0, BD)
    inside = channel < D
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * D + channel[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    factor = factor.to(tl.float32)
    if OFFSET:
        factor = 1.0 + factor
    if not LATE:
        factor = factor.to(kind).to(tl.float32)
        y = y.to(kind).to(tl.float32)
    tl.store(out_ptr + at, (y * factor[None, :]).to(kind), mask=mask)


@triton.jit(do_not_specialize=["rows", "each", "eps"])
def rms_norm_backward_kernel(
    x_ptr, weight_ptr, grad_ptr, dx_ptr, sums_ptr, eps, rows, each,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """One program: `each` times R rows. With y = x / rms and g = dout weight: dx = (g - y mean(g y)) / rms.

    sums [programs, D] float32: dout y, added up over the program's rows; or None.
    """
    kind = dx_ptr.dtype.element_ty
    channel = tl.arange(0, BD)
    inside = channel < D
    total = tl.zeros([BD], tl.float32)
    for step in range(0, each):
        row = (tl.program_id(0).to(tl.int64) * each + step) * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * D + channel[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        y = x * inverse
        if sums_ptr is not None:
            total += tl.sum(grad * y, 0)
        # Read again each time: registers would be too few for it and the sum.
        factor = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        if OFFSET:
            factor = 1.0 + factor
        if not LATE:
            factor = factor.to(kind).to(tl.float32)
        grad = grad * factor[None, :]
        dx = (grad - y * (tl.sum(grad * y, 1) / D)[:, None]) * inverse
        tl.store(dx_ptr + at, dx.to(kind), mask=mask)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + channel, total, mask=inside)


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool, late: bool) -> torch.Tensor:
    """See `rms_norm.rms_norm`; x is contiguous."""
    out = empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    if out.numel():
        width = x.shape[-1]
        flat, weight, size = x.view(-1, width), weight.contiguous(), _options(width, offset=offset, late=late)
        start(found_for(("rms_norm", width), flat, weight), rms_norm_kernel, triton.cdiv(len(flat), size["R"]), (
            flat, weight, out, eps, len(flat),
        ), {"D": width, **size})  # fmt: skip
    return out


def backward(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float, offset: bool, late: bool, *, weighed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x, and of the weight if it is `weighed`; x is contiguous."""
    dx = empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx, torch.zeros_like(weight) if weighed else None
    width = x.shape[-1]
    flat, grad, factor = x.view(-1, width), grad.contiguous(), weight.contiguous()
    size = _options(width, offset=offset, late=late)
    tiles = triton.cdiv(len(flat), size["R"])
    each = triton.cdiv(tiles, rms_norm_backward_programs(tiles, weighed=weighed))
    programs = triton.cdiv(tiles, each)
    sums = empty((programs, width), dtype=torch.float32, device=x.device) if weighed else None
    start(found_for(("rms_norm_backward", width, weighed), flat, factor, grad), rms_norm_backward_kernel, programs, (
        flat, factor, grad, dx, sums, eps, len(flat), each,
    ), {"D": width, **size})  # fmt: skip
    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


class _Norm(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, *given: Any) -> torch.Tensor:
        ctx.given = given
        ctx.save_for_backward(x, weight)
        return forward(x, weight, *given)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *backward(x, weight, grad, *ctx.given, weighed=ctx.needs_input_grad[1]), None, None, None


def rms_norm_call(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool, late: bool) -> torch.Tensor:
    """See `rms_norm.rms_norm`; x is contiguous."""
    if unseen(x, weight):
        return forward(x, weight, eps, offset, late)
    found: torch.Tensor = _Norm.apply(x, weight, eps, offset, late)  # type: ignore[no-untyped-call]
    return found


def _options(width: int, *, offset: bool, late: bool) -> dict[str, Any]:
    size = rms_norm_rows(width)
    return {"BD": size["BD"], "R": size["R"], "OFFSET": offset, "LATE": late, "num_warps": size["num_warps"]}


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations, for the compile gate."""
    signature = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16") | {"eps": "fp32", "rows": "i32"}
    cases = []
    for width, late in ((4096, False), (128, False), (3584, True), (16384, True)):
        constants = {"D": width, **_options(width, offset=late, late=late)}
        options = {"num_warps": constants.pop("num_warps")}
        cases.append((rms_norm_kernel, signature, constants, options, f"D {width}"))
    signature = dict.fromkeys(("x_ptr", "weight_ptr", "grad_ptr", "dx_ptr"), "*bf16") | {"eps": "fp32"}
    signature |= {"sums_ptr": "*fp32", "rows": "i32", "each": "i32"}
    for width in (4096, 128, 16384):
        constants = {"D": width, **_options(width, offset=False, late=False)}
        options = {"num_warps": constants.pop("num_warps")}
        cases.append((rms_norm_backward_kernel, signature, constants, options, f"backward, D {width}"))
    return cases
