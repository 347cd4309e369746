"""Converted masked language models: bidirectional linear attention in the layers that the configuration names.

    out_t = sum_s phi_q(q_t).phi_k(k_s) v_s / sum_s phi_q(q_t).phi_k(k_s),   s over all real tokens of the sequence

(Hedgehog, arXiv 2402.04347, without its causal mask). Nothing but the attention function of a layer changes:
projections, learned positions, token types and norms are the teacher's code. The classes are put together in
modeling_linearized.py.

Shapes: B batch, H heads, T tokens, D head channels, F features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from .encoder_spec import misfit
from .feature_maps import FeatureMap, feature_size, set_start_values
from .mixer_spec import MixerSpec

ENCODER_ATTENTION = "linearized_encoder_mixer"
TINY = 1e-30


def quadratic_weights(fq: torch.Tensor, fk: torch.Tensor) -> torch.Tensor:
    """The definition: every row's weights, which sum to one; fq, fk [B, H, T, F] -> [B, H, T, T]."""
    weights = fq @ fk.transpose(-1, -2)
    return weights / weights.sum(-1, keepdim=True).clamp_min(TINY)


def linear_output(fq: torch.Tensor, fk: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same output in time linear in T: fq, fk [B, H, T, F], v [B, H, T, D] -> [B, H, T, D]."""
    state = fk.transpose(-1, -2) @ v  # [B, H, F, D]
    mass = fq @ fk.sum(-2).unsqueeze(-1)  # [B, H, T, 1]
    return fq @ state / mass.clamp_min(TINY)


class BidirectionalMixer(nn.Module):
    """Linear attention over a whole sequence, in float32 whatever the model's dtype.

    `branches` is `full`, or `none` for zeros. `record` keeps `last_output` [B, T, H, D]; `record_weights` keeps
    `last_weights` [B, H, T, T] and runs the quadratic form.

    Raises:
        ValueError: an axis of `spec` that has no meaning in an encoder.
    """

    def __init__(self, spec: MixerSpec, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        if (problem := misfit(spec)) is not None:
            raise ValueError(problem[0])
        self.spec, self.num_heads, self.head_dim = spec, num_heads, head_dim
        self.features = feature_size(spec.feature_map, head_dim, spec.feature_dim)
        self.branches = "full"
        self.record = self.record_weights = False
        self.last_output: torch.Tensor | None = None
        self.last_weights: torch.Tensor | None = None
        self.q_map = FeatureMap(spec.feature_map, num_heads, head_dim, spec.feature_dim)
        self.k_map = FeatureMap(spec.feature_map, num_heads, head_dim, spec.feature_dim)
        self.reset_parameters()

    def initial_values(self) -> dict[str, torch.Tensor]:
        """Start value of every parameter, by name, on the CPU in float32; none on meta."""
        maps = {"q_map": self.q_map, "k_map": self.k_map}
        return {f"{name}.{key}": x for name, own in maps.items() for key, x in own.initial_values().items()}

    def reset_parameters(self) -> None:
        """Initialise everything that no checkpoint has set."""
        set_start_values(self)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mix tokens: q, k, v [B, H, T, D] of any float dtype -> [B, T, H, D] in q's dtype.

        `real` is bool [B, T], False at padding: no token attends there. What padding itself gives has no meaning.
        """
        dtype = q.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
            if self.branches == "none":
                out = torch.zeros_like(q)
            else:
                fq, fk = self.q_map(q), self.k_map(k)
                if real is not None:
                    fk = fk * real[:, None, :, None]  # after the map: phi(0) is not 0
                if self.record_weights:
                    self.last_weights = quadratic_weights(fq, fk)
                    out = self.last_weights @ v
                else:
                    out = linear_output(fq, fk, v)
        out = out.transpose(1, 2).to(dtype)
        if self.record:
            self.last_output = out
        return out


def encoder_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    mixer_real: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of linear layers: [B, H, T, D] in, [B, T, H, D] out. The mask came in as `mixer_real`."""
    return module.mixer(query, key, value, real=mixer_real), None  # type: ignore[operator]


# Only linear layers' own copies of the configuration name this function: no mask is ever made for it.
AttentionInterface.register(ENCODER_ATTENTION, encoder_attention)


class EncoderAttentionMixin:
    """Turns a native self-attention class into a linear layer."""

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        own = copy.copy(config)
        own._attn_implementation = ENCODER_ATTENTION
        super().__init__(own, layer_idx=layer_idx)  # type: ignore[call-arg]
        heads = config.num_attention_heads
        self.mixer = BidirectionalMixer(config.mixer_spec(), num_heads=heads, head_dim=config.hidden_size // heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        mixer_real: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the native forward; padding is told by `mixer_real` [B, T] alone, and there is no cache."""
        return super().forward(hidden_states, None, None, mixer_real=mixer_real, **kwargs)  # type: ignore[misc]


class EncoderInitMixin:
    """Mixers missing from a checkpoint get their own start values, never transformers' random ones."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (BidirectionalMixer, FeatureMap)):
            set_start_values(module, recurse=False)
        else:
            super()._init_weights(module)  # type: ignore[misc]


class EncoderModelMixin(EncoderInitMixin):
    """Swaps the self-attention of linear layers and tells them which tokens are real."""

    family: Any
    attention_class: type

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        if config.is_decoder or config.add_cross_attention:
            raise ValueError(
                "is_decoder, add_cross_attention: a linearized encoder reads in both directions, and alone"
            )
        config.require_plan()
        super().__init__(config, add_pooling_layer=add_pooling_layer)  # type: ignore[call-arg]
        for index in config.linear_layers:
            self.family.put_attention(self.encoder.layer, index, self.attention_class(config, index))  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the native forward.

        Raises:
            ValueError: a mask that is not [B, T]; linear layers cannot follow an arbitrary one.
        """
        config = self.config  # type: ignore[attr-defined]
        real = None
        if config.linear_layers and attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(
                    "attention_mask: a converted encoder needs [batch, tokens] with 0 at padding, got "
                    f"{tuple(attention_mask.shape)}"
                )
            real = attention_mask.bool()
            if len(config.linear_layers) == config.num_hidden_layers:
                attention_mask = None  # no layer reads it: a mask of T x T is never made
        return super().forward(input_ids, attention_mask, mixer_real=real, **kwargs)  # type: ignore[misc]


class MaskedLMMixin(EncoderInitMixin):
    """A converted encoder under the native head for masked tokens."""

    family: Any
    model_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        setattr(self, self.family.body, self.model_class(config, add_pooling_layer=False))
        self.post_init()  # type: ignore[attr-defined]


ENCODER_MIXINS = (EncoderAttentionMixin, EncoderModelMixin, MaskedLMMixin)
"""What modeling_linearized.py makes the classes of an encoder family from: attention, body, language model."""
