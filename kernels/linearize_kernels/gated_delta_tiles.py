"""Pieces that the kernels of the gated delta rule share. Needs Triton."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, stride, i, left, channel, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows i < left of [., WIDTH], zeros elsewhere: [len(i), PADDED], channel = arange(PADDED) or a tile of it."""
    mask = (i < left)[:, None]
    if WIDTH % PADDED:
        mask = mask & (channel < WIDTH)[None, :]
    return tl.load(base + (i[:, None] * stride + channel[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(base, stride, i, left, channel, WIDTH: tl.constexpr, PADDED: tl.constexpr, value):
    """Write [len(i), PADDED] to rows i < left of [., WIDTH]."""
    mask = (i < left)[:, None]
    if WIDTH % PADDED:
        mask = mask & (channel < WIDTH)[None, :]
    tl.store(base + (i[:, None] * stride + channel[None, :]), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def inverse_length(rows):
    """1 / max(|row|, 1e-6) for rows [N, F]: [N]."""
    x = rows.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-6)


@triton.jit
def span_of_chunk(table, c, T, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of chunk c, the end of its sequence, and its number there. Packed: rows of `table` [chunks, 3]."""
    if PACKED:
        first = tl.load(table + 3 * c)
        end = tl.load(table + 3 * c + 1)
        number = tl.load(table + 3 * c + 2)
    else:
        first = c * C
        end = T
        number = c
    return first, end, number


@triton.jit
def span_of_sequence(offsets, chunk_offsets, n, T, PACKED: tl.constexpr):
    """First token of sequence n, its number of tokens, and the number of its first chunk."""
    if PACKED:
        first = tl.load(offsets + n)
        length = tl.load(offsets + n + 1) - first
        chunk = tl.load(chunk_offsets + n)
    else:
        first = 0
        length = T
        chunk = 0
    return first, length, chunk


@triton.jit
def pair_decay(g_row, g_column, keep, GATED: tl.constexpr):
    """e^{G_row - G_column} where `keep`, else 0; G in log2 units."""
    if GATED:
        # Masked before exp2: elsewhere the difference is positive and may overflow, as it may in rows beyond the
        # sequence, whose G is 0.
        weight = tl.exp2(tl.where(keep, tl.minimum(g_row - g_column, 0.0), float("-inf")))
    else:
        weight = tl.where(keep, 1.0, 0.0)
    return weight


@triton.jit
def row_factors(g_cum, r, i, left, C: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr):
    """Of a chunk's rows i < left: G [C], G of the last, e^G r and e^{G_last - G} r [C]; pointers at its first."""
    r_rows = tl.full([C], 1.0, tl.float32)
    if UNIT:
        r_rows = tl.load(r + i, mask=i < left, other=0.0)
    g = tl.zeros([C], tl.float32)
    g_last = 0.0
    read = r_rows
    write = r_rows
    if GATED:
        g_last = tl.load(g_cum + tl.maximum(tl.minimum(left, C) - 1, 0))
        g = tl.load(g_cum + i, mask=i < left, other=0.0)
        read = tl.exp2(g) * r_rows
        write = tl.exp2(tl.where(i < left, g_last - g, 0.0)) * r_rows
    return g, g_last, read, write


@triton.jit
def times_rows(x, sxt, y, syt, i, left, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    """x y^T [C, C] of rows [C, V]."""
    made = tl.zeros([C, C], tl.float32)
    for tile in range(0, V, BV):
        column = tile + tl.arange(0, BV)
        x_rows = load_rows(x, sxt, i, left, column, V, BV)
        y_rows = load_rows(y, syt, i, left, column, V, BV)
        made = tl.dot(x_rows, tl.trans(y_rows), made, input_precision=PREC)
    return made


@triton.jit
def load_state(states, channel, column, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr):
    """A tile [BF, BV] of a state [F, V]."""
    at = channel[:, None] * V + column[None, :]
    if F % BF == 0 and V % BV == 0:
        tile = tl.load(states + at)
    else:
        tile = tl.load(states + at, mask=(channel < F)[:, None] & (column < V)[None, :], other=0.0)
    return tile


@triton.jit
def times_state(x, sxt, factor, states, made, i, left, channel, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr,
                BV: tl.constexpr, FACTOR: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """made + x S^T [C, BF] of rows x [C, V], times `factor` [C] if FACTOR, and a tile of channels of S [F, V]."""
    for tile in range(0, V, BV):
        column = tile + tl.arange(0, BV)
        rows = load_rows(x, sxt, i, left, column, V, BV)
        if FACTOR:
            rows = (rows * factor[:, None]).to(rows.dtype)
        state = load_state(states, channel, column, F, V, BF, BV)
        made = tl.dot(rows, tl.trans(state), made, input_precision=PREC)
    return made


@triton.jit
def take_length(gradient, stride, x, sxt, i, left, r, along, F: tl.constexpr, BF: tl.constexpr):
    """Turn the gradient of the rows x r, r one over their lengths, into that of x, in place; along = its sum with x r.

    A row shorter than the floor of `inverse_length` is scaled by a constant: nothing along it is taken away.
    """
    tl.debug_barrier()  # other threads of this program wrote what is read here
    turned = tl.where(r < 1e6, along, 0.0)
    for tile in range(0, F, BF):
        channel = tile + tl.arange(0, BF)
        found = load_rows(gradient, stride, i, left, channel, F, BF).to(tl.float32)
        unit = load_rows(x, sxt, i, left, channel, F, BF) * r[:, None]
        store_rows(gradient, stride, i, left, channel, F, BF, (found - turned[:, None] * unit) * r[:, None])
