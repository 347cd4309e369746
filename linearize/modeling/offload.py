"""Weights that accelerate keeps on the CPU or on disk, for a module that reads those of its parts itself.

accelerate brings a module's weights when that module is called, and takes them away right after. Kernels read the
weights of a mixer's parts without calling them: they would find none, or memory that is somebody else's by now.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def hooked_parts(module: nn.Module) -> list[nn.Module]:
    """The parts of `module` that accelerate watches over."""
    return [part for part in module._modules.values() if part is not None and "_hf_hook" in part.__dict__]


@contextmanager
def at_hand(parts: list[nn.Module]) -> Iterator[None]:
    """Keep the weights of `parts` where they are computed with, as if all were called now and returned at the end."""
    from accelerate.hooks import ModelHook

    hooks = [part._hf_hook for part in parts]
    brought = []
    try:
        for part, hook in zip(parts, hooks, strict=True):
            hook.pre_forward(part)  # type: ignore[operator, union-attr]
            brought.append((part, hook))
            part._hf_hook = ModelHook()  # type: ignore[assignment]  # a call in between leaves the weights alone
        yield
    finally:
        for part, hook in brought:
            part._hf_hook = hook
            hook.post_forward(part, None)  # type: ignore[operator, union-attr]
