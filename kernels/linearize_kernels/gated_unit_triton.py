"""`gated_unit`: a stretch of one row a program."""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import found_for, start
from .tuning import gated_unit_stretch

GELU_SLOPE, GELU_CUBE = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)
"""sqrt(2 / pi), and the cubic term of GELU's approximation (arXiv 1606.08415)."""


@triton.jit
def gated_unit_kernel(
    gate_ptr, up_ptr, out_ptr, s_g, s_u, F: tl.constexpr, STRETCH: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    """Grid (rows stretches). s_g, s_u: strides of rows; the output's is F."""
    kind = out_ptr.dtype.element_ty
    STRETCHES: tl.constexpr = (F + STRETCH - 1) // STRETCH
    row = (tl.program_id(0) // STRETCHES).to(tl.int64)
    column = tl.program_id(0) % STRETCHES * STRETCH + tl.arange(0, STRETCH)
    inside = column < F
    x = tl.load(gate_ptr + row * s_g + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * s_u + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        inner = GELU_SLOPE * (x + GELU_CUBE * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh u) / 2 = 1 / (1 + e^-2u), which keeps its digits below zero
    else:
        x = x / (1.0 + tl.exp(-x))
    tl.store(out_ptr + row * F + column, (x.to(kind).to(tl.float32) * up).to(kind), mask=inside)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `gated_unit.gated_unit`."""
    width = gate.shape[-1]
    out = empty(tuple(gate.shape), dtype=gate.dtype, device=gate.device)
    if out.numel():
        gate, up = (_rows(x) for x in (gate, up))
        size = _options(width, activation)
        start(found_for(("gated_unit", width), gate, up), gated_unit_kernel, (
            gate.shape[0] * triton.cdiv(width, size["STRETCH"])
        ), (gate, up, out, gate.stride(0), up.stride(0)), {"F": width, **size})  # fmt: skip
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, F] with channels beside each other: a view where the strides allow one."""
    if x.ndim == 1:
        x = x.unsqueeze(0)
    flat = x.flatten(0, -2)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _options(width: int, activation: str) -> dict[str, Any]:
    size = gated_unit_stretch(width)
    return {"STRETCH": size["STRETCH"], "GELU": activation == "gelu_tanh", "num_warps": size["num_warps"]}


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations, for the compile gate."""
    signature = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16") | {"s_g": "i32:16", "s_u": "i32:16"}
    cases = []
    for width, activation in ((14336, "silu"), (9216, "gelu_tanh"), (683, "silu")):
        constants = {"F": width, **_options(width, activation)}
        options = {"num_warps": constants.pop("num_warps")}
        cases.append((gated_unit_kernel, signature, constants, options, f"{activation}, F {width}"))
    return cases
