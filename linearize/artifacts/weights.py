"""Reading safetensors of others: the files of a checkpoint, their headers, and whether every number is finite.

The headers are read here, without any library, so that a truncated, padded or hostile file is refused by name before
anything is allocated. Only safetensors are read: pickled weights can run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.artifacts.atomic import sha256
from linearize.errors import RefusedError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Bytes. The format allows headers of 100 MB; parsed, one would take gigabytes, and 32 MiB describe 250 000 tensors.
HEADER_CAP = 32 << 20
JSON_CAP = 32 << 20
FINITE_CHUNK = 1 << 24  # elements looked at in one go
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Files that decide what a checkpoint computes. They make its digest.
_IDENTITY = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of one tensor. `dtype` is the safetensors name ("BF16"), `begin:end` its bytes in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name. UsageError, naming the file, for anything but a sound file:

    the header fits and is a JSON object without duplicate keys, every dtype is known, sizes match shapes, and the
    tensors cover the data exactly, without holes, overlaps or a tail.
    """
    path = Path(path)
    require_regular(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise _damaged(path, f"it has {size} bytes and ends inside its header")
            if length > HEADER_CAP:
                raise _damaged(path, f"its header claims {length} bytes, over the limit of {HEADER_CAP}")
            raw = file.read(length)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not raw.startswith(b"{"):
        raise _damaged(path, "its header is not a JSON object")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not valid JSON") from error
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise _damaged(path, "its metadata is not a mapping of texts")
    for name in header:
        if not name.isprintable() or not name:  # libraries print names as they are
            raise _damaged(path, f"a tensor is named {name!r}")
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items()}
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise _damaged(path, f"tensor {name!r} begins at byte {info.begin} of the data, not at {position}")
        position = info.end
    data = size - 8 - length
    if position != data:
        what = "it is truncated" if data < position else "it has bytes that belong to no tensor"
        raise _damaged(path, f"{what} ({data} bytes of data, {position} expected)")
    return tensors


def _no_weights(folder: Path) -> UsageError:
    """The error of a folder without weights; of a model of the Hub there may be some that were not fetched."""
    from linearize.artifacts.download import commit_of, display_name

    if commit_of(folder) is None:
        return UsageError(
            f"{folder} holds no weights: neither {SINGLE} nor {INDEX}", "Copy them there, or check MODEL."
        )
    name = display_name(folder, folder)
    return UsageError(
        f"{name} has no safetensors at this revision, and pickled weights (.bin) are never fetched",
        f"Try {name}@refs/pr/1, where the Hub's own conversion often lies, or save it as safetensors: docs/hub.md",
    )


