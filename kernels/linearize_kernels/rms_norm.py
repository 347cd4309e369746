"""RMSNorm of rows in one pass over memory (Zhang and Sennrich, arXiv 1910.07467), rounded where a model's code does."""

from __future__ import annotations

import torch

from .backend import pick, placed

WIDEST = 16384
"""Channels that a program of the kernel holds."""


@placed
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: bool = False,
    late: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) weight.

    Args:
        x: [..., D], float32, float16 or bfloat16. The mean and the quotient are float32.
        weight: [D], x's dtype.
        offset: multiply by 1 + weight (Gemma).
        late: multiply in float32 and round once (Gemma, OLMo 2); else the quotient is rounded first (Llama).
        backend: auto, torch or triton.

    Returns:
        [..., D] in x's dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or a backend that cannot serve.
    """
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not belong together"
        )
    unable = None if x.shape[-1] <= WIDEST else f"rows of {x.shape[-1]} channels are above {WIDEST}"
    if pick(backend, x, weight, unable=unable) == "triton":
        from .rms_norm_triton import rms_norm_call

        return rms_norm_call(x.contiguous(), weight, eps, offset, late)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    if not late:
        return ((1.0 + weight if offset else weight) * rows.to(x.dtype)).contiguous()
    factor = weight.to(wide)
    return ((1.0 + factor if offset else factor) * rows).to(x.dtype).contiguous()
