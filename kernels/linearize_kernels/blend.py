"""Two branches weighted by a share for every token and head: o = a near + (1 - a) far."""

from __future__ import annotations

import torch

from .backend import pick, placed, unseen


@placed
def blend(near: torch.Tensor, far: torch.Tensor, share: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """a near + (1 - a) far; gradients for all three.

    Args:
        near, far: [B, H, T, D], one dtype, any strides.
        share: a [B, H, T], float32 (float64 with it), any strides.
        backend: auto, torch or triton.

    Returns:
        [B, H, T, D] over memory [B, T, H, D].

    Raises:
        ValueError: shapes or dtypes that do not belong together, or a backend that cannot serve.
    """
    if near.shape != far.shape or share.shape != near.shape[:3] or near.dtype != far.dtype:
        raise ValueError(
            f"near {tuple(near.shape)} {near.dtype}, far {tuple(far.shape)} {far.dtype} and share "
            f"{tuple(share.shape)} do not belong together"
        )
    if pick(backend, near, far, share) == "triton":
        from .blend_triton import blend_op, forward

        near, far = (x if x.stride(-1) == 1 else x.contiguous() for x in (near, far))
        blended: torch.Tensor = (forward if unseen(near, far, share) else blend_op)(near, far, share.float())
        return blended
    precise = torch.promote_types(near.dtype, torch.float32)
    a = share.to(precise).unsqueeze(-1)
    mixed = a * near.to(precise) + (1 - a) * far.to(precise)
    return mixed.to(near.dtype).transpose(1, 2).contiguous().transpose(1, 2)
