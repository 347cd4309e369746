"""The linear branch over chunks: additive memory with any decay. Linear in time and memory.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          o_t = q_t S_t

(arXiv 2006.16236 without decay; 2307.08621 and 2405.21060 for scalar, 2312.06635 for per-channel decay.) A lag of two
chunks makes a query read only the chunks before its own and the previous one: what a block window cannot see.
Shapes: N sequences, S state heads, R query heads per state head, L tokens, C chunk, F features, V value channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf

from .decayed import decayed_scores

GROUP = 32
"""Chunks whose states are made by one product: its cost is quadratic in this."""


def split_chunks(x: torch.Tensor, dim: int, chunk: int) -> torch.Tensor:
    """Zero-pad `dim` to a multiple of `chunk` and split it into (chunks, chunk)."""
    missing = -x.shape[dim] % chunk
    if missing:
        pad = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, missing]
        x = nnf.pad(x, pad)
    return x.unflatten(dim, (-1, chunk))


def chunk_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk: int = 64,
    lag: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive linear attention in chunks.

    Args:
        q: queries [N, S, R, L, F], float32.
        k: keys [N, S, L, F]; zero rows write nothing.
        v: values [N, S, L, V].
        log_decay: g <= 0, [N, S, L] or [N, S, L, F]; None: no decay.
        state: S at index 0, [N, S, F, V] float32; None: zeros.
        chunk: C.
        lag: read the state as it was two chunks ago, and nothing inside the chunk.

    Returns:
        o [N, S, R, L, V], and the states at every chunk boundary [N, S, L/C + 1, F, V] (entry n: before chunk n).
    """
    length = q.shape[3]
    q_c, k_c, v_c = split_chunks(q, 3, chunk), split_chunks(k, 2, chunk), split_chunks(v, 2, chunk)
    g_cum = split_chunks(log_decay, 2, chunk).cumsum(3) if log_decay is not None else None
    written, values = k_c, v_c
    if g_cum is not None:
        kept = (g_cum[:, :, :, -1:] - g_cum).exp()
        written, values = _weighted(k_c, v_c, kept)
    states = scan_chunks(torch.einsum("nsbcf,nsbcv->nsbfv", written, values), g_cum, state)

    if lag:
        out = read_lagged(q_c, states, g_cum)
    else:
        out = _read(q_c, states[:, :, :-1], None if g_cum is None else g_cum.exp())
        out = out + torch.einsum("nsrbij,nsbjv->nsrbiv", chunk_scores(q_c, k_c, g_cum), v_c)
    return out.flatten(3, 4)[:, :, :, :length], states


def chunk_scores(q_c: torch.Tensor, k_c: torch.Tensor, g_cum: torch.Tensor | None) -> torch.Tensor:
    """Causal scores inside each chunk, decayed: [N, S, R, B, C, F] x [N, S, B, C, F] -> [N, S, R, B, C, C]."""
    if g_cum is not None and g_cum.ndim == 5:
        return decayed_scores(q_c.transpose(2, 3), k_c, g_cum).transpose(2, 3)
    scores = torch.einsum("nsrbif,nsbjf->nsrbij", q_c, k_c)
    if g_cum is None:
        return scores.tril()
    return scores * pair_decay(g_cum).unsqueeze(2)


def pair_decay(g_cum: torch.Tensor) -> torch.Tensor:
    """exp(g_cum_i - g_cum_j) for j <= i, else 0: [..., C] -> [..., C, C]."""
    difference = g_cum.unsqueeze(-1) - g_cum.unsqueeze(-2)
    future = torch.ones(difference.shape[-2:], dtype=torch.bool, device=g_cum.device).triu(1)
    # Mask before exp: above the diagonal the difference is positive and may overflow, and inf * 0 is nan.
    return difference.masked_fill(future, float("-inf")).exp()


def scan_chunks(update: torch.Tensor, g_cum: torch.Tensor | None, state: torch.Tensor | None) -> torch.Tensor:
    """States at chunk boundaries [N, S, B + 1, F, V] from each chunk's own update [N, S, B, F, V]."""
    first = torch.zeros_like(update[:, :, 0]) if state is None else state.to(update.dtype)
    if g_cum is None:
        return torch.cat((first.unsqueeze(2), first.unsqueeze(2) + update.cumsum(2)), dim=2)
    last = g_cum[:, :, :, -1]  # [N, S, B] or [N, S, B, F]
    if last.ndim == 3:
        return _scan_groups(update, last, first)
    states = [first]
    # unbind, not indexing: the gradient of an index is a whole tensor of zeros for every chunk.
    for kept, own in zip(last.exp().unbind(2), update.unbind(2), strict=True):
        states.append(states[-1] * kept.unsqueeze(-1) + own)
    return torch.stack(states, dim=2)


def _scan_groups(update: torch.Tensor, log_keep: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The scan under one decay a chunk, log_keep [N, S, B]: a product with the decays of all pairs, group by group.

    S_n = sum_{m < n} exp(g_{m+1} + ... + g_{n-1}) U_m: one matrix product where a loop would take B steps.
    """
    states = [first.unsqueeze(2)]
    for own, log in zip(update.split(GROUP, dim=2), log_keep.split(GROUP, dim=2), strict=True):
        total = log.cumsum(2)
        made = torch.einsum("nsij,nsjfv->nsifv", pair_decay(total), own)
        states.append(made + total.exp()[..., None, None] * states[-1][:, :, -1:])
    return torch.cat(states, dim=2)


def read_lagged(q_c: torch.Tensor, states: torch.Tensor, g_cum: torch.Tensor | None) -> torch.Tensor:
    """Each query reads the state before the previous chunk, decayed from there to itself: [N, S, R, B, C, V]."""
    before_previous = torch.cat((states[:, :, :1], states[:, :, :-2]), dim=2)
    if g_cum is None:
        return _read(q_c, before_previous, None)
    previous = torch.cat((torch.zeros_like(g_cum[:, :, :1, -1:]), g_cum[:, :, :-1, -1:]), dim=2)
    return _read(q_c, before_previous, (g_cum + previous).exp())


def _read(q_c: torch.Tensor, states: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """q S [N, S, R, B, C, V] of chunks' states [N, S, B, F, V], of which tokens see what is `kept`, [..., C (, F)]."""
    if kept is not None and kept.ndim == 5:
        q_c = q_c * kept.unsqueeze(2)
    out = torch.einsum("nsrbcf,nsbfv->nsrbcv", q_c, states)
    return out if kept is None or kept.ndim == 5 else out * kept[:, :, None, ..., None]


def _weighted(k_c: torch.Tensor, v_c: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of which one is weighted: by channel the keys, else the values, of which there are fewer."""
    return (k_c * kept, v_c) if kept.ndim == 5 else (k_c, v_c * kept.unsqueeze(-1))
