"""The gated delta rule over chunks, through the WY form.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          o_t = q_t S_t

(DeltaNet, arXiv 2406.06484; gated, 2412.06464, eqs. 8-10.) Inside a chunk every write depends on the ones before it:
u = (I + A)^-1 beta (v - k S), A_ij = beta_i exp(G_i - G_j) k_i.k_j below the diagonal, a triangular solve.
Shapes as in linear.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .linear import chunk_scores, pair_decay, read_lagged, split_chunks


def chunk_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk: int = 64,
    lag: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Delta rule in chunks.

    Args:
        q: queries [N, S, R, L, F], float32.
        k: keys of length one (or zero: nothing is written) [N, S, L, F].
        v: values [N, S, L, V].
        beta: write strength [N, S, L], in [0, 1] or [0, 2].
        log_decay: g <= 0, [N, S, L]; None: no decay.
        state: S at index 0, [N, S, F, V] float32; None: zeros.
        chunk: C.
        lag: read the state as it was two chunks ago, and nothing inside the chunk.

    Returns:
        o [N, S, R, L, V], and the states at every chunk boundary [N, S, L/C + 1, F, V].
    """
    length = q.shape[3]
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    q_c, k_c, v_c = split_chunks(q, 3, chunk), split_chunks(k, 2, chunk), split_chunks(v, 2, chunk)
    beta_c = split_chunks(beta, 2, chunk).unsqueeze(-1)
    g_cum = split_chunks(log_decay, 2, chunk).cumsum(3)

    decay = pair_decay(g_cum)
    lower = (beta_c * torch.einsum("nsbif,nsbjf->nsbij", k_c, k_c) * decay).tril(-1)
    system = lower + torch.eye(chunk, dtype=q.dtype, device=q.device)
    right = torch.cat((beta_c * v_c, beta_c * k_c * g_cum.exp().unsqueeze(-1)), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, seen = solved.split((v.shape[-1], k.shape[-1]), dim=-1)

    written = k_c * (g_cum[:, :, :, -1:] - g_cum).exp().unsqueeze(-1)
    q_read = q_c * g_cum.exp()[:, :, None, :, :, None]
    scores = None if lag else chunk_scores(q_c, k_c, g_cum)
    first = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.to(q.dtype)
    states, update = scan_delta(own, seen, written, g_cum[..., -1].exp(), first)
    if scores is None:
        return read_lagged(q_c, states, g_cum).flatten(3, 4)[:, :, :, :length], states
    out = torch.einsum("nsrbcf,nsbfv->nsrbcv", q_read, states[:, :, :-1])
    out = out + torch.einsum("nsrbij,nsbjv->nsrbiv", scores, update)
    return out.flatten(3, 4)[:, :, :, :length], states


def scan_delta(
    own: torch.Tensor, seen: torch.Tensor, written: torch.Tensor, keep: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequential part: u_n = own_n - seen_n S_n, S_{n+1} = keep_n S_n + written_n^T u_n.

    Args:
        own: [N, S, B, C, V]; seen, written: [N, S, B, C, F]; keep: [N, S, B]; state: S_0 [N, S, F, V].

    Returns:
        states [N, S, B + 1, F, V] and updates u [N, S, B, C, V], differentiable once.
    """
    states, update = _ScanDelta.apply(*(_chunks_first(x) for x in (own, seen, written, keep)), state.flatten(0, 1))
    heads = own.shape[:2]
    return tuple(x.unflatten(1, heads).movedim(0, 2) for x in (states, update))  # type: ignore[return-value]


def _chunks_first(x: torch.Tensor) -> torch.Tensor:
    """[N, S, B, ...] -> [B, N S, ...], so that a chunk is one batch of matrices."""
    return x.flatten(0, 1).transpose(0, 1).contiguous()


class _ScanDelta(torch.autograd.Function):
    """The recurrence with its own backward: a few batched products a chunk, where autograd would record dozens."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, seen: torch.Tensor, written: torch.Tensor, keep: torch.Tensor,
                state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        states, update = state.new_empty(len(own) + 1, *state.shape), torch.empty_like(own)
        states[0] = state
        factor = keep[..., None, None]
        for n in range(len(own)):
            torch.baddbmm(own[n], seen[n], states[n], alpha=-1, out=update[n])
            torch.baddbmm(states[n] * factor[n], written[n].mT, update[n], out=states[n + 1])
        ctx.save_for_backward(seen, written, keep, states, update)
        return states, update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: torch.Tensor, d_update: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        seen, written, keep, states, update = ctx.saved_tensors
        later = torch.empty_like(states)  # gradient of the state after each chunk; at index 0, of the first state
        later[-1] = d_states[-1]
        d_own = torch.empty_like(update)
        factor = keep[..., None, None]
        for n in reversed(range(len(update))):
            torch.baddbmm(d_update[n], written[n], later[n + 1], out=d_own[n])
            kept = torch.addcmul(d_states[n], factor[n], later[n + 1])
            torch.baddbmm(kept, seen[n].mT, d_own[n], alpha=-1, out=later[n])
        d_seen = -(d_own @ states[:-1].mT)
        d_written = update @ later[1:].mT
        d_keep = (states[:-1] * later[1:]).sum((-2, -1))
        return d_own, d_seen, d_written, d_keep, later[0]
