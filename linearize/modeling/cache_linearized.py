"""What a converted model remembers between calls: a state of fixed size in linear layers, keys and values in others.

Transformers' own cache for linear layers does not count tokens, which a model without any softmax layer needs; hence
a layer class of our own.

Buffers of linear layers keep their addresses. `freeze` gives those of softmax layers a fixed size too, for as long as
a CUDA graph decodes (decode_graph.py), and `thaw` takes it back. Transformers' StaticLayer would do for the first, but
it would also hold the prompt's keys during prefill, where masks would be as long as the whole cache.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
)

from .family_table import lookup

try:
    from linearize_kernels.decode import settle
except ImportError:  # an exported model without linearize: no kernel leaves anything to settle
    settle = None  # type: ignore[assignment]


def lasting() -> AbstractContextManager[Any]:
    """For tensors that are written to in place: those made in inference mode could not be, once it is over."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class LinearStateLayer(CacheLayerMixin):
    """State of one linear layer. Its bytes do not depend on the number of tokens read.

    `tensors` holds, batch first: `state` [B, S, F, D] and, where a denominator is kept, `z` [B, S, F], float32; with a
    window `ring_k`, `ring_v` [B, K, 2W, D] (the
    token at position p lies in slot p mod 2W) and, where keys enter the state late, `ring_g`, `ring_beta` [B, S, 2W];
    with sinks `sink_k`, `sink_v` [B, K, Z, D]; and `position` [B], the real tokens each row has read. `workspace` holds
    what the decode kernel leaves behind (`z_next`, as z) until `settle`; between tokens nothing in it counts.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self.workspace: dict[str, torch.Tensor] = {}
        self.shared = False
        """Whether a LinearizedCache settles all its layers at once, at the end of the model's step."""
        self.moves = 0
        """How often `tensors` were replaced."""
        self.unsettled = False
        """Whether the decode kernel has read a token that `position` and `z` do not know of yet."""
        self.seen = 0
        """Tokens read, padding included: what positions and masks of softmax layers count by."""
        self.uniform: int | None = 0
        """Real tokens read where every row has read as many, so that no question has to go to the device."""

    @property
    def bytes(self) -> int:
        """Size of everything that is kept, for the whole batch."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def count(self, tokens: int | None) -> None:
        """Count real tokens that every row has read; None: not as many in every row."""
        self.uniform = None if tokens is None or self.uniform is None else self.uniform + tokens

    def read_by_replay(self) -> None:
        """Count a token that a CUDA graph has read."""
        self.seen += 1
        self.count(1)

    def counts(self) -> tuple[Any, ...]:
        """What is counted on the host; `set_counts` puts it back."""
        return self.seen, self.uniform, self.unsettled

    def set_counts(self, known: tuple[Any, ...]) -> None:
        """See `counts`."""
        self.seen, self.uniform, self.unsettled = known

    def settle(self) -> None:
        """Bring `position` and `z` up to date after the decode kernel."""
        if self.unsettled:
            settle([self.tensors | self.workspace])
            self.unsettled = False

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
        self.tensors, self.workspace, self.unsettled = {}, {}, False
        self.seen, self.uniform, self.is_initialized = 0, 0, False
        self.moves += 1

    def _apply(self, change: Any) -> None:
        """Change the rows: new tensors, for the batch may be of another size."""
        self.settle()
        self.moves += 1
        with lasting():
            self.tensors = {name: change(x) for name, x in self.tensors.items()}
            self.workspace = {name: change(x) for name, x in self.workspace.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take rows in another order, in place where their number stays."""
        self.settle()
        for x in self.tensors.values():
            if len(beam_idx) != len(x):
                return self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))
            x.copy_(x.index_select(0, beam_idx.to(x.device)))

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


class FixedLayer(CacheLayerMixin):
    """Keys and values of a softmax layer in buffers [B, K, M, D], of which the first `read` are real; for decode."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, layer: DynamicLayer, most: int) -> None:
        super().__init__()
        self.read = layer.keys.shape[-2]
        self.place = torch.full((1,), self.read, dtype=torch.long, device=layer.keys.device)
        """`read` on the device: the slot of the next token."""
        grown = (*layer.keys.shape[:2], most)
        self.keys = layer.keys.new_zeros(*grown, layer.keys.shape[-1])
        self.values = layer.values.new_zeros(*grown, layer.values.shape[-1])
        self.keys[:, :, : self.read] = layer.keys
        self.values[:, :, : self.read] = layer.values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the layer is made from one that has read."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token [B, K, 1, D]; gives the whole buffers, whose unread part a mask has to hide."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        self.place.add_(1)
        self.read += 1
        return self.keys, self.values

    def read_by_replay(self) -> None:
        """Count a token that a CUDA graph has read."""
        self.read += 1

    def counts(self) -> tuple[Any, ...]:
        """What is counted on the host; `set_counts` puts it back."""
        return (self.read,)

    def set_counts(self, known: tuple[Any, ...]) -> None:
        """See `counts`."""
        (self.read,) = known

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> int:
        return self.read

    def get_max_length(self) -> int:
        return self.keys.shape[-2]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for x in (self.keys, self.values):
            x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def dynamic(self) -> DynamicLayer:
        """The same tokens in transformers' own layer, which grows."""
        layer = DynamicLayer()
        layer.update(self.keys[:, :, : self.read].clone(), self.values[:, :, : self.read].clone())
        return layer


