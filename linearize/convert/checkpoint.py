"""The run folder beside OUT: a lock, what the run is, and the newest checkpoints. Safetensors and JSON only.

.OUT.linearize-run/
    lock                     held (flock) while a convert writes into OUT; says which process, on which host, since when
    run.json                 what must be the same for a resume: digests of recipe, data and teacher
    00-align-00000120/       tensors.safetensors, state.json, and manifest.json, written last
    verify/                  a copy of the export while fresh processes load it
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from linearize.artifacts.atomic import atomic_directory, sha256, write_json
from linearize.artifacts.weights import read_header, read_json, require_inside, require_regular
from linearize.convert.early import LOCK, checkpoints, in_use, run_folder, sign_lock, unfinished
from linearize.convert.optim import AnyOptimizer
from linearize.convert.same_run import how_asked, require_same
from linearize.errors import RefusedError, UsageError
from linearize.recipe import Recipe

STAGES = ("align", "finetune")
KEEP = 2
SECONDS = 60.0
"""Seconds between two checkpoints; more where writing one takes longer than a twentieth of that."""
RECORD_CAP = 1 << 20
STATE_CAP = 16 << 20
_NAME = re.compile(r"(\d{2})-([a-z]{1,16})-(\d{8,12})")
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
STATE = "state.json"
RUN = "run.json"
ROOM = "verify"


@dataclass(kw_only=True)
class Run:
    """An open, locked run folder."""

    path: Path
    lock: int
    """File descriptor that holds the lock."""
    interrupted: bool = False
    """Set by a signal; loops finish their step, save and stop."""
    graceful: bool = False
    """Whether a loop is running that looks at `interrupted`; elsewhere a signal stops at once."""
    discard: bool = False
    """Whether the checkpoints are worthless (a dead or diverged training would only die again)."""
    last_save: float = field(default_factory=time.monotonic)
    cost: float = 0.0
    """Seconds the last save took."""
    asked: dict[str, Any] = field(default_factory=dict)
    """What was asked for, in the user's words; kept in the record, so that a resume can say what differs."""

    @property
    def room(self) -> Path:
        """Where the export is loaded for verification; what a killed process left there goes with the next one."""
        return self.path / ROOM

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While a loop looks at `interrupted` after every step, a signal waits for it."""
        self.graceful = True
        try:
            yield
        finally:
            self.graceful = False

    def stop_if_interrupted(self) -> None:
        """Stop here if a signal asked for it; what is to be kept has been saved."""
        if self.interrupted:
            raise KeyboardInterrupt

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.interrupted or time.monotonic() - self.last_save >= max(SECONDS, 20 * self.cost)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One verified checkpoint on disk."""

    path: Path
    stage: str
    step: int
    """Optimiser steps done in that stage."""
    state: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU."""
        with safe_open(self.path / TENSORS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


@contextmanager
def open_run(out: Path) -> Iterator[Run]:
    """Lock the run folder of `out`; on leaving, it stays only if it holds something to resume from.

    Raises:
        RefusedError: another process converts into the same OUT, or the folder cannot be made.
    """
    path = run_folder(out)
    made = [parent for parent in path.parents if not parent.exists()]  # innermost first
    lock = _take_lock(path, out)
    run = Run(path=path, lock=lock)
    for leftover in (*path.glob(".*.tmp-*"), *path.glob(".*.old-*"), run.room):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    try:
        with _signals(run):
            yield run
    except BaseException:
        if run.discard or not checkpoints(path):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()
        raise
    else:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _take_lock(path: Path, out: Path) -> int:
    while True:
        try:
            if path.is_symlink():
                raise RefusedError(f"{path} is a link", "Remove it or choose another OUT")
            if path.exists() and not path.is_dir():
                raise RefusedError(f"{path} is not a folder", "Remove it or choose another OUT")
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise RefusedError(f"{path}: cannot be written ({error.strerror})", "Choose another OUT") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise in_use(out, error) from error
        try:
            # The folder may have been removed by a run that ended between opening and locking.
            if os.path.samestat(os.fstat(lock), os.stat(path / LOCK)):
                sign_lock(lock)
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP let a training loop finish its step and save; a second one stops at once.

    But not a second SIGHUP: both the kernel and the shell send one when a terminal closes. Who has it ignored, as nohup
    does, is not stopped by it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if (run.interrupted and number != signal.SIGHUP) or not run.graceful:
            raise KeyboardInterrupt
        run.interrupted = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Send what is said to a terminal that has closed nowhere: a step's line would fail before the step is saved."""
    for output in (1, 2):
        try:
            os.write(output, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)


