"""`unrotate` and its gradient, one pass over memory each.

    forwards   y_1 = (x_1 c_1 + x_2 s_1) / n_1        y_2 = (x_2 c_2 - x_1 s_2) / n_2         n = c^2 + s^2
    backwards  dx_1 = dy_1 c_1 / n_1 - dy_2 s_2 / n_2    dx_2 = dy_1 s_1 / n_1 + dy_2 c_2 / n_2

1 and 2 are the halves of what was turned.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .tuning import blend_rows


@triton.jit(do_not_specialize=["rows", "T", "H"])
def unrotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, s_xb, s_xh, s_xt, s_cb, s_ct, s_sb, s_st, rows, T, H,
    D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One program: R rows, in the order of the output's memory [B, T, H, D]. BP covers P / 2, BR the other channels."""
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
    if BACK:
        first, second = first / n_1, second / n_2
        y_1, y_2 = first * c_1 - second * s_2, first * s_1 + second * c_2
    else:
        y_1, y_2 = (first * c_1 + second * s_1) / n_1, (second * c_2 - first * s_2) / n_2
    tl.store(out + channel, y_1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + P // 2 + channel, y_2.to(out_ptr.dtype.element_ty), mask=mask)
    if D > P:
        other = P + tl.arange(0, BR)[None, :]
        tl.store(out + other, tl.load(x + other, mask=live & (other < D), other=0.0), mask=live & (other < D))


def _launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    batch, heads, length, width = x.shape
    turned, rows = cos.shape[-1], batch * heads * length
    cos, sin = (y.expand(batch, length, turned) for y in (cos, sin))
    out = empty((batch, length, heads, width), dtype=x.dtype, device=x.device).transpose(1, 2)
    if rows:
        size = _size(width, turned)
        unrotate_kernel[(triton.cdiv(rows, size["R"]),)](
            x, cos, sin, out, *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], rows, length, heads, BACK=back,
            **size,
        )  # fmt: skip
    return out


def _size(width: int, turned: int) -> dict[str, int]:
    rows = blend_rows(width)
    half, rest = max(1, turned // 2), max(1, width - turned)
    return {
        "D": width, "P": turned, "BP": triton.next_power_of_2(half), "BR": triton.next_power_of_2(rest),
        "R": rows["R"], "num_warps": rows["num_warps"],
    }  # fmt: skip


@torch.library.custom_op("linearize::unrotate", mutates_args=())
def unrotate_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `unrotate.unrotate`; the last strides are 1."""
    return _launch(x, cos, sin, back=False)


@torch.library.custom_op("linearize::unrotate_backward", mutates_args=())
def unrotate_backward_op(d_out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Gradient of x."""
    return _launch(d_out, cos, sin, back=True)


@unrotate_op.register_fake
@unrotate_backward_op.register_fake
def _(x, cos, sin):  # type: ignore[no-untyped-def]
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    return torch.ops.linearize.unrotate_backward(d_out, *ctx.saved_tensors), None, None


unrotate_op.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations, for the compile gate."""
    numbers = dict.fromkeys(("s_xb", "s_xh", "s_xt", "s_cb", "s_ct", "s_sb", "s_st", "rows", "T", "H"), "i32")
    signature = {"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": "*bf16"} | numbers
    cases = []
    for width, turned, back in ((128, 128, False), (128, 128, True), (128, 32, False)):
        size = _size(width, turned)
        options = {"num_warps": size.pop("num_warps")}
        cases.append((unrotate_kernel, signature, {**size, "BACK": back}, options, f"D {width} P {turned} back {back}"))
    return cases
