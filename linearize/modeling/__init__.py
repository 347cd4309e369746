"""What a converted model needs to run. The flat files here are what an export copies beside its weights."""

from __future__ import annotations

from pathlib import Path

KERNEL_FILES = ("decayed.py", "delta.py", "linear.py", "quadratic.py", "step.py", "window.py")
"""Torch kernels that an export carries for machines without linearize."""


def register() -> None:
    """Make transformers' Auto classes know converted models. Idempotent."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .configuration_linearized import CONFIGS
    from .modeling_linearized import MODELS

    for family, config in CONFIGS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(config, MODELS[family], exist_ok=True)


def export_files() -> list[Path]:
    """The flat Python files of a converted model, this package's and the kernels'."""
    import linearize_kernels

    own = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")
    kernels = Path(linearize_kernels.__file__).parent
    return [*own, *(kernels / name for name in KERNEL_FILES)]
