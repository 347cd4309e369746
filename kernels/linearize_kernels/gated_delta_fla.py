"""The gated delta rule by fla-core (flash-linear-attention), where it is installed and known to be right.

Its kernels take [B, T, H, D] and one state a query head, and search for their configurations at the first call, which
takes minutes.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import torch

HOPPER = 90
WRONG_FROM, RIGHT_FROM = (3, 4, 0), (3, 7, 1)
"""Triton releases between which fla's backward pass under a decay is wrong on Hopper, and refused (fla issue 640)."""


def gated_delta_fla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None, normalise: bool,
    state: torch.Tensor | None, return_state: bool, cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Output [B, H, T, V] and last state, or None; arguments as in `gated_delta.gated_delta`.

    Raises:
        ValueError: fla-core is not installed, or cannot serve these tensors on this card.
    """
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, state))
    reason = _unable(q, k, g, wants_grad)
    if reason is not None:
        raise ValueError(f"backend 'fla' cannot serve this: {reason}")
    heads = q.shape[1]
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    options = {
        "scale": 1.0,
        "initial_state": None if state is None else state.float(),
        "output_final_state": return_state,
        "use_qk_l2norm_in_kernel": normalise,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long(),
    }
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    strength = beta.transpose(1, 2).to(q.dtype)
    if g is None:
        from fla.ops.delta_rule import chunk_delta_rule  # type: ignore[import-not-found]

        out, last = chunk_delta_rule(*rows, strength, **options)
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

        out, last = chunk_gated_delta_rule(*rows, g.float().transpose(1, 2), strength, **options)
    return out.transpose(1, 2), last


def _unable(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor | None, wants_grad: bool) -> str | None:
    """Why fla-core cannot serve, or None."""
    if find_spec("fla") is None:
        return "fla-core is not installed (pip install fla-core)"
    if not q.is_cuda:
        return "the tensors are not on a GPU"
    if q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} query heads share {k.shape[1]} states"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if g is not None and wants_grad and torch.cuda.get_device_capability(q.device)[0] * 10 == HOPPER:
        release = tuple(int(x) for x in version("triton").split("+")[0].split(".")[:3])
        if WRONG_FROM <= release < RIGHT_FROM:
            return f"its gradients under a decay are wrong on Hopper with Triton {version('triton')} (fla issue 640)"
    return None
