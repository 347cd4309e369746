"""RoPE on queries and keys (Su et al., arXiv 2104.09864) in one pass over memory, rounded where a model's code does."""

from __future__ import annotations

import torch

from .backend import pick, placed


@placed
def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """x cos + turn(x) sin, turn(a, b) = (-b, a) of halves, for q and for k; the tables get no gradient.

    Each of the three operations rounds to the output's dtype, as they do one by one in torch.

    Args:
        q: [B, H, T, D]; k: [B, K, T, D], of one dtype; any strides.
        cos, sin: [B or 1, T, P], q's dtype or float32; P even, at most D. Channels from P on stay as they are.
        backend: auto, torch or triton.

    Returns:
        q and k rotated, in their shapes and the tables' dtype, over memory [B, T, H or K, D].

    Raises:
        ValueError: shapes or dtypes that do not belong together, or a backend that cannot serve.
    """
    batch, _, length, width = q.shape
    turned = cos.shape[-1]
    if (
        k.shape[0] != batch or k.shape[2:] != q.shape[2:] or cos.shape != sin.shape
        or cos.shape[:-1] not in ((batch, length), (1, length)) or turned % 2 or not 0 < turned <= width
        or k.dtype != q.dtype or sin.dtype != cos.dtype or cos.dtype not in (q.dtype, torch.float32)
        or torch.promote_types(q.dtype, cos.dtype) != cos.dtype
    ):  # fmt: skip
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, cos {tuple(cos.shape)} {cos.dtype} and sin "
            f"{tuple(sin.shape)} {sin.dtype} do not belong together"
        )
    cos, sin = cos.detach(), sin.detach()
    if pick(backend, q, k, cos, sin) == "triton":
        from .rotate_triton import rotate_call

        return rotate_call(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin)))
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = part.chunk(2, dim=-1)
    made = part * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return torch.cat((made, rest), dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
