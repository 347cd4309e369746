"""Configuration of a converted model: the native one, a plan of its layers, and the axes of its mixer, all flat.

A converted Llama has model_type `linearized_llama`; `layer_mixers` says `linear` or `softmax` for every layer, and
`mixer_<axis>` holds each axis of MixerSpec.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Any, ClassVar

from .family_table import FAMILIES, PREFIX, lookup
from .feature_maps import feature_size
from .mixer_spec import AXES, MixerSpec

OLDEST = (5, 14)
"""The release of transformers from which on weights go by the names that this code knows."""


def require_transformers(found: str) -> None:
    """Raise ImportError for a version of transformers before OLDEST: some weights would come back random."""
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(f"linearized models need transformers {needed} or newer, and this is {found}")


require_transformers(metadata.version("transformers"))


@dataclass(kw_only=True)
class LinearizedFields:
    """What a converted model's configuration adds. Defaults are those of MixerSpec; see there for the meaning."""

    on_first_use: ClassVar[Callable[[Any], None] | None] = None
    """Called with each new config; what `register` puts here makes its model class known to transformers."""

    layer_mixers: list[str] | None = None
    mixer_feature_map: str = MixerSpec.feature_map
    mixer_key_map: str = MixerSpec.key_map
    mixer_feature_dim: int | None = MixerSpec.feature_dim
    mixer_state_heads: str = MixerSpec.state_heads
    mixer_rope: bool = MixerSpec.rope
    mixer_own_qk: bool = MixerSpec.own_qk
    mixer_decay: str = MixerSpec.decay
    mixer_decay_power: float | int = MixerSpec.decay_power
    mixer_write: str = MixerSpec.write
    mixer_negative_eigenvalues: bool = MixerSpec.negative_eigenvalues
    mixer_dt_gain: bool = MixerSpec.dt_gain
    mixer_normaliser: str = MixerSpec.normaliser
    mixer_window: int = MixerSpec.window
    mixer_sinks: int = MixerSpec.sinks
    mixer_mix: str = MixerSpec.mix
    mixer_coverage: str = MixerSpec.coverage
    mixer_window_weight: float | int = MixerSpec.window_weight

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_mixers is None:
            self.layer_mixers = ["linear"] * self.num_hidden_layers  # type: ignore[attr-defined]
        self.require_plan()
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if (announce := type(self).on_first_use) is not None:
            announce(self)

    def require_plan(self) -> None:
        """Compare the plan with the number of layers, which from_pretrained may set after the config was made.

        Raises:
            ValueError: they do not fit, or an entry is none.
        """
        layers, plan = self.num_hidden_layers, self.layer_mixers or []  # type: ignore[attr-defined]
        if len(plan) != layers or set(plan) - {"linear", "softmax"}:
            raise ValueError(f"layer_mixers: needs {layers} entries, each linear or softmax; got {plan}")

    def mixer_spec(self) -> MixerSpec:
        """The mixer of the linear layers.

        Raises:
            ValueError: the axes contradict each other.
        """
        return MixerSpec(**{axis: getattr(self, f"mixer_{axis}") for axis in AXES})

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the linear layers."""
        return [i for i, mixer in enumerate(self.layer_mixers or ()) if mixer == "linear"]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers', with the code files that `auto_map` names, so that what is saved loads without linearize.

        Classes that came from an export's own files are left to transformers, which copies those.
        """
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        files = getattr(sys.modules.get(__package__ or ""), "export_files", None)
        if files is not None and getattr(self, "auto_map", None):
            for path in files():
                shutil.copyfile(path, os.path.join(save_directory, path.name))


@cache
def config_class(model_type: str) -> Any:
    """The converted configuration of a native model type; imports transformers' own of that family.

    Raises:
        KeyError: a family that is not in the table.
    """
    family = FAMILIES[model_type]
    native = getattr(
        import_module(f"transformers.models.{family.module}.configuration_{family.module}"), family.config_class
    )
    return type(
        f"Linearized{family.name}Config",
        (LinearizedFields, native),
        {"__module__": __name__, "__doc__": f"{family.name} with linear layers.", "model_type": PREFIX + model_type},
    )


class ByFamily(Mapping[str, Any]):
    """Something for every model type of the table, made when it is asked for."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __getitem__(self, model_type: str) -> Any:
        return self._make(model_type)

    def __contains__(self, model_type: object) -> bool:
        return model_type in FAMILIES

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILIES)

    def __len__(self) -> int:
        return len(FAMILIES)


CONFIGS = ByFamily(config_class)


def __getattr__(name: str) -> Any:
    """LinearizedLlamaConfig and the like, by name: for saved models, pickles and imports."""
    for model_type, family in FAMILIES.items():
        if name == f"Linearized{family.name}Config":
            return config_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


NOT_CARRIED = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path")


def linearized_config(native: Any, *, layer_mixers: list[str], spec: MixerSpec) -> Any:
    """The converted model's configuration, everything of the teacher's kept.

    Args:
        native: configuration of a supported family.
        layer_mixers: `linear` or `softmax` for every layer.
        spec: the mixer of the linear layers.

    Raises:
        KeyError: a family without a converted class.
    """
    values = {k: v for k, v in native.to_dict().items() if k not in NOT_CARRIED}
    values |= {f"mixer_{axis}": value for axis, value in spec.as_dict().items()}
    config = CONFIGS[native.model_type](**values, layer_mixers=list(layer_mixers))
    config._attn_implementation = native._attn_implementation
    return config


def head_sizes(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and channels of a head."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def layer_state_bytes(config: Any, spec: MixerSpec, *, dtype_bytes: int = 2) -> int:
    """Bytes one linear layer keeps for one sequence; window keys and values in the model's dtype, the rest float32.

    None of it in an encoder, which reads every sequence whole.
    """
    if lookup(config).bidirectional:
        return 0
    heads, kv_heads, width = head_sizes(config)
    state_heads = heads if spec.state_heads == "query" else kv_heads
    features = 0 if spec.write == "none" else feature_size(spec.feature_map, width, spec.feature_dim)
    values = width + (spec.normaliser in ("shared", "own"))
    total = 4 * state_heads * features * values + 2 * (2 * spec.window + spec.sinks) * kv_heads * width * dtype_bytes
    if spec.lagged:
        slots = 2 * spec.window * state_heads
        total += 4 * slots * {"none": 0, "channel": features}.get(spec.decay, 1)
        total += 4 * slots * (spec.write == "delta")
    return total + 8  # the position


def state_bytes(config: Any, *, dtype_bytes: int = 2) -> int:
    """Bytes all linear layers keep for one sequence, whatever its length."""
    return len(config.linear_layers) * layer_state_bytes(config, config.mixer_spec(), dtype_bytes=dtype_bytes)


def kv_bytes(config: Any, tokens: int, *, dtype_bytes: int = 2, layers: int | None = None) -> int:
    """Bytes of a softmax cache of `tokens` for one sequence, in all layers or in `layers` of them; 0 for an encoder."""
    if lookup(config).bidirectional:
        return 0
    _, kv_heads, width = head_sizes(config)
    return 2 * (config.num_hidden_layers if layers is None else layers) * kv_heads * width * tokens * dtype_bytes
