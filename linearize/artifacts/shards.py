"""A checkpoint written a tensor at a time: every shard is laid out beforehand, and filled in any order.

Sizes are known before any value is, so the headers are written first and each tensor goes to its own place. A writer
that died goes on by writing again what it had not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linearize.artifacts.atomic import is_disk_full, sync_path
from linearize.artifacts.pieces import TYPES, as_bytes
from linearize.artifacts.weights import INDEX, SINGLE
from linearize.errors import RefusedError

NAMES = {dtype: name for name, dtype in TYPES.items()}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of every tensor, by name, in the order in which they lie in the files."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: its header, and where in the file every tensor begins and ends."""

    name: str
    header: bytes
    places: dict[str, tuple[int, int]]
    size: int
    """Bytes of the whole file."""


def lay_out(tensors: Layout, limit: int) -> list[Shard]:
    """Files of at most `limit` bytes of data each (a larger tensor has one to itself), filled in order."""
    groups: list[dict[str, int]] = []
    room = 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * _product(shape)
        if not groups or (size > room and groups[-1]):
            groups.append({})
            room = limit
        groups[-1][name] = size
        room -= size
    count = len(groups)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [_shard(file, group, tensors) for file, group in zip(files, groups, strict=True)]


class ShardWriter:
    """Fills the shards of a checkpoint in `folder`, which it makes. Close it, or use it in a `with`."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.folder, self.shards = folder, shards
        self._home = {name: shard for shard in shards for name in shard.places}
        self._open: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open = {}

    def write(self, name: str, pieces: Iterable[Tensor]) -> str:
        """Write one tensor, whole or in consecutive pieces; the sha256 of its bytes.

        Raises:
            ValueError: the pieces are not as large as the tensor was said to be. RefusedError: the disk is full.
        """
        shard = self._home[name]
        begin, end = shard.places[name]
        digest = hashlib.sha256()
        for piece in pieces:
            data = as_bytes(piece)
            if begin + len(data) > end:
                raise ValueError(f"{name} is larger than was said")
            digest.update(data)
            write_all(self._handle(shard), data, begin, self.folder / shard.name)
            begin += len(data)
        if begin != end:
            raise ValueError(f"{name} is smaller than was said")
        return digest.hexdigest()

    def flush(self) -> None:
        """Return when all that was written lies on the disk, the names of the files too."""
        for handle in self._open.values():
            os.fsync(handle)
        sync_path(self.folder)

    def finish(self) -> list[Path]:
        """Flush, write the index of more than one shard, and name the files."""
        for shard in self.shards:
            self._handle(shard)
        self.flush()
        paths = [self.folder / shard.name for shard in self.shards]
        if len(paths) > 1:
            total = sum(end - begin for shard in self.shards for begin, end in shard.places.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: shard.name for name, shard in sorted(self._home.items())},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            paths.append(self.folder / INDEX)
        return paths

    def _handle(self, shard: Shard) -> int:
        if shard.name not in self._open:
            handle = os.open(self.folder / shard.name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
            self._open[shard.name] = handle
            os.ftruncate(handle, shard.size)
            write_all(handle, memoryview(shard.header), 0, self.folder / shard.name)
        return self._open[shard.name]


def write_all(handle: int, data: memoryview, offset: int, path: Path) -> None:
    """Write `data` to an open file at `offset`. RefusedError if the disk is full."""
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(handle, data[done:], offset + done)
    except OSError as error:
        if is_disk_full(error):
            raise RefusedError(
                f"no space left on the disk while writing {path}", "Free some space, then go on with --resume"
            ) from error
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the disk knows no such thing."""
    import shutil

    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _shard(file: str, group: Mapping[str, int], tensors: Layout) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in group.items():
        dtype, shape = tensors[name]
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of eight
    header = len(text).to_bytes(8, "little") + text
    places, begin = {}, len(header)
    for name, size in group.items():
        places[name] = (begin, begin + size)
        begin += size
    return Shard(name=file, header=header, places=places, size=begin)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
