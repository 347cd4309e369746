"""What the teacher's attention layers read and give, layer by layer, during one forward pass.

A hook sees the hidden states and arguments of every attention module; the outputs of the heads before `o_proj` are
taken from inside, through a registered attention function. No family needs a patch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from linearize.modeling.family_table import lookup
from linearize.modeling.softcap import attention_weights, softmax_attention

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
    """The other arguments of its forward, e.g. position_embeddings = (cos, sin), but no mask and no cache."""
    heads: Tensor
    """[B, T, H, D]: its output per head, before o_proj."""
    weights: Tensor | None
    """[B, H, T, T] fp32 attention weights, if asked for."""
    output: Tensor
    """[B, T, hidden]: its output."""
    projected: tuple[Tensor, Tensor, Tensor] | None = None
    """Queries [B, H, T, D], keys and values [B, K, T, D], after norms and RoPE, if asked for."""


def _teacher_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The teacher's attention, that leaves what a hook wants on the module."""
    output = softmax_attention(module, query, key, value, attention_mask, **kwargs)
    wanted = getattr(module, WANTED, None)
    if wanted is not None:
        weights = attention_weights(module, query, key, attention_mask, **kwargs) if "weights" in wanted else None
        setattr(module, TAKEN, (output, weights, (query, key, value) if "projected" in wanted else None))
    return output, None


# Both registries: with the first alone, transformers would pass no mask at all, even where one is needed.
AttentionInterface.register(ATTENTION, _teacher_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def captured(
    teacher: Any,
    layers: Collection[int],
    on_layer: Callable[[TeacherLayer], None],
    *,
    weights: bool = False,
    projected: Collection[int] = (),
) -> Iterator[None]:
    """Call `on_layer` for each of `layers` while the teacher runs, right after that layer's attention.

    `weights`: with attention weights; `projected`: layers whose queries, keys and values are wanted. What was taken
    of a layer is dropped before the next one runs. The teacher's own output goes on unchanged.
    """
    before = teacher.config._attn_implementation
    handles = []

    family = lookup(teacher.config)

    def hook(index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        heads, row_weights, tokens = module.__dict__.pop(TAKEN)
        rest = dict(zip(family.arguments, args[1:], strict=False)) | kwargs
        hidden_states = args[0] if args else rest.pop("hidden_states")
        rest |= {"attention_mask": None, family.cache: None}
        on_layer(
            TeacherLayer(
                index=index,
                hidden_states=hidden_states,
                kwargs=rest,
                heads=heads,
                weights=row_weights,
                output=output[0],
                projected=tokens,
            )
        )

    modules = {index: family.attention_of(teacher, index) for index in layers}
    teacher.set_attn_implementation(ATTENTION)
    try:
        for index, module in modules.items():
            setattr(module, WANTED, ("weights",) * weights + ("projected",) * (index in projected))
            handles.append(module.register_forward_hook(partial(hook, index), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            module.__dict__.pop(WANTED, None)
            module.__dict__.pop(TAKEN, None)
        teacher.set_attn_implementation(before)
