"""What the kernel benchmarks time: shapes, inputs, and the definition that every timed op is held against first.

Shapes: B batch, H query heads, K kv heads, T tokens, D head channels, F features, W block of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

CHECKED = 512
"""Tokens of the check: eight blocks (some peers want multiples of 128)."""
FORWARD_ERROR, GRADIENT_ERROR = 1e-2, 3e-2
"""Relative RMSE against float64 that bfloat16 products may have; an op beyond it is not timed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one attention layer and its input."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    feature_dim: int = 64
    window: int = 64

    @property
    def name(self) -> str:
        """Batch x tokens, and the head size where it is not 128, the kv heads where they are not 8."""
        apart = "" if self.head_dim == 128 else f" d{self.head_dim}"
        return f"{self.batch}x{self.length}{apart}" + ("" if self.kv_heads != self.heads else " mha")

    @property
    def token_heads(self) -> int:
        """Tokens times query heads: what nanoseconds are divided by."""
        return self.batch * self.length * self.heads


MAIN = tuple(Shape(batch=b, length=t) for b, t in ((16, 2048), (4, 8192), (1, 8192), (1, 32768)))
"""Llama-3-8B's heads."""
SMALL = tuple(Shape(batch=b, length=t, heads=8, kv_heads=2, head_dim=64) for b, t in ((16, 8192), (4, 32768)))
"""llama-25m's heads."""
EQUAL = tuple(replace(s, kv_heads=s.heads) for s in MAIN)
"""As many kv heads as heads: what libraries without grouped queries are measured at."""


@dataclass
class Subject:
    """One implementation at one shape, ready to run.

    `forward` gives the output [B, H, T, D]; `leaves` are the tensors that its gradient is taken for, in the order of
    `names`; `maps` says which of them alignment trains.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    reference: Callable[[dict[str, Tensor]], Tensor]
    maps: tuple[str, ...] = ()
    maps_forward: Callable[[], Tensor] | None = None
    note: str = ""
    passes: Sequence[str] = field(default=("forward", "both"))


Build = Callable[[Shape, str], Subject]


def inputs(shape: Shape, device: str, *, seed: int = 0) -> dict[str, Tensor]:
    """q [B, H, T, D], k, v [B, K, T, D], bfloat16, as a model gives them: views of [B, T, heads, D]."""
    made = torch.Generator(device).manual_seed(seed)

    def heads(count: int) -> Tensor:
        size = (shape.batch, shape.length, count, shape.head_dim)
        x = torch.randn(size, generator=made, device=device, dtype=torch.float32)
        return x.bfloat16().transpose(1, 2).requires_grad_()

    return {"q": heads(shape.heads), "k": heads(shape.kv_heads), "v": heads(shape.kv_heads)}


def drawn(*size: int, device: str, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers [*size], float32, on `device`."""
    made = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=made, device=device) * scale


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, infinite where something is not finite."""
    found, wanted = found.detach(), wanted.detach()
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(difference) if bool(difference.isfinite()) else float("inf")


def check(build: Build, shape: Shape, device: str = "cuda", *, backward: bool = True) -> str | None:
    """What is wrong with an implementation's output and gradients at a short length, or None.

    Against float64, from the same rounded inputs.
    """
    subject = build(replace(shape, batch=1, length=CHECKED), device)
    exact = {name: x.detach().double().requires_grad_() for name, x in subject.leaves.items()}
    wanted, found = subject.reference(exact), subject.forward()
    error = relative_error(found, wanted)
    if not error <= FORWARD_ERROR:
        return f"output off by {error:.1e}"
    if not backward or "both" not in subject.passes:
        return None
    upstream = drawn(*wanted.shape, device=device, seed=9)
    theirs = torch.autograd.grad(wanted, list(exact.values()), upstream.double(), allow_unused=True)
    ours = torch.autograd.grad(found, list(subject.leaves.values()), upstream.to(found.dtype), allow_unused=True)
    for name, a, b in zip(subject.leaves, ours, theirs, strict=True):
        if a is None or b is None:
            if a is not b:
                return f"gradient of {name}: only one side has one"
            continue
        error = relative_error(a, b)
        if not error <= GRADIENT_ERROR:
            return f"gradient of {name} off by {error:.1e}"
    return None


def check_prefix(build: Build, shape: Shape, output: Tensor, device: str) -> str | None:
    """Whether the output at the timed shape is finite, and its last row's first tokens are those of a short run.

    Outputs do not depend on later tokens, so a short float64 run tells what a long one must begin with.
    """
    if not bool(output.isfinite().all()):
        return "output is not finite"
    whole = build(shape, device)
    short = build(replace(shape, batch=1, length=min(CHECKED, shape.length)), device)
    exact: dict[str, Tensor] = {}
    for name, x in short.leaves.items():
        full = whole.leaves[name].detach()
        if full.shape != x.shape:  # has a batch, first, and tokens somewhere
            full = full[-1:][tuple(slice(size) for size in x.shape)]
        exact[name] = full.double()
    error = relative_error(output[-1:, :, :CHECKED], short.reference(exact))
    return None if error <= FORWARD_ERROR else f"output of the timed run off by {error:.1e}"
