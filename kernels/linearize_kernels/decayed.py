"""Dot products under a per-channel decay, without ever exponentiating a positive number.

The weight of key j for query i is sum_f q_if k_jf exp(G_if - G_jf), G the running sum of log decays (GLA, arXiv
2312.06635, eq. 4). Factoring it into (q exp G)(k exp -G) overflows in fp32 once a chunk forgets more than e^88. Here a
chunk is halved again and again: a pair on either side of a midpoint is referred to that midpoint, so that both
exponents are at most zero, and every pair is split by exactly one midpoint.
"""

from __future__ import annotations

import torch


def decayed_scores(q: torch.Tensor, k: torch.Tensor, g_cum: torch.Tensor) -> torch.Tensor:
    """Causal decayed scores inside chunks.

    Args:
        q: queries [..., R, C, F], float32; R query heads share one key head.
        k: keys [..., C, F].
        g_cum: inclusive running sum of log decays inside the chunk [..., C, F], non-increasing along C.

    Returns:
        [..., R, C, C]: entry (i, j) is sum_f q_if k_jf exp(g_cum_if - g_cum_jf) for j <= i and 0 above the diagonal.
        C must be a power of two.
    """
    length = k.shape[-2]
    scores = torch.diag_embed(torch.einsum("...rcf,...cf->...rc", q, k))
    half = 1
    while half < length:
        pairs = length // (2 * half)
        q_right = q.unflatten(-2, (pairs, 2, half))[..., 1, :, :]  # [..., R, P, h, F]
        k_left = k.unflatten(-2, (pairs, 2, half))[..., 0, :, :]  # [..., P, h, F]
        g_split = g_cum.unflatten(-2, (pairs, 2, half))
        middle = g_split[..., 0, -1:, :]  # the log decay at the last key of the left half
        q_right = q_right * (g_split[..., 1, :, :] - middle).exp().unsqueeze(-4)
        k_left = k_left * (middle - g_split[..., 0, :, :]).exp()
        block = torch.einsum("...rpif,...pjf->...rpij", q_right, k_left)
        block = torch.diag_embed(block.movedim(-3, -1)).movedim((-2, -4, -1, -3), (-4, -3, -2, -1))
        place = torch.zeros_like(scores).unflatten(-2, (pairs, 2, half)).unflatten(-1, (pairs, 2, half))
        place[..., 1, :, :, 0, :] = block  # [..., R, P, h, P, h], zero off the diagonal of P
        scores = scores + place.flatten(-3, -1).flatten(-4, -2)
        half *= 2
    return scores
