"""Norms, gated units and rotations in one launch each while a model trains.

Transformers writes them out: a norm is six kernels forwards and a dozen backwards, each for a few microseconds of work
in a small model, and each a pass over memory in a large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from linearize.modeling.pointwise import epsilon, quick_class

ROWS = 4
"""Of random numbers, on which a module shows that it is the plain formula."""
TOLERANCE = 1e-5


@contextmanager
def in_one_launch(*models: nn.Module) -> Iterator[None]:
    """Within the block modules of native models are those of converted ones, which call kernels (pointwise.py).

    And every norm on a GPU that is x / rms(x) * weight is torch's own kernel for float32 inputs. What a module computes
    is seen from what it gives: some families scale by 1 + weight, or take a mean off first.
    """
    changed: list[Any] = []
    native: list[tuple[Any, type]] = []
    try:
        for model in models:
            for module in model.modules():
                before: Any = type(module)
                if (quick := quick_class(before)) is not None:
                    native.append((module, before))
                    module.__class__ = quick
                if "forward" not in module.__dict__ and is_plain(module):
                    module.forward = partial(_fused, module)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
        for module, before in native:
            module.__class__ = before


def is_plain(module: nn.Module) -> bool:
    """Whether a module is RMSNorm with a float32 weight on a GPU, by the formula that torch has."""
    weight, eps = getattr(module, "weight", None), epsilon(module)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or eps is None:
        return False
    if weight.ndim != 1 or weight.dtype != torch.float32 or not _fast(weight):
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, len(weight), generator=draw).to(weight.device)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        found = module(x)
        return isinstance(found, Tensor) and torch.allclose(found, _norm(x, weight, eps), TOLERANCE, TOLERANCE)


def _fast(weight: Tensor) -> bool:
    return weight.is_cuda


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nnf.rms_norm(x, weight.shape, weight, eps)


def _fused(module: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:  # where the rounding before the weight is part of what the model is
        found: Tensor = type(module).forward(module, x)
        return found
    eps = epsilon(module)
    assert eps is not None
    with torch.autocast(x.device.type, enabled=False):
        return _norm(x, module.weight, eps)
