"""`unrotate` and its gradient, one pass over memory each.

    forwards   y_1 = (x_1 c_1 + x_2 s_1) / n_1        y_2 = (x_2 c_2 - x_1 s_2) / n_2         n = c^2 + s^2
    backwards  dx_1 = dy_1 c_1 / n_1 - dy_2 s_2 / n_2    dx_2 = dy_1 s_1 / n_1 + dy_2 c_2 / n_2

1 and 2 are the halves of what was turned. What a layer's own projection made is added on the way, times a factor.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import found_for, start
from .tuning import blend_rows


@triton.jit(do_not_specialize=["rows", "T", "H"])
def unrotate_kernel(
    x_ptr, cos_ptr, sin_ptr, own_ptr, out_ptr, s_xb, s_xh, s_xt, s_cb, s_ct, s_sb, s_st, s_ob, s_oh, s_ot, factor,
    rows, T, H,
    D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """One program: R rows, in the order of the output's memory [B, T, H, D]. BP covers P / 2, BR the other channels.

    With OWN forwards factor * own is added; backwards own is written, its gradient factor * x.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = (row < rows)[:, None]
    h, t, b = row % H, row // H % T, row // H // T
    x = x_ptr + (b * s_xb + h * s_xh + t * s_xt)[:, None]
    out = out_ptr + row[:, None] * D
    channel = tl.arange(0, BP)[None, :]
    mask = live & (channel < P // 2)
    cos = cos_ptr + (b * s_cb + t * s_ct)[:, None] + channel
    sin = sin_ptr + (b * s_sb + t * s_st)[:, None] + channel
    c_1 = tl.load(cos, mask=mask, other=1.0).to(tl.float32)
    c_2 = tl.load(cos + P // 2, mask=mask, other=1.0).to(tl.float32)
    s_1 = tl.load(sin, mask=mask, other=0.0).to(tl.float32)
    s_2 = tl.load(sin + P // 2, mask=mask, other=0.0).to(tl.float32)
    n_1, n_2 = c_1 * c_1 + s_1 * s_1, c_2 * c_2 + s_2 * s_2
    first = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + P // 2 + channel, mask=mask, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    if OWN:
        own = own_ptr + (b * s_ob + h * s_oh + t * s_ot)[:, None]
        if BACK:
            tl.store(own + channel, (first * factor).to(own_ptr.dtype.element_ty), mask=mask)
            tl.store(own + P // 2 + channel, (second * factor).to(own_ptr.dtype.element_ty), mask=mask)
    if BACK:
        first, second = first / n_1, second / n_2
        y_1, y_2 = first * c_1 - second * s_2, first * s_1 + second * c_2
    else:
        y_1, y_2 = (first * c_1 + second * s_1) / n_1, (second * c_2 - first * s_2) / n_2
    if OWN and not BACK:
        y_1 += factor * tl.load(own + channel, mask=mask, other=0.0).to(tl.float32)
        y_2 += factor * tl.load(own + P // 2 + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + channel, y_1.to(kind), mask=mask)
    tl.store(out + P // 2 + channel, y_2.to(kind), mask=mask)
    if D > P:
        other = P + tl.arange(0, BR)[None, :]
        inside = live & (other < D)
        rest = tl.load(x + other, mask=inside, other=0.0)
        if OWN:
            wide = rest.to(tl.float32)
            if BACK:
                tl.store(own + other, (wide * factor).to(own_ptr.dtype.element_ty), mask=inside)
            else:
                rest = (wide + factor * tl.load(own + other, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(out + other, rest, mask=inside)


def _launch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, own: torch.Tensor | None, factor: float, *, back: bool
) -> torch.Tensor:
    batch, heads, length, width = x.shape
    turned, rows = cos.shape[-1], batch * heads * length
    cos, sin = (y.expand(batch, length, turned) for y in (cos, sin))
    out = empty_like(x, x.dtype)
    if rows:
        size = _size(width, turned)
        found = found_for(("unrotate", tuple(x.shape), turned, factor, back), x, cos, sin, own)
        start(found, unrotate_kernel, triton.cdiv(rows, size["R"]), (
            x, cos, sin, own, out, *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
            *(x if own is None else own).stride()[:3], factor, rows, length, heads,
        ), {"BACK": back, "OWN": own is not None, **size})  # fmt: skip
    return out


def _size(width: int, turned: int) -> dict[str, int]:
    rows = blend_rows(width)
    half, rest = max(1, turned // 2), max(1, width - turned)
    return {
        "D": width, "P": turned, "BP": triton.next_power_of_2(half), "BR": triton.next_power_of_2(rest),
        "R": rows["R"], "num_warps": rows["num_warps"],
    }  # fmt: skip


def forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, own: torch.Tensor | None, factor: float
) -> torch.Tensor:
    """See `unrotate.unrotate` and `unrotate_and_add`; the last strides are 1."""
    return _launch(x, cos, sin, own, factor, back=False)


unrotate_op = torch.library.custom_op("linearize::unrotate", forward, mutates_args=())


@unrotate_op.register_fake
def _(x, cos, sin, own, factor):  # type: ignore[no-untyped-def]
    return _like(x, x.dtype)


@torch.library.custom_op("linearize::unrotate_backward", mutates_args=())
def unrotate_backward_op(
    d_out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, own: torch.dtype | None, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x, and in dtype `own` that of what was added; empty where nothing was."""
    d_own = d_out.new_empty(0) if own is None else empty_like(d_out, own)
    return _launch(d_out, cos, sin, None if own is None else d_own, factor, back=True), d_own


@unrotate_backward_op.register_fake
def _(d_out, cos, sin, own, factor):  # type: ignore[no-untyped-def]
    return _like(d_out, d_out.dtype), d_out.new_empty(0) if own is None else _like(d_out, own)


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    batch, heads, length, width = x.shape
    return x.new_empty((batch, length, heads, width), dtype=dtype).transpose(1, 2)


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A buffer [B, H, T, D] over memory [B, T, H, D]."""
    batch, heads, length, width = x.shape
    return empty((batch, length, heads, width), dtype=dtype, device=x.device).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, own, factor = inputs
    ctx.save_for_backward(cos, sin)
    ctx.options = None if own is None else own.dtype, factor


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    own, factor = ctx.options
    dx, d_own = torch.ops.linearize.unrotate_backward(d_out, *ctx.saved_tensors, own, factor)
    return dx, None, None, None if own is None else d_own, None


unrotate_op.register_autograd(_backward, setup_context=_keep)


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations, for the compile gate."""
    names = ("s_xb", "s_xh", "s_xt", "s_cb", "s_ct", "s_sb", "s_st", "s_ob", "s_oh", "s_ot", "rows", "T", "H")
    signature = {"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "own_ptr": "*bf16", "out_ptr": "*bf16"}
    signature |= dict.fromkeys(names, "i32") | {"factor": "fp32"}
    cases = []
    for width, turned, back in ((128, 128, False), (128, 128, True), (128, 32, False)):
        size = _size(width, turned)
        options = {"num_warps": size.pop("num_warps")}
        constants = {**size, "BACK": back, "OWN": True}
        cases.append((unrotate_kernel, signature, constants, options, f"D {width} P {turned} back {back}"))
    return cases
