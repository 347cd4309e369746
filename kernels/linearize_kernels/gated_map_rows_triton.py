"""Rows that the scans over features multiply, weighted once (gated_map_scan_triton.py), chunk by chunk.

forwards   e^{G_last - G_j} v_j, and for z the weight itself
backwards  e^{G_i} do_i times its factor, and e^{G_i} e_i
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, row_decay


class Rows(NamedTuple):
    """Rows of tokens outside their sequence are 0. bfloat16 where the inputs are, else float32."""

    values: torch.Tensor
    """[B, heads, NT, C, V]"""
    columns: torch.Tensor
    """[B, heads, NT, C, 16]: weights of rows in z, as columns to be added up: two in bfloat16, which keep 16 bits."""
    spent: torch.Tensor
    """[B, S, NT] float32: log decay of a whole chunk, base 2."""


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_rows_kernel(
    y, g, factor, extra, values, columns, spent, table, syb, syh, syt, sgb, sgh, sgt, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, heads, flat): with REVERSE query heads, R a state, else state heads, G a value head."""
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    c = pid // H % NT
    b = (pid // H // NT).to(tl.int64)
    s = h // R
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    o = tl.arange(0, BV)
    running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
    weight = tl.where(live, tl.exp2(running if REVERSE else total - running), 0.0)
    in_z = weight
    if NORM and REVERSE:
        in_z = weight * tl.load(extra + (b * H + h) * T + t, mask=live, other=0.0)
        weight = weight * tl.load(factor + (b * H + h) * T + t, mask=live, other=0.0)
    elif REVERSE:
        weight = weight * scale
    tile = tl.load(
        y + b * syb + (h // G) * syh + first * syt + rows[:, None] * syt + o[None, :],
        mask=live[:, None] & (o < V)[None, :], other=0.0,
    )  # fmt: skip
    row = ((b * H + h) * NT + c) * C + rows
    kind = values.dtype.element_ty
    tl.store(values + row[:, None] * V + o[None, :], (tile.to(tl.float32) * weight[:, None]).to(kind),
             mask=(o < V)[None, :])  # fmt: skip
    if NORM:
        place = tl.arange(0, 16)[None, :]
        high = in_z.to(kind)
        low = (in_z - high.to(tl.float32)).to(kind)
        spread = tl.where(place == 0, high[:, None], tl.where(place == 1, low[:, None], 0.0))
        tl.store(columns + row[:, None] * 16 + place, spread.to(kind))
    if h % R == 0:
        tl.store(spent + (b * (H // R) + s) * NT + c, total + 0.0)


def map_rows(
    plan: Plan,
    y: torch.Tensor,
    g: torch.Tensor | None,
    *,
    chunk: int,
    reverse: bool,
    factors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> Rows:
    """Of values v [B, HK, T, V], or in reverse of the output's gradient [B, H, T, V] and its factors [B, H, T]."""
    table, _, count = plan.chunks(chunk)
    kind = torch.bfloat16 if y.dtype == torch.bfloat16 else torch.float32
    heads = plan.heads if reverse else plan.state_heads

    def made(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return empty(shape, dtype=dtype, device=y.device)

    shape = (plan.batch, heads, count, chunk)
    columns = made(*shape, 16) if plan.norm else made(0)
    spent = made(plan.batch, plan.state_heads, count, dtype=torch.float32)
    rows = Rows(made(*shape, plan.values), columns, spent)
    start(plan.found, map_rows_kernel, plan.batch * count * heads, (
        y, g, *factors, *rows, table, *y.stride()[:3], *plan.decay_strides(g), plan.scale, plan.length, heads, count,
    ), dict(
        R=plan.readers if reverse else 1, G=1 if reverse else plan.state_heads // plan.kv_heads, V=plan.values,
        BV=max(16, triton.next_power_of_2(plan.values)), C=chunk, DECAY=plan.decay, REVERSE=reverse, NORM=plan.norm,
        PACKED=table is not None, num_warps=4,
    ))  # fmt: skip
    return rows


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """The configuration in bfloat16, for the compile gate."""
    constants: dict[str, Any] = dict(
        R=4, G=1, V=128, BV=128, C=64, DECAY="scalar", REVERSE=True, NORM=True, PACKED=False, table=None
    )
    pointers = dict.fromkeys(("y", "values", "columns"), "*bf16")
    pointers |= dict.fromkeys(("g", "factor", "extra", "spent"), "*fp32")
    signature = gate_signature(map_rows_kernel, pointers, constants)
    return [(map_rows_kernel, signature, constants, {"num_warps": 4}, "V 128")]
