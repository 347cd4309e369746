"""What the teacher's attention layers read and give, layer by layer, during one forward pass.

A hook sees the hidden states and arguments of every attention module; the outputs of the heads before `o_proj` are
taken from inside, through a registered attention function. No family needs a patch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "linearize_teacher"
WANTED = "linearize_wanted"
TAKEN = "linearize_taken"


@dataclass(frozen=True, kw_only=True)
class TeacherLayer:
    """One attention layer of the teacher on one micro-batch; nothing here carries gradients."""

    index: int
    hidden_states: Tensor
    """[B, T, hidden]: what the module read (after the layer's input norm)."""
    kwargs: dict[str, Any]
    """The other arguments of its forward, e.g. position_embeddings = (cos, sin)."""
    heads: Tensor
    """[B, T, H, D]: its output per head, before o_proj."""
    weights: Tensor | None
    """[B, H, T, T] fp32 attention weights, if asked for."""
    output: Tensor
    """[B, T, hidden]: its output."""


def attention_weights(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """softmax(q k^T * scaling) in fp32, [B, H, T, T], for q [B, H, T, D] and k [B, HK, T, D].

    `mask` is boolean (True: may attend), additive, or None for plain causal attention.
    """
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    scores = (query.float() @ key.float().transpose(-1, -2)) * (scaling or query.shape[-1] ** -0.5)
    if mask is None:
        length = query.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask
    return scores.softmax(-1)


def _teacher_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Plain sdpa that leaves what a hook wants on the module."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    wanted = getattr(module, WANTED, None)
    if wanted is not None:
        weights = None
        if wanted == "weights":
            with torch.autocast(query.device.type, enabled=False):
                weights = attention_weights(module, query, key, attention_mask, kwargs.get("scaling"))
        setattr(module, TAKEN, (output, weights))
    return output, None


# Both registries: with the first alone, transformers would pass no mask at all, even where one is needed.
AttentionInterface.register(ATTENTION, _teacher_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def captured(
    teacher: Any, layers: Collection[int], on_layer: Callable[[TeacherLayer], None], *, weights: bool = False
) -> Iterator[None]:
    """Call `on_layer` for each of `layers` while the teacher runs, right after that layer's attention.

    What was taken of a layer is dropped before the next one runs. The teacher's own output goes on unchanged.
    """
    before = teacher.config._attn_implementation
    handles = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        heads, row_weights = module.__dict__.pop(TAKEN)
        rest = dict(kwargs)
        hidden_states = args[0] if args else rest.pop("hidden_states")
        on_layer(
            TeacherLayer(
                index=module.layer_idx,
                hidden_states=hidden_states,
                kwargs=rest,
                heads=heads,
                weights=row_weights,
                output=output[0],
            )
        )

    modules = [teacher.model.layers[index].self_attn for index in layers]
    teacher.set_attn_implementation(ATTENTION)
    try:
        for module in modules:
            setattr(module, WANTED, "weights" if weights else "heads")
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            module.__dict__.pop(WANTED, None)
            module.__dict__.pop(TAKEN, None)
        teacher.set_attn_implementation(before)
