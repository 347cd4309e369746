"""Converted models: the native family with linear attention in the layers that the configuration names.

A linear layer is the family's own attention module with its attention function replaced. Projections, biases, q/k
norms and RoPE are therefore the teacher's code, not a copy of it.
"""

from __future__ import annotations

import copy
import threading
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_utils import AttentionInterface

from .cache_linearized import LinearizedCache, adopt, has_read
from .configuration_linearized import ByFamily, config_class, head_sizes
from .decode_graph import DecodeGraph, why_not
from .family_table import FAMILIES, Family
from .feature_maps import FeatureMap, OwnProjection, set_start_values
from .gates import Decay, TokenScore
from .layout import Layout, document_mask, sequences
from .mixer import BRANCHES, Mixer
from .pointwise import quick_class, quicken

MIXER_ATTENTION = "linearized_mixer"
MIXER_PARTS = (Mixer, FeatureMap, OwnProjection, Decay, TokenScore)
"""Modules with `initial_values`. Each starts its own tensors: transformers passes over a module that lacks none."""


_running = threading.local()
"""`frozen`: the caches that this thread's innermost `generate` has to thaw."""


def mixer_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    mixer_call: dict[str, Any],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of linear layers: [B, H, T, D] in, [B, T, H, D] out. The mask came in as `layout`."""
    return module.mixer(query, key, value, **mixer_call), None  # type: ignore[operator]


# Only linear layers' own copies of the configuration name this function, and no mask is ever made for it: padding
# reaches the mixer as a Layout. So there is nothing to register with AttentionMaskInterface.
AttentionInterface.register(MIXER_ATTENTION, mixer_attention)


class LinearAttentionMixin:
    """Turns a native attention class into a linear layer."""

    family: Family

    def __init__(self, config: Any, layer_idx: int) -> None:
        own = copy.copy(config)
        own._attn_implementation = MIXER_ATTENTION
        super().__init__(own, layer_idx=layer_idx)  # type: ignore[call-arg]
        heads, kv_heads, width = head_sizes(config)
        self.rotates = self.family.rotates(config, layer_idx)
        self.mixer = Mixer(
            config.mixer_spec(),
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width,
            scaling=1.0 if self.family.query_scaled else self.scaling,  # type: ignore[attr-defined,has-type]
        )
        self.mixer.softcap = self.family.cap_of(config)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, mixer_layout: Layout | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the native forward; the layer's state lies in the cache, padding in `mixer_layout`."""
        given = {self.family.arguments[i]: value for i, value in enumerate(args)} | kwargs
        if isinstance(given.get("attention_mask"), Layout):  # from a LayoutLayerMixin
            mixer_layout = given["attention_mask"]
        cache = given.pop(self.family.cache, None)
        call = self.mixer_call(hidden_states, given, mixer_layout)
        call["cache"] = None if cache is None else cache.layers[self.layer_idx]  # type: ignore[attr-defined]
        return super().forward(hidden_states, **(given | {"attention_mask": None, "mixer_call": call}))  # type: ignore[misc]

    def mixer_call(
        self, hidden_states: torch.Tensor, given: dict[str, Any], mixer_layout: Layout | None = None
    ) -> dict[str, Any]:
        """What the mixer is told beside queries, keys and values; `given`: the attention's arguments by name."""
        return {
            "inputs": hidden_states,
            "rotation": given.get("position_embeddings") if self.rotates else None,
            "layout": mixer_layout,
        }


class LayoutLayerMixin:
    """A decoder layer that would lose `mixer_layout` on the way to its attention: it hands it on as the mask.

    In the layer's own forward, and nowhere else, so that recomputation under gradient checkpointing does the same.
    """

    native: type

    def forward(self, *args: Any, mixer_layout: Layout | None = None, **kwargs: Any) -> Any:
        """As the native forward."""
        return super().forward(*args, **(kwargs | {"attention_mask": mixer_layout}))  # type: ignore[misc]

    def __reduce__(self) -> Any:
        """As one of the native class: this one has no name to be found by."""
        return _layout_layer, (self.native,), self.__dict__


@cache
def layout_layer_class(native: type) -> type:
    """A native layer class under LayoutLayerMixin. Its name stays: transformers splits models by names of layers."""
    return type(native.__name__, (LayoutLayerMixin, native), {"native": native, "__module__": native.__module__})


def _layout_layer(native: type) -> Any:
    kind: Any = layout_layer_class(native)
    return kind.__new__(kind)


