"""Sizes of one call of the gated delta rule, where its chunks lie, and the launches of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One call's sizes. B batch, H query, S state and HK value heads, T tokens, F features, V value channels."""

    batch: int
    heads: int
    state_heads: int
    value_heads: int
    length: int
    features: int
    values: int
    dtype: torch.dtype
    chunk: int
    lag: int
    """Chunks of a block under a lag, else 0."""
    gated: bool
    unit: bool
    """Whether queries and keys are divided by their lengths."""
    capability: int
    cu_seqlens: torch.Tensor | None

    @property
    def sequences(self) -> int:
        """N: packed sequences, or rows of the batch."""
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def chunks(self) -> int:
        """Chunks of a row; packed, a bound that the host knows without reading cu_seqlens."""
        if self.cu_seqlens is None:
            return -(-self.length // self.chunk)
        return self.length // self.chunk + self.sequences

    @cached_property
    def packing(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Bounds of the sequences [N + 1], first chunk of each [N + 1], and of each chunk [chunks, 3] its first token,
        its sequence's end and its number there (zeros for chunks that are not needed); int32. None where not packed.
        """
        if self.cu_seqlens is None:
            return None, None, None
        bounds = self.cu_seqlens.to(torch.int32)
        number = (bounds.diff() + self.chunk - 1) // self.chunk
        firsts = torch.cat((number.new_zeros(1), number.cumsum(0, dtype=torch.int32)))
        chunk = torch.arange(self.chunks, dtype=torch.int32, device=bounds.device)
        sequence = torch.searchsorted(firsts, chunk, right=True) - 1
        real = sequence < self.sequences
        sequence = sequence.clamp_max(self.sequences - 1)
        inside = chunk - firsts[sequence]
        rows = torch.stack((bounds[sequence] + inside * self.chunk, bounds[sequence + 1], inside), dim=1)
        return bounds, firsts, torch.where(real[:, None], rows, 0).to(torch.int32).contiguous()

    @property
    def common(self) -> dict[str, object]:
        """Constants that most kernels share."""
        return {
            "F": self.features,
            "C": self.chunk,
            "GATED": self.gated,
            "UNIT": self.unit,
            "PACKED": self.cu_seqlens is not None,
            "PREC": "ieee" if self.dtype == torch.float32 else "tf32",
        }


def strides(x: torch.Tensor | None) -> tuple[int, int, int]:
    """Over batch, head and token; zeros for None."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))
