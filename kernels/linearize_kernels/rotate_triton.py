"""`rotate`: one launch for queries and keys; a program turns some heads of one token, which share its angle."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .backend import empty, unseen
from .compiled import found_for, start
from .tuning import rotate_heads


@triton.jit
def _turned(
    x_ptr, out_ptr, at_x, at_out, s_xh, first, HEADS, cos, sin, cos_2, sin_2,
    D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """R heads of a token from number `first` on; cos and sin [1, BP] for the first half, _2 for the second.

    BACK: the transposed map, rounded once.
    """
    kind = out_ptr.dtype.element_ty
    head = first + tl.arange(0, R)
    channel = tl.arange(0, BP)[None, :]
    live = (head < HEADS)[:, None]
    mask = live & (channel < P // 2)
    x = x_ptr + at_x + head[:, None] * s_xh
    out = out_ptr + at_out + head[:, None] * D
    a = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + P // 2 + channel, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        y = a * cos + b * sin_2
        y_2 = b * cos_2 - a * sin
    else:
        y = (a * cos).to(kind).to(tl.float32) - (b * sin).to(kind).to(tl.float32)
        y_2 = (b * cos_2).to(kind).to(tl.float32) + (a * sin_2).to(kind).to(tl.float32)
    tl.store(out + channel, y.to(kind), mask=mask)
    tl.store(out + P // 2 + channel, y_2.to(kind), mask=mask)
    if D > P:
        other = P + tl.arange(0, BR)[None, :]
        inside = live & (other < D)
        tl.store(out + other, tl.load(x + other, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["T", "H", "HK"])
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_cb, s_ct, s_sb, s_st, T, H, HK,
    D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Grid (B T, groups of R heads of queries, then of keys). BP covers P / 2, BR the channels that stay."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    b, t = token // T, token % T
    channel = tl.arange(0, BP)[None, :]
    mask = channel < P // 2
    cos_at = cos_ptr + b * s_cb + t * s_ct + channel
    sin_at = sin_ptr + b * s_sb + t * s_st + channel
    cos = tl.load(cos_at, mask=mask, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_at + P // 2, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_at, mask=mask, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_at + P // 2, mask=mask, other=0.0).to(tl.float32)
    groups = (H + R - 1) // R
    if group < groups:
        _turned(
            q_ptr, q_out_ptr, b * s_qb + t * s_qt, token * H * D, s_qh, group * R, H, cos, sin, cos_2, sin_2,
            D, P, BP, BR, R, BACK,
        )  # fmt: skip
    else:
        _turned(
            k_ptr, k_out_ptr, b * s_kb + t * s_kt, token * HK * D, s_kh, (group - groups) * R, HK, cos, sin, cos_2,
            sin_2, D, P, BP, BR, R, BACK,
        )  # fmt: skip


def turned_by(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rotate.rotate`; the last strides are 1. `back`: q and k are gradients of what it gave for this dtype."""
    batch, heads, length, width = q.shape
    key_heads, turned = k.shape[1], cos.shape[-1]
    cos, sin = (x.expand(batch, length, turned) for x in (cos, sin))
    out, key_out = (
        empty((batch, length, n, width), dtype=back or cos.dtype, device=q.device).transpose(1, 2)
        for n in (heads, key_heads)
    )
    if batch * length:
        size = _size(width, turned, max(heads, key_heads))
        groups = triton.cdiv(heads, size["R"]) + triton.cdiv(key_heads, size["R"])
        start(found_for(("rotate", width, turned, heads, key_heads, back), q, k, cos, sin), rotate_kernel, (
            batch * length, groups, 1
        ), (
            q, k, cos, sin, out, key_out, *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
            length, heads, key_heads,
        ), size | {"BACK": back is not None})  # fmt: skip
    return out, key_out


class _Rotation(torch.autograd.Function):
    """The kernel under autograd."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        return turned_by(q, k, cos, sin)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in grads)
        return *turned_by(q, k, *ctx.saved_tensors, back=ctx.dtype), None, None


def rotate_call(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rotate.rotate`; the last strides are 1."""
    if unseen(q, k):
        return turned_by(q, k, cos, sin)
    found: tuple[torch.Tensor, torch.Tensor] = _Rotation.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return found


def _size(width: int, turned: int, heads: int) -> dict[str, int]:
    """Constants and options. Products and sums stay apart: one instruction for both would round once, torch twice."""
    size = rotate_heads(heads, width)
    return {
        "D": width, "P": turned, "BP": triton.next_power_of_2(turned // 2),
        "BR": triton.next_power_of_2(max(1, width - turned)), "R": size["R"], "num_warps": size["num_warps"],
        "enable_fp_fusion": False,
    }  # fmt: skip


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations, for the compile gate."""
    signature = dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr"), "*bf16")
    strides = ("s_qb", "s_qh", "s_qt", "s_kb", "s_kh", "s_kt", "s_cb", "s_ct", "s_sb", "s_st")
    signature |= dict.fromkeys(strides, "i32:16") | dict.fromkeys(("T", "H", "HK"), "i32")
    cases = []
    for width, turned, heads in ((128, 128, 32), (96, 32, 32), (256, 256, 8)):
        size = _size(width, turned, heads)
        options = {name: size.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        for back in (False, True):
            label = f"D {width} P {turned}" + ", backward" * back
            cases.append((rotate_kernel, signature, size | {"BACK": back}, options, label))
    return cases
