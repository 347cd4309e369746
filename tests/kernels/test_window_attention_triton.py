"""The softmax window alone, with its log-sum-exp: kernels against the definition in float64, gradients of both."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux alone")

from linearize_kernels import block_window_mask
from linearize_kernels.window_attention import window_attention

DOUBLE = torch.float64


def inputs(batch: int, heads: tuple[int, int], length: int, size: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    return [
        1.5 * torch.randn(batch, length, n, size, generator=draw, dtype=DOUBLE).transpose(1, 2)
        for n in (heads[0], heads[1], heads[1])
    ]


def results(x: list[torch.Tensor], backend: str, dtype: torch.dtype, **options) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Output, log-sum-exp and the gradients of a random sum of both."""
    leaves = [y.to(dtype).requires_grad_() for y in x]
    found = window_attention(*leaves, scale=0.3, backend=backend, **options)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=draw, dtype=DOUBLE).to(y.dtype) for y in found]
    starts = options.get("starts")
    if starts is not None:  # what stands at padding has no meaning
        real = (torch.arange(x[0].shape[2]) >= starts[:, None])[:, None]
        found = found[0], torch.where(real, found[1], 0.0)
    return [y.detach() for y in found] + list(torch.autograd.grad(found, leaves, weights))


@pytest.mark.parametrize("softcap", [None, 0.6])
def test_the_reference_is_the_definition(softcap: float | None) -> None:
    for length in (1, 16, 17, 70):
        q, k, v = inputs(2, (4, 2), length, 8)
        out, mass = window_attention(q, k, v, window=16, scale=0.3, sinks=3, softcap=softcap, backend="torch")
        scores = torch.einsum("nhid,nhjd->nhij", q, k.repeat_interleave(2, dim=1)) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~block_window_mask(length, 16, 3), float("-inf"))
        torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(2, dim=1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mass, scores.logsumexp(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "batch,heads,length,size,options",
    [
        (1, (2, 2), 1, 16, {"window": 16}),
        (1, (4, 2), 50, 16, {"window": 16}),
        (2, (3, 1), 70, 24, {"window": 32}),
        (1, (2, 1), 70, 16, {"window": 16, "sinks": 5}),
        (1, (4, 2), 50, 16, {"window": 16, "softcap": 2.0}),
        (2, (2, 1), 70, 24, {"window": 32, "sinks": 5, "softcap": 0.4, "starts": torch.tensor([0, 9])}),
        (1, (2, 1), 50, 16, {"window": 16, "softcap": 30.0, "cu_seqlens": torch.tensor([0, 20, 50])}),
        (1, (2, 1), 50, 16, {"window": 16, "cu_seqlens": torch.tensor([0, 20, 50])}),
        (2, (2, 1), 50, 16, {"window": 16, "starts": torch.tensor([0, 9]), "sinks": 2}),
    ],
)
def test_kernels_are_the_reference(batch, heads, length, size, options) -> None:  # type: ignore[no-untyped-def]
    x = inputs(batch, heads, length, size)
    want = results(x, "torch", DOUBLE, **options)
    got = results(x, "triton", torch.float32, **options)
    for one, other in zip(got, want):
        assert float((one.double() - other).norm()) <= 3e-6 * float(other.norm()) + 1e-6


def test_a_window_is_needed() -> None:
    with pytest.raises(ValueError, match="window 0"):
        window_attention(*inputs(1, (1, 1), 4, 8), window=0, scale=1.0)
