"""The softmax window: a query in block b of W tokens sees its own block, the one before, and the first `sinks` tokens.

Blocks are counted from the start of the sequence, so what a token sees never depends on what comes after it.
Numerator and denominator are returned apart, relative to the row's largest score, because LoLCATs (arXiv 2410.10254,
eq. 7) shares the denominator with the linear branch; the largest score comes with them, so that the window's mass is
known.
Shapes: N sequences, K key heads, R query heads per key head, L tokens, W block, D channels.
"""

from __future__ import annotations

import torch

from .linear import split_chunks


def block_window_mask(length: int, window: int, sinks: int, device: torch.device | None = None) -> torch.Tensor:
    """The definition: [T, T] bool, True where query i attends key j by softmax."""
    i = torch.arange(length, device=device).unsqueeze(1)
    j = torch.arange(length, device=device).unsqueeze(0)
    return (j <= i) & ((i // window - j // window <= 1) | (j < sinks))


def bounded(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """c tanh(s / c), a bound on attention scores (Gemma 2, arXiv 2408.00118, 2.3); None: the scores as they are."""
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def chunk_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    scale: float,
    softcap: float | None = None,
    sink_k: torch.Tensor | None = None,
    sink_v: torch.Tensor | None = None,
    first_block: torch.Tensor | int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block-window softmax attention, unnormalised; linear in time and memory.

    Args:
        q: queries [N, K, R, L, D], float32; index 0 is the start of a block.
        k, v: keys and values [N, K, L, D].
        window: W.
        scale: factor of the scores, usually D^-0.5.
        softcap: c, the bound on the scores, or None.
        sink_k, sink_v: the first tokens of each sequence [N, K, Z, D], or None.
        first_block: number of the block at index 0, an int or [N].

    Returns:
        numerator [N, K, R, L, D] and denominator [N, K, R, L, 1], both relative to exp(the row's largest score), and
        that score [N, K, R, L, 1]. Nothing is seen before index 0 but the sinks.
    """
    length = q.shape[3]
    q_b, k_b, v_b = split_chunks(q, 3, window), split_chunks(k, 2, window), split_chunks(v, 2, window)
    blocks = k_b.shape[2]
    k_pair, v_pair = (torch.cat((_previous(x), x), dim=3) for x in (k_b, v_b))  # [N, K, B, 2W, D]
    scores = bounded(torch.einsum("nkrbid,nkbjd->nkrbij", q_b, k_pair) * scale, softcap)

    i = torch.arange(window, device=q.device).unsqueeze(1)
    j = torch.arange(2 * window, device=q.device).unsqueeze(0) - window
    seen = (j <= i).expand(blocks, window, 2 * window).clone()
    seen[0, :, :window] = False
    scores = scores.masked_fill(~seen, float("-inf"))

    if sink_k is not None and sink_v is not None:
        sink_scores = bounded(torch.einsum("nkrbid,nkzd->nkrbiz", q_b, sink_k) * scale, softcap)
        first = first_block.reshape(-1, 1, 1) if isinstance(first_block, torch.Tensor) else first_block
        block = first + torch.arange(blocks, device=q.device).reshape(1, -1, 1)
        sink_block = torch.arange(sink_k.shape[2], device=q.device).reshape(1, 1, -1) // window
        apart = sink_block < block - 1  # the others are in the window already
        scores = torch.cat((scores, sink_scores.masked_fill(~apart[:, None, None, :, None], float("-inf"))), dim=-1)

    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp()
    denominator = weights.sum(dim=-1, keepdim=True)
    pair, rest = weights.split((2 * window, weights.shape[-1] - 2 * window), dim=-1)
    numerator = torch.einsum("nkrbij,nkbjd->nkrbid", pair, v_pair)
    if sink_v is not None:
        numerator = numerator + torch.einsum("nkrbiz,nkzd->nkrbid", rest, sink_v)
    return tuple(x.flatten(3, 4)[:, :, :, :length] for x in (numerator, denominator, largest))  # type: ignore[return-value]


def _previous(blocks: torch.Tensor) -> torch.Tensor:
    """Each block's predecessor; zeros before the first."""
    return torch.cat((torch.zeros_like(blocks[:, :, :1]), blocks[:, :, :-1]), dim=2)
