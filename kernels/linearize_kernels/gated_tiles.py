"""What the kernels of gated linear attention share: where a chunk lies, and what its rows have forgotten.

Log decays are summed inside a chunk and in base 2. What is exponentiated is at most zero, masked before exp2, so that
nothing overflows however strong the decay; or it is known to be small (`mild`).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)
REACH = tl.constexpr(60.0)
"""Largest exponent of 2 by which `mild` lets a factor grow, far from what float32 and bfloat16 can hold."""


@triton.jit
def chunk_span(c, table, T, C: tl.constexpr, LAG: tl.constexpr, PACKED: tl.constexpr):
    """First token of chunk c (before `begin` for the empty chunk that a lag puts first), and its sequence's bounds.

    table [NT, 3]: these three for every chunk of packed sequences.
    """
    if PACKED:
        first = tl.load(table + 3 * c).to(tl.int64)
        begin = tl.load(table + 3 * c + 1).to(tl.int64)
        end = tl.load(table + 3 * c + 2).to(tl.int64)
    else:
        first = (c - LAG).to(tl.int64) * C
        begin = first * 0
        end = begin + T
    return first, begin, end


@triton.jit
def row_decay(g, base, step, t, live, C: tl.constexpr, DECAY: tl.constexpr):
    """Running sum of the log decays of rows t [C], and their total; DECAY is none, fixed (one number) or scalar."""
    if DECAY == "scalar":
        own = tl.load(g + base + t * step, mask=live, other=0.0) * LOG2E
        running = tl.cumsum(own, 0)
        total = tl.sum(own, 0)
    elif DECAY == "fixed":
        own = tl.where(live, tl.load(g + base), 0.0) * LOG2E
        running = tl.cumsum(own, 0)
        total = tl.sum(own, 0)
    else:
        running = tl.zeros([C], tl.float32)
        total = 0.0
    return running, total


@triton.jit
def pair_decay(later, earlier, seen):
    """exp2(later - earlier) where `seen`, else 0."""
    return tl.exp2(tl.where(seen, later - earlier, float("-inf")))


@triton.jit
def product(a, b, acc, PREC: tl.constexpr):
    """acc + a b on tensor cores; a state kept in float32 is read in float32."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PREC)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PREC)


@triton.jit
def channel_sums(g, base, first, step, rows, live, f, in_f):
    """Running sums of log decays per channel, in base 2: [C, BF]; g holds them in base e."""
    at = g + base + first * step + rows[:, None] * step + f[None, :]
    return tl.load(at, mask=live[:, None] & in_f[None, :], other=0.0) * LOG2E


@triton.jit
def channel_total(g, base, first, begin, end, step, f, in_f, C: tl.constexpr):
    """What a whole chunk forgets, per channel and in base 2: [BF]."""
    last = tl.minimum(first + C, end) - 1 + 0 * f  # one for each channel, as the mask
    return tl.load(g + base + last * step + f, mask=in_f & (last >= begin), other=0.0) * LOG2E


@triton.jit
def mild(total, dtype: tl.constexpr):
    """Whether no channel forgets more in a chunk than `parted` can split; of float16's range there is too little."""
    if dtype == tl.float16:
        small = False
    else:
        small = tl.min(total, 0) > -2.0 * REACH
    return small


@triton.jit
def parted(sums, total):
    """e^{G - m} and e^{m - G}, m half of what the chunk forgets: their products are the decays between its tokens."""
    middle = sums - 0.5 * total[None, :]
    return tl.exp2(middle), tl.exp2(-middle)


@triton.jit
def halves(sums, g, base, first, end, step, f, in_f, level, C: tl.constexpr):
    """Decays that meet in the middle of blocks of 2^(level + 1) tokens: [C, BF].

    The decay from token j in a block's first half to token i in its second is the product of theirs, both at most 1:
    from j to the last token of the first half, and from there to i. Every pair i > j belongs to exactly one level.
    """
    rows = tl.arange(0, C)
    middle = ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1
    known = first + middle < end
    at = g + base + first * step + middle[:, None] * step + f[None, :]
    reference = tl.load(at, mask=known[:, None] & in_f[None, :], other=0.0) * LOG2E
    return tl.exp2(-tl.abs(sums - reference))


@triton.jit
def decays(g, step, rows, f, mask):
    """Running sums of a chunk's log decays g [C, BF] in base 2, and their totals [BF]; g at the chunk's first token."""
    own = tl.load(g + rows[:, None] * step + f[None, :], mask=mask, other=0.0) * LOG2E
    return tl.cumsum(own, 0), tl.sum(own, 0)


@triton.jit
def meet(sums, level):
    """As `halves`, from all of a chunk's running sums [C, BF]."""
    rows = tl.zeros(sums.shape, tl.int32) + tl.arange(0, sums.shape[0])[:, None]
    middle = ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1
    return tl.exp2(-tl.abs(sums - tl.gather(sums, middle, 0)))


@triton.jit
def served(later, earlier, level):
    """Whether a pair of rows belongs to a level of `halves`."""
    return (((later >> level) ^ (earlier >> level)) == 1) & (later > earlier)


@triton.jit
def sum_before(x):
    """Sum over earlier rows alone; subtracting a row from the sum up to it would lose what is small beside it."""
    index = tl.arange(0, x.shape[0])
    if len(x.shape) == 2:
        index = tl.zeros(x.shape, tl.int32) + index[:, None]
    return tl.where(index > 0, tl.gather(tl.cumsum(x, 0), tl.maximum(index - 1, 0), 0), 0.0)
