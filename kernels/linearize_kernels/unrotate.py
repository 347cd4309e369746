"""Queries and keys as they were before RoPE turned them, for a branch that reads them unturned."""

from __future__ import annotations

import torch

from .backend import pick, placed, unseen


@placed
def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Undo x cos + turn(x) sin, turn(a, b) = (-b, a) of halves; a factor that cos and sin share (YaRN's) goes too.

    Args:
        x: [B, H, T, D], any strides.
        cos, sin: [B or 1, T, P], any float dtype, no gradients; P even, at most D. Channels from P on stay as they are.
        backend: auto, torch or triton. Products are in float32 (float64 for float64 x).

    Returns:
        [B, H, T, D] in x's dtype over memory [B, T, H, D].

    Raises:
        ValueError: shapes that do not belong together, or a backend that cannot serve.
    """
    return _turned(x, cos, sin, None, 1.0, backend)


@placed
def unrotate_and_add(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, own: torch.Tensor, factor: float, *, backend: str = "auto"
) -> torch.Tensor:
    """unrotate(x) + factor * own in one pass, rounded once.

    Args:
        own: [B, H, T, D], any strides and float dtype.

    Other arguments, the result and errors are those of `unrotate`.
    """
    if own.shape != x.shape:
        raise ValueError(f"own {tuple(own.shape)} is not of the shape of x {tuple(x.shape)}")
    return _turned(x, cos, sin, own, factor, backend)


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, own: torch.Tensor | None, factor: float, backend: str
) -> torch.Tensor:
    batch, _, length, width = x.shape
    turned = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[:2] not in ((batch, length), (1, length)) or turned % 2 or turned > width:
        raise ValueError(
            f"x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not belong together"
        )
    if pick(backend, x, cos, sin, own) == "triton":
        from .unrotate_triton import forward, unrotate_op

        x, cos, sin = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, cos, sin))
        own = own if own is None or own.stride(-1) == 1 else own.contiguous()
        run = forward if unseen(x, cos, sin, own) else unrotate_op
        found: torch.Tensor = run(x, cos.detach(), sin.detach(), own, factor)
        return found
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    first, second = x[..., :turned].to(wide).chunk(2, dim=-1)
    back = (x[..., :turned].to(wide) * cos + torch.cat((second, -first), dim=-1) * sin) / (cos.square() + sin.square())
    made = torch.cat((back, x[..., turned:].to(wide)), dim=-1)
    made = made if own is None else made + factor * own.to(wide)
    return made.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
