"""The bound on scores inside a kernel: value and slope, from scores near zero to those far beyond it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux alone")

import triton
import triton.language as tl

from linearize_kernels.softcap_triton import bounded

pytestmark = pytest.mark.usefixtures("interpreter")


@triton.jit
def look(s_ptr, to_ptr, slope_ptr, BOUND: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    s, slope = bounded(tl.load(s_ptr + at), BOUND)
    tl.store(to_ptr + at, s)
    tl.store(slope_ptr + at, slope)


@pytest.mark.parametrize("bound", [0.5, 72.0])
def test_value_and_slope(bound: float) -> None:
    """The slope keeps its digits where the value has none left to say how far it is from the bound."""
    s = torch.cat((torch.linspace(-20, 20, 250), torch.tensor([0.0, 1e-30, -1e30, 1e30, 3e-5, -3e-5]))) * bound
    found, slope = torch.empty(256), torch.empty(256)
    look[(1,)](s, found, slope, bound, 256)
    x = s.double() / bound
    assert float((found.double() / bound - x.tanh()).abs().max()) < 2e-7
    exact = x.cosh() ** -2
    assert float(((slope.double() - exact).abs() - 5e-6 * exact).max()) <= 1e-30


def test_no_bound() -> None:
    s, found = torch.randn(16), torch.empty(16)
    look[(1,)](s, found, torch.empty(16), 0.0, 16)
    assert torch.equal(found, s)
