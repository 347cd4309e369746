"""Pieces of the decode kernel: head vectors, feature maps on them, gates, and the block that enters the state.

Features come as two halves, `a` and `b`: of two-sided maps the one of Wx and the one of -Wx; of others b is a. A half
is a vector [FP], or a tile [FP, tokens]; both reduce along axis 0. Names and constants as in modeling's feature_maps.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-12)
EXP_LIMIT = tl.constexpr(15.0)
RELU_FLOOR = tl.constexpr(1e-6)
UNIT_EPS = tl.constexpr(1e-6)
HEAD_TILE = tl.constexpr(32)
"""Head channels of a projection that are multiplied at once."""


@triton.jit
def log1p_exp(x):
    """log(1 + e^x), exact to float32 also where e^x is small (Kahan's correction)."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    low = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + low


@triton.jit
def log_sigmoid(x):
    return -log1p_exp(-x)


@triton.jit
def read_head(x, at, cos, sin, D: tl.constexpr, UNROTATE: tl.constexpr):
    """Channels `at` of a head vector, float32; under UNROTATE before its rotation by (cos, sin), as rotary.unrotate."""
    inside = at < D
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if UNROTATE:
        HALF: tl.constexpr = D // 2
        partner = tl.where(at < HALF, at + HALF, at - HALF)
        other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
        turned = tl.where(at < HALF, -other, other)
        c = tl.load(cos + at, mask=inside, other=1.0).to(tl.float32)
        s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        value = (value * c - turned * s) / (c * c + s * s)
    return value


@triton.jit
def project(
    x, weight, bias, cos, sin,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
    LEARNED: tl.constexpr, BIASED: tl.constexpr, UNROTATE: tl.constexpr,
):  # fmt: skip
    """x W + b of one head, [FP] float32: x [D], weight [D, F], bias [F]. Without a projection x itself."""
    of = tl.arange(0, FP)
    if LEARNED:
        TILE: tl.constexpr = HEAD_TILE if DP > HEAD_TILE else DP
        total = tl.zeros([TILE, FP], tl.float32)
        for start in tl.static_range(0, DP, TILE):
            od = start + tl.arange(0, TILE)
            inside = (od < D)[:, None] & (of < F)[None, :]
            tile = tl.load(weight + (od[:, None] * F + of[None, :]), mask=inside, other=0.0).to(tl.float32)
            total += tile * read_head(x, od, cos, sin, D, UNROTATE)[:, None]
        y = tl.sum(total, 0)
        if BIASED:
            y += tl.load(bias + of, mask=of < F, other=0.0).to(tl.float32)
    else:
        y = read_head(x, of, cos, sin, D, UNROTATE)
    return y


@triton.jit
def activate(y, inside, MAP: tl.constexpr):
    """Features of y along axis 0, zero where not `inside`: halves a and b."""
    if MAP == "hedgehog_softmax":
        # Both signs in one reduction: across warps it costs more than its arithmetic.
        low = float("-inf")
        both = tl.join(tl.where(inside, y, low), tl.where(inside, -y, low))
        e = tl.exp(both - tl.max(both, axis=0, keep_dims=True))
        a, b = tl.split(e / tl.sum(e, axis=0, keep_dims=True))
        a, b = tl.maximum(a, FLOOR), tl.maximum(b, FLOOR)
    elif MAP == "softmax" or MAP == "learned_softmax":
        a = _softmax(y, inside)
        if MAP == "learned_softmax":
            a = tl.maximum(a, FLOOR)
        b = a
    elif MAP == "hedgehog_exp":
        y = tl.minimum(tl.maximum(y, -EXP_LIMIT), EXP_LIMIT)
        a, b = tl.exp(y), tl.exp(-y)
    elif MAP == "relu":
        a = tl.maximum(y, RELU_FLOOR)
        b = a
    elif MAP == "crelu":
        a, b = tl.maximum(y, 0.0), tl.maximum(-y, 0.0)
    elif MAP == "elu":
        a = tl.where(y > 0, 1.0 + y, tl.exp(tl.minimum(y, 0.0)))
        b = a
    elif MAP == "l2norm":
        length = tl.sqrt(tl.sum(tl.where(inside, y * y, 0.0), axis=0, keep_dims=True))
        a = y / tl.maximum(length, UNIT_EPS)
        b = a
    elif MAP == "forget":
        a = 1.0 - tl.sigmoid(y)
        b = a
    else:
        tl.static_assert(MAP == "identity" or MAP == "linear", "a map without a kernel")
        a = y
        b = y
    return tl.where(inside, a, 0.0), tl.where(inside, b, 0.0)


@triton.jit
def _softmax(y, inside):
    y = tl.where(inside, y, float("-inf"))
    e = tl.exp(y - tl.max(y, axis=0, keep_dims=True))
    return e / tl.sum(e, axis=0, keep_dims=True)


@triton.jit
def unit(a, b, SIGNS: tl.constexpr):
    """Features of length one along axis 0, both halves together: the delta rule's directions."""
    squares = a * a
    if SIGNS == 2:
        squares += b * b
    square = tl.sum(squares, axis=0, keep_dims=True)
    length = tl.maximum(tl.sqrt(square), UNIT_EPS)
    return a / length, b / length


@triton.jit
def token_score(x, weight, bias, C: tl.constexpr, CT: tl.constexpr):
    """w.x + b over the layer's C input channels, float32."""
    total = tl.zeros([CT], tl.float32)
    for start in tl.static_range(0, C, CT):
        at = start + tl.arange(0, CT)
        w = tl.load(weight + at, mask=at < C, other=0.0).to(tl.float32)
        total += tl.load(x + at, mask=at < C, other=0.0).to(tl.float32) * w
    return tl.sum(total, 0) + tl.load(bias).to(tl.float32)


@triton.jit
def exact_dot(x, y):
    """x y in float32 for float32 x: exact where y is float32, to 2^-17 of x where y is bfloat16 (two products)."""
    if y.dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        out = tl.dot(high, y, tl.dot(low, y))
    else:
        out = tl.dot(x, y.to(tl.float32), input_precision="ieee")
    return out
