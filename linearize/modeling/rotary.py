"""RoPE on vectors that the mixer makes or unmakes itself; the teacher's own are rotated by its own code."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on [N, H, L, D], cos and sin [N or 1, L, D]."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo RoPE on [N, H, L, D], cos and sin [N or 1, L, D]; their common factor (YaRN's) is divided out."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos - torch.cat((-second, first), dim=-1) * sin) / (cos.square() + sin.square())
