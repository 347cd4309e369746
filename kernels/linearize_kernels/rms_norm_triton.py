"""`rms_norm`: some rows a program, each held in registers whole."""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import found_for, start
from .tuning import rms_norm_rows


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


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: bool, late: bool) -> torch.Tensor:
    """See `rms_norm.rms_norm`; x is contiguous."""
    out = empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    if out.numel():
        width = x.shape[-1]
        flat, weight, size = x.view(-1, width), weight.contiguous(), _options(width, offset=offset, late=late)
        start(found_for(("rms_norm", width), flat, weight), rms_norm_kernel, triton.cdiv(len(flat), size["R"]), (
            flat, weight, out, eps, len(flat),
        ), {"D": width, **size})  # fmt: skip
    return out


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
    return cases
