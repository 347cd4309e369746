"""Hidden states between two layers, on the disk: what enters a layer is in one file, what leaves it goes to the next.

A stream is a set of training windows that pass through the teacher together, in the batches and in the precision in
which the ordinary conversion would run them: so the same numbers come out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linearize.artifacts.atomic import sync_path
from linearize.artifacts.pieces import Stored, as_bytes, read_into
from linearize.artifacts.shards import write_all
from linearize.convert.calibrate import picked_windows
from linearize.convert.stages import StageShape
from linearize.data import batches
from linearize.errors import RefusedError


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Windows that pass through the layers together."""

    name: str
    rows: np.ndarray
    """Numbers of its windows [n], rising."""
    context: int
    hidden: int
    """Channels."""
    dtype: torch.dtype
    """On the disk: the type that the teacher is stored in, which is the one that its own hidden states have."""
    batch: int
    """Windows of one pass."""
    folder: Path

    @property
    def bytes(self) -> int:
        """Of one file."""
        return len(self.rows) * self._window

    @property
    def _window(self) -> int:
        return self.context * self.hidden * self.dtype.itemsize

    def path(self, layer: int) -> Path:
        """The file of what enters a layer."""
        return self.folder / f"{self.name}-{layer:05d}.hidden"

    def parts(self) -> Iterator[np.ndarray]:
        """The numbers of the windows, a pass at a time."""
        for begin in range(0, len(self.rows), self.batch):
            yield self.rows[begin : begin + self.batch]

    def numbers(self, part: np.ndarray, device: torch.device) -> Tensor:
        """The windows `part` as a model is asked for them: [n, T], every row full of its window's number."""
        return torch.from_numpy(part.astype(np.int64))[:, None].expand(-1, self.context).to(device)

    def read(self, layer: int, numbers: Tensor) -> Tensor:
        """What enters `layer` of the windows `numbers` [n, T]: fp32 [n, T, C] on their device.

        Raises:
            KeyError: a window that is not in the stream. UsageError: the file is shorter than it was written.
        """
        found = []
        wanted = numbers[:, 0].cpu().numpy()
        with open(self.path(layer), "rb") as file:
            for slot, window in zip(np.searchsorted(self.rows, wanted), wanted, strict=True):
                if slot >= len(self.rows) or self.rows[slot] != window:
                    raise KeyError(f"window {window} is not in the stream {self.name}")
                taken = torch.empty(self._window, dtype=torch.uint8)
                read_into(file.fileno(), taken, int(slot) * self._window, self.path(layer))
                found.append(taken.view(self.dtype).reshape(self.context, self.hidden))
        return torch.stack(found).to(numbers.device).float()

    def write(self, layer: int, parts: Iterator[Tensor]) -> None:
        """Write what enters `layer`, [n, T, C] a pass; on return it lies on the disk, under its name.

        Raises:
            RefusedError: the disk is full.
        """
        path, offset = self.path(layer), 0
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        try:
            for part in parts:
                data = as_bytes(part.to(self.dtype))
                write_all(handle, data, offset, path)
                offset += len(data)
            os.fsync(handle)
        finally:
            os.close(handle)
        if offset != self.bytes:
            raise ValueError(f"{path} has {offset} bytes and not {self.bytes}")
        sync_path(self.folder)  # its name, too: the next checkpoint counts on it

    def require(self, layer: int) -> None:
        """RefusedError unless the file of what enters `layer` is there, whole."""
        path = self.path(layer)
        if not path.is_file() or path.stat().st_size != self.bytes:
            raise RefusedError(
                f"{path} is missing or cut short", f"To start over, delete {self.folder} and leave out --resume."
            )

    def drop(self, layer: int) -> None:
        """Remove the file of what enters `layer`."""
        self.path(layer).unlink(missing_ok=True)


def aligned_windows(count: int, shape: StageShape, seed: int) -> np.ndarray:
    """Numbers of the windows, of `count`, that an alignment reads: [n], rising."""
    if shape.steps * shape.batch >= count:
        return np.arange(count)
    numbers = np.arange(count)[:, None]
    read = [batches(numbers, batch_size=shape.batch, seed=seed, step=shape.offset + s) for s in range(shape.steps)]
    return np.unique(np.concatenate(read)) if read else np.arange(0)


def calibration_windows(windows: np.ndarray, *, tokens: int, seed: int) -> np.ndarray:
    """Numbers of the windows that a calibration on `tokens` tokens reads: [n], rising."""
    if not tokens:
        return np.arange(0)
    return np.unique(picked_windows(window_numbers(windows), tokens=tokens, seed=seed))


def window_numbers(windows: np.ndarray) -> np.ndarray:
    """As `windows` [N, T], but every token says which window it is in: what a bare model is asked for."""
    return np.broadcast_to(np.arange(len(windows), dtype=np.int32)[:, None], windows.shape)


def embed(stored: Stored, name: str, ids: np.ndarray) -> Tensor:
    """Embeddings of token ids [n, T], as stored: [n, T, C]. Only the rows of tokens that occur are read."""
    tokens, places = np.unique(ids, return_inverse=True)
    table = torch.cat([stored.rows(name, token, token + 1) for token in tokens.tolist()])
    return table[torch.from_numpy(places.reshape(ids.shape))]
