"""Tensors out of a file of `torch.save`, without unpickling it.

Such a file is a zip: `data.pkl` describes nested values, and every `data/N` holds the raw bytes of one storage. A
pickle is a program. Here it is only parsed (`pickletools`, which runs nothing) and followed by a machine that knows
dicts, lists, numbers, texts and two functions of torch, both of which only say where a tensor lies. Whatever else it
asks for is refused by name, and nothing is allocated that the file does not hold: torch's own reader, told to read
weights only, still builds `torch.Tensor(10**12)` because a file says so.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import UsageError

if TYPE_CHECKING:
    import torch

FILE_CAP = 32 << 30
"""Most bytes of a file; adapters and feature maps of the largest published models are a hundredth of that."""
PROGRAM_CAP = 4 << 20
ENTRIES_CAP = 100_000
_BESIDE = ("version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}
_DICT, _TENSOR, _PARAMETER = "OrderedDict", "_rebuild_tensor_v2", "_rebuild_parameter"
_NAMES = {
    "collections OrderedDict": _DICT,
    "torch._utils _rebuild_tensor_v2": _TENSOR,
    "torch._utils _rebuild_parameter": _PARAMETER,
    **{f"torch {name}": name for name in _STORAGES},
}
_MARK = object()


@dataclass(frozen=True, kw_only=True)
class _Name:
    """One of `_NAMES`, as a value on the stack; it can be called in no other way than `_apply` does."""

    name: str


@dataclass(frozen=True, kw_only=True)
class _Storage:
    record: str
    dtype: str
    elements: int


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where a tensor lies: elements of a storage from `offset` on, by `shape` and `stride`."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: str | os.PathLike[str], *, inside: str) -> dict[str, torch.Tensor]:
    """The state dict that `torch.save` wrote into a file: {name: tensor}, on the CPU and in the dtype stored.

    `inside` names the entry that holds it where the file has other entries beside it (epochs, losses); a file that is
    nothing but tensors is taken as it is. Tensors may share memory, as they did when they were saved.

    Raises:
        UsageError: no such file, not of torch's zip format, damaged, or it asks for anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "Give the .pt file that was published.")
    try:
        if path.stat().st_size > FILE_CAP:
            raise UsageError(f"{path} is larger than {FILE_CAP >> 30} GB")
        with zipfile.ZipFile(path) as archive:
            records = _records(archive, path)
            found = _follow(archive.read(records["data.pkl"]), path)
            state = found.get(inside, found) if isinstance(found, dict) else found
            if not isinstance(state, dict) or not state:
                raise _refused(path, f"it holds no dict of tensors, neither by itself nor as {inside!r}")
            for name, value in state.items():
                if not isinstance(name, str) or not isinstance(value, _Stored):
                    raise _refused(path, f"its entry {name!r:.100} is not a tensor")
            raw: dict[str, bytearray] = {}
            return {name: _tensor(name, value, archive, records, raw, path) for name, value in state.items()}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, struct.error, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path} is not a sound file of torch's zip format: {error}",
            "It is truncated, damaged, or of an older pickled format, which is not read.",
        ) from error


