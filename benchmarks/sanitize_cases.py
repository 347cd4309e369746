"""Small calls of every op, forward and backward, for compute-sanitizer; and faults that it must find.

    python -m benchmarks.sanitize_cases OP

prints, as one JSON line, the kernels that ran. The shapes are those of the default configurations (D = 128, 64 features
a sign, blocks of 64) with few heads and a length that no block divides.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.kernels_shapes import Build, Shape, drawn

SHAPE = Shape(batch=1, length=200, heads=4, kv_heads=2)
PLANTED = """
extern "C" __global__ void planted_race(int* out) {
    __shared__ volatile int cells[128];
    cells[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = cells[(threadIdx.x + 64) % 128];
}
extern "C" __global__ void planted_overrun(int* out) { out[threadIdx.x + (1 << 22)] = threadIdx.x; }
"""
"""Threads that read what others write, without a barrier between; a write far behind the end."""


def layer(build: Build) -> None:
    """Output and all gradients of a benchmark's op."""
    subject = build(SHAPE, "cuda")
    out = subject.forward()
    upstream = drawn(*out.shape, device="cuda", seed=9).to(out.dtype)
    torch.autograd.grad(out, list(subject.leaves.values()), upstream, allow_unused=True)
    if subject.maps_forward is not None:
        chosen = [subject.leaves[name] for name in subject.maps]
        torch.autograd.grad(subject.maps_forward(), chosen, upstream)


def step(recipe: str, batch: int = 2, heads: int = SHAPE.heads) -> None:
    """Two tokens of a layer: the one that ends a block, and the next. Larger batches take other kernels."""
    from benchmarks.kernels_decode import our_layers
    from linearize.recipe import load_recipe
    from linearize_kernels.decode import settle

    sizes: dict[str, Any] = {"heads": heads, "kv_heads": SHAPE.kv_heads, "spec": load_recipe(recipe).mixer}
    with torch.no_grad():
        ((mixer, cache),), token, call = our_layers(batch, 2 * SHAPE.window - 1, "cuda", layers=1, **sizes)
        for _ in range(2):
            mixer(*token, **call, cache=cache)
            settle([cache.tensors | cache.workspace])
            cache.unsettled = False


def distill() -> None:
    """KL and cross-entropy from hidden states, with gradients."""
    from linearize_kernels.distill import distill_loss

    sizes = {"hidden": (70, 64), "weight": (1000, 64), "teacher_hidden": (70, 64), "teacher_weight": (1000, 64)}
    made: dict[str, Any] = {
        name: drawn(*size, device="cuda", seed=n).bfloat16() for n, (name, size) in enumerate(sizes.items())
    }
    for name in ("hidden", "weight"):
        made[name].requires_grad_()
    labels = torch.arange(70, device="cuda")
    distill_loss(**made, labels=labels, backend="triton")[0].backward()


def pointwise() -> None:
    """Norms, gated units and rotations of the native code, with gradients."""
    from linearize_kernels.gated_unit import gated_unit
    from linearize_kernels.rms_norm import rms_norm
    from linearize_kernels.rotate import rotate

    x, weight = (drawn(*size, device="cuda", seed=0).bfloat16().requires_grad_() for size in ((30, 1000), (1000,)))
    rms_norm(x, weight, 1e-6, backend="triton").sum().backward()
    gated_unit(*x.chunk(2, dim=-1), "silu", backend="triton").sum().backward()
    q, k = (drawn(2, n, 50, 96, device="cuda", seed=n).bfloat16().requires_grad_() for n in (6, 2))
    cos, sin = (drawn(1, 50, 32, device="cuda", seed=n).bfloat16() for n in (8, 9))
    sum(y.sum() for y in rotate(q, k, cos, sin, backend="triton")).backward()


def planted(name: str) -> None:
    """A kernel with a fault."""
    run = torch.cuda._compile_kernel(PLANTED, name)
    run(grid=(1, 1, 1), block=(128, 1, 1), args=[torch.zeros(128, dtype=torch.int32, device="cuda")])


def cases() -> dict[str, Callable[[], None]]:
    """Cases by op, the slowest first."""
    from benchmarks import kernels_ours as ours

    return {
        "pure layer": partial(layer, ours.pure_layer),
        "gated delta rule": partial(layer, ours.delta(gate=True)),
        "delta rule": partial(layer, ours.delta(gate=False)),
        "window + linear": partial(layer, ours.layer),
        "channel gate": partial(layer, ours.gated("channel")),
        "scalar gate": partial(layer, ours.gated("scalar")),
        "window": partial(layer, ours.window),
        "decode, lolcats": partial(step, "lolcats"),
        "decode, lolcats, 8 sequences": partial(step, "lolcats", 8),
        "decode, pure": partial(step, "pure"),
        "decode, pure, four heads a state": partial(step, "pure", heads=8),
        "decode, gated-deltanet": partial(step, "gated-deltanet"),
        "distillation loss": distill,
        "norm, gated unit, rotation": pointwise,
    }


def kernels_of(run: Callable[[], Any]) -> list[str]:
    """Names of the Triton kernels that `run` launches, as the GPU knows them."""
    from triton.runtime.jit import JITFunction

    found: set[str] = set()
    plain = JITFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        kernel = plain(self, *args, **options)
        found.add(str(getattr(kernel, "name", self.__name__)))
        return kernel

    JITFunction.run = noted
    try:
        run()
    finally:
        JITFunction.run = plain
    torch.cuda.synchronize()
    return sorted(found)


def main() -> None:
    """Command line: see the module's docstring."""
    name = sys.argv[1]
    found = kernels_of(partial(planted, name) if name.startswith("planted") else cases()[name])
    print(json.dumps({"kernels": found}), flush=True)


if __name__ == "__main__":
    main()
