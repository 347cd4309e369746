"""Gated linear attention from queries and keys as they are: the feature map belongs to the op.

    phi(q)_t = features of q_t W_h + b_h        o, S and z as in gated.py, with phi(q) and phi(k)

Where the kernels serve, features are held for a slice of the call at a time, and made again for the backward pass; else
they are made in torch, for `gated_linear`.
"""

from __future__ import annotations

import torch

from .backend import Call, decay_kind, pick, placed, unseen, untrusted
from .gated import CHUNK, LARGEST, _rows, gated_linear

WIDEST = 128
"""Channels of a query that the kernels hold beside a tile of features."""
BEYOND_FLOAT16 = {"hedgehog_exp": "e^15", "hedgehog_softmax": "1e-12", "learned_softmax": "1e-12"}
"""Maps whose features float16 cannot hold, and one that it cannot."""
FLOORS = {"hedgehog_softmax": 1e-12, "learned_softmax": 1e-12, "relu": 1e-6}
EXP_LIMIT = 15.0
MAPS = ("hedgehog_exp", "hedgehog_softmax", "learned_softmax", "relu", "crelu", "linear")


def map_features(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> torch.Tensor:
    """phi(x W + b): x [B, H or a divisor of it, T, D], weight [H, D, f], bias [H, f] -> [B, H, T, F], F = f or 2 f.

    hedgehog_exp, hedgehog_softmax: arXiv 2402.04347, 2410.10254, learned_softmax: the latter of one sign; relu: T2R,
    2103.13076; crelu: 1603.05201.
    """
    x = x.repeat_interleave(weight.shape[0] // x.shape[1], dim=1)
    y = torch.einsum("bhtd,hdf->bhtf", x, weight.to(x.dtype))
    y = y if bias is None else y + bias.to(x.dtype)[:, None]
    if name == "linear":
        return y
    if name == "relu":
        return y.relu().clamp_min(FLOORS[name])
    if name == "learned_softmax":
        return y.softmax(-1).clamp_min(FLOORS[name])
    if name == "crelu":
        return torch.cat((y.relu(), (-y).relu()), dim=-1)
    if name == "hedgehog_softmax":
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1).clamp_min(FLOORS[name])
    y = y.clamp(-EXP_LIMIT, EXP_LIMIT)
    return torch.cat((y.exp(), (-y).exp()), dim=-1)


@placed
def mapped_gated_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor,
    k_bias: torch.Tensor | None,
    *,
    map: str = "hedgehog_exp",
    scale: float = 1.0,
    normaliser: str = "none",
    state: torch.Tensor | None = None,
    return_state: bool = False,
    lag: bool = False,
    chunk: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`gated_linear` of phi(q) and phi(k); gradients also for the maps' weights and biases.

    Args:
        q: [B, H, T, D]; k: [B, K, T, D]; v: [B, K, T, V], any strides.
        log_decay: as in `gated_linear`; None, [S], [B, S, T] or [B, S, T, F].
        q_weight: [H, D, f], q_bias: [H, f] or None; k_weight: [S, D, f], k_bias: [S, f] or None (as q's). Any float
            dtype; multiplied in q's. State head s maps the keys of head s // (S / K).
        map: hedgehog_exp, hedgehog_softmax, crelu (F = 2 f), learned_softmax, relu or linear (F = f).

    Other arguments, the result and errors are those of `gated_linear`.
    """
    if map not in MAPS:
        raise ValueError(f"map {map!r} is not one of {', '.join(MAPS)}")
    if (q_bias is None) != (k_bias is None):
        raise ValueError("q and k both have a bias in their maps, or neither has")
    for name, x, w in (("q", q, q_weight), ("k", k, k_weight)):
        if w.ndim != 3 or w.shape[0] % x.shape[1] or w.shape[1] != x.shape[3]:
            raise ValueError(f"{name}_weight {tuple(w.shape)} does not map {name} {tuple(x.shape)}")
    given = (q, k, v, log_decay, state)
    signs = 2 if map in ("hedgehog_exp", "hedgehog_softmax", "crelu") else 1
    size = Call(features=signs * q_weight.shape[2], values=v.shape[3], decay=decay_kind(log_decay))
    unable = _unable(q, k, v, log_decay, map, lag)
    unable = unable or untrusted("mapped_gated_linear", size, *given, q_weight, q_bias, k_weight, k_bias)
    if pick(backend, *given, unable=unable) == "torch":
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        fq = map_features(q.to(wide), q_weight, q_bias, map)
        fk = map_features(k.to(wide), k_weight, k_bias, map)
        inner = "torch" if backend == "torch" else "auto"
        if q.is_cuda and inner == "auto" and not (map in BEYOND_FLOAT16 and v.dtype == torch.float16):
            fq, fk = fq.to(v.dtype), fk.to(v.dtype)  # as gated_linear's kernels read them
        return gated_linear(
            fq, fk, v, log_decay, scale=scale, normaliser=normaliser, state=state, return_state=return_state, lag=lag,
            chunk=chunk, cu_seqlens=cu_seqlens, backend=inner,
        )  # fmt: skip
    from .gated_map_triton import forward, mapped_gated_linear_op

    g = None if log_decay is None else log_decay.float()
    first = None if state is None else state.float().contiguous()
    q, k, v = (_rows(x) for x in (q, k, v))
    trained = (q, k, v, g, q_weight, q_bias, k_weight, k_bias, first)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained)
    run = forward if unseen(*trained, cu_seqlens) else mapped_gated_linear_op
    out, _, last, *_ = run(
        q, k, v, g, q_weight, q_bias, k_weight, k_bias, first, cu_seqlens, map, float(scale), normaliser == "own",
        return_state, train,
    )  # fmt: skip
    return (out, last) if return_state else out


def _unable(q, k, v, g, name: str, lag: bool) -> str | None:  # type: ignore[no-untyped-def]
    """Why the kernels cannot serve, or None."""
    if lag:
        return "a lag needs features that are given"
    if g is not None and g.ndim == 4:
        return "a decay per channel needs features that are given"
    if v.shape[3] > LARGEST or q.shape[3] > WIDEST:
        return f"heads have {q.shape[3]} and {v.shape[3]} channels, more than {WIDEST} and {LARGEST}"
    if name in BEYOND_FLOAT16 and q.dtype == torch.float16:
        return f"{BEYOND_FLOAT16[name]} is beyond float16; use bfloat16"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"q, k and v differ in dtype ({q.dtype}, {k.dtype}, {v.dtype})"
    return "there are no tokens" if q.shape[2] == 0 else None
