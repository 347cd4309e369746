"""What a converted model remembers between calls: a state of fixed size in linear layers, keys and values in others.

Transformers' own cache for linear layers does not count tokens, which a model without any softmax layer needs; hence
a layer class of our own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class LinearStateLayer(CacheLayerMixin):
    """State of one linear layer. Its bytes do not depend on the number of tokens read.

    `tensors` holds, batch first: `state` [B, S, F, V] float32; with a window `ring_k`, `ring_v` [B, K, 2W, D] (the
    token at position p lies in slot p mod 2W) and, where keys enter the state late, `ring_g`, `ring_beta` [B, S, 2W];
    with sinks `sink_k`, `sink_v` [B, K, Z, D]; and `position` [B], the real tokens each row has read.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self.seen = 0
        """Tokens read, padding included: what positions and masks of softmax layers count by."""
        self.uniform: int | None = 0
        """Real tokens read where every row has read as many, so that no question has to go to the device."""

    @property
    def bytes(self) -> int:
        """Size of everything that is kept, for the whole batch."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the mixer makes the state at its first call."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a linear layer's state is written by its mixer, not by Cache.update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_query_offset(self) -> int:
        return self.seen

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.tensors, self.seen, self.uniform, self.is_initialized = {}, 0, 0, False

    def _apply(self, change: Any) -> None:
        self.tensors = {name: change(x) for name, x in self.tensors.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """A state of fixed size stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                "a linear layer cannot forget its last tokens: the cache of a converted model is not croppable"
            )


class LinearizedCache(Cache):
    """Cache of a converted model: `LinearStateLayer` for linear layers, transformers' own for softmax layers."""

    def __init__(self, config: Any) -> None:
        layers: list[CacheLayerMixin] = []
        for index, mixer in enumerate(config.layer_mixers):
            sliding = softmax_window(config, index)
            if mixer == "linear":
                layers.append(LinearStateLayer())
            elif sliding is not None:
                layers.append(DynamicSlidingWindowLayer(sliding_window=sliding))
            else:
                layers.append(DynamicLayer())
        super().__init__(layers=layers)

    @property
    def state_bytes(self) -> int:
        """Bytes held by the linear layers."""
        return sum(layer.bytes for layer in self.layers if isinstance(layer, LinearStateLayer))


def softmax_window(config: Any, index: int) -> int | None:
    """Sliding window of the native attention in layer `index`, or None where it sees everything."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[index] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)
