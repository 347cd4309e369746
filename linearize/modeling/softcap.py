"""Softmax attention of a teacher that bounds its attention scores (Gemma 2): softmax(c tanh(s / c)).

The linear layers' window has to bound them in the same way, or it would not be the teacher's attention. Without a bound
all goes to linearize_kernels, or to transformers' sdpa; with one, to the same formulas here. Shapes as in the kernels:
N or B sequences, K key heads, R query heads per key head, L tokens, W block, D channels, Z sinks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

try:
    import linearize_kernels as kernels
except ImportError:  # an exported model without linearize: the same files lie beside this one
    kernels = None  # type: ignore[assignment]
    from .quadratic import window_weights as plain_window_weights  # type: ignore[import-not-found]
    from .step import step_window as plain_step_window  # type: ignore[import-not-found]
    from .window import chunk_window as plain_chunk_window  # type: ignore[import-not-found]
else:
    plain_window_weights, plain_step_window = kernels.window_weights, kernels.step_window
    plain_chunk_window = kernels.chunk_window

Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def bounded(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """c tanh(s / c); None: the scores as they are. As in transformers' eager attention of Gemma 2."""
    return scores if cap is None else (scores / cap).tanh() * cap


def softmax_parts(scores: torch.Tensor, cap: float, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(s - largest), 0 where not `seen`, and the largest of each row [..., 1]; scores [..., rows, columns]."""
    scores = bounded(scores, cap).masked_fill(~seen, float("-inf"))
    largest = scores.amax(dim=-1, keepdim=True)
    return (scores - largest).exp(), largest


def chunk_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cap: float | None, window: int, scale: float, **sinks: Any
) -> Window:
    """Block-window softmax of whole sequences, unnormalised; arguments and outputs as linearize_kernels.chunk_window.

    `sinks` are its sink_k, sink_v and first_block.
    """
    if cap is None:
        found: Window = plain_chunk_window(q, k, v, window=window, scale=scale, **sinks)
        return found
    length = q.shape[3]
    blocks = -(-length // window)
    rest = (0, 0, 0, blocks * window - length)
    q_b, k_b, v_b = (nnf.pad(x, rest).unflatten(-2, (blocks, window)) for x in (q, k, v))
    k_b, v_b = (torch.cat((nnf.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x), dim=3) for x in (k_b, v_b))
    place = torch.arange(blocks * window, device=q.device).view(blocks, window, 1)
    key = torch.arange(2 * window, device=q.device) + (place[:, :1] - window)
    seen = (key <= place) & (key >= 0)  # [B, W, 2W]
    scores = torch.einsum("nkrbid,nkbjd->nkrbij", q_b, k_b) * scale
    sink_k, sink_v, first = sinks.get("sink_k"), sinks.get("sink_v"), sinks.get("first_block", 0)
    if sink_k is not None:
        first = first.view(-1, 1, 1) if isinstance(first, torch.Tensor) else first
        block = first + torch.arange(blocks, device=q.device).view(1, -1, 1)
        apart = torch.arange(sink_k.shape[2], device=q.device) // window < block - 1  # the others are in the window
        apart = apart[:, None, None, :, None].expand(-1, 1, 1, -1, window, -1)
        seen = torch.cat((seen.expand(len(apart), 1, 1, -1, -1, -1), apart), dim=-1)
        scores = torch.cat((scores, torch.einsum("nkrbid,nkzd->nkrbiz", q_b, sink_k) * scale), dim=-1)
    weights, largest = softmax_parts(scores, cap, seen)
    out = torch.einsum("nkrbij,nkbjd->nkrbid", weights[..., : 2 * window], v_b)
    if sink_v is not None:
        out = out + torch.einsum("nkrbiz,nkzd->nkrbid", weights[..., 2 * window :], sink_v)
    total = weights.sum(dim=-1, keepdim=True)
    out, total, largest = (x.flatten(3, 4)[:, :, :, :length] for x in (out, total, largest))
    return out, total, largest


def step_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, *, cap: float | None, scale: float
) -> Window:
    """The same of one query over stored keys; arguments and outputs as linearize_kernels.step_window."""
    if cap is None:
        found: Window = plain_step_window(q, k, v, seen, scale=scale)
        return found
    scores = torch.einsum("bkrd,bkmd->bkrm", q, k) * scale
    weights, largest = softmax_parts(scores, cap, seen[:, None, None])
    return torch.einsum("bkrm,bkmd->bkrd", weights, v), weights.sum(dim=-1, keepdim=True), largest


def window_weights(
    q: torch.Tensor, k: torch.Tensor, *, cap: float | None, scale: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition; arguments and outputs as linearize_kernels.window_weights."""
    if cap is None:
        found: tuple[torch.Tensor, torch.Tensor] = plain_window_weights(q, k, scale=scale, seen=seen)
        return found
    return softmax_parts(torch.einsum("nkrid,nkjd->nkrij", q, k) * scale, cap, seen)


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