class LinearizedCache(Cache):
    """Cache of a converted model: `LinearStateLayer` for linear layers, transformers' own for softmax layers."""

    def __init__(self, config: Any) -> None:
        layers: list[CacheLayerMixin] = []
        for index, mixer in enumerate(config.layer_mixers):
            sliding = softmax_window(config, index)
            if mixer == "linear":
                layer = LinearStateLayer()
                layer.shared = True
                layers.append(layer)
            elif sliding is not None:
                layers.append(DynamicSlidingWindowLayer(sliding_window=sliding))
            else:
                layers.append(DynamicLayer())
        super().__init__(layers=layers)
        self.padding: torch.Tensor | None = None
        """While frozen: which slots of the softmax layers may be seen once they are read, [B, M] bool."""
        self.graph: Any = None
        """While `generate` decodes by a CUDA graph: the DecodeGraph."""

    @property
    def fixed(self) -> list[FixedLayer]:
        """The softmax layers, while they are frozen."""
        return [layer for layer in self.layers if isinstance(layer, FixedLayer)]

    @property
    def moves(self) -> int:
        """Grows whenever tensors of linear layers are replaced: a CUDA graph of the old ones is then void."""
        return sum(layer.moves for layer in self.linear)

    def stays_frozen(self, tokens: int) -> bool:
        """Whether softmax layers are frozen and have room for one more token; otherwise they thaw."""
        fixed = self.fixed
        if fixed and (tokens != 1 or fixed[0].read >= fixed[0].get_max_length()):
            self.thaw()
            return False
        return bool(fixed)

    @property
    def linear(self) -> list[LinearStateLayer]:
        """The linear layers."""
        return [layer for layer in self.layers if isinstance(layer, LinearStateLayer)]

    @property
    def state_bytes(self) -> int:
        """Bytes held by the linear layers."""
        return sum(layer.bytes for layer in self.linear)

    def settle(self) -> None:
        """Bring all linear layers up to date after the decode kernel, in two launches."""
        waiting = [layer for layer in self.linear if layer.unsettled]
        if waiting:
            settle([layer.tensors | layer.workspace for layer in waiting])
        for layer in waiting:
            layer.unsettled = False

    def freeze(self, most: int, padding: torch.Tensor | None) -> None:
        """Give the keys and values of softmax layers a fixed size.

        Args:
            most: tokens M the cache will ever read, padding included.
            padding: the attention mask of the tokens read so far [B, at least so many], 0 at padding; None: no padding.

        Raises:
            ValueError: a kept layer has a sliding window, whose buffer transformers shifts from the host.
        """
        if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.layers):
            raise ValueError("a softmax layer with a sliding window has no buffer of fixed addresses")
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicLayer):
                fixed = FixedLayer(layer, most)
                self.layers[index] = fixed
                if self.padding is None:
                    self.padding = torch.ones(len(fixed.keys), most, dtype=torch.bool, device=fixed.keys.device)
                    if padding is not None:
                        self.padding[:, : fixed.read] = padding[:, : fixed.read].bool()

    def thaw(self) -> None:
        """Undo `freeze`, and let go of the graph."""
        self.graph = self.padding = None
        for index, layer in enumerate(self.layers):
            if isinstance(layer, FixedLayer):
                self.layers[index] = layer.dynamic()

    def decode_mask(self, dtype: torch.dtype, *, additive: bool) -> torch.Tensor | None:
        """Mask of the next token in frozen softmax layers, [B, 1, 1, M]: bool, or 0 and the least number of `dtype`.

        None where there is no frozen layer.
        """
        if not self.fixed or self.padding is None:
            return None
        place = torch.arange(self.padding.shape[1], device=self.padding.device)
        seen = (self.padding & (place <= self.fixed[0].place))[:, None, None]
        if not additive:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def has_read(cache: Any) -> bool:
    """Whether there is a cache, and tokens in it."""
    return cache is not None and cache.get_seq_length() > 0


def adopt(cache: Any, config: Any) -> LinearizedCache:
    """Turn the caller's empty DynamicCache or StaticCache into ours: the same object, for the caller goes on with it.

    Raises:
        ValueError: another kind of cache, or one that has read tokens.
    """
    if type(cache) not in (DynamicCache, StaticCache) or has_read(cache):
        read = f" that has read {cache.get_seq_length()} tokens" if has_read(cache) else ""
        raise ValueError(
            "past_key_values: a converted model continues from a LinearizedCache, or fills an empty DynamicCache or "
            f"StaticCache; got a {type(cache).__name__}{read}"
        )
    cache.__class__ = LinearizedCache
    cache.__init__(config)
    return cast(LinearizedCache, cache)


def softmax_window(config: Any, index: int) -> int | None:
    """Sliding window of the native attention in layer `index`, or None where it sees everything."""
    return lookup(config).window_of(config, index)
