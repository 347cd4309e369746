"""The gated delta rule over chunks, through the WY form.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          o_t = q_t S_t

(DeltaNet, arXiv 2406.06484; gated, 2412.06464, eqs. 8-10.) Inside a chunk every write depends on the ones before it:
u = (I + A)^-1 beta (v - k S), A_ij = beta_i exp(G_i - G_j) k_i.k_j below the diagonal, a triangular solve.
Shapes as in linear.py.
"""

from __future__ import annotations

import torch

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
    states = [torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :]) if state is None else state.to(q.dtype)]
    outputs = []
    for n in range(k_c.shape[2]):
        last = states[-1]
        update = own[:, :, n] - seen[:, :, n] @ last  # what each token really writes, [N, S, C, V]
        if scores is not None:
            inside = torch.einsum("nsrij,nsjv->nsriv", scores[:, :, :, n], update)
            outputs.append(torch.einsum("nsrcf,nsfv->nsrcv", q_read[:, :, :, n], last) + inside)
        states.append(last * g_cum[:, :, n, -1].exp()[..., None, None] + written[:, :, n].mT @ update)
    stacked = torch.stack(states, dim=2)
    if lag:
        return read_lagged(q_c, stacked, g_cum).flatten(3, 4)[:, :, :, :length], stacked
    return torch.stack(outputs, dim=3).flatten(3, 4)[:, :, :, :length], stacked
