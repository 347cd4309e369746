"""Pieces of a Triton kernel that the window + linear kernels share: finding a block, loading tiles, feature maps.

A tile has C tokens (a block of the window), BD channels or BF features; BD and BF are powers of two, at least 16, and
what lies beyond D or F is zero. A map of two sides has two parts of BF features each; features given by the caller are
cut into one or two parts. Import this only where Triton is installed.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1e-30)
FLOOR = tl.constexpr(1e-12)
EXP_LIMIT = tl.constexpr(15.0)
RELU_FLOOR = tl.constexpr(1e-6)

HEDGEHOG_SOFTMAX = tl.constexpr(0)
HEDGEHOG_EXP = tl.constexpr(1)
RELU = tl.constexpr(2)
SOFTMAX = tl.constexpr(3)
PRECOMPUTED = tl.constexpr(4)
NO_MAP = tl.constexpr(5)
MAP_CODES = {"hedgehog_softmax": 0, "hedgehog_exp": 1, "relu": 2, "softmax": 3, "precomputed": 4, "none": 5}

SHARED = tl.constexpr(0)
SUM = tl.constexpr(1)
GATE = tl.constexpr(2)
MASS = tl.constexpr(3)
MIX_CODES = {"shared": 0, "sum": 1, "gate": 2, "mass": 3}


@triton.jit
def find_block(index, table_ptr, T, BLOCKS, TABLE: tl.constexpr):
    """Of block `index`: row of the batch, first token and end of its sequence, its number there, and the sequence.

    Row -1: no such block. table: [G, 5] int32, these five; without one a row is a sequence of T tokens.
    """
    if TABLE:
        row = tl.load(table_ptr + index * 5).to(tl.int64)
        low = tl.load(table_ptr + index * 5 + 1)
        high = tl.load(table_ptr + index * 5 + 2)
        number = tl.load(table_ptr + index * 5 + 3)
        sequence = tl.load(table_ptr + index * 5 + 4).to(tl.int64)
    else:
        row = (index // BLOCKS).to(tl.int64)
        number = (index % BLOCKS).to(tl.int32)
        low = number * 0
        high = low + T
        sequence = row
    return row, low, high, number, sequence


@triton.jit
def ask_for(base, COUNT: tl.constexpr):
    """Have the COUNT elements from the address `base` on, of 16 bytes or a multiple, brought into the L2 cache."""
    SIZE: tl.constexpr = COUNT * base.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, thread;
        }""",
        "=r,l,r", [base.to(tl.int64, bitcast=True), tl.full([], SIZE, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def ask_for_rows(base, live, stride, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """The same for the rows of a tile, a line of 128 bytes at a time; for rows that are not `live` the first."""
    LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = BD // LINE if BD > LINE else 1  # max() would be no constant in Triton 3.5
    row = tl.where(live, tl.arange(0, C), 0)
    column = tl.minimum(tl.arange(0, LINES) * LINE, D - 1)
    at = base + row[:, None] * stride + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_rows(
    base, live, stride, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, ONCE: tl.constexpr = False
):  # fmt: skip
    """[C, BD] from `base`, the address of the first row; rows that are not `live` [C] are zero. ONCE: nobody else reads
    them, and the L2 cache had better keep what others do.
    """
    row = tl.arange(0, C)
    column = tl.arange(0, BD)
    mask = live[:, None]
    if D != BD:
        mask = mask & (column < D)[None, :]
    at = base + row[:, None] * stride + column[None, :]
    if ONCE:
        tile = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=mask, other=0.0)
    return tile


@triton.jit
def load_part(base, live, stride, PART: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr):
    """Part 0 or 1 of features that the caller gave."""
    if PART == 0:
        part = load_rows(base, live, stride, min(F, BF), BF, C)
    else:
        part = load_rows(base + BF, live, stride, F - BF, BF, C)
    return part


@triton.jit
def store_rows(base, tile, live, stride, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """The other way."""
    row = tl.arange(0, C)
    column = tl.arange(0, BD)
    mask = live[:, None]
    if D != BD:
        mask = mask & (column < D)[None, :]
    tl.store(base + row[:, None] * stride + column[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_matrix(base, stride, ROWS: tl.constexpr, BR: tl.constexpr, COLS: tl.constexpr, BC: tl.constexpr):
    """[BR, BC] of a matrix of ROWS x COLS; zeros beyond it."""
    row = tl.arange(0, BR)
    column = tl.arange(0, BC)
    at = base + row[:, None] * stride + column[None, :]
    if ROWS == BR and COLS == BC:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(row < ROWS)[:, None] & (column < COLS)[None, :], other=0.0)
    return tile


@triton.jit
def load_state(
    states_ptr, at, before, first_v, D: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, CUT: tl.constexpr,
    ONCE: tl.constexpr = False,
):  # fmt: skip
    """One part's state, the BV values from first_v on by BF features. CUT: plus what its segment began with. ONCE: as
    in load_rows.
    """
    value = first_v + tl.arange(0, BV)
    from_state = states_ptr + at * D * BF + value[:, None] * BF + tl.arange(0, BF)[None, :]
    if D % BV == 0 and ONCE:
        state = tl.load(from_state, eviction_policy="evict_first")
    elif D % BV == 0:
        state = tl.load(from_state)
    else:
        state = tl.load(from_state, mask=(value < D)[:, None], other=0.0)
    if CUT:
        from_state = states_ptr + before * D * BF + value[:, None] * BF + tl.arange(0, BF)[None, :]
        if D % BV == 0:
            state += tl.load(from_state)
        else:
            state += tl.load(from_state, mask=(value < D)[:, None], other=0.0)
    return state


@triton.jit
def load_mass(masses_ptr, at, before, BF: tl.constexpr, CUT: tl.constexpr):
    """Its mass [BF]."""
    mass = tl.load(masses_ptr + at * BF + tl.arange(0, BF))
    if CUT:
        mass += tl.load(masses_ptr + before * BF + tl.arange(0, BF))
    return mass


@triton.jit
def load_columns(base, live, stride, first_n, D: tl.constexpr, BN: tl.constexpr, C: tl.constexpr):
    """[C, BN]: the columns from first_n on of the rows at `base`."""
    column = first_n + tl.arange(0, BN)
    mask = live[:, None]
    if D % BN != 0:
        mask = mask & (column < D)[None, :]
    return tl.load(base + tl.arange(0, C)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(base, tile, live, stride, first_n, D: tl.constexpr, BN: tl.constexpr, C: tl.constexpr):
    """The other way."""
    column = first_n + tl.arange(0, BN)
    mask = live[:, None]
    if D % BN != 0:
        mask = mask & (column < D)[None, :]
    at = base + tl.arange(0, C)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def through_map(grad, dy_base, weight_ptr, head, live, first_n, D: tl.constexpr, BN: tl.constexpr, F: tl.constexpr,
                BF: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr):  # fmt: skip
    """Add to grad [C, BN] what a row gets through its map: dy W^T, or dy itself where there is no W."""
    if MAP == SOFTMAX:
        grad += load_columns(dy_base, live, F, first_n, D, BN, C).to(tl.float32)
    else:
        dy = load_rows(dy_base, live, F, F, BF, C)
        channel = first_n + tl.arange(0, BN)
        feature = tl.arange(0, BF)
        at = weight_ptr + head * D * F + channel[:, None] * F + feature[None, :]
        if D % BN == 0 and F == BF:
            w = tl.load(at)
        else:
            w = tl.load(at, mask=(channel < D)[:, None] & (feature < F)[None, :], other=0.0)
        grad = tl.dot(dy, tl.trans(w), grad, input_precision="ieee")
    return grad


@triton.jit
def project(x, weight, bias_ptr, head, F: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """x W + b, [C, BF] float32; x itself for a map without weights."""
    if MAP == SOFTMAX:
        y = x.to(tl.float32)
    else:
        y = tl.dot(x, weight, input_precision="ieee")
        if bias_ptr is not None:
            column = tl.arange(0, BF)
            y += tl.load(bias_ptr + head * F + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def project_across(x, weight, bias_ptr, head, F: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """The same, features first: [BF, C]. Made so by the product: a product's result is never turned over."""
    if MAP == SOFTMAX:
        y = tl.trans(x).to(tl.float32)
    else:
        y = tl.dot(tl.trans(weight), tl.trans(x), input_precision="ieee")
        if bias_ptr is not None:
            column = tl.arange(0, BF)
            y += tl.load(bias_ptr + head * F + column, mask=column < F, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def features(y, MAP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, AXIS: tl.constexpr):
    """One side of the map, float32, of y with the features along AXIS; the other side is that of -y."""
    if AXIS == 1:
        inside = (tl.arange(0, BF) < F)[None, :]
    else:
        inside = (tl.arange(0, BF) < F)[:, None]
    if MAP == HEDGEHOG_EXP:
        phi = tl.exp2(tl.minimum(tl.maximum(y, -EXP_LIMIT), EXP_LIMIT) * LOG2E)
    elif MAP == RELU:
        phi = tl.maximum(y, RELU_FLOOR)
    else:
        if F != BF:
            y = tl.where(inside, y, float("-inf"))
        phi = tl.exp2(y * LOG2E - tl.expand_dims(tl.max(y, AXIS) * LOG2E, AXIS))
        phi = phi * tl.expand_dims(1.0 / tl.sum(phi, AXIS), AXIS)
        if MAP == HEDGEHOG_SOFTMAX:
            phi = tl.maximum(phi, FLOOR)
    if F != BF:
        phi = tl.where(inside, phi, 0.0)
    return phi


@triton.jit
def features_backward(y, phi, dphi, MAP: tl.constexpr):
    """Gradient of y from that of one side's features; softmax over axis 1."""
    if MAP == HEDGEHOG_EXP:
        dy = tl.where(tl.abs(y) <= EXP_LIMIT, phi * dphi, 0.0)
    elif MAP == RELU:
        dy = tl.where(y >= RELU_FLOOR, dphi, 0.0)
    elif MAP == PRECOMPUTED:
        dy = dphi
    else:
        if MAP == HEDGEHOG_SOFTMAX:
            dphi = tl.where(phi > FLOOR, dphi, 0.0)
        dy = phi * (dphi - tl.sum(phi * dphi, 1)[:, None])
    return dy


@triton.jit
def window_share(peak, near_ptr, near_at, near_live, window_weight, MIX: tl.constexpr):
    """The softmax window's factor for each row [C]: gamma of the head, or the window's share.

    peak: log2 of the window's sum (split mixes).
    """
    if MIX == SHARED:
        share = peak * 0.0 + tl.load(near_ptr + near_at).to(tl.float32)
    elif MIX == SUM:
        share = peak * 0.0 + window_weight
    elif MIX == GATE:
        share = tl.load(near_ptr + near_at, mask=near_live, other=0.0).to(tl.float32)
    else:
        far = tl.load(near_ptr + near_at, mask=near_live, other=0.0).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp2(far * LOG2E - peak))
    return share


FLOAT32_POINTERS = frozenset((
    "first_ptr", "first_mass_ptr", "part_ptr", "part_mass_ptr", "masses_ptr", "last_ptr", "last_mass_ptr", "near_ptr",
    "peak_ptr", "total_ptr", "row_scale_ptr", "row_mass_ptr", "row_ptr", "shift_ptr", "far_ptr", "level_ptr",
    "d_peak_ptr", "grads_ptr", "bias_grads_ptr", "q_bias_ptr", "k_bias_ptr", "bias_ptr",
))  # fmt: skip
INT32_POINTERS = frozenset(("sequences_ptr", "table_ptr", "pick_ptr"))


WIDE = {"D": 256, "BD": 256}
"""For the compile gate: heads of 256 channels, as Gemma has."""


def gate_case(kernel, rows, label, *, absent=(), **constants):  # type: ignore[no-untyped-def]
    """One case of the compile gate, in bfloat16: the types of a kernel's arguments are read from their names.

    rows: a row of the tuning table. The other constants are those of LoLCATs on Llama 3's heads, where `constants`
    does not say otherwise.
    """
    options = {name: rows[name] for name in ("num_warps", "num_stages", "maxnreg") if name in rows}
    usual = {
        "D": 128, "BD": 128, "F": 64, "BF": 64, "PARTS": 2, "C": 64, "MAP": 0, "LAG": 2, "WINDOW": True, "MIX": 0,
        "OWN": True, "KEYS": 4, "STATES": 1, "BZ": 0, "SHARING": 4, "V_SHARING": 4, "GROUP": 1, "ALONE": True,
        "EVEN": True, "TEAM": 4, "BOUND": 0.0, "BACKWARDS": False, "CUT": False, "FIRST": False, "LAST": False,
        "TABLE": False,
    }  # fmt: skip
    known = usual | {name: rows[name] for name in ("BV", "BN", "BQ", "BY_DOT", "PREFETCH") if name in rows} | constants
    missing = {"sequences_ptr", "table_ptr", "q_bias_ptr", "k_bias_ptr", "bias_ptr", "bias_grads_ptr", *absent}
    fixed = {name: known[name] for name in kernel.arg_names if name in known}
    fixed |= {name: None for name in kernel.arg_names if name in missing}
    signature = {}
    for name in kernel.arg_names:
        if name in fixed:
            continue
        if name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOAT32_POINTERS else "*i32" if name in INT32_POINTERS else "*bf16"
        elif name.startswith("s_"):
            signature[name] = "i32:16"
        else:
            signature[name] = "fp32" if name in ("scale", "window_weight") else "i32"
    return kernel, signature, fixed, options, label
