"""The definition: every weight of every pair, written out. Quadratic; for tests, audits and weight transfer.

Nothing here is shared with the chunked path but the mask of the window and the bound on its scores, so that each
checks the other.
Shapes: N sequences, S state heads, R query heads per state head, T tokens, F features.
"""

from __future__ import annotations

import torch

from .window import bounded


def linear_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    covered: torch.Tensor,
) -> torch.Tensor:
    """Unnormalised weights of the linear branch.

    Args:
        q: [N, S, R, T, F]; k: [N, S, T, F].
        log_decay: g <= 0, [N, S, T] or [N, S, T, F]; None: no decay.
        beta: write strength of the delta rule [N, S, T]; None: additive.
        covered: which pairs this branch may read, [T, T] bool, causal.

    Returns:
        [N, S, R, T, T]; row i times the values is the branch's output before normalisation.
    """
    weights = pair_weights(q, k, log_decay)
    if beta is None:
        return weights * covered
    # S = sum_j decay k_j u_j with u = (I + A)^-1 beta v: the delta rule is additive in the writes u.
    lower = (beta.unsqueeze(-1) * pair_weights(k.unsqueeze(2), k, log_decay).squeeze(2)).tril(-1)
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    write = torch.linalg.inv(lower + eye) * beta.unsqueeze(-2)
    return (weights * covered) @ write.unsqueeze(2)


def pair_weights(q: torch.Tensor, k: torch.Tensor, log_decay: torch.Tensor | None) -> torch.Tensor:
    """sum_f q_if k_jf exp(G_if - G_jf) for j <= i, else 0: [N, S, R, T, T]."""
    length = k.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=k.device).triu(1)
    if log_decay is None:
        return torch.einsum("nsrif,nsjf->nsrij", q, k).masked_fill(future, 0.0)
    g_cum = log_decay.cumsum(2)
    if log_decay.ndim == 3:
        decay = (g_cum.unsqueeze(-1) - g_cum.unsqueeze(-2)).masked_fill(future, float("-inf")).exp()
        return torch.einsum("nsrif,nsjf->nsrij", q, k) * decay.unsqueeze(2)
    rows = []
    for i in range(length):  # row by row: [T, T, F] at once would be cubic in memory
        decay = (g_cum[:, :, i : i + 1] - g_cum).masked_fill(future[i, :, None], float("-inf")).exp()
        rows.append(torch.einsum("nsrf,nsjf,nsjf->nsrj", q[:, :, :, i], k, decay))
    return torch.stack(rows, dim=3)


def window_weights(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, seen: torch.Tensor, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the pairs in `seen` [T, T], unnormalised.

    Args:
        q: [N, K, R, T, D]; k: [N, K, T, D].
        softcap: the bound on the scores, or None.

    Returns:
        exp(s_ij - max_j s_ij) [N, K, R, T, T], 0 elsewhere, and the largest score of each row [N, K, R, T, 1].
    """
    scores = bounded(torch.einsum("nkrid,nkjd->nkrij", q, k) * scale, softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    largest = scores.amax(dim=-1, keepdim=True)
    return (scores - largest).exp(), largest
