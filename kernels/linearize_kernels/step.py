"""One token against the state: decode. Time and bytes do not depend on the number of tokens read.

Shapes: B sequences, S state heads, R query heads per state head, K key heads, W block, F features, V value channels.
"""

from __future__ import annotations

import torch

from .window import bounded


def step_linear(
    state: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, log_decay: torch.Tensor | None, in_place: bool = False
) -> torch.Tensor:
    """S <- exp(g) S + k v^T.

    Args:
        state: [B, S, F, V] float32; changed `in_place` on demand, where no gradients are wanted.
        k: [B, S, F]; v: [B, S, V].
        log_decay: g, [B, S] or [B, S, F]; None: no decay.
    """
    if not in_place:
        return _decayed(state, log_decay) + k.unsqueeze(-1) * v.unsqueeze(-2)
    if log_decay is not None:
        state.mul_(_spread(log_decay.exp()))
    return state.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))


def step_delta(
    state: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, *, log_decay: torch.Tensor | None
) -> torch.Tensor:
    """S <- exp(g) S + beta k (v - k exp(g) S)^T; arguments as `step_linear`, beta [B, S]."""
    state = _decayed(state, log_decay)
    error = v - torch.einsum("bsf,bsfv->bsv", k, state)
    return state + (beta.unsqueeze(-1) * k).unsqueeze(-1) * error.unsqueeze(-2)


def step_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax of one query over the stored keys, unnormalised as in window.py.

    Args:
        q: [B, K, R, D]; k, v: [B, K, M, D]; seen: which of the M stored keys count, [B, M] bool.
        softcap: the bound on the scores, or None.

    Returns:
        numerator [B, K, R, D], denominator [B, K, R, 1], largest score [B, K, R, 1].
    """
    scores = bounded(torch.einsum("bkrd,bkmd->bkrm", q, k) * scale, softcap)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp()
    return torch.einsum("bkrm,bkmd->bkrd", weights, v), weights.sum(dim=-1, keepdim=True), largest


def _decayed(state: torch.Tensor, log_decay: torch.Tensor | None) -> torch.Tensor:
    return state if log_decay is None else state * _spread(log_decay.exp())


def _spread(keep: torch.Tensor) -> torch.Tensor:
    """[B, S] or [B, S, F], shaped to multiply a state."""
    return keep[..., None, None] if keep.ndim == 2 else keep[..., None]
