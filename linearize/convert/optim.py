"""Optimiser, schedule, clipping, precision and seeds: what both training stages share."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic as torch_deterministic

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
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
    entries: list[dict[str, Any]] = []
    for parameters, lr in groups:
        members = list(parameters)
        for wide, decay in ((True, weight_decay), (False, 0.0)):
            part = [p for p in members if (p.ndim >= 2) == wide]
            if part:
                entries.append({"params": part, "lr": lr, "peak": lr, "weight_decay": decay})
    # One launch a group: a small model's step is over before the host has launched a dozen.
    fused = bool(entries) and all(p.is_cuda for entry in entries for p in entry["params"])
    return torch.optim.AdamW(entries, betas=BETAS, weight_decay=0.0, fused=fused or None)


class Optimizers:
    """Several optimisers that share out the parameters, handled as one."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What each parameter's own optimiser remembers of it; the inner dictionaries are the members'."""
        return {p: m.state[p] for m in self.members for group in m.param_groups for p in group["params"]}

    def step(self) -> None:
        """One step of each."""
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)


AnyOptimizer = torch.optim.Optimizer | Optimizers
"""What a stage steps with."""


def rate_groups(
    parameters: Mapping[str, nn.Parameter], lr: float, mixer_lr: float | None
) -> list[tuple[Mapping[str, nn.Parameter], float]]:
    """(parameters by name, peak lr): the mixers' own parameters apart, if they have a rate of their own."""
    if mixer_lr is None:
        return [(parameters, lr)]
    own = {name: p for name, p in parameters.items() if "mixer" in name.split(".")}
    return [({name: p for name, p in parameters.items() if name not in own}, lr), (own, mixer_lr)]


def make_optimizer(
    kind: str, groups: Sequence[tuple[Mapping[str, nn.Parameter], float]], *, weight_decay: float
) -> AnyOptimizer:
    """The optimiser of a stage over (parameters by name, peak lr) groups.

    `adamw` is AdamW for everything. `muon` is Muon (momentum, orthogonalised; Jordan 2024) for the matrices of
    projections, with steps as large as AdamW's would be (arXiv 2502.16982, eq. 4), and AdamW for the rest: gates, maps,
    scales and adapters.
    """
    if kind == "adamw":
        return adamw([(members.values(), lr) for members, lr in groups], weight_decay=weight_decay)
    matrices, rest = [], []
    for members, lr in groups:
        # Whatever the family calls its projections: what is neither the mixer's own nor an adapter's.
        wide = [
            p for name, p in members.items() if p.ndim == 2 and not {"mixer", "lora_A", "lora_B"} & {*name.split(".")}
        ]
        if wide:
            matrices.append({"params": wide, "lr": lr, "peak": lr, "weight_decay": weight_decay})
        chosen = {id(p) for p in wide}
        rest.append(([p for p in members.values() if id(p) not in chosen], lr))
    others = [(members, lr) for members, lr in rest if members]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(torch.optim.Muon(matrices, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(adamw(others, weight_decay=weight_decay))
    return Optimizers(*made)


def set_learning_rate(optimizer: AnyOptimizer, step: int, *, steps: int, warmup: float, min_lr: float) -> None:
    """Give every group its rate for step `step` (from 0) of `steps`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps=steps, lr=group["peak"], warmup=warmup, min_lr=min_lr)


def highest_rate(optimizer: AnyOptimizer) -> float:
    """The learning rate of the group that has the highest one now."""
    return max(float(group["lr"]) for group in optimizer.param_groups if group["params"])


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
def fast_products() -> Iterator[None]:
    """fp32 matrix products in TF32 within the block, where the GPU has it: training's own noise is far larger."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
