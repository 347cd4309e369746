"""The distillation loss on a GPU: as exact as torch's on the same rounded logits, and replayed in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from linearize_kernels.distill import distill_loss

pytestmark = pytest.mark.gpu


def made(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").to(dtype)

    labels = torch.randint(20000, (300,), generator=draw, device="cuda")
    labels[::5] = -100
    return {
        "hidden": normal(300, 64),
        "weight": normal(20000, 64) / 4,
        "labels": labels,
        "teacher_hidden": normal(300, 128),
        "teacher_weight": normal(20000, 128) / 4,
    }


def results(x: dict[str, torch.Tensor], backend: str, weight: bool) -> list[torch.Tensor]:
    leaves = [x[n].detach().requires_grad_() for n in ("hidden", "weight")[: 1 + weight]]
    own = x | dict(zip(("hidden", "weight"), leaves))
    loss, sums = distill_loss(**own, ce=0.3, kl=0.7, piece=128, backend=backend)
    return [sums, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error(dtype: torch.dtype, weight: bool) -> None:
    x = made(dtype)
    right = results({n: t.double() if t.is_floating_point() else t for n, t in x.items()}, "torch", weight)
    plain, fused = (results(x, backend, weight) for backend in ("torch", "triton"))
    for want, torchs, ours in zip(right, plain, fused):
        limit = 2 * float((torchs.double() - want).norm() / want.norm()) + 1e-6
        assert float((ours.double() - want).norm() / want.norm()) <= limit


def test_in_a_cuda_graph() -> None:
    x = made(torch.bfloat16)
    want = results(x, "triton", False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(x, "triton", False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(x, "triton", False)
    graph.replay()
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b)
