"""What a converted model needs to run. The flat files here are what an export copies beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KERNEL_FILES = ("decayed.py", "delta.py", "linear.py", "quadratic.py", "step.py", "window.py")
"""Torch kernels that an export carries for machines without linearize."""


def register() -> None:
    """Make transformers' Auto classes know converted models. Idempotent.

    Config classes are registered at once, the model class of a family with its first config: its native code is then
    imported, and not that of all others.
    """
    from transformers import AutoConfig

    from .configuration_linearized import CONFIGS, LinearizedFields

    for config in CONFIGS.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
    LinearizedFields.on_first_use = staticmethod(_register_model)


def _register_model(config: Any) -> None:
    from .family_table import auto_class, lookup
    from .modeling_linearized import MODELS, family_classes

    family = lookup(config)
    auto_class(config).register(type(config), MODELS[family.model_type], exist_ok=True)
    if family.bidirectional:  # an encoder is of use without its head, too
        from transformers import AutoModel

        AutoModel.register(type(config), family_classes(family.model_type).body, exist_ok=True)


def export_files() -> list[Path]:
    """The flat Python files of a converted model, this package's and the kernels'."""
    import linearize_kernels

    own = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")
    kernels = Path(linearize_kernels.__file__).parent
    return [*own, *(kernels / name for name in KERNEL_FILES)]
