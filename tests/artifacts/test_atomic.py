"""Invariant 17: a crash at any write leaves the old artifact or the new one, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linearize.artifacts import atomic
from linearize.artifacts.manifest import verify_manifest, write_manifest
from linearize.errors import RefusedError, UsageError

FILES = {"config.json": b"{}\n", "model.safetensors": b"w" * 5000, "code/model.py": b"pass\n"}


def fill(folder: Path, mark: bytes) -> None:
    for name, data in FILES.items():
        if not (folder / name).parent.is_dir():
            (folder / name).parent.mkdir()
        (folder / name).write_bytes(data + mark)
    write_manifest(folder, {"mark": mark.decode()})


def write(final: Path, mark: bytes, *, replace: bool = False) -> None:
    with atomic.atomic_directory(final, replace=replace) as work:
        fill(work, mark)


def state(final: Path) -> str | None:
    """Mark of the whole artifact at `final`, None if there is none; fails on a broken one."""
    if not final.exists():
        return None
    assert verify_manifest(final) == []
    return json.loads((final / "linearize.json").read_text())["mark"]


def leftovers(final: Path) -> list[str]:
    return sorted(p.name for p in final.parent.iterdir() if p != final)


class Died(BaseException):
    """A death that no `except Exception` sees."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> list[int]:
    """Raise `error` at the `after`-th call that changes the disk; the returned list counts the calls."""
    calls = [0]

    def wrap(function):
        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == after:
                raise error
            return function(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "mkdir"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    monkeypatch.setattr(Path, "write_bytes", wrap(Path.write_bytes))
    monkeypatch.setattr(atomic, "_exchange", wrap(atomic._exchange))
    return calls


def count_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replace: bool) -> int:
    with monkeypatch.context() as patch:
        calls = dying(patch, 0, Died())
        if replace:
            write(tmp_path / "count" / "out", b"old")
            calls[0] = 0
        write(tmp_path / "count" / "out", b"new", replace=replace)
        return calls[0]


