"""What the kernel benchmarks time: shapes, inputs, and the definition that every timed op is held against first.

Shapes: B batch, H query heads, K kv heads, T tokens, D head channels, F features, W block of the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHECKED = 512
"""Tokens that a check compares."""
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

    def trained(self, which: str) -> tuple[str, ...]:
        """Leaves that a pass takes gradients for: none going forward, all in "both", the maps' in "maps"."""
        return {"forward": (), "both": tuple(self.leaves), "maps": self.maps}[which]

    def run(self, which: str, upstream: Callable[[Tensor], Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The output, and the gradients of `trained` for upstream(output)."""
        names = self.trained(which)
        for name, x in self.leaves.items():
            x.requires_grad_(name in names)
        if not names:
            with torch.no_grad():
                return self.forward(), ()
        out = (self.maps_forward if which == "maps" and self.maps_forward is not None else self.forward)()
        return out, torch.autograd.grad(out, [self.leaves[name] for name in names], upstream(out), allow_unused=True)


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


def part(full: Tensor, like: Tensor) -> Tensor:
    """Of a tensor at a timed shape, what a run over its last sequence's first tokens has, whose tensor is `like`."""
    full = full.detach()
    return full if full.shape == like.shape else full[-1:][tuple(slice(size) for size in like.shape)]


def check(build: Build, shape: Shape, device: str, which: str) -> str | None:
    """What is wrong with an implementation's output and gradients at the shape that is timed, or None.

    Held against float64 from the same rounded inputs: the last sequence's first CHECKED tokens, whose outputs do not
    depend on later tokens, and the gradients of a loss that reads these alone.
    """
    whole = build(shape, device)
    short = build(replace(shape, batch=1, length=min(CHECKED, shape.length)), device)
    names = whole.trained(which)
    exact = {
        name: part(x, short.leaves[name]).double().requires_grad_(name in names) for name, x in whole.leaves.items()
    }
    wanted = short.reference(exact)
    upstream = drawn(*wanted.shape, device=device, seed=9)

    def early(out: Tensor) -> Tensor:
        full = torch.zeros(out.shape, dtype=out.dtype, device=out.device)
        full[-1:, :, : wanted.shape[2]] = upstream.to(out.dtype)
        return full

    found, ours = whole.run(which, early)
    if not bool(found.isfinite().all()):
        return "output is not finite"
    error = relative_error(found[-1:, :, : wanted.shape[2]], wanted)
    if not error <= FORWARD_ERROR:
        return f"output off by {error:.1e}"
    rounded = upstream.to(found.dtype).double()
    theirs = torch.autograd.grad(wanted, [exact[n] for n in names], rounded, allow_unused=True) if names else ()
    for name, a, b in zip(names, ours, theirs, strict=True):
        if a is None or b is None:
            if a is not b:
                return f"gradient of {name}: only one side has one"
            continue
        error = relative_error(part(a, b), b)
        if not error <= GRADIENT_ERROR:
            return f"gradient of {name} off by {error:.1e}"
    return None
