"""The schema of a recipe: its sections as frozen dataclasses, each checking itself when it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, TypeVar

from linearize.errors import UsageError
from linearize.modeling.mixer_spec import MixerSpec
from linearize.recipe_readers import ALIGN, ATTENTION, CALIBRATE, FINETUNE, LORA, MIXER, RECIPE, instance, read_fields
from linearize.strict import Reader, optional, show, unknown_key

_OUT_OF_REACH = {"output": ("o_proj",), "weights": ("v_proj", "o_proj"), "hidden": ()}
"""Projections that lie behind the point where each alignment objective is measured."""

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """What is set from the teacher's own attention before any training: gates, scales, shares. No gradients."""

    tokens: int = 32_000
    """Tokens to read, rounded to whole sequences of `context` (one at least); 0 skips the stage."""

    def __post_init__(self) -> None:
        read_fields(self, "calibrate", CALIBRATE)


@dataclass(frozen=True, kw_only=True)
class Align:
    """Attention transfer: each layer learns the teacher's attention on the teacher's own hidden states."""

    tokens: int = 4_000_000
    """Tokens to train on; 0 skips the stage."""
    batch_tokens: int = 16_384
    """Tokens of one optimiser step, rounded down to whole sequences of `context` (one at least)."""
    lr: float = 1e-3
    """Peak learning rate."""
    mixer_lr: float | None = None
    """Peak learning rate of the mixer's own parameters; None: `lr`."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0 to `lr`."""
    min_lr: float = 0.1
    """Share of `lr` that is left at the end of the cosine."""
    clip: float = 1.0
    """Largest norm of the gradient, per layer."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    optimizer: str = "adamw"
    """adamw | muon (for the matrices of projections; AdamW for the rest)."""
    objective: str = "output"
    """output: normalised MSE of the heads' outputs | weights: cross-entropy of the attention weights | hidden: L2
    behind o_proj."""
    branch: str = "mix"
    """What is matched: mix (window and linear together) | linear (the linear branch alone) | both (their sum)."""
    window_dropout: float = 0.0
    """Probability that a step hides the window."""
    train: tuple[str, ...] = ("mixer",)
    """What is trained: the mixer's own parameters and any of q_proj, k_proj, v_proj, o_proj."""

    def __post_init__(self) -> None:
        read_fields(self, "align", ALIGN)
        if self.tokens and not self.train:
            raise UsageError("align.train: nothing to train", "Name mixer or a projection, or set align.tokens to 0.")
        for name in self.train:
            if name in _OUT_OF_REACH[self.objective]:
                raise UsageError(
                    f"align.train: {name} gets no gradient from the objective {self.objective!r}", "Use hidden."
                )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters, merged into the weights at the end of finetuning."""

    r: int = 8
    """Rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ATTENTION
    """Projections that get an adapter."""

    def __post_init__(self) -> None:
        read_fields(self, "finetune.lora", LORA)
        if not self.targets:
            raise UsageError("finetune.lora.targets: empty", "For no adapters set finetune.lora to null.")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """End-to-end training of the converted model on next tokens, on the teacher's logits, or on both."""

    tokens: int = 6_000_000
    """Tokens to train on; 0 skips the stage."""
    batch_tokens: int = 16_384
    """Tokens of one optimiser step, rounded down to whole sequences of `context` (one at least)."""
    lr: float = 1e-4
    """Peak learning rate of the adapters."""
    full_lr: float | None = None
    """Peak learning rate of what `full` names; None: `lr`."""
    mixer_lr: float | None = None
    """Peak learning rate of the mixer's own parameters, where `full` names it; None: `full_lr`."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0 to its peak."""
    min_lr: float = 0.1
    """Share of the peak that is left at the end of the cosine."""
    clip: float = 1.0
    """Largest norm of the gradient, over all trained parameters."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    optimizer: str = "adamw"
    """adamw | muon (for the matrices of projections; AdamW for the rest)."""
    window_dropout: float = 0.0
    """Probability that a step hides the window in all layers, so that the linear branches carry the model alone."""
    ce: float = 1.0
    """Weight of the cross-entropy on the next token."""
    kl: float = 0.0
    """Weight of KL(teacher || student) per token."""
    lora: Lora | None = field(default_factory=Lora)
    """Adapters; None: none."""
    full: tuple[str, ...] = ()
    """What is trained in full: mixer and any projection that has no adapter."""

    def __post_init__(self) -> None:
        read_fields(self, "finetune", _FINETUNE)
        if self.tokens and self.lora is None and not self.full:
            raise UsageError("finetune: nothing to train", "Set finetune.lora or finetune.full.")
        if self.tokens and self.ce == 0 and self.kl == 0:
            raise UsageError("finetune: ce and kl are both 0, so there is no loss", "Give one of them a weight.")
        both = sorted(set(self.full) & set(self.lora.targets)) if self.lora else []
        if both:
            raise UsageError(f"finetune.full: {both[0]} is in finetune.lora.targets too", "Name it in one of the two.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to turn a softmax model into a linear one.

    Raises:
        UsageError: a value of the wrong type or out of range, or values that contradict each other.
    """

    name: str
    """Short name: letters, digits, dots, dashes and underscores."""
    paper: str = ""
    """Where the idea is from, such as `arXiv:2410.10254`."""
    summary: str = ""
    """One line for people."""
    mixer: MixerSpec
    """The linear attention that replaces softmax."""
    keep_softmax: str | tuple[int, ...] = "none"
    """Layers that stay as they are: none | every N (the last of each N layers) | auto (a quarter of them, those whose
    loss costs the model most) | auto N | a list of indices from 0."""
    context: int = 1024
    """Tokens of one training sequence."""
    repeats: float = 0.0
    """Share of the training sequences in which passages come again further on: see `linearize.repeats`."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    dtype: str = "auto"
    """Type of the exported weights: auto (the teacher's) | float32 | bfloat16 | float16."""
    gradient_checkpointing: bool = False
    """Recompute activations in finetuning: less memory, a third more time."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    """Before training."""
    align: Align = field(default_factory=Align)
    """First stage."""
    finetune: Finetune = field(default_factory=Finetune)
    """Second stage."""

    def __post_init__(self) -> None:
        read_fields(self, "", _RECIPE)
        if self.align.window_dropout and not self.mixer.window:
            raise UsageError("align.window_dropout: the mixer has no window to hide (mixer.window is 0)")
        if self.finetune.window_dropout and not self.mixer.window:
            raise UsageError("finetune.window_dropout: the mixer has no window to hide (mixer.window is 0)")
        if self.mixer.write == "none" and (self.align.window_dropout or self.finetune.window_dropout):
            raise UsageError("window_dropout: without the window this mixer has nothing (mixer.write is none)")
        if self.mixer.write == "none" and self.align.branch != "mix":
            raise UsageError("align.branch: the mixer has no linear branch (mixer.write is none)", "Use mix.")
        if self.align.branch != "mix" and not self.mixer.window:
            raise UsageError(f"align.branch: {self.align.branch!r} needs a window (mixer.window is 0)", "Use mix.")
        if self.align.objective == "weights" and self.mixer.normaliser not in ("shared", "own"):
            raise UsageError(
                "align.objective: 'weights' needs attention weights that sum to one "
                f"(mixer.normaliser is {self.mixer.normaliser!r})",
                "Use output or hidden.",
            )

    def softmax_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices, from 0 and rising, of the layers that keep softmax in a model of `num_layers`.

        `auto` is known only once the teacher has been measured; until then as many layers stand in for them, evenly.

        Raises:
            UsageError: an index that the model does not have, or an `every N` that keeps nothing.
        """
        if self.keep_softmax == "none":
            return ()
        if self.automatic:
            return even_layers(num_layers, self.automatic_keep(num_layers))
        if isinstance(self.keep_softmax, str):
            step = int(self.keep_softmax.split()[1])
            if step > num_layers:
                raise UsageError(
                    f"keep_softmax: {self.keep_softmax!r} keeps no layer of a model with {num_layers}",
                    f"Use every {num_layers} or less, a list of layers, or none.",
                )
            return tuple(range(step - 1, num_layers, step))
        for index in self.keep_softmax:
            if index >= num_layers:
                raise UsageError(
                    f"keep_softmax: the model has no layer {index}", f"Its layers are 0 to {num_layers - 1}."
                )
        return self.keep_softmax

    @property
    def automatic(self) -> bool:
        """Whether the layers to keep are chosen by measuring the teacher."""
        return isinstance(self.keep_softmax, str) and self.keep_softmax.startswith("auto")

    def automatic_keep(self, num_layers: int) -> int:
        """How many layers `auto` keeps: a quarter (one at least), or the number it names.

        Raises:
            UsageError: no layer would be left to convert.
        """
        words = str(self.keep_softmax).split()
        keep = int(words[1]) if len(words) == 2 else max(1, round(num_layers / 4))
        if keep >= num_layers:
            raise UsageError(f"keep_softmax: {self.keep_softmax!r} leaves none of {num_layers} layers to convert")
        return keep

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values (lists, no tuples) that `recipe_from_dict` and a YAML file take back."""
        return _plain(asdict(self))

    def digest(self) -> str:
        """SHA-256, in hex, of the canonical JSON of every value: equal for equal recipes however they were written."""
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def even_layers(num_layers: int, keep: int) -> tuple[int, ...]:
    """`keep` of `num_layers`, evenly spread, the last of each group: `every k` where k divides them."""
    return tuple((n + 1) * num_layers // keep - 1 for n in range(keep))


def build(cls: type[Section], values: Any, section: str) -> Section:
    """One dataclass of the schema from plain values; unknown and missing keys are named."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{section}: expected a section of key: value lines, got {show(values)}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_key(section, str(key), known, dotted_keys())
    for name, spec in known.items():
        if name not in values and spec.default is MISSING and spec.default_factory is MISSING:
            raise UsageError(f"{section + '.' if section else ''}{name}: missing", "Write this key.")
    ready = dict(values)
    for name, inner in _SECTIONS.items():
        parent, _, leaf = name.rpartition(".")
        if parent == section and leaf in ready and not (name == "finetune.lora" and ready[leaf] in (None, "none")):
            ready[leaf] = build(inner, ready[leaf], name)
    if cls is MixerSpec:
        ready = {key: MIXER[key](value, f"mixer.{key}") for key, value in ready.items()}
    try:
        return cls(**ready)
    except ValueError as error:  # MixerSpec's own checks
        raise UsageError(str(error)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


_FINETUNE: dict[str, Reader] = FINETUNE | {"lora": optional(instance(Lora))}
_RECIPE: dict[str, Reader] = RECIPE | {
    "calibrate": instance(Calibrate),
    "align": instance(Align),
    "finetune": instance(Finetune),
}
_SECTIONS: dict[str, type] = {
    "mixer": MixerSpec,
    "calibrate": Calibrate,
    "align": Align,
    "finetune": Finetune,
    "finetune.lora": Lora,
}


@lru_cache(maxsize=1)
def dotted_keys() -> tuple[str, ...]:
    """Every key of the schema, written out."""
    keys = [f.name for f in fields(Recipe)]
    for section, cls in _SECTIONS.items():
        keys += [f"{section}.{f.name}" for f in fields(cls)]
    return tuple(keys)
