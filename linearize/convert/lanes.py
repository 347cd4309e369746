"""Work side by side on one GPU: what does not depend on one another goes to streams of its own.

A small model's kernels take a few microseconds and a part of the GPU each. Recorded as a graph with several branches,
they run next to one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1 << 22
"""Most numbers of a micro-batch's hidden states: with more, one kernel fills a GPU, and lanes only take memory."""
LANES = 4


class Lanes:
    """Streams beside the current one; with none, everything runs in its place."""

    def __init__(self, device: torch.device, count: int = 0) -> None:
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(count)]
        self._used: dict[torch.cuda.Stream, list[object]] = {}

    @classmethod
    def fitting(cls, device: torch.device, numbers: int, *, recorded: bool) -> Lanes:
        """Lanes for micro-batches with so many numbers in their hidden states, where their steps are recorded."""
        return cls(device, LANES if recorded and device.type == "cuda" and numbers <= SMALL else 0)

    @contextmanager
    def beside(self, number: int, *held: object) -> Iterator[None]:
        """What is launched within the block may run beside what is launched after it, until `join`.

        Blocks of one number follow one another. `held`: what they read; it stays in memory until then.
        """
        if not self.streams:
            yield
            return
        stream = self.streams[number % len(self.streams)]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self._used.setdefault(stream, []).append(held)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """What is launched from here on waits for all lanes."""
        for stream in self._used:  # to wait for one that has done nothing cannot be recorded
            torch.cuda.current_stream(self.device).wait_stream(stream)
        self._used.clear()
