"""`gated_unit`: a stretch of one row a program."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .backend import empty, unseen
from .compiled import found_for, start
from .tuning import gated_unit_stretch

GELU_SLOPE, GELU_CUBE = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)
"""sqrt(2 / pi), and the cubic term of GELU's approximation (arXiv 1606.08415)."""


@triton.jit
def gated_unit_backward_kernel(
    gate_ptr, up_ptr, grad_ptr, d_gate_ptr, d_up_ptr, s_g, s_u,
    F: tl.constexpr, STRETCH: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Grid and strides as below; gradients are contiguous. activation(x) = x sigmoid(inner(x))."""
    kind = d_gate_ptr.dtype.element_ty
    STRETCHES: tl.constexpr = (F + STRETCH - 1) // STRETCH
    row = (tl.program_id(0) // STRETCHES).to(tl.int64)
    column = tl.program_id(0) % STRETCHES * STRETCH + tl.arange(0, STRETCH)
    inside = column < F
    x = tl.load(gate_ptr + row * s_g + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * s_u + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + column, mask=inside, other=0.0).to(tl.float32)
    inner, bend = x, x  # and x inner'(x)
    if GELU:
        inner = 2.0 * GELU_SLOPE * (x + GELU_CUBE * x * x * x)
        bend = 2.0 * GELU_SLOPE * (x + 3.0 * GELU_CUBE * x * x * x)
    share = 1.0 / (1.0 + tl.exp(-inner))
    curved = share * (1.0 - share)
    slope = share + tl.where(curved > 0.0, bend * curved, 0.0)  # far out the bend may be infinite
    tl.store(d_gate_ptr + row * F + column, (grad * up * slope).to(kind), mask=inside)
    tl.store(d_up_ptr + row * F + column, (grad * (x * share).to(kind).to(tl.float32)).to(kind), mask=inside)


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


def backward(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, contiguous."""
    width, shape = gate.shape[-1], tuple(gate.shape)
    made = [empty(shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    if grad.numel():
        gate, up, grad = _rows(gate), _rows(up), grad.contiguous()
        size = _options(width, activation)
        start(found_for(("gated_unit_backward", width), gate, up, grad), gated_unit_backward_kernel, (
            gate.shape[0] * triton.cdiv(width, size["STRETCH"])
        ), (gate, up, grad, *made, gate.stride(0), up.stride(0)), {"F": width, **size})  # fmt: skip
    return made[0], made[1]


class _Unit(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return forward(gate, up, activation)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *backward(gate, up, grad, ctx.activation), None


def gated_unit_call(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `gated_unit.gated_unit`."""
    if unseen(gate, up):
        return forward(gate, up, activation)
    found: torch.Tensor = _Unit.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return found


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
        back = dict.fromkeys(("gate_ptr", "up_ptr", "grad_ptr", "d_gate_ptr", "d_up_ptr"), "*bf16")
        back |= {"s_g": "i32:16", "s_u": "i32:16"}
        cases.append((gated_unit_backward_kernel, back, constants, options, f"backward, {activation}, F {width}"))
    return cases