class MixerInitMixin:
    """Mixers missing from a checkpoint get their own start values, never transformers' random ones."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MIXER_PARTS):
            set_start_values(module, recurse=False)
        else:
            super()._init_weights(module)  # type: ignore[misc]


class LinearizedModelMixin(MixerInitMixin):
    """Swaps the attention of linear layers and hands them sequences instead of masks."""

    family: Family
    attention_class: type

    def __init__(self, config: Any) -> None:
        config.require_plan()
        super().__init__(config)  # type: ignore[call-arg]
        layers = attrgetter(self.family.layers)(self)
        for index in config.linear_layers:
            self.family.put_attention(layers, index, self.attention_class(config, index))
            if self.family.deaf_layers:
                native: type = type(layers[index])
                layers[index].__class__ = layout_layer_class(native)
        quicken(self)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the native forward. Packed documents are told by `position_ids` that start anew."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        config = self.config  # type: ignore[attr-defined]
        if past_key_values is not None and not isinstance(past_key_values, LinearizedCache):
            past_key_values = adopt(past_key_values, config)
        if attention_mask is not None and attention_mask.ndim == 2 and len(attention_mask) == 1:
            attention_mask = attention_mask.expand(len(tokens), -1)
        layout = None
        if past_key_values is not None and past_key_values.stays_frozen(tokens.shape[1]):
            # A step of `generate`: the mask's own length would change from step to step, and its zeros ask the host.
            additive = config._attn_implementation == "eager"
            attention_mask = past_key_values.decode_mask(self.dtype, additive=additive)  # type: ignore[attr-defined]
        else:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            own_mask = len(config.linear_layers) == config.num_hidden_layers
            layout = sequences(tokens, attention_mask, position_ids, seen=seen, own_mask=own_mask)
        packed = bool(config.linear_layers) and layout is not None and layout.packed
        if packed and (past_key_values is not None or use_cache):
            raise ValueError(
                "position_ids start anew within a row, so that it holds several documents: a cache cannot keep them "
                "apart. Pass use_cache=False and no past_key_values, or one document a row"
            )
        if use_cache is None:
            use_cache = config.use_cache and not self.training and not packed  # type: ignore[attr-defined]
        if past_key_values is None and use_cache:
            past_key_values = LinearizedCache(config)
        if position_ids is None and config.linear_layers:
            position_ids = real_positions(tokens, layout, past_key_values, config.linear_layers[0])
            if position_ids is None and self.family.explicit_positions:
                before = 0 if past_key_values is None else past_key_values.get_seq_length()
                position_ids = torch.arange(before, before + tokens.shape[1], device=tokens.device).unsqueeze(0)
        _require_positions(self.family.most_positions(config), tokens.shape[1], position_ids, past_key_values)
        if len(config.linear_layers) == config.num_hidden_layers:
            # No layer reads a mask. A 4D one is handed through as it is, so that none of T x T is ever made.
            attention_mask = tokens.new_zeros((1, 1, 1, 1), dtype=torch.bool)
        elif packed and self.family.packs:
            attention_mask = None  # all ones; only without one do softmax layers look at positions
        elif packed:
            attention_mask = document_mask(position_ids, tokens.shape[0])  # type: ignore[arg-type]
            if config._attn_implementation == "eager":  # which adds its mask
                attention_mask = torch.where(attention_mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)  # type: ignore[attr-defined]
        out = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mixer_layout=layout,
            **kwargs,
        )
        if past_key_values is not None:
            past_key_values.settle()
        return out


class LinearizedCausalLMMixin(MixerInitMixin):
    """Model class, cache and generation of a converted causal LM."""

    family: Family
    model_class: type
    decode_graphs = True
    """Whether `generate` may decode by a CUDA graph; LINEARIZE_CUDA_GRAPHS=0 in the environment forbids it too."""
    decode_graph_reason: str | None = None
    """Why the last `generate` went without a graph."""
    _is_stateful = True  # assisted generation would have to take tokens back, and refuses

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        owner, _, leaf = self.family.body.rpartition(".")
        setattr(attrgetter(owner)(self) if owner else self, leaf, self.model_class(config))
        self.post_init()  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward; a step of `generate` by its CUDA graph, where there is one."""
        graph = getattr(kwargs.get("past_key_values"), "graph", None)
        if graph is not None and not args and graph.serves(kwargs):
            return graph.run(kwargs["input_ids"], kwargs["position_ids"])
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def plain_step(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: LinearizedCache) -> Any:
        """One token a row [B, 1], all of them real, without asking the host for anything."""
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate; on a GPU the decode runs as a CUDA graph (decode_graph.py)."""
        outer, frozen = getattr(_running, "frozen", None), []  # type: ignore[var-annotated]
        _running.frozen = frozen
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _running.frozen = outer
            for cache in frozen:
                cache.thaw()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching pages keys and values, and a linear layer has none.

        Raises:
            NotImplementedError: always; `generate_batch` begins here too.
        """
        raise NotImplementedError(
            "continuous batching keeps pages of keys and values, which a converted model has not: call generate on a "
            "left-padded batch"
        )

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: Any, *args: Any, **kw: Any
    ) -> Any:
        """Transformers' prefill; then the cache takes the form in which a graph can read it."""
        out = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)  # type: ignore[misc]
        cache = getattr(out, "past_key_values", None)
        if isinstance(cache, LinearizedCache):
            self.decode_graph_reason = why_not(self, cache)
            if self.decode_graph_reason is None:
                most = cache.get_seq_length() + max(generation_config.max_length - input_ids.shape[1], 0)
                positions = self.family.most_positions(self.config)  # type: ignore[attr-defined]
                try:
                    if positions is not None and most > positions:
                        raise ValueError(f"the text may grow beyond the {positions} learned positions")
                    cache.freeze(most, model_kwargs.get("attention_mask"))
                except ValueError as error:
                    self.decode_graph_reason = str(error)
                else:
                    cache.graph = DecodeGraph(self, cache, most)
                    _running.frozen.append(cache)
        return out

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """A fresh LinearizedCache, whatever cache implementation was asked for; a given one is continued."""
        if generation_config.is_assistant:
            raise ValueError(
                "assistant_model: a converted model cannot draft for another one, for its state cannot take back the "
                "tokens that are rejected"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinearizedCache(self.config)  # type: ignore[attr-defined]


def real_positions(
    tokens: torch.Tensor, layout: Layout | None, cache: LinearizedCache | None, index: int
) -> torch.Tensor | None:
    """Positions that count real tokens alone, [B, T]; None where counting all is the same.

    A softmax layer sees only differences of positions; a feature map of a rotated key sees the position itself.
    """
    layer = cache.layers[index] if has_read(cache) else None  # type: ignore[union-attr]
    if layout is None and (layer is None or layer.uniform is not None):  # type: ignore[attr-defined]
        return None
    batch, length = tokens.shape[:2]
    real = torch.ones(batch, length, dtype=torch.long, device=tokens.device) if layout is None else layout.real.long()
    before = 0 if layer is None else layer.tensors["position"][:, None]  # type: ignore[attr-defined]
    return before + (real.cumsum(1) - 1).clamp_min(0)


def _require_positions(most: int | None, length: int, position_ids: torch.Tensor | None, cache: Any) -> None:
    """Refuse more tokens than there are learned positions: a GPU would only say that an assertion failed somewhere."""
    columns = length + (0 if cache is None else cache.get_seq_length())
    if most is not None and columns > most and (position_ids is None or int(position_ids.max()) >= most):
        raise ValueError(f"the text has more than {most} tokens, and the model has learned no positions beyond them")


def set_branches(model: nn.Module, branches: str) -> None:
    """Run all linear layers with `full`, `window`, `linear` or `none` of their branches (for whole sequences)."""
    if branches not in BRANCHES:
        raise ValueError(f"branches: {branches!r} is not one of {', '.join(BRANCHES)}")
    for mixer in _mixers(model):
        mixer.branches = branches


def attention_layers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """Index and attention module of every linear layer."""
    return [(m.layer_idx, m) for m in model.modules() if isinstance(getattr(m, "mixer", None), nn.Module)]  # type: ignore[misc]


def _mixers(model: nn.Module) -> list[Mixer]:
    return [module for module in model.modules() if isinstance(module, Mixer)]


class FamilyClasses(NamedTuple):
    """The converted classes of one family."""

    attention: Any
    body: Any
    model: Any


def mixins_of(family: Family) -> tuple[type, type, type]:
    """What turns a family's attention, body and model into converted ones."""
    if family.bidirectional:
        from .encoder_linearized import ENCODER_MIXINS

        return ENCODER_MIXINS
    return LinearAttentionMixin, LinearizedModelMixin, LinearizedCausalLMMixin


@cache
def family_classes(model_type: str) -> FamilyClasses:
    """The converted classes of a native model type; imports transformers' own of that family.

    Raises:
        KeyError: a family that is not in the table.
    """
    family = FAMILIES[model_type]
    native = import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    mixins = mixins_of(family)

    def make(kind: str, mixin: type, parent: str, **own: Any) -> Any:
        name, base = f"Linearized{family.name}{kind}", getattr(native, parent)
        own |= {"family": family, "__module__": __name__, "__doc__": f"{family.name}'s {parent}, with linear layers."}
        # transformers makes another class, of no name, of a generating one from an export that lacks this direct base.
        generating = (GenerationMixin,) if issubclass(base, GenerationMixin) else ()
        return type(name, (mixin, quick_class(base) or base, *generating), own)

    attention = make("Attention", mixins[0], family.attention_class)
    config: dict[str, Any] = {"config_class": config_class(model_type)}
    if family.softcap:
        config["_supports_sdpa"] = False  # transformers' sdpa drops the bound on scores without a word
    body = make("Model", mixins[1], family.body_class, attention_class=attention, **config)
    return FamilyClasses(attention, body, make(family.task, mixins[2], family.task_class, model_class=body, **config))


MODELS = ByFamily(lambda model_type: family_classes(model_type).model)
"""The converted model of every native model type."""


def __getattr__(name: str) -> Any:
    """LinearizedLlamaForCausalLM and the like, by name: where a config's auto_map points, for pickles and imports."""
    for model_type, family in FAMILIES.items():
        kind = name.removeprefix(f"Linearized{family.name}")
        if kind in ("Attention", "Model", family.task) and kind != name:
            return getattr(family_classes(model_type), {"Attention": "attention", "Model": "body"}.get(kind, "model"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
