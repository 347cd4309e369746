"""Softmax attention of a teacher that bounds its attention scores (Gemma 2): softmax(c tanh(s / c)).

The linear layers' window has to bound them in the same way, or it would not be the teacher's attention. Its formulas
are linearize_kernels'; here are those of whole layers, which transformers' sdpa computes where there is no bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

try:
    from linearize_kernels.quadratic import window_weights
    from linearize_kernels.step import step_window
    from linearize_kernels.window import bounded, chunk_window
except ImportError:  # an exported model with no linearize, or one without bounds: the same files lie beside this one
    from .quadratic import window_weights  # type: ignore[import-not-found,no-redef]
    from .step import step_window  # type: ignore[import-not-found,no-redef]
    from .window import bounded, chunk_window  # type: ignore[import-not-found,no-redef]

    BOUNDED = False
else:
    BOUNDED = True
"""Whether the ops of linearize_kernels take a bound."""

__all__ = ["BOUNDED", "attention_weights", "chunk_window", "softmax_attention", "step_window", "window_weights"]


def attention_weights(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of whole sequences, row by row: fp32 [B, H, T, T], for q [B, H, T, D] and k [B, HK, T, D].

    `mask` is boolean (True: may attend), additive, or None for what the module says: causal, or all. The rest are
    arguments of transformers' attention functions.
    """
    with torch.autocast(query.device.type, enabled=False):
        key = repeat_kv(key, query.shape[1] // key.shape[1])
        scores = (query.float() @ key.float().transpose(-1, -2)) * (scaling or query.shape[-1] ** -0.5)
        scores = bounded(scores, softcap)
        if mask is None and getattr(module, "is_causal", True):
            length = query.shape[-2]
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)


def softmax_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """The heads' outputs [B, T, H, D], arguments as above: by sdpa, or by definition where that would drop a bound."""
    if kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    weights = attention_weights(module, query, key, mask, **kwargs).to(value.dtype)
    return (weights @ repeat_kv(value, query.shape[1] // value.shape[1])).transpose(1, 2).contiguous()
