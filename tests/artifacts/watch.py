"""Reading hostile files under watch: what is opened, written, run or connected to, and how much memory it takes.

Each case is read in a forked child whose address space is limited, whose time is limited (a pipe would block it), and
in which an audit hook notes what no reader may do. The canaries are files outside the folder that is read.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space that reading may take beyond what Python and torch hold already."""
SECONDS = 60
CANARY = "<canary>"
"""A token that only the tokenizer outside of the folder knows."""
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_RUNS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "pickle.find_class")
_NET = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind")


class TooLong(BaseException):
    """A reader did not come back."""


@dataclass(kw_only=True)
class Outcome:
    """How one case ended."""

    name: str
    result: str
    """refused | read | traceback | hung | crashed"""
    message: str = ""
    escapes: list[str] = field(default_factory=list)
    kilobytes: int = 0
    """Most memory that the child had held by then."""


def watched(
    cases: Iterable[tuple[str, Callable[[], Any]]], *, inside: Path, outside: Path, ours: Iterable[Path] = ()
) -> list[Outcome]:
    """Run every case's reader. `inside` may be read, `outside` may not, and nothing may be written but below `ours`."""
    todo = list(cases)
    done: list[Outcome] = []
    told = outside / "outcomes.jsonl"
    while len(done) < len(todo):
        told.write_text("")
        child = os.fork()
        if child == 0:
            try:
                _child(todo[len(done) :], told, inside, outside, tuple(ours))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        lines = told.read_text().splitlines()
        done += [Outcome(**json.loads(line)) for line in lines]
        if len(done) < len(todo):
            done.append(Outcome(name=todo[len(done)][0], result="crashed"))
    return done


def _child(
    cases: list[tuple[str, Callable[[], Any]]], told: Path, inside: Path, outside: Path, ours: tuple[Path, ...]
) -> None:
    from linearize.errors import LinearizeError

    escapes: list[str] = []
    listening = False
    home, out = os.path.realpath(inside), os.path.realpath(outside)
    temporary = [os.path.realpath(path) for path in ours]
    scratch = os.path.join(os.path.realpath(os.environ.get("TMPDIR", "/tmp")), "linearize-tokenizer-")

    def note(event: str, args: tuple[Any, ...]) -> None:
        nonlocal listening
        if not listening:
            return
        listening = False
        try:
            found = _escape(event, args, home, out, (*temporary, scratch))
            if found:
                escapes.append(found)
        finally:
            listening = True

    def late(number: int, frame: Any) -> None:
        raise TooLong

    sys.addaudithook(note)
    signal.signal(signal.SIGALRM, late)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    with open(told, "a") as file:
        for name, read in cases:
            outcome = Outcome(name=name, result="read")
            escapes.clear()
            signal.alarm(SECONDS)
            listening = True
            try:
                value = read()
                if isinstance(value, str):
                    outcome.result, outcome.message = "refused", value
            except LinearizeError as error:
                outcome.result, outcome.message = "refused", str(error)
            except TooLong:
                outcome.result = "hung"
            except BaseException as error:
                outcome.result, outcome.message = "traceback", f"{type(error).__name__}: {error}"[:500]
            listening = False
            signal.alarm(0)
            outcome.escapes = sorted(set(escapes))
            outcome.kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
    os._exit(0)


def _escape(event: str, args: tuple[Any, ...], home: str, out: str, ours: tuple[str, ...]) -> str | None:
    if event in _RUNS or event in _NET:
        return f"{event} {args[:2]!r:.200}"
    if event == "open" and not isinstance(args[0], int) and args[0] is not None:
        flags = args[2] if isinstance(args[2], int) else 0
        path = _itself(args[0]) if flags & os.O_NOFOLLOW else os.path.realpath(os.fsdecode(args[0]))
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and path != os.devnull
        if path.startswith(out):
            return f"opened {path}"
        if writes and not path.startswith(ours):
            return f"wrote {path}"
    if event in _CHANGES and not isinstance(args[0], int):
        path = os.fsdecode(args[1 if event == "os.symlink" else 0])
        if event in ("os.remove", "os.rmdir") and args[-1] != -1:  # within an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), path)
        path = _itself(path)
        if not path.startswith(ours):
            return f"{event} {path}"
    if event == "exec" and os.path.realpath(str(getattr(args[0], "co_filename", ""))).startswith((home, out)):
        return f"ran {args[0].co_filename}"
    return None


def _itself(path: Any) -> str:
    """Where a path lies, and not where it leads if it is a link."""
    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    return os.path.join(os.path.realpath(folder), name)