@pytest.mark.parametrize(
    "error", [Died(), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")], ids=["died", "ctrl-c", "io"]
)
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_error_at_every_step(tmp_path, monkeypatch, replace, exchange, error):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    steps = count_steps(tmp_path, monkeypatch, replace=replace)
    assert steps >= 10
    seen = set()
    for step in range(1, steps + 1):
        final = tmp_path / f"at{step}" / "out"
        if replace:
            write(final, b"old")
        with monkeypatch.context() as patch:
            dying(patch, step, error)
            try:
                write(final, b"new", replace=replace)
            except (type(error), UsageError):
                pass
            else:  # an error that did not matter: mkdir of a folder that is there
                assert isinstance(error, OSError) and state(final) == "new"
        if final.parent.exists():
            seen.add(state(final))
            assert leftovers(final) == [], f"left behind at step {step}"
    assert seen <= ({"old", "new"} if replace else {None, "new"})


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from linearize.artifacts import atomic
from linearize.artifacts.manifest import write_manifest

def wrap(function):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return function(*args, **kwargs)
    return counted

def write(final, mark):
    with atomic.atomic_directory(final, replace=True) as work:
        (work / "model.safetensors").write_bytes(b"w" * 5000)
        write_manifest(work, {{"mark": mark}})

if not {exchange!r}:
    atomic._exchange = lambda one, other: False
for name in ("fsync", "replace", "mkdir", "rmdir", "unlink"):
    setattr(os, name, wrap(getattr(os, name)))
Path.write_bytes = wrap(Path.write_bytes)
base = Path({base!r})
for step in range(1, 60):
    final = base / f"at{{step}}" / "out"
    left = -1
    write(final, "old")
    child = os.fork()
    if child == 0:
        left = step
        write(final, "new")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        print(step)
        break
"""


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_killed_at_every_step(tmp_path, exchange, root):
    """A kill runs no clean-up: what it leaves is whole, and the next writer removes the rest."""
    script = KILLED.format(root=str(root), base=str(tmp_path), exchange=exchange)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) > 8
    marks = set()
    for place in sorted(tmp_path.iterdir()):
        final = place / "out"
        if exchange:  # between two renames there is nothing at `final` until the leftovers are seen to
            assert state(final) in ("old", "new")
        atomic.remove_leftovers(final)
        marks.add(state(final))
        assert leftovers(final) == []
    assert marks == {"old", "new"}


def test_disk_full_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    final = tmp_path / "new" / "parents" / "out"
    with monkeypatch.context() as patch:
        dying(patch, 8, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(RefusedError, match="no space left"):
            write(final, b"new")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_from_a_native_writer(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(RefusedError, match="no space left"), atomic.atomic_directory(tmp_path / "out") as work:
        (work / "a").write_bytes(b"1")
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    with pytest.raises(RefusedError, match="no space left"), atomic.atomic_directory(tmp_path / "out"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_write_json_keeps_the_old_file_at_every_step(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    for step in range(1, 5):
        atomic.write_json(path, {"mark": "old"})
        with monkeypatch.context() as patch:
            calls = dying(patch, step, Died())
            try:
                atomic.write_json(path, {"mark": "new"})
            except Died:
                pass
            else:
                assert calls[0] < step
        assert json.loads(path.read_text())["mark"] in ("old", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_write_new_never_overwrites_even_without_hard_links(tmp_path, monkeypatch):
    path = tmp_path / "my.yaml"
    for links in (True, False):
        if not links:
            monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
        atomic.write_new(path, b"mine")
        with pytest.raises(FileExistsError):
            atomic.write_new(path, b"other")
        assert path.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == ["my.yaml"]
        path.unlink()


def test_a_file_is_not_written_through_a_link_that_somebody_put_there(tmp_path):
    (tmp_path / "theirs").write_text("keep me")
    (tmp_path / f".x.json.tmp-{os.getpid()}").symlink_to(tmp_path / "theirs")
    atomic.write_json(tmp_path / "x.json", {"mark": "new"})
    assert (tmp_path / "theirs").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs", "x.json"]


def test_leftovers_of_killed_writers_of_one_file_go_with_the_next(tmp_path):
    (tmp_path / ".x.json.tmp-999999999").write_text("half")
    atomic.write_json(tmp_path / "x.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_write_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        atomic.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_out_must_be_empty(tmp_path):
    out = tmp_path / "out"
    atomic.require_empty(out)
    out.mkdir()
    atomic.require_empty(out)
    write(out, b"new")
    assert state(out) == "new"
    with pytest.raises(RefusedError, match=r"not empty\. Choose another folder\.$"):  # --resume would not help
        atomic.require_empty(out)
    with pytest.raises(RefusedError, match="not empty"):
        write(out, b"other")
    assert state(out) == "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RefusedError, match="is a file"):
        atomic.require_empty(tmp_path / "file")
    with pytest.raises(RefusedError, match="is a file"):
        write(tmp_path / "file", b"new", replace=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RefusedError, match="dangling"):
        atomic.require_empty(tmp_path / "link")


def test_a_link_to_an_empty_folder_stays_and_the_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "real").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to("elsewhere/real")
    write(link, b"one")
    assert link.is_symlink() and state(tmp_path / "elsewhere" / "real") == "one"
    write(link, b"two", replace=True)
    assert link.is_symlink() and state(tmp_path / "elsewhere" / "real") == "two"
    assert leftovers(tmp_path / "elsewhere" / "real") == []
    link.unlink()
    link.symlink_to("nowhere")
    with pytest.raises(RefusedError, match="dangling link"):
        write(link, b"three")


@pytest.mark.parametrize("place", ["a mount point", "a mount point of the same disk", "the current folder"])
def test_a_folder_that_no_rename_replaces_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = tmp_path / "an empty" / "out"
    out.mkdir(parents=True)
    if place == "a mount point of the same disk":
        listed = str(out).replace(" ", "\\040")
        (tmp_path / "mounts").write_text(
            f"22 1 8:1 / / rw - ext4 /dev/a rw\n29 22 8:1 /a {listed} rw - ext4 /dev/a rw\n"
        )
        monkeypatch.setattr(atomic, "MOUNTS", tmp_path / "mounts")
    elif place == "a mount point":
        monkeypatch.setattr(atomic.os.path, "ismount", lambda path: Path(path) == out)
    else:
        monkeypatch.chdir(out)
    why = place.removesuffix(" of the same disk")
    refusal = pytest.raises(RefusedError, match=rf"is {why}.*Choose a folder within it, such as .*/out/model")
    with refusal, atomic.atomic_directory(out):
        raise AssertionError("it began")
    write(out / "model", b"one")
    assert state(out / "model") == "one"


def test_a_folder_filled_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RefusedError, match="not empty"), atomic.atomic_directory(out) as work:
        fill(work, b"new")
        out.mkdir()
        (out / "theirs").write_text("keep me")
    assert [p.name for p in out.iterdir()] == ["theirs"]
    assert leftovers(out) == []


def test_leftovers_of_the_living_are_kept(tmp_path):
    living = tmp_path / f".out.tmp-{os.getppid()}"
    living.mkdir()
    other = tmp_path / ".other.tmp-999999999"
    other.mkdir()
    write(tmp_path / "out", b"new")
    assert living.exists() and other.exists()


def test_free_space(tmp_path, monkeypatch):
    atomic.require_free_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(RefusedError, match=r"has .* free and about 909494\.7 TiB are needed"):
        atomic.require_free_space(tmp_path / "not" / "there", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_folder(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic.atomic_directory(tmp_path / "out") as work:
            (work / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot create"):
        write(tmp_path / "file" / "sub" / "out", b"new")


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    """A rename onto /dev/null, by root, would take it from everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (atomic.write_bytes, atomic.write_new):
        with pytest.raises(RefusedError, match="no ordinary file"):
            write(pipe, b"x")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
