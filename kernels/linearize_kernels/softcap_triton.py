"""The bound on attention scores, c tanh(s / c), inside a kernel. Import this only where Triton is installed."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
GEMMA = 50 * LOG2E.value
"""The bound of Gemma 2's checkpoints for scores in base 2: for the compile gate."""


@triton.jit
def bounded(s, BOUND: tl.constexpr):
    """Scores s within -BOUND and BOUND, and the slope there, float32; 0.0: no bound, and no slope to be read.

    BOUND tanh(s / BOUND), in the unit of s: one that counts in powers of two bounds by c log2(e). With
    e = exp(-2 |s| / BOUND), tanh is (1 - e) / (1 + e) and its slope 4 e / (1 + e)^2, which keeps its digits where
    1 - tanh^2 has none left.
    """
    slope = s
    if BOUND > 0.0:
        e = tl.exp2(tl.abs(s) * (-2.0 * LOG2E / BOUND))
        part = 1.0 / (1.0 + e)
        size = BOUND * ((1.0 - e) * part)
        slope = 4.0 * e * part * part
        s = tl.where(s < 0.0, -size, size)
    return s, slope
