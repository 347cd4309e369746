"""`unrotate`: the inverse of RoPE, and in Triton what it is in float64."""

from __future__ import annotations

import pytest
import torch

from linearize.modeling import rotary
from linearize_kernels.backend import HAS_TRITON
from linearize_kernels.unrotate import unrotate, unrotate_and_add

SIZES = [(1, 1, 1, 16, 16), (2, 3, 5, 8, 8), (1, 4, 70, 64, 64), (2, 2, 33, 96, 32), (1, 2, 9, 20, 6)]


def drawn(batch: int, heads: int, length: int, width: int, turned: int) -> list[torch.Tensor]:
    """x as a view of [B, T, H, D], and RoPE's tables, scaled as YaRN's are, halves not alike."""
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(batch, length, heads, width, generator=draw).transpose(1, 2)
    angle = torch.randn(batch if length % 2 else 1, length, turned, generator=draw)
    return [x, 1.2 * angle.cos(), 1.2 * angle.sin()]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_inverse_of_rope(size: tuple[int, ...]) -> None:
    x, cos, sin = (y.double() for y in drawn(*size))
    cos, sin = (torch.cat((y[..., : size[4] // 2],) * 2, dim=-1) for y in (cos, sin))  # as RoPE's halves are
    back = unrotate(rotary.rotate(x, cos, sin), cos, sin, backend="torch")
    assert torch.allclose(back[..., : size[4]], x[..., : size[4]])
    assert torch.equal(back[..., size[4] :], x[..., size[4] :])


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradient(size: tuple[int, ...], kernel_device: str) -> None:
    x, cos, sin = (y.to(kernel_device) for y in drawn(*size))
    exact, ours = x.double().requires_grad_(), x.clone().requires_grad_()
    want = unrotate(exact, cos.double(), sin.double(), backend="torch")
    assert torch.allclose(want, rotary.unrotate(exact, cos.double(), sin.double()))
    got = unrotate(ours, cos, sin, backend="triton")
    assert torch.allclose(got.double(), want, atol=1e-6)
    assert got.transpose(1, 2).is_contiguous()
    upstream = torch.randn_like(got)
    (theirs,) = torch.autograd.grad(want, exact, upstream.double())
    (found,) = torch.autograd.grad(got, ours, upstream)
    assert torch.allclose(found.double(), theirs, atol=1e-6)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("size", SIZES)
def test_something_is_added_on_the_way(size: tuple[int, ...], kernel_device: str) -> None:
    x, cos, sin = (y.to(kernel_device) for y in drawn(*size))
    own = torch.randn(size[0], size[2], size[1], size[3]).to(kernel_device).transpose(1, 2)
    exact = [y.double().requires_grad_() for y in (x, own)]
    want = unrotate_and_add(exact[0], cos.double(), sin.double(), exact[1], 0.3, backend="torch")
    assert torch.allclose(want, unrotate(exact[0], cos.double(), sin.double(), backend="torch") + 0.3 * exact[1])
    ours = [y.clone().requires_grad_() for y in (x, own)]
    got = unrotate_and_add(ours[0], cos, sin, ours[1], 0.3, backend="triton")
    assert torch.allclose(got.double(), want, atol=1e-6)
    upstream = torch.randn_like(got)
    theirs = torch.autograd.grad(want, exact, upstream.double())
    for found, right in zip(torch.autograd.grad(got, ours, upstream), theirs, strict=True):
        assert torch.allclose(found.double(), right, atol=1e-6)


def test_what_does_not_belong_together() -> None:
    x, cos, sin = drawn(2, 2, 3, 8, 8)
    for bad in (
        (x, cos[:, :2], sin[:, :2]),
        (x, cos, sin[..., :4]),
        (x[..., :4], cos, sin),
        (x, cos[..., :5], sin[..., :5]),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            unrotate(*bad)
    with pytest.raises(ValueError, match="not of the shape"):
        unrotate_and_add(x, cos, sin, x[:1], 1.0)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_graph_stays_whole(kernel_device: str) -> None:
    from linearize_kernels.unrotate_triton import unrotate_op

    x, cos, sin = (y.to(kernel_device) for y in drawn(2, 2, 5, 16, 16))
    for own in (None, torch.randn_like(x)):
        torch.library.opcheck(unrotate_op, (x.requires_grad_(), cos, sin, own, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    x, cos, sin = (y.cuda() for y in drawn(2, 8, 300, 128, 128))
    x = x.to(dtype)
    want = unrotate(x.double(), cos.double(), sin.double(), backend="torch")
    plain = (unrotate(x, cos, sin, backend="torch").double() - want).norm()
    assert (unrotate(x, cos, sin, backend="triton").double() - want).norm() <= 2 * plain
