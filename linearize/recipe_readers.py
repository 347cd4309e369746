"""What the keys of a recipe may hold: a reader for each key of each section that gives its value in the canonical type.

A reader takes `(value, where)`; see `strict`. The sections themselves are the dataclasses of `recipe_schema`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from linearize.errors import UsageError
from linearize.modeling.mixer_spec import CHOICES, MixerSpec
from linearize.strict import Reader, choice, count, flag, names, number, optional, show, text, whole

MAX_TOKENS = 10**12
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
OBJECTIVES = ("output", "weights", "hidden")
BRANCHES = ("mix", "linear", "both")
OPTIMIZERS = ("adamw", "muon")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def read_fields(instance: Any, section: str, readers: Mapping[str, Reader]) -> None:
    """Check every field of a frozen dataclass and store its canonical value.

    Raises:
        UsageError: a value that its reader refuses.
    """
    for name, reader in readers.items():
        where = f"{section}.{name}" if section else name
        object.__setattr__(instance, name, reader(getattr(instance, name), where))


def instance(cls: type) -> Reader:
    """A section that has been built."""

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, cls):
            raise UsageError(f"{where}: expected a section, got {show(value)}")
        return value

    return read


def _read_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise UsageError(f"{where}: {show(value)} is not a name of letters, digits, dots, dashes and underscores")
    return value


def _read_device(value: Any, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise UsageError(f"{where}: {show(value)} is not one of auto, cpu, cuda, cuda:N")
    return value


def _read_keep(value: Any, where: str) -> str | tuple[int, ...]:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return "none"
    if isinstance(value, str):
        words = value.split()
        if words in (["none"], ["auto"]):
            return words[0]
        if len(words) == 2 and words[0] == "auto" and re.fullmatch(r"[1-9]\d{0,3}", words[1]):
            return f"auto {words[1]}"
        if len(words) == 2 and words[0] == "every" and re.fullmatch(r"[1-9]\d{0,3}", words[1]):
            return f"every {words[1]}"
    if isinstance(value, (list, tuple)):
        index = whole(0, 9999)
        layers = tuple(sorted(index(item, where) for item in value))
        if len(set(layers)) == len(layers):
            return layers
        raise UsageError(f"{where}: a layer is named twice in {show(list(value))}")
    raise UsageError(f"{where}: {show(value)} is not one of none, every N, auto, auto N, or a list such as [0, 3]")


def _of_the_mixer(name: str, kind: str) -> Reader:
    plain: dict[str, Reader] = {"bool": flag, "int": whole(0, 2**20), "float": number(-1e6, 1e6)}
    if name in CHOICES:
        return choice(CHOICES[name])
    return optional(whole(1, 2**16)) if kind == "int | None" else plain[kind]


_SHARE = number(0, 1)
_RATE = number(0, 10, above=True)
_TRAINING: dict[str, Reader] = {
    "tokens": count(0, MAX_TOKENS),
    "batch_tokens": count(1, 2**30),
    "lr": _RATE,
    "mixer_lr": optional(_RATE),
    "warmup": _SHARE,
    "min_lr": _SHARE,
    "clip": number(0, 1e6, above=True),
    "weight_decay": _SHARE,
    "optimizer": choice(OPTIMIZERS),
    "window_dropout": _SHARE,
}
MIXER: dict[str, Reader] = {f.name: _of_the_mixer(f.name, str(f.type)) for f in fields(MixerSpec)}
CALIBRATE: dict[str, Reader] = {"tokens": count(0, 10**8)}
ALIGN: dict[str, Reader] = _TRAINING | {
    "objective": choice(OBJECTIVES),
    "branch": choice(BRANCHES),
    "train": names(("mixer", *ATTENTION)),
}
LORA: dict[str, Reader] = {
    "r": whole(1, 4096),
    "alpha": number(0, 1e5, above=True),
    "dropout": number(0, 0.95),
    "targets": names((*ATTENTION, *MLP)),
}
FINETUNE: dict[str, Reader] = _TRAINING | {
    "full_lr": optional(_RATE),
    "ce": number(0, 1e3),
    "kl": number(0, 1e3),
    "full": names(("mixer", *ATTENTION, *MLP)),
}
RECIPE: dict[str, Reader] = {
    "name": _read_name,
    "paper": text(200),
    "summary": text(300),
    "mixer": instance(MixerSpec),
    "keep_softmax": _read_keep,
    "context": count(2, 2**24),
    "seed": whole(0, 2**32 - 1),
    "device": _read_device,
    "dtype": choice(DTYPES),
    "gradient_checkpointing": flag,
    "repeats": _SHARE,
}
"""Of FINETUNE and RECIPE all but the sections within them, which `recipe_schema` adds."""
