"""Decode for mixers with projections of their own: queries and keys of the linear branch, for all heads at once.

    q_lin = unrotate(q) + x W_q^T / sqrt(C),  k_lin likewise        every row of W_q and W_k is read once

In float32, from weights and inputs as they are kept. Of a wide layer these matrices are most of what a step reads.
Shapes as in decode.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .decode_maps_triton import exact_dot, read_head
from .tuning import decode_own as tuning

PROGRAMMATIC = 90
"""From which compute capability on the next launch may begin before this one has ended."""


@triton.jit(do_not_specialize=["B", "H", "S"])
def own_kernel(
    q, k, inputs, cos, sin, q_own, k_own, q_lin, k_lin, sqb, sqh, skb, skh, sxb, scb, B, H, S,
    FACTOR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, UNROTATE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BD channels of S + H heads, groups of ROWS sequences). q_lin [B, H, D], k_lin [B, S, D] float32.

    KEYS: state heads that share a key head. Fewer than 16 ROWS are multiplied one by one, 16 by tensor cores. EARLY:
    the next launch may begin.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    TILES: tl.constexpr = (D + BD - 1) // BD
    head = tl.program_id(0) // TILES
    od = tl.program_id(0) % TILES * BD + tl.arange(0, BD)
    if head < S:
        w, x, to = k_own + head * (D * C), k + head // KEYS * skh, k_lin + head * D
    else:
        w, x, to = q_own + (head - S) * (D * C), q + (head - S) * sqh, q_lin + (head - S) * D
    stride = tl.where(head < S, skb, sqb)
    step = tl.where(head < S, S, H) * D
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.minimum(rows, B - 1).to(tl.int64)  # a row that does not exist is the last, never stored
    oc = tl.arange(0, BC)
    if ROWS < 16:
        sums = tl.zeros([ROWS, BD, BC], tl.float32)
        for start in tl.range(0, C, BC):
            at = start + oc
            tile = tl.load(w + (od[:, None] * C + at[None, :]), mask=(od < D)[:, None] & (at < C)[None, :], other=0.0)
            token = tl.load(inputs + b[:, None] * sxb + at[None, :], mask=(at < C)[None, :], other=0.0)
            sums += tile.to(tl.float32)[None, :, :] * token.to(tl.float32)[:, None, :]
        y = tl.sum(sums, 2)
        b, od, rows = b[:, None], od[None, :], rows[:, None]
    else:
        y = tl.zeros([BD, ROWS], tl.float32)
        for start in tl.range(0, C, BC):
            at = start + oc
            tile = tl.load(w + (od[:, None] * C + at[None, :]), mask=(od < D)[:, None] & (at < C)[None, :], other=0.0)
            token = tl.load(inputs + b[None, :] * sxb + at[:, None], mask=(at < C)[:, None], other=0.0)
            if tile.dtype == token.dtype and tile.dtype != tl.float32:
                y = tl.dot(tile, token, y)
            elif token.dtype == tl.bfloat16:
                y += exact_dot(tile.to(tl.float32), token)
            else:
                y = tl.dot(tile.to(tl.float32), token.to(tl.float32), y, input_precision="tf32x3")
        b, od, rows = b[None, :], od[:, None], rows[None, :]
    value = read_head(x + b * stride, od, cos + b * scb, sin + b * scb, D, UNROTATE)
    tl.store(to + b * step + od, value + FACTOR * y, mask=(rows < B) & (od < D))


def constants(
    *, head_dim: int, channels: int, batch: int, card: int, keys: int, unrotate: bool, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, int]]:
    """The kernel's constexpr arguments and its launch options for one layer, whose weights are of `dtype`."""
    tiles = tuning(card, head_dim, channels, batch, dtype)
    made = {
        "FACTOR": channels**-0.5, "D": head_dim, "C": channels, "KEYS": keys, "UNROTATE": unrotate,
        "EARLY": card >= PROGRAMMATIC,
    }  # fmt: skip
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    return made | tiles, options


def own_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    inputs: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    weights: Mapping[str, torch.Tensor],
    *,
    state_heads: int,
    card: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [B, H, D] and keys [B, S, D] of the linear branch, float32.

    Args:
        q: [B, H, D]; k: [B, K, D]; inputs: [B, C].
        rotation: cos, sin [B or 1, D] to undo, or None.
        weights: q_own [H D, C] and k_own [S D, C], contiguous.
    """
    (batch, heads, head_dim), channels = q.shape, inputs.shape[1]
    made, options = constants(
        head_dim=head_dim, channels=channels, batch=batch, card=card, keys=state_heads // k.shape[1],
        unrotate=rotation is not None, dtype=weights["q_own"].dtype,
    )  # fmt: skip
    cos, sin = (q, q) if rotation is None else rotation
    turned = cos.stride(0) if rotation is not None and len(cos) > 1 else 0
    q_lin, k_lin = (
        empty((batch, count, head_dim), dtype=torch.float32, device=q.device) for count in (heads, state_heads)
    )
    grid = triton.cdiv(head_dim, made["BD"]) * (state_heads + heads), triton.cdiv(batch, made["ROWS"])
    own_kernel[grid](
        q, k, inputs, cos, sin, weights["q_own"], weights["k_own"], q_lin, k_lin, q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), inputs.stride(0), turned, batch, heads, state_heads, **made, **options,
    )  # fmt: skip
    return q_lin, k_lin


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Layers at the size of Llama-3-8B, for the compile gate."""
    cases = []
    for batch, dtype in ((1, torch.bfloat16), (16, torch.bfloat16), (16, torch.float32)):
        sizes: dict[str, Any] = {"head_dim": 128, "channels": 4096, "batch": batch, "card": arch, "keys": 1}
        made, options = constants(**sizes, unrotate=True, dtype=dtype)
        weights = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        types = {name: "*bf16" for name in own_kernel.arg_names if name not in made}
        types |= dict.fromkeys(("q_own", "k_own"), weights) | dict.fromkeys(("q_lin", "k_lin"), "*fp32")
        types |= dict.fromkeys(("sqb", "sqh", "skb", "skh", "sxb", "scb"), "i32:16") | dict.fromkeys("BHS", "i32")
        cases.append((own_kernel, types, made, options, f"batch {batch}, weights {weights[1:]}"))
    return cases