def list_shards(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that hold the model in `folder`, in order. UsageError when there are none, when one of the
    index is absent, or when the index points outside the folder."""
    folder = Path(folder)
    index = folder / INDEX
    names = sorted(set(read_index(index).values())) if _lexists(index) else []
    if _lexists(folder / SINGLE):
        names = [SINGLE]  # what transformers loads when both are there
    if not names:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED and p.name != "training_args.bin")
        if pickled:
            raise UsageError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code, and no safetensors",
                "Save the model again as safetensors: docs/hub.md has the lines.",
            )
        raise _no_weights(folder)
    for name in names:
        require_regular(folder / name)
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name} is missing", f"{INDEX} names it." if name != SINGLE else None)
        require_inside(folder, folder / name)
    return [folder / name for name in names]


def read_index(index: str | os.PathLike[str]) -> dict[str, str]:
    """{tensor: shard file} of a model.safetensors.index.json; every shard is a plain file name, or UsageError."""
    index = Path(index)
    require_inside(index.parent, index)
    weight_map = read_json(index, cap=JSON_CAP).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not _plain_name(name):
            raise UsageError(
                f"{index} points outside its folder: {name!r} for tensor {tensor!r}", "Only plain file names are read."
            )
        if not name.endswith(".safetensors"):
            raise UsageError(f"{index} names {name!r}, which is not a safetensors file")
    return weight_map


def _plain_name(name: Any) -> bool:
    """Whether `name` can be a visible file of this folder and of no other."""
    if not isinstance(name, str) or not name.isprintable() or name != os.path.basename(name):
        return False
    return bool(name) and not name.startswith(".") and not set(name) & set("\\:") and len(name.encode()) <= 255


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a checkpoint with its shard. UsageError for a damaged shard, a tensor in two shards, or an index
    that disagrees with the shards."""
    folder = Path(folder)
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    shards = list_shards(folder)
    for shard in shards:
        for name, info in read_header(shard).items():
            if name in tensors:
                raise UsageError(
                    f"tensor {name!r:.200} is in both {tensors[name][0].name} and {shard.name} of {folder}"
                )
            tensors[name] = (shard, info)
    if shards != [folder / SINGLE]:
        for name, file in read_index(folder / INDEX).items():
            if name not in tensors or tensors[name][0].name != file:
                raise UsageError(f"{folder / INDEX} says that tensor {name!r} is in {file}, and it is not there")
    if not tensors:
        raise UsageError(f"{folder} holds no tensors")
    return tensors


def require_finite(folder: str | os.PathLike[str]) -> None:
    """RefusedError, naming tensor and file, if any weight is NaN or infinite. Streams, a chunk at a time."""
    import torch

    from linearize.artifacts.pieces import open_stored

    with open_stored(folder) as stored:
        for name, (shard, _) in stored.tensors.items():
            for chunk in stored.pieces(name, FINITE_CHUNK):
                if not chunk.is_floating_point():
                    break
                wide = chunk if chunk.element_size() > 1 else chunk.float()
                if torch.isfinite(wide).all():
                    continue
                what = "NaN" if torch.isnan(wide).any() else "Inf"
                raise RefusedError(f"tensor {name!r:.200} in {shard} holds {what}", "The checkpoint is damaged.")


def digest_checkpoint(folder: str | os.PathLike[str]) -> str:
    """sha256 over the weights, config and tokenizer files of a checkpoint: names and contents, not where it lies."""
    folder = Path(folder)
    paths = [folder / name for name in _IDENTITY if (folder / name).is_file()] + list_shards(folder)
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def checkpoint_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of weights in a checkpoint, from the headers alone."""
    return sum(info.end - info.begin for _, info in read_tensors(folder).values())


def read_json(path: Path, *, cap: int) -> dict[str, Any]:
    """One JSON object from a file of at most `cap` bytes; UsageError for anything else, NaN and duplicate keys too."""
    require_regular(path)
    try:
        if path.stat().st_size > cap:
            raise UsageError(f"{path} is larger than {cap >> 20} MB")
        value = json.loads(
            path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return value


def require_regular(path: Path) -> None:
    """UsageError if `path` is there and is no file: reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise UsageError(f"{path} is a link to itself", "Put the file itself there.") from error
        return  # absent: for whoever needs it to say
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is not a file", "Copy or download it again.")


def require_inside(folder: Path, path: Path) -> None:
    """UsageError if `path` is a link that leaves `folder`. The Hub's cache links into its own blobs folder: allowed."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return
    if home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs":
        return
    raise UsageError(f"{path} is a link that leaves its folder", "Put the file itself there.")


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header's entry for tensor {name!r} is not one of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _natural_numbers(shape) or len(shape) > 16 or not _natural_numbers(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has a bad shape or bad offsets")
    info = TensorInfo(dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])
    if (info.end - info.begin) * 8 != info.elements * _BITS[dtype]:
        raise _damaged(path, f"tensor {name!r} has {info.end - info.begin} bytes, not those of {dtype} {list(shape)}")
    return info


def _natural_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _lexists(path: Path) -> bool:
    return os.path.lexists(path)


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is not a sound safetensors file: {why}", "Copy or download it again.")
