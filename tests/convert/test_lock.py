"""Two converts into one OUT: the second is refused at once, by the name of the first; a dead one holds nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from linearize.artifacts.exports import unfinished_out
from linearize.convert.checkpoint import open_run
from linearize.convert.early import LOCK, path_of, refuse_early, require_out, run_folder
from linearize.errors import RefusedError

SECOND = """
import sys
from linearize_cli.app import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "it took seconds to refuse"
sys.exit(code)
"""


@contextmanager
def another_process(out: Path) -> Iterator[int]:
    """A real process that converts into `out`; it never ends by itself."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open_run(out):
                os.write(tell, b"x")
                time.sleep(600)
        finally:
            os._exit(1)
    try:
        assert os.read(told, 1) == b"x"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)


def test_the_second_is_refused_by_the_name_of_the_first(tmp_path: Path, source_env: dict[str, str]) -> None:
    out = tmp_path / "out"
    with another_process(out) as first:
        name = rf"another convert writes there: process {first} on {socket.gethostname()}, since 20\d\d-"
        held = (run_folder(out) / LOCK).read_text()
        tries: list[Callable[[], object]] = [
            lambda: open_run(out).__enter__(),
            lambda: require_out(out, resume=True),
            lambda: refuse_early("demo", out, "demo", resume=False),
        ]
        for attempt in tries:
            with pytest.raises(RefusedError, match=name):
                attempt()
        command = [sys.executable, "-c", SECOND, "convert", "demo", str(out), "--data", "demo"]
        done = subprocess.run(command, env=source_env, capture_output=True, text=True, check=False)
        assert done.returncode == 3 and f"process {first} on " in done.stderr, done.stderr
        assert (run_folder(out) / LOCK).read_text() == held and not out.exists()


def test_a_lock_of_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_process(out) as first:
        pass
    left = json.loads((run_folder(out) / LOCK).read_text())
    assert left["pid"] == first  # a kill runs no clean-up
    require_out(out, resume=False)
    with open_run(out):
        assert json.loads((run_folder(out) / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(RefusedError, match=f"process {os.getpid()} on"):
            require_out(out, resume=False)
    assert not run_folder(out).exists()


def test_of_many_that_start_together_one_goes_on(tmp_path: Path) -> None:
    for attempt in range(3):
        out = tmp_path / str(attempt) / "out"
        out.parent.mkdir()
        ready, go = os.pipe()
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                os.read(ready, 1)
                try:
                    require_out(out, resume=False)
                    with open_run(out):
                        (out.parent / f"{os.getpid()}").touch()
                        time.sleep(1.0)
                        os._exit(0)
                except RefusedError as error:
                    os._exit(3 if "another convert writes there" in str(error) else 4)
                finally:
                    os._exit(5)
            children.append(child)
        os.write(go, b"xxxx")
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(ready)
        os.close(go)
        assert sorted(codes) == [0, 3, 3, 3]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "\0" * 9000])
def test_a_lock_that_does_not_say_whose_it_is_still_holds(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    with another_process(out):
        (run_folder(out) / LOCK).write_text(text)
        with pytest.raises(RefusedError, match=r"another convert writes there\. Wait"):
            require_out(out, resume=False)


def test_a_run_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").write_text("mine")
    run_folder(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="is a link"), open_run(tmp_path / "out"):
        pass
    run_folder(tmp_path / "other").mkdir()
    (run_folder(tmp_path / "other") / LOCK).symlink_to(tmp_path / "file")
    with pytest.raises(RefusedError, match="cannot be written"), open_run(tmp_path / "other"):
        pass
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["out", "deeper/out"])
def test_a_finished_conversion_is_not_written_into(tmp_path: Path, place: str) -> None:
    """What lay there would be taken for what somebody added, and the model refused from then on."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "linearize.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(
            RefusedError, match=r"would lie inside .*/export, a finished conversion\. Choose an OUT beside"
        ):
            require_out(tmp_path / "export" / place, resume=resume)
    require_out(tmp_path / "export-2" / place, resume=False)


def test_out_by_a_link_or_from_home_is_the_folder_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run lies beside the folder itself, so the last rename has no disk to cross and every name finds it."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    monkeypatch.setenv("HOME", str(tmp_path / "disk"))
    assert path_of(tmp_path / "link") == path_of("~/real") == tmp_path / "disk" / "real"
    assert path_of("~/new") == tmp_path / "disk" / "new"
    with open_run(path_of("~/real")):
        assert (tmp_path / "disk" / ".real.linearize-run").is_dir()
        assert unfinished_out(tmp_path / "link") == unfinished_out(Path("~/real")) == tmp_path / "disk" / "real"
        with pytest.raises(RefusedError, match=f"process {os.getpid()} on"):
            refuse_early("demo", tmp_path / "link", "demo", resume=False)
