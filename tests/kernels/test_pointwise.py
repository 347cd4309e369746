"""`rms_norm`, `gated_unit` and `rotate`: in Triton what they are in torch, and on a GPU no further from float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from linearize_kernels.backend import HAS_TRITON
from linearize_kernels.gated_unit import ACTIVATIONS, gated_unit
from linearize_kernels.rms_norm import WIDEST, rms_norm
from linearize_kernels.rotate import rotate

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
FORMS = [(False, False), (False, True), (True, False), (True, True)]


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 48), (2, 7, 2, 20), (4, 1000), (2, 4100)])
@pytest.mark.parametrize(("offset", "late"), FORMS)
def test_norms(shape: tuple[int, ...], offset: bool, late: bool, kernel_device: str) -> None:
    x, weight = drawn(*shape).to(kernel_device), drawn(shape[-1], seed=1).to(kernel_device)
    options: dict[str, Any] = {"offset": offset, "late": late}
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * (weight.double() + offset)
    for backend in ("torch", "triton"):
        assert close(rms_norm(x, weight, 0.1, backend=backend, **options), exact)
    aside = x.transpose(0, -2).contiguous().transpose(0, -2)  # the same, other strides
    assert close(rms_norm(aside, weight, 0.1, backend="triton", **options), exact)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 48), (2, 683), (3, 4100)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_units(shape: tuple[int, ...], activation: str, kernel_device: str) -> None:
    gate, up = (3 * drawn(*shape, seed=seed).to(kernel_device) for seed in (0, 1))
    x = gate.double()
    factor = torch.sigmoid(x if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    exact = x * factor * up.double()
    halves = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)  # rows that are twice as long
    for backend in ("torch", "triton"):
        assert close(gated_unit(gate, up, activation, backend=backend), exact)
        assert close(gated_unit(*halves, activation, backend=backend), exact)


@needs_triton
def test_large_gates_neither_overflow_nor_vanish(kernel_device: str) -> None:
    gate = torch.tensor([[-3e4, -200.0, -20.0, 0.0, 20.0, 200.0, 3e4]], device=kernel_device)
    for activation in ACTIVATIONS:
        found = gated_unit(gate, torch.ones_like(gate), activation, backend="triton")
        assert torch.allclose(found, gate.clamp_min(0.0), atol=1e-6)


ROTATED = [
    # batch, rows of tables, heads, key heads, tokens, channels, turned
    (1, 1, 1, 1, 1, 16, 16),
    (2, 1, 4, 2, 7, 16, 16),
    (2, 2, 3, 1, 5, 20, 6),
    (1, 1, 40, 40, 3, 96, 32),
    (1, 1, 300, 3, 2, 16, 16),
    (1, 1, 2, 1, 2, 5000, 5000),
]


@needs_triton
@pytest.mark.parametrize("size", ROTATED)
def test_rotations(size: tuple[int, ...], kernel_device: str) -> None:
    batch, rows, heads, key_heads, length, width, turned = size
    q, k = (drawn(batch, length, n, width, seed=n).transpose(1, 2).to(kernel_device) for n in (heads, key_heads))
    cos, sin = (drawn(rows, length, turned, seed=s).to(kernel_device) for s in (8, 9))
    for backend in ("torch", "triton"):
        for x, found in zip((q, k), rotate(q, k, cos, sin, backend=backend), strict=True):
            part, c, s = x[..., :turned].double(), cos.double()[:, None], sin.double()[:, None]
            first, second = part.chunk(2, dim=-1)
            exact = torch.cat((part * c + torch.cat((-second, first), -1) * s, x[..., turned:].double()), -1)
            assert close(found, exact)
            assert found.shape == x.shape and found.transpose(1, 2).is_contiguous()


@needs_triton
def test_nothing_to_do(kernel_device: str) -> None:
    nothing = torch.empty(0, 4, 16, device=kernel_device)
    assert rms_norm(nothing, torch.ones(16, device=kernel_device), 1e-6, backend="triton").shape == (0, 4, 16)
    assert gated_unit(nothing, nothing, "silu", backend="triton").shape == (0, 4, 16)
    heads, table = torch.empty(2, 4, 0, 16, device=kernel_device), torch.empty(1, 0, 16, device=kernel_device)
    assert all(x.shape == heads.shape for x in rotate(heads, heads, table, table, backend="triton"))


X, Q = torch.ones(2, 3, 16), torch.ones(2, 4, 3, 16)
MISFITS: list[tuple[Callable[[], Any], str]] = [
    (lambda: rms_norm(X, torch.ones(8), 1e-6), "do not belong together"),
    (lambda: rms_norm(X, torch.ones(16).half(), 1e-6), "do not belong together"),
    (lambda: gated_unit(X, X[..., :8], "silu"), "do not belong together"),
    (lambda: gated_unit(X, X.half(), "silu"), "do not belong together"),
    (lambda: gated_unit(X, X, "relu"), "'relu' is not one of silu, gelu_tanh"),
    (lambda: rotate(Q, Q[:1], X, X), "do not belong together"),
    (lambda: rotate(Q, Q, X, X.half()), "do not belong together"),
    (lambda: rotate(Q, Q, X[..., :5], X[..., :5]), "do not belong together"),
    (lambda: rotate(Q, Q, X[:, :2], X[:, :2]), "do not belong together"),
    (lambda: rotate(Q, Q, torch.ones(2, 3, 18), torch.ones(2, 3, 18)), "do not belong together"),
]


@pytest.mark.parametrize(("call", "words"), MISFITS)
def test_what_does_not_belong_together(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@needs_triton
def test_what_is_too_wide_is_said() -> None:
    wide = torch.ones(1, WIDEST + 1)
    with pytest.raises(ValueError, match="rows of 16385 channels are above 16384"):
        rms_norm(wide, wide[0], 1e-6, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Nearly all numbers are torch's own: both round in the same places."""

    def same(triton: torch.Tensor, torch_: torch.Tensor) -> bool:
        return bool((triton == torch_).float().mean() > 0.99) and torch.allclose(triton, torch_, rtol=2e-2, atol=2e-2)

    for width in (128, 3000, 4096):
        x, weight = drawn(300, width).cuda().to(dtype), drawn(width, seed=1).cuda().to(dtype)
        for offset, late in FORMS:
            by = {b: rms_norm(x, weight, 1e-5, offset=offset, late=late, backend=b) for b in ("triton", "torch")}
            assert same(by["triton"], by["torch"])
        for activation in ACTIVATIONS:
            by = {b: gated_unit(x, x.flip(0), activation, backend=b) for b in ("triton", "torch")}
            assert same(by["triton"], by["torch"])
    q, k = (drawn(2, 300, n, 128, seed=n).transpose(1, 2).cuda().to(dtype) for n in (32, 8))
    cos, sin = (drawn(1, 300, 128, seed=s).cuda().to(dtype) for s in (8, 9))
    for found, torchs in zip(*(rotate(q, k, cos, sin, backend=b) for b in ("triton", "torch")), strict=True):
        assert torch.equal(found, torchs)
