"""Optimiser, schedule, clipping, precision and seeds: what both training stages share."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic as torch_deterministic

BETAS = (0.9, 0.95)
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from what it is for, e.g. (seed, "align", step, layer): no random state is ever carried."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derived_uniform(*parts: object) -> float:
    """A number in [0, 1) from what it is for."""
    return derived_seed(*parts) / 2**63


def learning_rate(step: int, *, steps: int, lr: float, warmup: float, min_lr: float) -> float:
    """Linear warm-up over the share `warmup` of all steps, then a cosine down to `min_lr` * lr at the last step.

    `step` counts from 0; the first step already moves (lr / warm-up steps), the last one runs at min_lr * lr.
    """
    rise = min(max(1, round(warmup * steps)), steps) if warmup > 0 else 0
    if step < rise:
        return lr * (step + 1) / rise
    done = (step - rise + 1) / max(1, steps - rise)
    return lr * (min_lr + (1.0 - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def adamw(groups: Sequence[tuple[Iterable[nn.Parameter], float]], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over (parameters, lr) groups; biases, norms and per-head scalars (fewer than 2 axes) are not decayed.

    A group's peak learning rate stays in its entry `peak`, for `set_learning_rate`.
    """
    entries = []
    for parameters, lr in groups:
        members = list(parameters)
        for wide, decay in ((True, weight_decay), (False, 0.0)):
            part = [p for p in members if (p.ndim >= 2) == wide]
            if part:
                entries.append({"params": part, "lr": lr, "peak": lr, "weight_decay": decay})
    return torch.optim.AdamW(entries, betas=BETAS, weight_decay=0.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, *, steps: int, warmup: float, min_lr: float) -> None:
    """Give every group its rate for step `step` (from 0) of `steps`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps=steps, lr=group["peak"], warmup=warmup, min_lr=min_lr)


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that their joint L2 norm is at most `limit` (0: no limit); the norm before, as a scalar."""
    members = [p for p in parameters if p.grad is not None]
    if not members:
        return torch.zeros(())
    return nn.utils.clip_grad_norm_(members, limit if limit > 0 else math.inf, error_if_nonfinite=False)


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These parameters take gradients within the block; after it they are frozen and hold none."""
    members = list(parameters)
    for parameter in members:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in members:
            parameter.requires_grad_(False)
            parameter.grad = None


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast on a GPU, nothing elsewhere.

    Casts are not cached: a weight used in turn without and with gradients would be cached without them.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms within the block; the settings before it come back after it."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    settings: Any = torch_deterministic
    fill = settings.fill_uninitialized_memory
    workspace = os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        settings.fill_uninitialized_memory = fill
        if workspace is None:
            os.environ.pop(CUBLAS, None)
