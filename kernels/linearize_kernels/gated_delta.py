"""The gated delta rule: a memory that replaces what a key held before it writes, read by every query.

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - e^{g_t} S_{t-1}^T k_t)^T          o_t = S_t^T q_t

(DeltaNet, arXiv 2406.06484; gated, 2412.06464.) The definition is `chunk_delta`, in torch; own kernels serve on a GPU,
and fla-core's, where it is installed, by name.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as nnf

from .backend import Call, decay_kind, pick, placed, unseen, untrusted
from .delta import chunk_delta

CHUNK = 64
EPS = 1e-6
"""Least length that queries and keys are divided by under `normalise`."""
LARGEST = 256
"""Features that one program of the kernels holds."""


@placed
def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    normalise: bool = False,
    state: torch.Tensor | None = None,
    return_state: bool = False,
    lag: bool = False,
    chunk: int = CHUNK,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Gated delta rule over whole sequences; gradients for q, k, v, beta, log_decay and state.

    Args:
        q: queries [B, H, T, F], any strides.
        k: keys of length one, or zero, [B, S, T, F]. Query head h reads state head h // (H / S).
        v: values [B, K, T, V]; state head s writes those of value head s // (S / K).
        beta: write strength [B, S, T], in [0, 1] or [0, 2]. Kept in float32.
        log_decay: g <= 0: None, fixed [S], or a number a token [B, S, T]. Kept in float32.
        normalise: divide every query and key by its length (at least 1e-6) first.
        state: S before the first token, float32 [N, S, F, V]; N is B, or the number of packed sequences. None: zeros.
        return_state: also return the state after the last token; under `lag`, the one to go on from: before the block
            that comes before the next token's.
        lag: read only the blocks before the previous one: what a block window cannot see.
        chunk: tokens of such a block; without `lag` it only sizes the work in torch.
        lengths: real tokens of every row [B], which come first; the rest write nothing and forget nothing.
        cu_seqlens: where packed sequences begin and end [N + 1]; then B is 1.
        backend: auto, torch, triton or fla (fla-core, which knows neither lag nor lengths).

    Returns:
        o [B, H, T, V] in v's dtype, and if asked for the state, float32.

    Raises:
        ValueError: shapes that do not belong together, an unknown name, or a backend that cannot serve.
    """
    _check(q, k, v, beta, log_decay, state, lengths, cu_seqlens)
    g = log_decay
    if g is not None and g.ndim == 1:
        g = g[:, None].expand(*beta.shape)
    if lengths is not None:
        real = torch.arange(q.shape[2], device=q.device) < lengths[:, None, None]
        beta = torch.where(real, beta, 0.0)
        g = None if g is None else torch.where(real, g, 0.0)
    given = (q, k, v, beta, g, state)
    size = Call(features=q.shape[3], values=v.shape[3], decay=decay_kind(g))
    unable = _unable(q, k, v, lag, chunk) or untrusted("gated_delta", size, *given)
    if backend == "fla":
        from .gated_delta_fla import gated_delta_fla

        if lag or lengths is not None:
            raise ValueError("backend 'fla' cannot serve this: it knows neither lag nor lengths")
        out, last = gated_delta_fla(q, k, v, beta, g, normalise, state, return_state, cu_seqlens)
    elif pick(backend, *given, unable=unable) == "triton":
        out, last = _fused(q, k, v, beta, g, normalise, state, return_state, lag, chunk, lengths, cu_seqlens)
    elif cu_seqlens is None:
        out, last = _torch(q, k, v, beta, g, normalise, state, lag, chunk, lengths)
    else:
        out, last = _torch_packed(q, k, v, beta, g, normalise, state, lag, chunk, cu_seqlens)
    if not return_state:
        return out
    assert last is not None
    return out, last


