"""Dying at one chosen change of the disk: every way in which Python code here changes a file is counted.

    with injected(at=7, mode="killed"): ...

`error`: the 7th change raises EIO; `full`: from the 7th on there is no space (ENOSPC); `died`: a BaseException that no
`except Exception` sees; `killed`: the process ends at once, by os._exit; `power`: likewise, and what was not flushed
to disk is lost: new content of files is cut in half, what was written in place is as it was, new names in folders
vanish. A write that dies writes half.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

MODES = ("error", "full", "died", "killed", "power")
DEATHS = ("killed", "power")
KILLED = 9
_GROWS = {
    "write",
    "open",
    "mkdir",
    "link",
    "symlink",
    "replace",
    "rename",
    "serialize",
    "sendfile",
    "pwrite",
    "exchange",
}


class Died(BaseException):
    """A death that no `except Exception` sees."""


class Injector:
    """Counts changes of the disk and dies at one of them."""

    def __init__(self, at: int, mode: str) -> None:
        self.at, self.mode, self.count, self.last = at, mode, 0, ""
        self.real: dict[str, Callable[..., Any]] = {}
        self.unsynced: dict[tuple[int, int], int] = {}
        """By inode: a handle of a file whose content may be lost."""
        self.before: dict[tuple[int, int], list[tuple[int, int, int, bytes]]] = {}
        """By inode: handle, size, offset and bytes that were there before each change in place, oldest first."""
        self.names: dict[tuple[int, int], tuple[int, list[str]]] = {}
        """By inode: a handle of a folder, and the files made in it since it was flushed."""

    def change(self, what: str, torn: Callable[[], Any] | None = None) -> None:
        """One change of the disk is about to happen; `torn` does half of it."""
        self.count += 1
        if self.at == 0 or self.count < self.at or (self.mode == "full" and what not in _GROWS):
            return
        if self.mode != "full" and self.count > self.at:
            return
        self.last = what
        if torn is not None:
            with suppress(OSError):
                torn()
        if self.mode == "power":
            self.lose()
        if self.mode in DEATHS:
            os._exit(KILLED)
        if self.mode == "died":
            raise Died(what)
        number = errno.ENOSPC if self.mode == "full" else errno.EIO
        raise OSError(number, os.strerror(number))

    def written(self, handle: int) -> None:
        """A file was written to and is not flushed."""
        if self.mode == "power":
            place = os.fstat(handle)
            self.unsynced.setdefault((place.st_dev, place.st_ino), os.dup(handle))

    def patched(self, handle: int, offset: int, count: int) -> None:
        """A part of a file is about to be written in place, or the file cut or lengthened there."""
        if self.mode == "power":
            place, kept = os.fstat(handle), os.dup(handle)
            old = os.pread(kept, count, offset) if count else b""
            self.before.setdefault((place.st_dev, place.st_ino), []).append((kept, place.st_size, offset, old))

    def named(self, path: Any) -> None:
        """A file has got a name, and its folder is not flushed."""
        if self.mode != "power":
            return
        folder, name = os.path.split(os.path.abspath(os.fspath(path)))
        handle = self.real["open_fd"](folder, os.O_RDONLY)
        place = os.fstat(handle)
        self.names.setdefault((place.st_dev, place.st_ino), (handle, []))[1].append(name)

    def flushed(self, handle: int) -> None:
        """A file or folder was flushed."""
        place = os.fstat(handle)
        self.unsynced.pop((place.st_dev, place.st_ino), None)
        self.before.pop((place.st_dev, place.st_ino), None)
        self.names.pop((place.st_dev, place.st_ino), None)

    def lose(self) -> None:
        """What the disk never got."""
        for handle in self.unsynced.values():
            with suppress(OSError):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
        for changes in self.before.values():
            for handle, size, offset, old in reversed(changes):
                with suppress(OSError):
                    self.real["pwrite"](handle, old, offset)
                    self.real["ftruncate"](handle, size)
        for handle, names in self.names.values():
            for name in names:
                with suppress(OSError):
                    self.real["unlink"](name, dir_fd=handle)


class _File:
    """A file open for writing that counts."""

    def __init__(self, file: Any, injector: Injector) -> None:
        self._file, self._injector = file, injector

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._injector.change("write", half)
        done = self._file.write(data)
        self._injector.written(self._file.fileno())
        return done

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._injector.change("close")
            finally:
                self._file.close()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def injected(at: int, mode: str) -> Iterator[Injector]:
    """Within the block the `at`-th change of the disk dies in `mode`; 0: none does, they are only counted."""
    injector = Injector(at, mode)
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, new: Any) -> None:
        undo.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, new)

    try:
        _install(injector, put)
        yield injector
    finally:
        for owner, name, old in reversed(undo):
            setattr(owner, name, old)


def _install(injector: Injector, put: Callable[[Any, str, Any], None]) -> None:
    real_open, real_fd = builtins.open, os.open
    injector.real |= {"open_fd": os.open, "unlink": os.unlink, "pwrite": os.pwrite, "ftruncate": os.ftruncate}

    def plain(name: str) -> Any:
        real = getattr(os, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            injector.change(name)
            # What a rename put in the place of an old file is the old file again, should the rename be lost: no state
            # that is not there before it, too.
            new = name in ("replace", "rename", "link") and not os.path.lexists(args[1])
            if name == "ftruncate":
                injector.patched(args[0], 0, 0)
            done = real(*args, **kwargs)
            if name in ("fsync", "fdatasync"):
                injector.flushed(args[0])
            elif new:
                with suppress(OSError):
                    if os.path.isfile(args[1]):
                        injector.named(args[1])
            return done

        return counted

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa+") or isinstance(file, int):
            return real_open(file, mode, *args, **kwargs)
        injector.change("open")
        made = real_open(file, mode, *args, **kwargs)
        injector.named(file)
        injector.written(made.fileno())
        return _File(made, injector)

    def opened_fd(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            injector.change("open")
        new = flags & os.O_CREAT and not kwargs and not os.path.lexists(path)
        handle = real_fd(path, flags, *args, **kwargs)
        if new:
            injector.named(path)
        return handle

    def written_fd(name: str) -> Any:
        real = getattr(os, name)

        def counted(handle: int, data: Any, *rest: Any) -> int:
            if name == "pwrite":
                injector.patched(handle, rest[0], len(data))
            injector.change(name, lambda: real(handle, data[: len(data) // 2], *rest))
            done = real(handle, data, *rest)
            if name != "pwrite":
                injector.written(handle)
            return done  # type: ignore[no-any-return]

        return counted

    def sent(out: int, source: int, offset: int, count: int) -> int:
        size = os.fstat(source).st_size
        injector.change("sendfile", lambda: real_send(out, source, offset, size // 2))
        done = real_send(out, source, offset, count)
        injector.written(out)
        return done

    names = (
        "fsync",
        "fdatasync",
        "replace",
        "rename",
        "link",
        "symlink",
        "unlink",
        "remove",
        "rmdir",
        "mkdir",
        "chmod",
        "ftruncate",
    )
    new: dict[str, Any] = {name: plain(name) for name in names}
    new |= {name: written_fd(name) for name in ("write", "pwrite")} | {"open": opened_fd}
    if hasattr(os, "sendfile"):
        real_send = os.sendfile
        new["sendfile"] = sent
    for name, function in new.items():
        put(os, name, function)
    put(builtins, "open", opened)
    put(io, "open", opened)
    accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps functions of its own
    for name, function in (new | {"open": opened}).items():
        if accessor is not None and name in accessor.__dict__:
            put(accessor, name, staticmethod(function))
    _install_ours(injector, put)


def _install_ours(injector: Injector, put: Callable[[Any, str, Any], None]) -> None:
    """What neither Python's files nor os does: the exchange of two folders, and safetensors' own writer."""
    import safetensors.torch

    from linearize.artifacts import atomic

    exchange, serialize = atomic._exchange, safetensors.torch.serialize_file

    def exchanged(one: Any, other: Any) -> bool:
        injector.change("exchange")
        return exchange(one, other)

    def serialized(tensors: Any, filename: Any, **more: Any) -> None:
        def half() -> None:
            serialize(tensors, filename, **more)
            os.truncate(filename, os.path.getsize(filename) // 2)

        injector.change("serialize", half)
        serialize(tensors, filename, **more)
        injector.named(filename)
        handle = injector.real["open_fd"](filename, os.O_WRONLY)
        injector.written(handle)
        os.close(handle)

    put(atomic, "_exchange", exchanged)
    put(safetensors.torch, "serialize_file", serialized)
