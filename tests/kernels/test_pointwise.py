"""`rms_norm`, `gated_unit` and `rotate`, and their gradients: both backends against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


Run = Callable[..., Any]


def gradients(run: Run, given: tuple[torch.Tensor, ...], upstream: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Of `given`, for the gradients `upstream` of what run(*given) gives."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    found = run(*leaves)
    return list(torch.autograd.grad(found, leaves, [x.to(found[0].dtype) for x in upstream]))


def assert_gradients(run: Run, given: tuple[torch.Tensor, ...], sizes: list[torch.Size]) -> None:
    """Those of both backends against float64's; run(*given, backend=...) gives tensors of `sizes`."""
    upstream = tuple(drawn(*size, seed=77 + n).to(given[0].device) for n, size in enumerate(sizes))

    def by(backend: str) -> Run:
        return lambda *x: (y,) if isinstance(y := run(*x, backend=backend), torch.Tensor) else y

    exact = gradients(by("torch"), tuple(x.double() for x in given), upstream)
    assert all(x.abs().max() > 0 for x in exact)
    for backend in ("torch", "triton"):
        for found, want in zip(gradients(by(backend), given, upstream), exact, strict=True):
            assert torch.allclose(found.double(), want, rtol=1e-4, atol=1e-5)


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
    assert_gradients(lambda x, w, backend: rms_norm(x, w, 0.1, backend=backend, **options), (x, weight), [x.shape])
    assert_gradients(lambda x, backend: rms_norm(x, weight.to(x), 0.1, backend=backend, **options), (x,), [x.shape])


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
    assert_gradients(lambda g, u, backend: gated_unit(g, u, activation, backend=backend), (gate, up), [gate.shape])
    both = torch.cat((gate, up), dim=-1)
    assert_gradients(
        lambda x, backend: gated_unit(*x.chunk(2, dim=-1), activation, backend=backend), (both,), [gate.shape]
    )


@needs_triton
def test_large_gates_neither_overflow_nor_vanish(kernel_device: str) -> None:
    gate = torch.tensor([[-3e30, -3e4, -200.0, -20.0, 0.0, 20.0, 200.0, 3e4, 3e30]], device=kernel_device)
    for activation in ACTIVATIONS:
        gate = gate.detach().requires_grad_()
        found = gated_unit(gate, torch.ones_like(gate), activation, backend="triton")
        assert torch.allclose(found, gate.clamp_min(0.0), atol=1e-6)
        found.sum().backward()
        assert gate.grad is not None
        assert torch.allclose(gate.grad, (gate > 0).float() + (gate == 0).float() / 2, atol=1e-6)


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
    sizes = [q.shape, k.shape]
    assert_gradients(lambda q, k, backend: rotate(q, k, cos.to(q), sin.to(q), backend=backend), (q, k), sizes)


@needs_triton
def test_rotations_by_tables_of_more_digits(kernel_device: str) -> None:
    """As under autocast: the output, and its gradient, are the tables' dtype."""
    q, k = (drawn(2, 7, n, 20, seed=n).transpose(1, 2).to(kernel_device).half().requires_grad_() for n in (4, 2))
    cos, sin = (drawn(1, 7, 6, seed=s).to(kernel_device) for s in (8, 9))
    found, wanted = (rotate(q, k, cos, sin, backend=b) for b in ("triton", "torch"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
    upstream = [drawn(*x.shape, seed=5).to(kernel_device) for x in found]
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k), upstream) for y in (found, wanted)), strict=True):
        assert ours.dtype == torch.float16
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@needs_triton
def test_gradients_in_other_strides_and_of_one_output(kernel_device: str) -> None:
    """As attention gives them: heads before tokens, or none for the keys."""
    q, k = (drawn(2, 5, n, 16, seed=n).transpose(1, 2).to(kernel_device).requires_grad_() for n in (4, 2))
    cos, sin = (drawn(1, 5, 16, seed=s).to(kernel_device) for s in (8, 9))
    upstream = drawn(2, 16, 4, 5).to(kernel_device).transpose(1, 2).transpose(2, 3)
    found, wanted = (
        torch.autograd.grad(rotate(q, k, cos, sin, backend=b)[0], (q, k), upstream, materialize_grads=True)
        for b in ("triton", "torch")
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    x = drawn(6, 4, 16).to(kernel_device).requires_grad_()
    ones = torch.ones(16, device=kernel_device)
    upstream = drawn(16, 4, 6).to(kernel_device).permute(2, 1, 0)
    runs: list[Run] = [
        lambda b: rms_norm(x, ones, 1e-6, backend=b), lambda b: gated_unit(x, x.flip(0), "silu", backend=b)
    ]  # fmt: skip
    for run in runs:
        (ours,), (theirs,) = (torch.autograd.grad(run(b), x, upstream) for b in ("triton", "torch"))
        torch.testing.assert_close(ours, theirs)


@needs_triton
def test_nothing_to_do(kernel_device: str) -> None:
    nothing = torch.empty(0, 4, 16, device=kernel_device)
    assert rms_norm(nothing, torch.ones(16, device=kernel_device), 1e-6, backend="triton").shape == (0, 4, 16)
    assert gated_unit(nothing, nothing, "silu", backend="triton").shape == (0, 4, 16)
    x, weight = nothing.clone().requires_grad_(), torch.ones(16, device=kernel_device, requires_grad=True)
    gated_unit(rms_norm(x, weight, 1e-6, backend="triton"), x, "silu", backend="triton").sum().backward()
    assert weight.grad is not None and not weight.grad.any()
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
    (lambda: rotate(Q, Q, X.half(), X.half()), "do not belong together"),
    (lambda: rotate(Q.half(), Q, X, X), "do not belong together"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_on_a_gpu(dtype: torch.dtype) -> None:
    """No further from float64 than those of torch in the same dtype, but for rounding."""

    def error(found: torch.Tensor, exact: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    def check(run: Run, *given: torch.Tensor) -> None:
        given = tuple(x.cuda().to(dtype) for x in given)
        upstream = tuple(torch.randn_like(y) for y in run("torch")(*given))
        exact = gradients(run("torch"), tuple(x.double() for x in given), upstream)
        found = {b: gradients(run(b), given, upstream) for b in ("triton", "torch")}
        for ours, theirs, want in zip(found["triton"], found["torch"], exact, strict=True):
            assert error(ours, want) <= 1.05 * error(theirs, want)

    def norm(b: str, offset: bool, late: bool) -> Run:
        return lambda x, weight: (rms_norm(x, weight, 1e-5, offset=offset, late=late, backend=b),)

    def unit(b: str, activation: str) -> Run:
        return lambda gate, up: (gated_unit(gate, up, activation, backend=b),)

    for width in (128, 3000, 4096):
        x = drawn(700, width)
        for offset, late in FORMS:
            check(partial(norm, offset=offset, late=late), x, drawn(width, seed=1))
        for name in ACTIVATIONS:
            check(partial(unit, activation=name), x, x.flip(0))
    q, k = (drawn(2, 300, n, 128, seed=n).transpose(1, 2) for n in (32, 8))
    cos, sin = (drawn(1, 300, 128, seed=s).cuda().to(dtype) for s in (8, 9))
    check(lambda b: lambda q, k: rotate(q, k, cos.to(q), sin.to(q), backend=b), q, k)
