"""Models that hold one layer at a time: everything else of them is empty, and is passed through.

A bare model is the real class on the meta device, its layers taken out. Put one back, and the model's own forward runs
just that layer: masks, positions and rotations are made by the family's code, and hidden states come from wherever the
feed in the embedding's place reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from linearize.artifacts.pieces import Stored
from linearize.errors import VerificationError
from linearize.modeling.family_table import Family, lookup

FINAL_NORM = {
    "llama": "norm",
    "mistral": "norm",
    "qwen2": "norm",
    "qwen3": "norm",
    "phi3": "norm",
    "olmo2": "norm",
    "olmo3": "norm",
    "smollm3": "norm",
    "stablelm": "norm",
}
"""What follows the last layer, by family. These can be streamed: their bodies compute nothing of their own beside masks
and rotations, as others do that scale embeddings; and their layers are attention and `mlp`."""


class Through(nn.Module):
    """Gives back what it is given: an absent layer, norm or head."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states as they came."""
        return hidden_states


class Feed(nn.Module):
    """In the place of an embedding: turns the numbers it is asked for, [B, T], into hidden states [B, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Callable[[Tensor], Tensor] | None = None

    def forward(self, numbers: Tensor) -> Tensor:
        """What is to enter the layer at work."""
        assert self.read is not None
        return self.read(numbers)


def just(states: Tensor) -> Callable[[Tensor], Tensor]:
    """A source that gives these hidden states whatever it is asked for."""
    return lambda numbers: states


@dataclass(frozen=True, kw_only=True)
class Bare:
    """A model without its layers."""

    model: Any
    family: Family
    layers: tuple[nn.Module, ...]
    """The layers that were taken out, on the meta device."""
    norm: nn.Module
    head: nn.Module
    feed: Feed

    @contextmanager
    def holding(self, index: int, layer: nn.Module) -> Iterator[Any]:
        """The model with one of its layers in place; after the block it is gone, and its values are freed."""
        places = self.family.layers_of(self.model)
        places[index] = layer
        try:
            yield self.model
        finally:
            places[index] = Through()
            layer.to("meta")

    def run(self, numbers: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """What the layer in place makes of what `read` gives for `numbers` [B, T]: [B, T, C]."""
        with self.fed(read):
            output: Tensor = self.family.body_of(self.model)(input_ids=numbers, use_cache=False).last_hidden_state
        return output

    @contextmanager
    def fed(self, read: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the block what the model takes for token ids are numbers that `read` turns into hidden states."""
        self.feed.read = read
        try:
            yield
        finally:
            self.feed.read = None


def strip(model: Any, device: torch.device) -> Bare:
    """Take the layers, the embedding, the last norm and the head out of a model on the meta device, and keep the rest.

    Tables that are computed from the config alone are made anew on `device`.
    """
    family = lookup(model.config)
    body, places, name = family.body_of(model), family.layers_of(model), FINAL_NORM[family.model_type]
    layers, norm, head, feed = tuple(places), getattr(body, name), attrgetter(family.head)(model), Feed()
    for index in range(len(layers)):
        places[index] = Through()
    setattr(body, family.embedding, feed)
    setattr(body, name, Through())
    setattr(model, family.head, Through())
    for child, module in list(body.named_children()):
        if any(buffer.is_meta for buffer in module.buffers()):
            setattr(body, child, type(module)(config=model.config).to(device))
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise VerificationError(f"{family.model_type}: {left[0]} belongs to no layer, so the model cannot be streamed")
    model.tie_weights = lambda *args, **kwargs: None  # it would look for the embedding, to tie the head to
    model.eval().requires_grad_(False)
    return Bare(model=model, family=family, layers=layers, norm=norm, head=head, feed=feed)


@contextmanager
def attention_alone(layer: Any) -> Iterator[None]:
    """Within the block the layer ends after its attention: nothing is computed that alignment does not look at."""
    mlp, layer.mlp = layer.mlp, Through()
    try:
        yield
    finally:
        layer.mlp = mlp


def fill(
    module: nn.Module, stored: Stored, prefix: str, *, dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    """Give a module on the meta device its values from files: on `device`, in `dtype` (None: as stored), not trainable.

    Raises:
        VerificationError: the files lack one, or hold another shape.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, empty in named:
        full = f"{prefix}.{name}"
        if full not in stored.tensors:
            raise VerificationError(f"nothing gives {full} a value")
        value = stored.read(full)
        if value.shape != empty.shape:
            raise VerificationError(f"{full}: {tuple(value.shape)} in the files, {tuple(empty.shape)} in the model")
        value = value.to(device=device, dtype=dtype if dtype and value.is_floating_point() else value.dtype)
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            setattr(place, leaf, nn.Parameter(value, requires_grad=False))
        else:
            place._buffers[leaf] = value
    return module.eval()
