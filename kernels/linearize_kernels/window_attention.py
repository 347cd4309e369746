"""The softmax window alone: a query in block b of W tokens sees its own block, the one before, and the first tokens.

The output comes with the logarithm of its softmax's sum, so that another branch can be mixed in by its mass; both have
gradients. window.py holds the definition.
"""

from __future__ import annotations

import torch

from .backend import pick, placed
from .window import chunk_window
from .window_linear import first_tokens, tables_of
from .window_linear_plan import Plan, spans_of

Maybe = torch.Tensor | None


@placed
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    softcap: float | None = None,
    cu_seqlens: Maybe = None,
    starts: Maybe = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by softmax inside a block window.

    Args:
        q: [B, H, T, D]; k, v: [B, HK, T, D], H a multiple of HK; fp32, fp16 or bf16, any strides.
        window: W > 0, tokens of a block.
        scale: factor of the scores, usually D^-0.5.
        sinks: the first tokens of a sequence that every query sees; at most W.
        softcap: c, a bound: scores become c tanh(s / c) (Gemma 2); None: none.
        cu_seqlens: [N + 1], where packed sequences begin and end; B is then 1.
        starts: [B], the first real token of left-padded rows; padding gives zeros.
        backend: auto | torch | triton.

    Returns:
        out [B, H, T, D] in q's dtype, and log sum_j exp(s_ij) [B, H, T], float32 (float64 for float64); 0 at padding.

    Raises:
        ValueError: triton was asked for and cannot serve, or there is no window.
    """
    if window < 1:
        raise ValueError(f"window {window}: the window alone needs at least one token")
    plan = Plan(
        batch=q.shape[0], tokens=q.shape[2], heads=q.shape[1], key_heads=k.shape[1], state_heads=q.shape[1],
        channels=q.shape[3], width=0, map="none", window=window, lag=2, mix="sum", own=False, scale=scale,
        window_weight=1.0, sinks=sinks, softcap=softcap,
    )  # fmt: skip
    if pick(backend, q, k, v, unable=plan.unable(q.dtype, k.dtype, v.dtype)) == "torch":
        return _torch(q, k, v, window, scale, sinks, softcap, cu_seqlens, starts)
    from .window_linear_ops import LN2, window_linear_call

    sequences, blocks = tables_of(q, window, cu_seqlens, starts)
    sink_k, sink_v = (first_tokens(x, sinks, sequences) if sinks else None for x in (k, v))
    out, peak, *_ = window_linear_call(
        q, k, v, None, None, None, None, None, None, None, sink_k, sink_v, None, sequences, blocks,
        q.shape[1], "none", window, 2, "sum", False, float(scale), 1.0, sinks, softcap, False, False, False,
    )  # fmt: skip
    return out, peak * LN2


def _torch(q, k, v, window, scale, sinks, softcap, cu_seqlens, starts):  # type: ignore[no-untyped-def]
    """Sequence by sequence, in float32 (float64 stays)."""
    out = q.new_zeros(q.shape)
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    mass = q.new_zeros(q.shape[:3], dtype=precise)
    for row, a, b in spans_of(q.shape[0], q.shape[2], cu_seqlens, starts):
        q_own, k_own, v_own = (x[row, :, a:b].to(precise) for x in (q, k, v))
        sink = (k_own[:, :, :sinks], v_own[:, :, :sinks]) if sinks else (None, None)
        grouped = q_own.unflatten(1, (k.shape[1], -1))
        top, below, largest = (
            x.flatten(1, 2)
            for x in chunk_window(
                grouped, k_own, v_own, window=window, scale=scale, softcap=softcap, sink_k=sink[0], sink_v=sink[1]
            )
        )
        out[row, :, a:b] = (top / below).to(q.dtype)
        mass[row, :, a:b] = (below.log() + largest).squeeze(-1)
    return out, mass
