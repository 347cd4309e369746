"""What can be refused before torch is imported: OUT, the path of the text, the model's path and family."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from linearize.artifacts.atomic import require_empty
from linearize.artifacts.load import resolve
from linearize.convert.families import require_family
from linearize.data import require_place
from linearize.errors import RefusedError

LOCK = "lock"


def refuse_early(model: str | os.PathLike[str], out: str | os.PathLike[str], data: str, *, resume: bool) -> None:
    """The refusals of a conversion that need no tensor, within a fraction of a second.

    Raises:
        UsageError, RefusedError: see `convert`.
    """
    require_out(Path(os.path.abspath(out)), resume=resume)
    require_place(data)
    require_family(resolve(model))


def require_out(out: Path, *, resume: bool) -> None:
    """Refuse an OUT that holds something, that another process is writing, or that has an unfinished run.

    Raises:
        RefusedError: it does.
    """
    require_empty(out)
    require_unlocked(out)
    if not resume:
        require_no_run(out)


def run_folder(out: Path) -> Path:
    """Where the state of an unfinished conversion into `out` lives."""
    return out.parent / f".{out.name}.linearize-run"


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted(p for p in path.glob("[0-9][0-9]-*-*") if p.is_dir())


def require_unlocked(out: Path) -> None:
    """Refuse early if a living process converts into `out`; nothing is made.

    Raises:
        RefusedError: it does.
    """
    try:
        lock = os.open(run_folder(out) / LOCK, os.O_RDWR)
    except OSError:
        return  # nobody has been there, or nobody may: that is for whoever makes the folder to say
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        raise in_use(out) from error
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


def unfinished(path: Path) -> RefusedError:
    """The refusal of a run folder that holds checkpoints."""
    return RefusedError(f"{path}: holds an unfinished run", "Add --resume to go on, or delete that folder")


def in_use(out: Path) -> RefusedError:
    """The refusal of an OUT that a living process writes."""
    return RefusedError(f"{out}: another convert writes there", "Wait for it or choose another OUT")
