"""The teacher cut to a window: softmax attention that sees its own block of W tokens, the block before, and sinks.

This is what a linearized model's window sees, so a model cut like this is the floor that a conversion has to beat
(design: recovery 0 %). Nothing is trained; only the mask changes. It holds for every family that takes its attention
through transformers' AttentionInterface and its mask through AttentionMaskInterface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from linearize.errors import UsageError
from linearize.modeling.softcap import softmax_attention

BLOCK_WINDOW = "linearize_block_window"
_SETTING = "_linearize_block_window"


def block_window(visible: torch.Tensor, *, window: int, sinks: int, q_offset: int = 0, kv_offset: int = 0,
                 start: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Cut a mask to the window: query i keeps key j if i // W - j // W <= 1 or j < sinks, counted from the row's start.

    Args:
        visible: bool [B, 1, Tq, Tk], True where the model's own mask (causal, padding, sliding) lets a query see a key.
        window, sinks: W and how many first tokens stay visible for good.
        q_offset, kv_offset: position of the first query and of the first key.
        start: int [B], position of each row's first real token; None: where each query's own mask begins, which is also
            right for packed documents but not under a sliding window.

    Returns:
        bool [B, 1, Tq, Tk].
    """
    queries = torch.arange(visible.shape[2], device=visible.device)[:, None] + q_offset  # [Tq, 1]
    keys = torch.arange(visible.shape[3], device=visible.device)[None, :] + kv_offset  # [1, Tk]
    if start is None:
        origin = visible.to(torch.uint8).argmax(dim=-1, keepdim=True) + kv_offset  # [B, 1, Tq, 1]
    else:
        origin = start.view(-1, 1, 1, 1)
    i, j = queries - origin, keys - origin
    near = torch.div(i, window, rounding_mode="floor") - torch.div(j, window, rounding_mode="floor") <= 1
    return visible & (near | (j < sinks))


def _mask(*args: Any, config: Any = None, **kwargs: Any) -> torch.Tensor:
    """The model's own boolean mask, cut. transformers asks for it once per forward and kind of layer."""
    window, sinks = getattr(config, _SETTING)
    # Never skipped: without a mask, attention would be told `is_causal` and see everything.
    visible = sdpa_mask(*args, config=config, **{**kwargs, "allow_is_causal_skip": False})
    padding, sliding = kwargs.get("attention_mask"), kwargs.get("local_size") is not None
    start = None
    if padding is not None:
        start = padding.to(torch.uint8).argmax(dim=-1)
    elif sliding:
        start = torch.zeros(visible.shape[0], dtype=torch.long, device=visible.device)
    positions = kwargs.get("cache_position")  # older transformers give positions instead of an offset
    q_offset = kwargs.get("q_offset", 0) if positions is None else int(positions[0])
    return block_window(visible, window=window, sinks=sinks, q_offset=q_offset,
                        kv_offset=kwargs.get("kv_offset", 0), start=start)  # fmt: skip


def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The model's attention under the cut mask; q [B, H, Tq, D], k and v [B, HK, Tk, D] -> [B, Tq, H, D]."""
    assert attention_mask is not None, "a block window without its mask would see everything"
    return softmax_attention(module, query, key, value, attention_mask, **kwargs), None


# Both, always: a name without a mask function of its own gets no mask at all, in silence.
AttentionInterface.register(BLOCK_WINDOW, _attention)
AttentionMaskInterface.register(BLOCK_WINDOW, _mask)


@contextmanager
def truncated(model: Any, window: int, sinks: int = 0) -> Iterator[Any]:
    """`model` with every layer cut to `window` and `sinks`; its own attention is put back afterwards, also on errors.

    Raises:
        UsageError: a window below 1, negative sinks, or a model that does not take its attention from the registry.
    """
    if window < 1 or sinks < 0:
        raise UsageError(f"window {window} with {sinks} sinks: the window must be positive and the sinks not negative")
    config = model.config.get_text_config()
    before = model.config._attn_implementation
    setattr(config, _SETTING, (window, sinks))
    try:
        model.set_attn_implementation(BLOCK_WINDOW)
        if config._attn_implementation != BLOCK_WINDOW:
            raise UsageError(f"{type(model).__name__} does not let its attention be replaced, so it cannot be cut")
        yield model
    finally:
        model.set_attn_implementation(before)
        delattr(config, _SETTING)
