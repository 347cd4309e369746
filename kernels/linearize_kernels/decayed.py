"""Dot products under a per-channel decay, without ever exponentiating a positive number.

The weight of key j for query i is sum_f q_if k_jf exp(G_if - G_jf), G the running sum of log decays (GLA, arXiv
2312.06635, eq. 4). Factoring it into (q exp G)(k exp -G) overflows in fp32 once a chunk forgets more than e^88. So a
chunk is cut into blocks: keys of earlier blocks are referred to the last token before the query's block, which makes
both exponents at most zero; inside a block every pair has its own exponent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf

BLOCK = 16


def decayed_scores(q: torch.Tensor, k: torch.Tensor, g_cum: torch.Tensor) -> torch.Tensor:
    """Causal decayed scores inside chunks.

    Args:
        q: queries [..., R, C, F], float32; R query heads share one key head.
        k: keys [..., C, F].
        g_cum: inclusive running sum of log decays inside the chunk [..., C, F], non-increasing along C.

    Returns:
        [..., R, C, C]: entry (i, j) is sum_f q_if k_jf exp(g_cum_if - g_cum_jf) for j <= i and 0 above the diagonal.
    """
    length, rows = k.shape[-2], []
    for a in range(0, length, BLOCK):
        b = min(a + BLOCK, length)
        q_own, k_own, g_own = q[..., a:b, :], k[..., a:b, :], g_cum[..., a:b, :]
        parts = [_within(q_own, k_own, g_own)]
        if a:
            last = g_cum[..., a - 1 : a, :]
            reader = q_own * (g_own - last).exp().unsqueeze(-3)
            written = k[..., :a, :] * (last - g_cum[..., :a, :]).exp()
            parts.insert(0, torch.einsum("...rif,...jf->...rij", reader, written))
        rows.append(nnf.pad(torch.cat(parts, dim=-1), (0, length - b)))
    return torch.cat(rows, dim=-2)


def _within(q: torch.Tensor, k: torch.Tensor, g_cum: torch.Tensor) -> torch.Tensor:
    """Scores of one block, an exponent for every pair and channel: [..., R, c, c]."""
    size = k.shape[-2]
    future = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1).unsqueeze(-1)
    difference = g_cum.unsqueeze(-2) - g_cum.unsqueeze(-3)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    decayed = k.unsqueeze(-3) * difference.masked_fill(future, float("-inf")).exp()
    return torch.einsum("...rif,...ijf->...rij", q, decayed)
