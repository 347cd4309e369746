"""`blend` and its gradient, one pass over memory each."""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import found_for, start
from .tuning import blend_rows


@triton.jit(do_not_specialize=["rows", "T", "H"])
def blend_kernel(
    near_ptr, far_ptr, share_ptr, out_ptr,
    s_nb, s_nh, s_nt, s_fb, s_fh, s_ft, s_ab, s_ah, s_at, rows, T, H,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One program: R rows of D channels, in the order of the output's memory [B, T, H, D]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < rows
    channel = tl.arange(0, BD)
    mask = live[:, None] & (channel < D)[None, :]
    h, t, b = row % H, row // H % T, row // H // T
    share = tl.load(share_ptr + b * s_ab + h * s_ah + t * s_at, mask=live, other=0.0)[:, None]
    near = tl.load(near_ptr + (b * s_nb + h * s_nh + t * s_nt)[:, None] + channel[None, :], mask=mask, other=0.0)
    far = tl.load(far_ptr + (b * s_fb + h * s_fh + t * s_ft)[:, None] + channel[None, :], mask=mask, other=0.0)
    out = share * near.to(tl.float32) + (1.0 - share) * far.to(tl.float32)
    tl.store(out_ptr + row[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "T", "H"])
def blend_backward_kernel(
    near_ptr, far_ptr, share_ptr, d_out_ptr, d_near_ptr, d_far_ptr, d_share_ptr,
    s_nb, s_nh, s_nt, s_fb, s_fh, s_ft, s_ab, s_ah, s_at, s_db, s_dh, s_dt, rows, T, H,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One program: R rows; d_near, d_far in memory [B, T, H, D], d_share [B, T, H]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < rows
    channel = tl.arange(0, BD)
    mask = live[:, None] & (channel < D)[None, :]
    h, t, b = row % H, row // H % T, row // H // T
    share = tl.load(share_ptr + b * s_ab + h * s_ah + t * s_at, mask=live, other=0.0)[:, None]
    near = tl.load(near_ptr + (b * s_nb + h * s_nh + t * s_nt)[:, None] + channel[None, :], mask=mask, other=0.0)
    far = tl.load(far_ptr + (b * s_fb + h * s_fh + t * s_ft)[:, None] + channel[None, :], mask=mask, other=0.0)
    d_out = tl.load(d_out_ptr + (b * s_db + h * s_dh + t * s_dt)[:, None] + channel[None, :], mask=mask, other=0.0)
    d_out = d_out.to(tl.float32)
    tl.store(d_share_ptr + row, tl.sum(d_out * (near.to(tl.float32) - far.to(tl.float32)), 1), mask=live)
    at = row[:, None] * D + channel[None, :]
    tl.store(d_near_ptr + at, (share * d_out).to(d_near_ptr.dtype.element_ty), mask=mask)
    tl.store(d_far_ptr + at, ((1.0 - share) * d_out).to(d_far_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, tensors: list[torch.Tensor], strided: list[torch.Tensor], like: torch.Tensor) -> None:
    batch, heads, length, width = like.shape
    rows = batch * heads * length
    strides = [s for x in strided for s in x.stride()[:3]]
    size = blend_rows(width)
    if rows:
        found = found_for(("blend", tuple(like.shape)), *strided)
        given = (*tensors, *strides, rows, length, heads)
        start(found, kernel, triton.cdiv(rows, size["R"]), given, {"D": width, **size})


def _like(x: torch.Tensor, channels: bool = True) -> torch.Tensor:
    """A buffer viewed as [B, H, T, D] over memory [B, T, H, D]; without channels float32 [B, H, T] over [B, T, H]."""
    batch, heads, length, width = x.shape
    if channels:
        return empty((batch, length, heads, width), dtype=x.dtype, device=x.device).transpose(1, 2)
    return empty((batch, length, heads), dtype=torch.float32, device=x.device).transpose(1, 2)


def forward(near: torch.Tensor, far: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """See `blend.blend`; stride(-1) of near and far is 1."""
    out = _like(near)
    _launch(blend_kernel, [near, far, share, out], [near, far, share], near)
    return out


blend_op = torch.library.custom_op("linearize::blend", forward, mutates_args=())


@torch.library.custom_op("linearize::blend_backward", mutates_args=())
def blend_backward_op(
    near: torch.Tensor, far: torch.Tensor, share: torch.Tensor, d_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of near, far and share."""
    made = _like(near), _like(far), _like(near, channels=False)
    _launch(blend_backward_kernel, [near, far, share, d_out, *made], [near, far, share, d_out], near)
    return made


@blend_op.register_fake
def _(near, far, share):  # type: ignore[no-untyped-def]
    return _fake(near)


@blend_backward_op.register_fake
def _(near, far, share, d_out):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = near.shape
    return _fake(near), _fake(far), share.new_empty(batch, length, heads).transpose(1, 2)


def _fake(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.linearize.blend_backward(
        *ctx.saved_tensors, d_out
    )
    return found


blend_op.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations, for the compile gate."""
    strides = [f"s_{x}{axis}" for x in "nfa" for axis in "bht"]
    numbers = dict.fromkeys([*strides, "rows", "T", "H"], "i32")
    tiles = ("near_ptr", "far_ptr", "out_ptr")
    forward = dict.fromkeys(tiles, "*bf16") | {"share_ptr": "*fp32"} | numbers
    back = dict.fromkeys(["near_ptr", "far_ptr", "d_out_ptr", "d_near_ptr", "d_far_ptr"], "*bf16")
    back |= dict.fromkeys(["share_ptr", "d_share_ptr"], "*fp32") | numbers
    back |= dict.fromkeys(["s_db", "s_dh", "s_dt"], "i32")
    cases = []
    for kernel, signature, label in ((blend_kernel, forward, "forward"), (blend_backward_kernel, back, "backward")):
        size = blend_rows(128)
        options = {"num_warps": size.pop("num_warps")}
        cases.append((kernel, signature, {"D": 128, **size}, options, f"{label}, D 128"))
    return cases
