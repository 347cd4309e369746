"""Sizes of one call of gated linear attention, and where its chunks lie."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .compiled import Found

ENOUGH_PROGRAMS = 132
"""Programs of a scan that fill a large GPU; with fewer, it is cut into segments."""
LEAST_SEGMENT = 4
"""Chunks that a segment has at least."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows of the batch, and whole key-value heads with all that read them; one row where it is not every head."""

    rows: slice
    keys: slice
    states: slice
    heads: slice
    packed: bool
    whole: bool
    """Whether it is all there is; then nothing is cut."""

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Of [B, H, ...]."""
        return x if self.whole else x[self.rows, self.heads]

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Of [B, HK, ...]."""
        return x if self.whole else x[self.rows, self.keys]

    def of_gates(self, g: torch.Tensor | None) -> torch.Tensor | None:
        """Of log decays, [S] or [B, S, T]."""
        if g is None or self.whole:
            return g
        return g[self.states] if g.ndim == 1 else g[self.rows, self.states]

    def of_states(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Of the states of sequences [N, S, ...]."""
        if x is None or self.whole:
            return x
        return x[:, self.states] if self.packed else x[self.rows, self.states]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One call's sizes. B batch, H query, S state and HK key-value heads, T tokens, F features, V value channels."""

    batch: int
    heads: int
    state_heads: int
    kv_heads: int
    length: int
    features: int
    values: int
    decay: str
    """none, fixed, scalar or channel."""
    norm: bool
    lag: bool
    scale: float
    capability: int
    map: str = "none"
    """Feature map of the op; none: features are given."""
    signs: int = 1
    """Signs of the map: F is this times the map's width."""
    cu_seqlens: torch.Tensor | None = None
    """Where packed sequences begin and end [N + 1], int32 or int64; None: every row of the batch is one sequence."""

    tables: dict[int, tuple[torch.Tensor | None, torch.Tensor | None, int]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """What `chunks` has found, by size; slices share it."""

    found: Found | None = field(default=None, repr=False, compare=False)
    """What `compiled` knows of such calls; every slice has its own."""

    @property
    def spared(self) -> bool:
        """Whether a row of features times their gradients adds up to what is known, but for features at their floor.

        One softmax over a denominator. Where no denominator is near the floors, no pass over a row's features has to
        find the sum (gated_map_dq_triton.py, gated_map_dk_triton.py).
        """
        return self.norm and self.map == "learned_softmax"

    @property
    def sequences(self) -> int:
        """N: packed sequences, or rows of the batch."""
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def readers(self) -> int:
        """Query heads that read one state."""
        return self.heads // self.state_heads

    def segments(self, programs: int, chunks: int) -> int:
        """Segments that a scan of this many programs is cut into."""
        wanted = 1 if programs >= ENOUGH_PROGRAMS else -(-2 * ENOUGH_PROGRAMS // programs)
        return max(1, min(wanted, chunks // LEAST_SEGMENT))

    def slices(self, fit: int) -> list[tuple[Plan, Slice]]:
        """The call cut into parts of at most `fit` key-value heads (at least one) of single rows of the batch."""
        whole = fit >= self.kv_heads
        rows = _evenly(self.batch, fit // self.kv_heads if whole else 1)
        keys = _evenly(self.kv_heads, fit)
        states, heads = self.state_heads // self.kv_heads, self.heads // self.kv_heads
        found = []
        for row in range(0, self.batch, rows):
            for low in range(0, self.kv_heads, keys):
                high = min(low + keys, self.kv_heads)
                at = Slice(
                    rows=slice(row, min(row + rows, self.batch)),
                    keys=slice(low, high),
                    states=slice(low * states, high * states),
                    heads=slice(low * heads, high * heads),
                    packed=self.cu_seqlens is not None,
                    whole=rows == self.batch and keys == self.kv_heads,
                )
                sizes = {
                    "batch": at.rows.stop - at.rows.start,
                    "kv_heads": high - low,
                    "state_heads": (high - low) * states,
                    "heads": (high - low) * heads,
                }
                found.append((replace(self, **sizes), at))
        return found

    def sizes(self) -> tuple[object, ...]:
        """All that its numbers follow from, besides the strides of tensors."""
        return (
            self.batch, self.heads, self.state_heads, self.kv_heads, self.length, self.features, self.values,
            self.sequences, self.scale,
        )  # fmt: skip

    def decay_strides(self, g: torch.Tensor | None) -> tuple[int, int, int]:
        """Strides of the log decay over batch, head and token."""
        if g is None:
            return 0, 0, 0
        if self.decay == "fixed":
            return 0, g.stride(0), 0
        return g.stride(0), g.stride(1), g.stride(2)

    def chunks(self, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """Table of chunks [NT, 3] int64 (first token, bounds of its sequence), each sequence's first chunk [N + 1], NT.

        Without packing both tensors are None: chunk c begins at token c * size. NT is a bound that needs no look at
        cu_seqlens from the host; chunks beyond the last have empty bounds.
        """
        if self.cu_seqlens is None:
            return None, None, self.count(size)
        if size not in self.tables:
            self.tables[size] = self._packed_chunks(self.cu_seqlens, size)
        return self.tables[size]

    def count(self, size: int) -> int:
        """NT, of chunks of `size` tokens."""
        if self.cu_seqlens is None:
            return -(-self.length // size) + self.lag
        return self.length // size + self.sequences * (1 + int(self.lag))

    def _packed_chunks(self, cu_seqlens: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        ends = cu_seqlens.to(torch.int64)
        number = (ends.diff() + size - 1) // size + int(self.lag)
        offsets = torch.cat((number.new_zeros(1), number.cumsum(0)))
        count = self.count(size)
        chunk = torch.arange(count, device=ends.device)
        sequence = torch.searchsorted(offsets, chunk, right=True) - 1
        real = sequence < self.sequences
        sequence = sequence.clamp_max(self.sequences - 1)
        first = ends[sequence] + (chunk - offsets[sequence] - int(self.lag)) * size
        rows = torch.stack((first, ends[sequence], ends[sequence + 1]), dim=1)
        return torch.where(real[:, None], rows, 0).contiguous(), offsets, count


def _evenly(count: int, most: int) -> int:
    """Size of parts of `count`, at most `most` each but at least one, that differ little."""
    return -(-count // -(-count // max(1, most)))


def gate_signature(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Types of a kernel's arguments for the compile gate: of `pointers` as given, strides multiples of 16."""
    signature = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
    for name in kernel.arg_names:
        if name not in signature and name not in constants:
            signature[name] = "fp32" if name == "scale" else "i32:16" if name.startswith("s") else "i32"
    return signature
