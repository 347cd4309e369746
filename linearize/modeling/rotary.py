"""RoPE on vectors that the mixer makes or unmakes itself; the teacher's own are rotated by its own code.

Heads may be rotated in part: tables of P < D channels turn the first P, and the others stay as they are.
"""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on [N, H, L, D], cos and sin [N or 1, L, P]."""
    turned, rest = _parts(x, cos)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return _joined(turned * cos + _turn(turned) * sin, rest)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo RoPE on [N, H, L, D], cos and sin [N or 1, L, P]; their common factor (YaRN's) is divided out."""
    turned, rest = _parts(x, cos)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return _joined((turned * cos - _turn(turned) * sin) / (cos.square() + sin.square()), rest)


def _turn(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _parts(x: torch.Tensor, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = cos.shape[-1]
    return (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])


def _joined(turned: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
    return turned if rest is None else torch.cat((turned, rest), dim=-1)