def find_start(run: Run, identity: Mapping[str, Any], *, resume: bool) -> Checkpoint | None:
    """Compare `identity` with what the folder holds; the checkpoint to go on from, or None to begin.

    Raises:
        RefusedError: there is an unfinished run and `resume` is off, it is a run of something else, or not one of its
            checkpoints is whole.
    """
    found = checkpoints(run.path)
    before = record(run)
    if not found:
        if resume and before:  # killed before its first checkpoint
            require_same(run.path, before, identity, run.asked, saved=False)
        return None
    if not resume:
        raise unfinished(run.path)
    newest = latest(run)
    if newest is None:
        raise RefusedError(
            f"{found[-1]}: is damaged, and no other checkpoint is whole",
            f"To start over, delete {run.path} and leave out --resume.",
        )
    require_same(run.path, before, identity, run.asked)
    # What lies behind the newest whole one is damaged, and would count as new when old ones are dropped.
    _drop(folder for folder in found if folder.name > newest.path.name)
    _drop(checkpoints(run.path)[:-KEEP])
    return newest


def record(run: Run) -> dict[str, Any]:
    """What `write_record` wrote, or nothing."""
    return noted(run.path)


def noted(path: Path) -> dict[str, Any]:
    """What the record in a run folder says, or nothing."""
    return _read_json(path / RUN, RECORD_CAP) or {}


def begun_streaming(out: Path) -> bool | None:
    """Whether the unfinished run of `out` streams its layers; None: it does not say."""
    return {"yes": True, "no": False}.get(str(noted(run_folder(out)).get("streamed", "")))


def saved_step(out: Path, *, recipe: Recipe, streamed: bool, teacher_bits: int | None) -> dict[str, Any] | None:
    """The stage and step that a resume of `out` would go on from, by what the run folder says; None: it begins anew.

    No checkpoint is read, so one that turns out to be damaged is not known yet.

    Raises:
        RefusedError: the run is one of another recipe, or was begun with other options.
    """
    path = run_folder(out)
    found, before = checkpoints(path), noted(path)
    if found or before:
        identity = how_asked(recipe, streamed=streamed, teacher_bits=teacher_bits)
        require_same(path, before, identity, {"recipe": recipe.as_dict()}, saved=bool(found))
    name = _NAME.fullmatch(found[-1].name) if found else None
    return {"stage": name[2], "step": int(name[3])} if name else None


def write_record(run: Run, values: Mapping[str, Any]) -> None:
    """Say what this run is, and what a resume needs to know before it can load a checkpoint."""
    write_json(run.path / RUN, dict(values) | ({"asked": run.asked} if run.asked else {}))


def save(run: Run, *, stage: str, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically and drop all but the newest `KEEP`."""
    begin = time.monotonic()
    final = run.path / f"{STAGES.index(stage):02d}-{stage}-{step:08d}"
    with atomic_directory(final, replace=True) as folder:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
        write_json(folder / STATE, dict(state))
        files = {name: sha256(folder / name) for name in (TENSORS, STATE)}
        write_json(folder / MANIFEST, {"stage": stage, "step": step, "files": files})
    _drop(checkpoints(run.path)[:-KEEP])
    run.last_save = time.monotonic()
    run.cost = run.last_save - begin


def _drop(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def latest(run: Run) -> Checkpoint | None:
    """The newest checkpoint whose files are those of its manifest; a damaged one is passed over."""
    for folder in reversed(checkpoints(run.path)):
        found = read_checkpoint(folder)
        if found is not None:
            return found
    return None


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None unless it is whole: real files, as its manifest says, under its own name."""
    manifest, state = _read_json(folder / MANIFEST, RECORD_CAP), _read_json(folder / STATE, STATE_CAP)
    name = _NAME.fullmatch(folder.name)
    if manifest is None or state is None or name is None or folder.is_symlink():
        return None
    stage, step, files = manifest.get("stage"), manifest.get("step"), manifest.get("files")
    if (stage, step) != (name[2], int(name[3])) or stage not in STAGES or int(name[1]) != STAGES.index(stage):
        return None
    if not isinstance(files, dict) or set(files) != {TENSORS, STATE}:
        return None
    try:
        for file, digest in files.items():
            require_inside(folder, folder / file)
            require_regular(folder / file)
            if sha256(folder / file) != digest:
                return None
        read_header(folder / TENSORS)
    except (OSError, UsageError):
        return None
    return Checkpoint(path=folder, stage=stage, step=int(name[3]), state=state)


def _read_json(path: Path, cap: int) -> dict[str, Any] | None:
    try:
        require_inside(path.parent, path)
        return read_json(path, cap=cap)
    except UsageError:
        return None


def pack_state(parameters: Mapping[str, nn.Parameter], optimizer: AnyOptimizer | None) -> dict[str, Tensor]:
    """Parameters and what the optimiser remembers of them, under flat names."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter
        if optimizer is not None:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
    return tensors
