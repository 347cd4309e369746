"""`blend` in Triton against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from linearize_kernels.backend import HAS_TRITON
from linearize_kernels.blend import blend

SIZES = [(1, 1, 1, 16), (2, 3, 5, 8), (1, 4, 70, 64), (2, 2, 33, 96)]


def drawn(batch: int, heads: int, length: int, width: int) -> list[torch.Tensor]:
    """near as a view of [B, T, H, D], far of [B, H, T, D], share of [B, T, H]."""
    draw = torch.Generator().manual_seed(width)
    near = torch.randn(batch, length, heads, width, generator=draw).transpose(1, 2)
    far = torch.randn(batch, heads, length, width, generator=draw)
    share = torch.randn(batch, length, heads, generator=draw).sigmoid().transpose(1, 2)
    return [near, far, share]


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients(size: tuple[int, int, int, int], kernel_device: str) -> None:
    given = [x.to(kernel_device) for x in drawn(*size)]
    exact = [x.double().requires_grad_() for x in given]
    ours = [x.clone().requires_grad_() for x in given]
    want, got = blend(*exact, backend="torch"), blend(*ours, backend="triton")
    assert torch.allclose(got.double(), want, atol=1e-6)
    assert got.transpose(1, 2).is_contiguous()
    upstream = torch.randn_like(got)
    theirs = torch.autograd.grad(want, exact, upstream.double())
    found = torch.autograd.grad(got, ours, upstream)
    for a, b in zip(found, theirs, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5)


def test_what_does_not_belong_together() -> None:
    near, far, share = drawn(1, 2, 3, 4)
    for bad in ((near, far[..., :2], share), (near, far, share[:, :1]), (near, far.double(), share)):
        with pytest.raises(ValueError, match="do not belong together"):
            blend(*bad)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_graph_stays_whole() -> None:
    from linearize_kernels.blend_triton import blend_op

    near, far, share = (x.requires_grad_() for x in drawn(2, 2, 5, 16))
    torch.library.opcheck(blend_op, (near, far, share))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    near, far, share = (x.cuda() for x in drawn(2, 8, 300, 128))
    near, far = near.to(dtype), far.to(dtype)
    want = blend(near.double(), far.double(), share.double(), backend="torch")
    plain = (blend(near, far, share, backend="torch").double() - want).norm()
    assert (blend(near, far, share, backend="triton").double() - want).norm() <= 2 * plain + 1e-12