def _records(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries without their common folder; refuses whatever torch.save does not write."""
    entries = archive.infolist()
    if len(entries) > ENTRIES_CAP:
        raise _refused(path, f"it has {len(entries)} entries")
    records: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for entry in entries:
        root, slash, name = entry.filename.partition("/")
        known = name in ("data.pkl", *_BESIDE) or (name.startswith("data/") and name[5:].isdecimal())
        if not slash or root in ("", ".", "..") or "\\" in root or not known:
            raise _refused(path, f"it has the entry {entry.filename!r:.100}, which torch.save does not write")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise _refused(path, f"its entry {entry.filename!r:.100} is compressed or encrypted")
        if name in records or (records and root != entries[0].filename.partition("/")[0]):
            raise _refused(path, f"its entry {entry.filename!r:.100} is there twice or in another folder")
        records[name] = entry
        total += entry.file_size
    if total > path.stat().st_size:
        raise _refused(path, f"its entries claim {total} bytes, more than the file has")
    if "data.pkl" not in records:
        raise _refused(path, "it has no data.pkl")
    if records["data.pkl"].file_size > PROGRAM_CAP:
        raise _refused(path, f"its data.pkl is larger than {PROGRAM_CAP >> 20} MB")
    if "byteorder" in records and archive.read(records["byteorder"]).strip() != b"little":
        raise _refused(path, "its numbers are not little-endian")
    return records


def _follow(program: bytes, path: Path) -> Any:
    """What a pickle of plain data and tensors describes; a tensor as `_Stored`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(program):
            if operation.name == "STOP":
                return stack.pop()
            _step(operation.name, argument, stack, memo)
    except UsageError as error:
        raise _refused(path, error.message) from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise _refused(path, "its data.pkl is damaged") from error
    raise _refused(path, "its data.pkl has no end")


def _step(operation: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction. A UsageError names what a file may not ask for; other errors mean that it is damaged."""
    if operation in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
        stack.append(argument)
    elif operation in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif operation in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif operation in ("NEWTRUE", "NEWFALSE", "NONE"):
        stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[operation])
    elif operation == "EMPTY_DICT":
        stack.append({})
    elif operation == "EMPTY_LIST":
        stack.append([])
    elif operation == "EMPTY_TUPLE":
        stack.append(())
    elif operation == "MARK":
        stack.append(_MARK)
    elif operation == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif operation in ("TUPLE1", "TUPLE2", "TUPLE3"):
        size = int(operation[-1])
        stack[-size:] = [tuple(stack[-size:])]
    elif operation in ("APPEND", "APPENDS"):
        items = [stack.pop()] if operation == "APPEND" else _since_mark(stack)
        _as(list, stack[-1]).extend(items)
    elif operation in ("SETITEM", "SETITEMS"):
        items = [stack.pop(-2), stack.pop()] if operation == "SETITEM" else _since_mark(stack)
        _as(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
    elif operation == "BUILD":  # an OrderedDict's attributes, such as the versions in a state dict: not needed
        stack.pop()
        _as(dict, stack[-1])
    elif operation == "BINPERSID":
        stack.append(_storage(*_as(tuple, stack.pop())))
    elif operation == "GLOBAL":
        if argument not in _NAMES:
            raise UsageError(f"it asks for {argument.replace(' ', '.')!r:.100}; only tensors and plain values are read")
        stack.append(_Name(name=_NAMES[argument]))
    elif operation == "REDUCE":
        arguments = _as(tuple, stack.pop())
        stack.append(_apply(_as(_Name, stack.pop()).name, arguments))
    elif operation != "PROTO":
        raise UsageError(f"its data.pkl holds the instruction {operation}, which torch.save does not write for tensors")


def _apply(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == _DICT and not arguments:
        return {}
    if name == _PARAMETER:
        return _as(_Stored, arguments[0])
    if name == _TENSOR:
        storage, offset, shape, stride = arguments[:4]
        for sizes in (shape, stride, (offset,)):
            if not all(type(n) is int and n >= 0 for n in _as(tuple, sizes)):
                raise ValueError("a size")
        if len(shape) != len(stride) or len(shape) > 8:
            raise ValueError("a shape")
        return _Stored(storage=_as(_Storage, storage), offset=offset, shape=shape, stride=stride)
    raise ValueError(name)


def _storage(kind: Any, dtype: Any, key: Any, place: Any, elements: Any) -> _Storage:
    """What torch puts in place of a storage; where it once lay (`cuda:0`) does not matter."""
    if kind != "storage" or not isinstance(key, str) or type(elements) is not int or elements < 0:
        raise ValueError("a storage")
    return _Storage(record=f"data/{key}", dtype=_STORAGES[_as(_Name, dtype).name], elements=elements)


def _tensor(
    name: str,
    stored: _Stored,
    archive: zipfile.ZipFile,
    records: dict[str, zipfile.ZipInfo],
    raw: dict[str, bytearray],
    path: Path,
) -> torch.Tensor:
    """The tensor itself, once what is claimed of it is known to lie in the file; `raw` keeps the storages read."""
    import torch

    storage = stored.storage
    record, width = records.get(storage.record), _BYTES[storage.dtype]
    if record is None:
        raise _refused(path, f"tensor {name!r:.100} lies in {storage.record!r:.100}, which is not there")
    if storage.elements * width != record.file_size:
        raise _refused(path, f"tensor {name!r:.100} claims {storage.elements} elements, not those of its storage")
    elements = math.prod(stored.shape)
    last = stored.offset + sum((side - 1) * step for side, step in zip(stored.shape, stored.stride, strict=True))
    if elements > storage.elements or (elements and last >= storage.elements):
        raise _refused(path, f"tensor {name!r:.100} claims the shape {list(stored.shape)}, beyond its storage")
    if elements == 0:
        return torch.empty(stored.shape, dtype=getattr(torch, storage.dtype))
    if storage.record not in raw:
        raw[storage.record] = bytearray(archive.read(record))  # checks the CRC too
    flat = torch.frombuffer(raw[storage.record], dtype=getattr(torch, storage.dtype))
    return flat.as_strided(stored.shape, stored.stride, stored.offset)


def _since_mark(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark, and the mark."""
    place = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is _MARK)
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}")
    return value


def _refused(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is not read: {why}")
