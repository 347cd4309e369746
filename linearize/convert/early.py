"""What can be refused before torch is imported: OUT, the path of the text, the model's path and family."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from linearize.artifacts.atomic import place_of, require_empty
from linearize.artifacts.exports import RUN, run_folder
from linearize.artifacts.load import resolve
from linearize.artifacts.manifest import MANIFEST
from linearize.convert.families import require_family
from linearize.data import require_place
from linearize.errors import RefusedError, UsageError, did_you_mean

LOCK = "lock"
LONGEST = 255 - len(f".{RUN}")
"""Bytes of OUT's name: its run folder has a longer one, and a disk takes 255."""


def refuse_early(model: str | os.PathLike[str], out: str | os.PathLike[str], data: str | None, *, resume: bool) -> None:
    """The refusals of a conversion that need no tensor, within a fraction of a second; `data`: None for a plan of one.

    Raises:
        UsageError, RefusedError: see `convert`.
    """
    require_out(path_of(out), resume=resume)
    if data is not None:
        require_place(data)
    require_family(resolve(model))


def path_of(out: str | os.PathLike[str]) -> Path:
    """Where OUT lies; see `place_of`.

    Raises:
        UsageError: it is empty, as an unset variable of a shell is, or no name that a disk can hold.
    """
    name = os.fspath(out)
    if not name.strip():
        raise UsageError("OUT is empty", "Name the folder to make.")
    if "\0" in name:
        raise UsageError("OUT holds a zero byte", "Choose another name.")
    path = place_of(name)
    if len(os.fsencode(path.name)) > LONGEST:
        raise UsageError(f"the name of OUT is longer than {LONGEST} bytes", "Choose a shorter one.")
    return path


def require_out(out: Path, *, resume: bool) -> None:
    """Refuse an OUT that holds something, cannot be made, that another process writes, or that has an unfinished run;
    with `resume`, one that has none.

    Raises:
        RefusedError: it does. UsageError: there is nothing to resume.
    """
    if resume and (out / MANIFEST).is_file():
        raise RefusedError(
            f"{out} is a finished conversion: there is nothing to resume", "To convert again, choose another OUT."
        )
    require_empty(out)
    require_place_for(out)
    require_unlocked(out)
    if resume:
        require_run(out)
    else:
        require_no_run(out)


def require_place_for(out: Path) -> None:
    """Refuse an OUT that could not be made where it is named; nothing is made.

    Raises:
        RefusedError: a part of its path is a file, the folder it would lie in cannot be written to, or it would lie in
            a finished conversion, which holds nothing but what its manifest lists.
    """
    export = next((folder for folder in out.parents if (folder / MANIFEST).is_file()), None)
    if export is not None:
        raise RefusedError(f"{out} would lie inside {export}, a finished conversion", "Choose an OUT beside it")
    parent = out.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise RefusedError(f"{out}: {parent} is not a folder", "Choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RefusedError(f"{out}: {parent} cannot be written to", "Choose another OUT")


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(p for p in path.glob("[0-9][0-9]-*-*") if p.is_dir())


def require_unlocked(out: Path) -> None:
    """Refuse early if a living process converts into `out`; nothing is made.

    Raises:
        RefusedError: it does.
    """
    try:
        lock = os.open(run_folder(out) / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return  # nobody has been there, or nobody may: that is for whoever makes the folder to say
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        raise in_use(out, error) from error
    finally:
        os.close(lock)


def require_no_run(out: Path) -> None:
    """Refuse early if an unfinished run of `out` lies there.

    Raises:
        RefusedError: it does.
    """
    path = run_folder(out)
    if checkpoints(path):
        raise unfinished(path)


def begun(out: Path) -> bool:
    """Whether a conversion into `out` was begun and has not ended: what a resume can go on from."""
    return os.path.lexists(run_folder(out))


def require_run(out: Path) -> None:
    """Refuse early to resume what was never begun. A run that was killed before its first checkpoint was begun.

    Raises:
        UsageError: no run folder of `out` lies there.
    """
    if begun(out):
        return
    beside = [path.name for path in out.parent.glob(f".*{RUN}")] if out.parent.is_dir() else []
    near = did_you_mean(out.name, (name[1 : -len(RUN)] for name in beside))
    raise UsageError(f"{out} has no unfinished run to resume.{near}", "Leave out --resume to begin.")


def unfinished(path: Path) -> RefusedError:
    """The refusal of a run folder that holds checkpoints."""
    return RefusedError(f"{path}: holds an unfinished run", "Add --resume to go on, or delete that folder")


def in_use(out: Path, error: OSError) -> RefusedError:
    """The refusal of an OUT that a living process writes, or whose disk knows no locks."""
    if error.errno not in (errno.EAGAIN, errno.EACCES):
        return RefusedError(f"{run_folder(out) / LOCK}: cannot be locked ({error.strerror})", "Choose another OUT")
    return RefusedError(
        f"{out}: another convert writes there{_holder(run_folder(out) / LOCK)}", "Wait for it or choose another OUT"
    )


def sign_lock(lock: int) -> None:
    """Say in the held lock file who holds it. The kernel frees the lock when its holder dies, and only that counts:
    what a dead process wrote there is overwritten by the next one."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with suppress(OSError):  # on a full disk the lock holds all the same, without a name
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(line).encode(), 0)


def _holder(path: Path) -> str:
    """`: process 12 on host, since 2026-11-22T10:00:00Z`, or nothing where the file does not say it."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            line = json.loads(os.read(lock, 4096))
        finally:
            os.close(lock)
        pid, host, since = int(line["pid"]), str(line["host"])[:80], str(line["since"])[:30]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return f": process {pid} on {host}, since {since}"