def _fused(q, k, v, beta, g, normalise, state, return_state, lag, block, lengths, cu_seqlens):  # type: ignore[no-untyped-def]
    from .gated_delta_ops import forward, gated_delta_op
    from .tuning import capability, gated_delta_chunk

    chunk = gated_delta_chunk(capability(q.device), q.shape[3], q.dtype)
    stops = None
    if lag:
        while block % chunk:
            chunk //= 2
        if return_state:
            counted = cu_seqlens.diff() if cu_seqlens is not None else lengths
            if counted is None:
                counted = torch.full((q.shape[0],), q.shape[2], device=q.device)
            stops = (_gone(counted, block) * (block // chunk)).to(torch.int32)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    first = None if state is None else state.float().contiguous()
    g = None if g is None else g.float()
    run = forward if unseen(q, k, v, beta, g, first, cu_seqlens) else gated_delta_op
    out, last, *_ = run(
        q, k, v, beta.float(), g, first, cu_seqlens, stops, normalise, chunk, block if lag else 0, return_state
    )
    return out, last


def _gone(tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Blocks that the token after `tokens` cannot see through a block window."""
    return (tokens // block - 1).clamp_min(0)


def _torch(q, k, v, beta, g, normalise, state, lag, chunk, lengths):  # type: ignore[no-untyped-def]
    """The definition, in float32 or float64."""
    heads, dtype = k.shape[1], v.dtype
    q, k, v, beta = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v, beta))
    g = None if g is None else g.to(q.dtype)
    if normalise:
        q, k = (nnf.normalize(x, dim=-1, eps=EPS) for x in (q, k))
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    out, states = chunk_delta(
        q.unflatten(1, (heads, -1)), k, v, beta, log_decay=g, state=state, chunk=chunk, lag=lag
    )  # fmt: skip
    if lag:
        counted = torch.full((len(q),), q.shape[2], device=q.device) if lengths is None else lengths
        last = states[torch.arange(len(q), device=q.device), :, _gone(counted, chunk)]
    else:
        last = states[:, :, -1]
    return out.flatten(1, 2).to(dtype), last


def _torch_packed(q, k, v, beta, g, normalise, state, lag, chunk, cu_seqlens):  # type: ignore[no-untyped-def]
    """The definition for every packed sequence alone."""
    bounds = cu_seqlens.tolist()
    outs, lasts = [], []
    for i, (a, b) in enumerate(pairwise(bounds)):
        own_g = None if g is None else g[:, :, a:b]
        first = None if state is None else state[i : i + 1]
        own_q, own_k, own_v, own_beta = (x[:, :, a:b] for x in (q, k, v, beta))
        out, last = _torch(own_q, own_k, own_v, own_beta, own_g, normalise, first, lag, chunk, None)
        outs.append(out)
        lasts.append(last)
    return torch.cat(outs, dim=2), torch.cat(lasts)


def _unable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lag: bool, chunk: int) -> str | None:
    """Why the kernels cannot serve, or None."""
    if lag and chunk % 16:
        return f"a lag needs blocks of a multiple of 16 tokens, not {chunk}"
    if q.shape[3] > LARGEST:
        return f"queries have {q.shape[3]} features, more than {LARGEST}"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"q, k and v differ in dtype ({q.dtype}, {k.dtype}, {v.dtype})"
    if q.numel() == 0 or v.numel() == 0:
        return "there are no tokens"
    return None


def _check(q, k, v, beta, g, state, lengths, cu_seqlens) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError, with the shapes, where the arguments do not belong together."""
    batch, heads, length, features = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:] or v.shape[0] != batch or v.shape[2] != length:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    state_heads, value_heads = k.shape[1], v.shape[1]
    if heads % state_heads or state_heads % value_heads:
        raise ValueError(f"{heads} query heads, {state_heads} state heads, {value_heads} value heads: no whole ratios")
    per_token = (batch, state_heads, length)
    if tuple(beta.shape) != per_token:
        raise ValueError(f"beta {tuple(beta.shape)} is not {per_token}")
    if g is not None and tuple(g.shape) not in ((state_heads,), per_token):
        raise ValueError(f"log_decay {tuple(g.shape)} is neither {(state_heads,)} nor {per_token}")
    if lengths is not None and (cu_seqlens is not None or tuple(lengths.shape) != (batch,)):
        raise ValueError(f"lengths {tuple(lengths.shape)} needs one number a row ({batch}), and no cu_seqlens")
    if cu_seqlens is not None and (batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} needs [N + 1] bounds and a batch of 1, not {batch}")
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    right = (sequences, state_heads, features, v.shape[3])
    if state is not None and tuple(state.shape) != right:
        raise ValueError(f"state {tuple(state.shape)} is not {right}")
