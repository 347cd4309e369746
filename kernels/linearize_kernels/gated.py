"""Gated linear attention: additive memory with any decay, read by every query.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale q_t S_t, or with a denominator q_t S_t / q_t z_t

where z is the same sum with 1 in place of v (arXiv 2006.16236 without decay; 2307.08621 and 2405.21060 for scalar,
2312.06635 for per-channel decay). The definition is `chunk_linear`, in torch; fused kernels serve on a GPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as nnf

from .backend import Call, decay_kind, pick, placed, unseen, untrusted
from .linear import chunk_linear

NORMALISERS = ("none", "own")
TINY = 1e-30
"""Least denominator."""
CHUNK = 64
LARGEST = 256
"""Value channels that one program of the kernels holds."""
LAGS = (16, 32, 64, 128)
"""Blocks whose lag the kernels serve."""


@placed
def gated_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    normaliser: str = "none",
    state: torch.Tensor | None = None,
    return_state: bool = False,
    lag: bool = False,
    chunk: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Additive linear attention over whole sequences; gradients for q, k, v, log_decay and state.

    Args:
        q: features of queries [B, H, T, F], any strides.
        k: features of keys [B, S, T, F]; zero rows write nothing. Query head h reads state head h // (H / S).
        v: values [B, K, T, V]; state head s writes those of key-value head s // (S / K).
        log_decay: g <= 0: None, fixed [S], a number a token [B, S, T], or one a channel [B, S, T, F]. Kept in float32.
        scale: factor of the output; without effect under normaliser "own".
        normaliser: none, or own: divide by the decayed sum of q k (at least 1e-30).
        state: S before the first token, float32 [N, S, F, V]; under "own" [N, S, F, V + 1], z the last column. N is B,
            or the number of packed sequences. None: zeros.
        return_state: also return the state after the last token.
        lag: read only the blocks before the previous one: what a block window cannot see.
        chunk: tokens of such a block; without `lag` it only sizes the work.
        cu_seqlens: where packed sequences begin and end [N + 1]; then B is 1.
        backend: auto, torch or triton.

    Returns:
        o [B, H, T, V] in v's dtype, and if asked for the state, float32.

    Raises:
        ValueError: shapes that do not belong together, an unknown name, or a backend that cannot serve.
    """
    _check(q, k, v, log_decay, normaliser, state, cu_seqlens)
    norm = normaliser == "own"
    given = (q, k, v, log_decay, state)
    size = Call(features=q.shape[3], values=v.shape[3], decay=decay_kind(log_decay))
    unable = _unable(q, k, v, lag, chunk) or untrusted("gated_linear", size, *given)
    if pick(backend, *given, unable=unable) == "triton":
        from .gated_triton import forward, gated_linear_op

        q, k, v = (_rows(x) for x in (q, k, v))
        g = None if log_decay is None else _rows(log_decay.float())
        first = None if state is None else state.float().contiguous()
        run = forward if unseen(q, k, v, g, first, cu_seqlens) else gated_linear_op
        out, _, last, _ = run(q, k, v, g, first, cu_seqlens, float(scale), norm, chunk if lag else 0, return_state)
    elif cu_seqlens is None:
        out, last = _torch(q, k, v, log_decay, float(scale), norm, state, lag, chunk)
    else:
        out, last = _torch_packed(q, k, v, log_decay, float(scale), norm, state, lag, chunk, cu_seqlens)
    return (out, last) if return_state else out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension side by side, which is all that the kernels ask of strides."""
    return x if x.stride(-1) == 1 or x.ndim < 4 else x.contiguous()


def _torch(q, k, v, g, scale, norm, state, lag, chunk):  # type: ignore[no-untyped-def]
    """The definition, in float32 or float64."""
    heads, dtype = k.shape[1], v.dtype
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    g = None if g is None else g.to(q.dtype)
    if g is not None and g.ndim == 1:
        g = g[:, None].expand(q.shape[0], -1, q.shape[2])
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    values = nnf.pad(v, (0, 1), value=1.0) if norm else v
    out, states = chunk_linear(q.unflatten(1, (heads, -1)), k, values, log_decay=g, state=state, chunk=chunk, lag=lag)
    out = out.flatten(1, 2)
    if norm:
        out = out[..., :-1] * scale / (out[..., -1:] * scale).clamp_min(TINY)
    else:
        out = out * scale
    return out.to(dtype), states[:, :, -1]


def _torch_packed(q, k, v, g, scale, norm, state, lag, chunk, cu_seqlens):  # type: ignore[no-untyped-def]
    """The definition for every packed sequence alone."""
    bounds = cu_seqlens.tolist()
    outs, lasts = [], []
    for i, (a, b) in enumerate(pairwise(bounds)):
        own_g = g if g is None or g.ndim == 1 else g[:, :, a:b]
        first = None if state is None else state[i : i + 1]
        out, last = _torch(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], own_g, scale, norm, first, lag, chunk)
        outs.append(out)
        lasts.append(last)
    return torch.cat(outs, dim=2), torch.cat(lasts)


def _unable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lag: bool, chunk: int) -> str | None:
    """Why the kernels cannot serve, or None."""
    if lag and chunk not in LAGS:
        return f"a lag needs blocks of {', '.join(map(str, LAGS))} tokens, not {chunk}"
    if v.shape[3] > LARGEST:
        return f"values have {v.shape[3]} channels, more than {LARGEST}"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"q, k and v differ in dtype ({q.dtype}, {k.dtype}, {v.dtype})"
    if q.shape[2] == 0:
        return "there are no tokens"
    return None


def _check(q, k, v, g, normaliser, state, cu_seqlens) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError, with the shapes, where the arguments do not belong together."""
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser {normaliser!r} is not one of {', '.join(NORMALISERS)}")
    batch, heads, length, features = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:] or v.shape[0] != batch or v.shape[2] != length:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    state_heads, kv_heads = k.shape[1], v.shape[1]
    if heads % state_heads or state_heads % kv_heads:
        raise ValueError(f"{heads} query heads, {state_heads} state heads, {kv_heads} value heads: no whole ratios")
    shapes = [(state_heads,), (batch, state_heads, length), (batch, state_heads, length, features)]
    if g is not None and tuple(g.shape) not in shapes:
        raise ValueError(f"log_decay {tuple(g.shape)} is none of {', '.join(map(str, shapes))}")
    if cu_seqlens is not None and (batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} needs [N + 1] bounds and a batch of 1, not {batch}")
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    right = (sequences, state_heads, features, v.shape[3] + (normaliser == "own"))
    if state is not None and tuple(state.shape) != right:
        raise ValueError(f"state {tuple(state.shape)} is not {right}")
