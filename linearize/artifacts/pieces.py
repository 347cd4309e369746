"""Tensors of safetensors files, read a piece at a time.

Files are read, not mapped: a mapped page counts as memory of this process once it was touched, and a checkpoint read
from end to end would count in full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from linearize.artifacts.weights import TensorInfo, read_tensors
from linearize.errors import UsageError

PIECE = 1 << 24
"""Elements read in one go."""
TYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The safetensors names of torch's types."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The tensors of a checkpoint, whose headers were checked; see `open_stored`."""

    tensors: dict[str, tuple[Path, TensorInfo]]
    _files: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """Descriptor and first byte of the data, of the files that were needed so far."""

    def read(self, name: str) -> Tensor:
        """A whole tensor, as stored, on the CPU."""
        return self._read(name, 0, self.tensors[name][1].elements).reshape(self.tensors[name][1].shape)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Entries `begin` to `end` along the first axis."""
        info = self.tensors[name][1]
        width = info.elements // max(1, info.shape[0])
        return self._read(name, begin * width, end * width).reshape(end - begin, *info.shape[1:])

    def pieces(self, name: str, elements: int = PIECE) -> Iterator[Tensor]:
        """The tensor in rows, about `elements` at a time; a tensor without axes in one piece."""
        info = self.tensors[name][1]
        if not info.shape or not info.elements:
            yield self.read(name)
            return
        step = max(1, elements // (info.elements // info.shape[0]))
        for begin in range(0, info.shape[0], step):
            yield self.rows(name, begin, min(begin + step, info.shape[0]))

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        path, info = self.tensors[name]
        dtype = TYPES.get(info.dtype)
        if dtype is None:
            raise UsageError(f"{path}: tensor {name!r:.200} is {info.dtype}, which torch does not hold")
        handle, data = self._file(path)
        taken = torch.empty((end - begin) * dtype.itemsize, dtype=torch.uint8)
        read_into(handle, taken, data + info.begin + begin * dtype.itemsize, path)
        return taken.view(dtype)

    def _file(self, path: Path) -> tuple[int, int]:
        if path not in self._files:
            handle = os.open(path, os.O_RDONLY)
            self._files[path] = handle, 8 + int.from_bytes(os.pread(handle, 8, 0), "little")
        return self._files[path]


@contextmanager
def open_stored(folder: str | os.PathLike[str]) -> Iterator[Stored]:
    """The tensors of the checkpoint in `folder`; its headers are checked first, the files are closed at the end.

    Raises:
        UsageError: see `read_tensors`.
    """
    stored = Stored(tensors=read_tensors(folder))
    try:
        yield stored
    finally:
        for handle, _ in stored._files.values():
            os.close(handle)


def read_into(handle: int, buffer: Tensor, offset: int, path: Path) -> None:
    """Fill a uint8 tensor with the bytes of an open file from `offset` on; UsageError if the file ends before."""
    view = buffer.numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise UsageError(f"{path} became shorter while it was read", "Copy or download it again.")
        done += count


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; of a contiguous one on the CPU, without a copy."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
