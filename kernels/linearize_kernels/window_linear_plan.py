"""Sizes of a window + linear call: what every launch of its kernels is told, worked out once.

Also the tables of packed or padded sequences. They are made by tensor operations only, so nothing waits for the device:
their length is the most that could be needed, and rows too many say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

TWO_SIDED = ("hedgehog_softmax", "hedgehog_exp")
PROJECTED = ("hedgehog_softmax", "hedgehog_exp", "relu")
MAPS = (*PROJECTED, "softmax", "precomputed")
CHUNK = 64
"""Tokens of a block where there is no window to set it."""


def cover(size: int) -> int:
    """The least power of two, from 16 on, that covers `size`."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes and choices of one call; names as in the kernels."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    state_heads: int
    channels: int
    """D."""
    width: int
    """F: outputs of the map per side, or all features where the caller gave them; 0 without a linear branch."""
    map: str
    window: int
    lag: int
    """2: the linear branch reads what the window cannot see; 1: everything up to the query."""
    mix: str
    own: bool
    """Whether the linear branch has a denominator of its own (split mixes)."""
    scale: float
    window_weight: float
    sinks: int
    softcap: float | None
    """The bound on the window's scores."""

    @property
    def chunk(self) -> int:
        """C: tokens of a block."""
        return self.window or CHUNK

    @property
    def blocks(self) -> int:
        """Blocks of one row."""
        return -(-self.tokens // self.chunk)

    @property
    def tile(self) -> int:
        """BF: columns of a tile of features."""
        size = cover(self.width or 16)
        return size // 2 if self.map == "precomputed" and size > 128 else size

    @property
    def parts(self) -> int:
        """Tiles of one token's features."""
        return 2 if self.map in TWO_SIDED or (self.map == "precomputed" and self.width > self.tile) else 1

    @property
    def apart(self) -> bool:
        """Whether the linear branch is normalised by itself, without the window's mass."""
        return not self.window or self.mix != "shared"

    @property
    def features(self) -> int:
        """Features of a token, as the caller sees them."""
        return 2 * self.width if self.map in TWO_SIDED else self.width

    def unable(self, dtype: torch.dtype, *others: torch.dtype) -> str | None:
        """Why the kernels cannot serve queries of this dtype, and keys and values of those; None where they can."""
        if any(x != dtype for x in others):
            return f"q, k and v differ in dtype ({dtype}, {', '.join(map(str, others))})"
        if self.channels > 256:
            return f"head_dim {self.channels} is above 256"
        if self.window and (self.window not in (16, 32, 64, 128)):
            return f"its blocks have 16, 32, 64 or 128 tokens, the window has {self.window}"
        if self.tile > 128:
            return f"a map of {self.width} features a side is above 128 (precomputed: 256)"
        if self.sinks > self.window:
            return f"{self.sinks} sinks do not fit into a window of {self.window}"
        if self.heads % self.key_heads or self.state_heads not in (self.heads, self.key_heads):
            return f"{self.heads} heads, {self.key_heads} key heads and {self.state_heads} states do not divide"
        if self.window and self.softcap is not None and self.softcap <= 0:
            return f"scores are bounded by more than 0, not by {self.softcap}"
        if self.window and self.scale <= 0:
            return f"its scores are scaled by more than 0, not by {self.scale}"
        if dtype == torch.float16 and self.map in ("hedgehog_exp", "relu"):
            return f"features of the map {self.map!r}, or sums of them, leave the range of float16; use bfloat16"
        if dtype == torch.float16 and self.map == "hedgehog_softmax" and self.own and self.apart:
            return "a denominator of features as small as 1e-12 is beyond float16; use bfloat16"
        return None


def sequence_tables(low: torch.Tensor, high: torch.Tensor, rows: torch.Tensor, chunk: int, most: int):  # type: ignore[no-untyped-def]
    """Tables for sequences that do not fill their rows.

    Args:
        low, high, rows: first token, end and row of the batch of each sequence, [N].
        chunk: C. most: an upper bound of the number of blocks of all sequences.

    Returns:
        sequences [N, 4] int32: row, low, high, first block; blocks [most, 5] int32: row (-1: unused), low, high,
        number in the sequence, sequence.
    """
    counts = (high - low + chunk - 1) // chunk
    ends = counts.cumsum(0)
    sequences = torch.stack((rows, low, high, ends - counts), dim=1).to(torch.int32)
    index = torch.arange(most, device=low.device)
    owner = torch.searchsorted(ends, index, right=True)
    used = owner < low.shape[0]
    owner = owner.clamp_max(low.shape[0] - 1)
    row = torch.where(used, rows[owner], -1)
    blocks = torch.stack((row, low[owner], high[owner], index - (ends - counts)[owner], owner), dim=1)
    return sequences.contiguous(), blocks.to(torch.int32).contiguous()


def spans_of(
    batch: int, tokens: int, cu_seqlens: torch.Tensor | None, starts: torch.Tensor | None
) -> list[tuple[slice, int, int]]:
    """Rows of the batch, first token and end of each sequence; reads the tensors, so it waits for the device."""
    if cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        return [(slice(0, 1), a, b) for a, b in pairwise(edges)]
    if starts is not None:
        return [(slice(row, row + 1), a, tokens) for row, a in enumerate(starts.tolist())]
    return [(slice(0, batch), 0, tokens)]
