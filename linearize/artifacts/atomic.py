"""Writing so that a crash at any moment leaves the old artifact or the new one, never a broken one.

A directory is filled beside its final place, every file and directory of it is flushed to disk, and one rename puts it
there. Leftovers of killed processes are removed by the next writer of the same place.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError, RefusedError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20
MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux lists what is mounted."""


def place_of(path: str | os.PathLike[str]) -> Path:
    """Where a folder of this name is written: absolute, `~` as the shell knows it, and through a link to what it names.

    A rename of a folder onto a link fails, even where it leads to an empty folder.
    """
    place = os.path.abspath(os.path.expanduser(path))
    return Path(os.path.realpath(place) if os.path.islink(place) and os.path.isdir(place) else place)


@contextmanager
def atomic_directory(final: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `final`; on success it becomes `final` in one rename.

    On any error (KeyboardInterrupt too) the temporary folder is removed and `final` is what it was. With
    `replace=True`, `final` may hold an older artifact, which is swapped out whole; otherwise a non-empty `final` raises
    RefusedError, before anything is written and again at the end. A full disk raises RefusedError; other OSErrors pass
    through.
    """
    final = place_of(final)
    if not replace:
        require_empty(final)
    elif final.exists() and not final.is_dir():
        raise RefusedError(f"{final} is a file, not a folder", "Choose another folder.")
    made = [parent for parent in final.parents if not parent.exists()]  # innermost first
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create {final.parent}: {error.strerror}", "Choose another folder.") from error
    remove_leftovers(final)
    work = _sibling(final, "tmp")
    if work.exists():
        shutil.rmtree(work)
    try:
        work.mkdir()
        yield work
        _open_up(work)
        sync_tree(work)
        if replace:
            _swap_in(work, final)
        else:
            require_empty(final)
            os.replace(work, final)  # POSIX: onto an absent or empty folder
        sync_path(final.parent)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if is_disk_full(error) and not isinstance(error, LinearizeError):
            raise RefusedError(
                f"no space left on the disk of {final.parent}; nothing was written to {final}",
                "Free some space or choose another disk.",
            ) from error
        raise


def remove_leftovers(final: str | os.PathLike[str]) -> None:
    """Remove what killed writers left beside `final`; put an old artifact back if one died in mid-swap."""
    final = Path(os.path.abspath(final))
    if not final.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(tmp|old)-(\d{{1,10}})")
    for path in sorted(final.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or _alive(int(match[2])):
            continue
        if match[1] == "old" and not final.exists():
            os.replace(path, final)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write one file atomically: temporary sibling, flush, rename. A full disk raises RefusedError."""
    _write_file(Path(path), data, os.replace)


def write_new(path: str | os.PathLike[str], data: bytes) -> None:
    """Write one file atomically where none is. FileExistsError if one is; a full disk raises RefusedError."""
    _write_file(Path(path), data, _link_in)


def _require_ordinary(path: Path) -> None:
    """RefusedError for a device, a pipe or a socket: a rename onto /dev/null would replace it for everybody."""
    with suppress(OSError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            raise RefusedError(f"{path} is no ordinary file", "Choose the name of a file.")


def _write_file(path: Path, data: bytes, put: Callable[[Path, Path], None]) -> None:
    _require_ordinary(path)
    remove_leftovers(path)
    work = _sibling(path, "tmp")
    try:
        with open(work, "xb") as file:  # never through a link that somebody put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put(work, path)
        sync_path(path.parent)
    except BaseException as error:
        with suppress(OSError):
            work.unlink(missing_ok=True)
        if is_disk_full(error):
            raise RefusedError(
                f"no space left on the disk while writing {path}", "Free some space or choose another disk."
            ) from error
        raise


def _link_in(work: Path, path: Path) -> None:
    """Give `work` its name, unless that name is taken: a rename would overwrite, a link does not."""
    try:
        os.link(work, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # No hard links on this disk.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(work, path)
    else:
        os.unlink(work)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as UTF-8 JSON, atomically. ValueError for NaN and Infinity, which are not JSON."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_empty(out: str | os.PathLike[str]) -> None:
    """RefusedError unless `out` is absent or an empty folder that a rename may replace."""
    path = Path(out)
    if path.is_symlink() and not path.exists():
        raise RefusedError(f"{path} is a dangling link", "Choose another folder.")
    if not path.exists():
        return
    if not path.is_dir():
        raise RefusedError(f"{path} is a file, not a folder", "Choose another folder.")
    if any(path.iterdir()):
        raise RefusedError(f"{path} is not empty", "Choose another folder.")
    inside = f"Choose a folder within it, such as {path / 'model'}."
    if _is_mount(path):
        raise RefusedError(f"{path} is a mount point, which cannot be replaced by a finished folder", inside)
    if _is_current(path):
        raise RefusedError(f"{path} is the current folder, which would be replaced under your shell", inside)


def _is_mount(path: Path) -> bool:
    """Whether something is mounted there, be it a folder of the same disk, which no device of its own tells."""
    if os.path.ismount(path):
        return True
    try:
        table = MOUNTS.read_bytes()
    except OSError:  # no Linux
        return False
    place = os.fsencode(os.path.realpath(path))
    for character in (b"\\", b" ", b"\t", b"\n"):  # as the table writes them
        place = place.replace(character, b"\\%03o" % ord(character))
    return any(line.split(b" ")[4:5] == [place] for line in table.splitlines())


def _is_current(path: Path) -> bool:
    try:
        return path.samefile(os.curdir)
    except OSError:  # the current folder was removed
        return False


def require_free_space(path: str | os.PathLike[str], size: int) -> None:
    """RefusedError unless the disk of `path` (which need not exist yet) has `size` bytes free."""
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise RefusedError(
            f"the disk of {path} has {_human(free)} free and about {_human(size)} are needed",
            "Free some space or choose another disk.",
        )
    folder = place if place.is_dir() else place.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RefusedError(f"{folder} cannot be written to", "Choose another folder.")


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk (or quota) is full. Native writers only say it in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return "No space left on device" in str(error) or f"os error {errno.ENOSPC})" in str(error)


@contextmanager
def full_disk_named(place: Path) -> Iterator[None]:
    """Let a full disk within the block raise RefusedError, wherever it shows.

    Raises:
        RefusedError: it is.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise RefusedError(
            f"no space left on the disk of {place}", "Free some space, then go on with --resume"
        ) from error


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and the folder itself, to disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                sync_path(path)
        sync_path(Path(root))


def _open_up(folder: Path) -> None:
    """Give files the mode that the umask gives folders: safetensors writes files that only their owner may read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | mode)


def sync_path(path: Path) -> None:
    """Flush one file to disk, or the names in one folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{os.getpid()}"


def _swap_in(work: Path, final: Path) -> None:
    if not final.exists():
        os.replace(work, final)
        return
    if _exchange(work, final):
        shutil.rmtree(work, ignore_errors=True)  # now the old artifact
        return
    # No atomic exchange here: two renames. A death between them is mended by `remove_leftovers`.
    old = _sibling(final, "old")
    os.replace(final, old)
    try:
        os.replace(work, final)
    except BaseException:
        os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step (Linux renameat2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), ctypes.c_uint(rename_exchange)) == 0


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own earlier leftovers: one process writes one place at a time
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _human(size: int) -> str:
    """In binary units, as every command prints sizes."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
