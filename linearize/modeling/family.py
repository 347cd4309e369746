"""What has to be said of a family of models for its attention to be replaced: where its parts lie, and what they do.

The rows are in family_table.py. Both files need nothing but the standard library, so that configs are judged without
torch; methods take models as they find them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

PREFIX = "linearized_"
"""Before the native model_type in a converted model's config."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What recipes call the projections of attention, whatever the family calls them."""
TASKS = {"ForCausalLM": "AutoModelForCausalLM", "ForMaskedLM": "AutoModelForMaskedLM"}
"""Transformers' Auto class of each task."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A value of the config that linear layers cannot carry."""

    key: str
    allowed: tuple[Any, ...]
    """Values that are fine; a key that is absent is fine too."""
    reason: str
    """After "the teacher's <key> is <value>: "."""
    hint: str = ""
    """What to do."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A native architecture whose attention can be replaced layer by layer.

    Paths are dotted attribute names: of `body` and `head` from the model, of `layers` and `embedding` from the body, of
    `attention` and the projections from one layer. Names of classes are those of transformers; empty ones follow from
    `name`.
    """

    model_type: str
    """The native `model_type`, the key of every registry."""
    name: str
    """Converted classes are called Linearized<name>Config, ...Attention, ...Model and ...<task>."""
    task: str = "ForCausalLM"
    module: str = ""
    """Of transformers.models; empty: the model_type."""
    config_class: str = ""
    attention_class: str = ""
    body_class: str = ""
    task_class: str = ""

    body: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    projections: Mapping[str, str] = field(default_factory=dict)
    """Where each of PROJECTIONS lies, if not under that name in the attention; fused ones share a path. Of an MLP, too,
    where gate_proj, up_proj and down_proj go by other names."""

    arguments: tuple[str, ...] = ("position_embeddings", "attention_mask")
    """Positional arguments of the attention's forward after the hidden states."""
    cache: str = "past_key_values"
    """What that forward calls the cache."""
    query_scaled: bool = False
    """Whether queries come scaled, so that the attention's own factor is one."""
    deaf_layers: bool = False
    """Whether a layer hands no keyword that it does not know on to its attention."""
    rope: bool = True
    """Whether queries and keys are rotated; where not, positions are learned or none."""
    rope_layers: str = ""
    """Config key with a truth value per layer, where only some layers rotate."""
    explicit_positions: bool = False
    """Whether the body must be given position_ids, for it would read them off the attention mask."""
    packs: bool = True
    """Whether softmax layers keep packed documents apart by position_ids; where not, they are given a mask."""
    bidirectional: bool = False
    """Whether tokens see later ones: an encoder."""

    tied: Mapping[str, str] = field(default_factory=dict)
    """Where the config ties embeddings: tensors, and the ones that they are; empty: the head is the input embedding."""
    spare: tuple[str, ...] = ()
    """Beginnings of names in its files that the task has no use for."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Endings of names in files, old ones among them, and what they are called in the model now."""

    sliding: str = "none"
    """Which layers have the teacher's own sliding window: none | all | listed (by `layer_types`)."""
    softcap: str = ""
    """Config key of the bound c on attention scores: softmax(c tanh(s / c))."""
    logit_divisor: str = ""
    """Config key of what the head's output is divided by."""
    logit_cap: str = ""
    """Config key of the bound on logits, as `softcap`."""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that go by other names than hidden_size, num_hidden_layers, num_attention_heads, ..."""
    refused: tuple[Refusal, ...] = ()
    note: str = ""
    """What a plan says of the family, one line."""

    def __post_init__(self) -> None:
        found = {name: f"{self.attention}.{name}" for name in PROJECTIONS} | dict(self.projections)
        object.__setattr__(self, "projections", found)
        for attribute, value in (
            ("module", self.model_type),
            ("config_class", f"{self.name}Config"),
            ("attention_class", f"{self.name}Attention"),
            ("body_class", f"{self.name}Model"),
            ("task_class", f"{self.name}{self.task}"),
        ):
            if not getattr(self, attribute):
                object.__setattr__(self, attribute, value)
        if not self.tied:
            object.__setattr__(self, "tied", {f"{self.head}.weight": f"{self.body}.{self.embedding}.weight"})

    # ------------------------------------------------------------------------------------------ parts of a model

    def body_of(self, model: Any) -> Any:
        """Everything but the head: gives `last_hidden_state`."""
        return attrgetter(self.body)(model)

    def layers_of(self, model: Any) -> Any:
        """The list of layers."""
        return attrgetter(self.layers)(self.body_of(model))

    def attention_of(self, model: Any, layer: int) -> Any:
        """The attention module of a layer."""
        return attrgetter(self.attention)(self.layers_of(model)[layer])

    def put_attention(self, layers: Any, layer: int, attention: Any) -> None:
        """Put another attention module into a layer of `layers`, the list."""
        owner, _, leaf = self.attention.rpartition(".")
        setattr(attrgetter(owner)(layers[layer]) if owner else layers[layer], leaf, attention)

    def layer_path(self, layer: int) -> str:
        """The name of a layer in the model, as in names of its parameters."""
        return f"{self.body}.{self.layers}.{layer}"

    def attention_path(self, layer: int) -> str:
        """The name of a layer's attention in the model."""
        return f"{self.layer_path(layer)}.{self.attention}"

    def current_name(self, name: str) -> str:
        """The name that a tensor of the family's files has in its model today."""
        for old, new in self.renamed.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def layer_index(self, name: str) -> int | None:
        """The layer that a parameter of this name lies in, or None."""
        prefix = f"{self.body}.{self.layers}."
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        return int(number) if number.isdecimal() else None

    def project_heads(self, attention: Any, heads: Any) -> Any:
        """What the attention module gives for the outputs of its heads [B, T, H, D]."""
        projection = self.head_projection(attention)
        flat = heads.flatten(-2)
        return flat if projection is None else projection(flat)

    def head_projection(self, attention: Any) -> Any:
        """The attention module's own o_proj, or None where it is a part of another module."""
        inside, path = f"{self.attention}.", self.projections["o_proj"]
        return attrgetter(path.removeprefix(inside))(attention) if path.startswith(inside) else None

    def plain_head(self, config: Any) -> bool:
        """Whether logits are the head's output as it is."""
        return not self._value(config, self.logit_cap) and self._value(config, self.logit_divisor) in (None, 1, 1.0)

    def logits(self, model: Any, hidden: Any) -> Any:
        """Logits of last hidden states [..., hidden], as the whole model would give them."""
        found = attrgetter(self.head)(model)(hidden)
        divisor, cap = (self._value(model.config, key) for key in (self.logit_divisor, self.logit_cap))
        if divisor is not None:
            found = found / divisor
        return found if cap is None else (found / cap).tanh() * cap

    # --------------------------------------------------------------------------------------------------- of a config

    def rotates(self, config: Any, layer: int) -> bool:
        """Whether queries and keys of a layer are rotated."""
        return self.rope and (not self.rope_layers or bool(getattr(config, self.rope_layers)[layer]))

    def rope_of(self, config: Any, layer: int) -> Mapping[str, Any]:
        """The RoPE parameters of a layer; some families have one set for each kind of layer."""
        found = getattr(config, "rope_parameters", None) or {}
        kinds = getattr(config, "layer_types", None)
        by_kind = found.get(kinds[layer]) if kinds else None
        return by_kind if isinstance(by_kind, Mapping) else found

    def window_of(self, config: Any, layer: int) -> int | None:
        """The teacher's own sliding window in this layer, in tokens; None: full attention."""
        window = getattr(config, "sliding_window", None)
        if self.sliding == "all" or (self.sliding == "listed" and config.layer_types[layer] == "sliding_attention"):
            return window
        return None

    def most_positions(self, config: Any) -> int | None:
        """Tokens of a text beyond which no position was learned; None: positions are rotations."""
        return None if self.rope or self.bidirectional else config.max_position_embeddings

    def cap_of(self, config: Any) -> float | None:
        """The bound on attention scores, or None."""
        return self._value(config, self.softcap)

    @property
    def implementation(self) -> str:
        """The attention implementation of transformers that computes what a config says: its sdpa drops a bound.

        By the family, as its converted classes support it, also where a config sets no bound.
        """
        return "eager" if self.softcap else "sdpa"

    @staticmethod
    def _value(config: Any, key: str) -> Any:
        return getattr(config, key, None) if key else None
