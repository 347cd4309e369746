"""Every artifact we write, with a death at every change of the disk: `python -m tests.artifacts.faults`.

Each crash point is tried in five ways (see `injector`): the disk reports an error, is full, or the process dies at
once; in the last way the disk also loses what was not flushed. Afterwards the artifact must be the old one or the new
one, whole; then the same command is run again, must succeed, and must leave nothing of the first try behind.
Prints the number of crash points and of artifacts lost, and exits with 1 if any was. Figures: docs/trust.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.artifacts.fault_artifacts import Artifact, artifacts
from tests.artifacts.injector import DEATHS, KILLED, MODES, injected

REFUSED, UNCLEAR, ERROR, DIED = 3, 4, 5, 6
"""How the child of a try ended: by an error of ours, by another one, by the disk's own, by the injected death."""


@dataclass(kw_only=True)
class Count:
    """What was tried, and what went wrong."""

    points: int = 0
    by_artifact: dict[str, int] = field(default_factory=dict)
    by_mode: dict[str, int] = field(default_factory=dict)
    by_change: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Broken or missing artifacts."""
    stuck: list[str] = field(default_factory=list)
    """A following run that failed or left something behind."""
    unclear: list[str] = field(default_factory=list)
    """A full disk that ended in another error than ours."""

    @property
    def failures(self) -> list[str]:
        return self.lost + self.stuck + self.unclear


def run_all(
    artifacts: list[Artifact],
    base: Path,
    *,
    every: int = 1,
    modes: tuple[str, ...] = MODES,
    told: Callable[[str], None] = lambda line: None,
) -> Count:
    """Try every `every`-th crash point of every artifact in every mode, in forked children of this process; `told` is
    given a line for each artifact and mode, for all of them take an hour."""
    import safetensors.torch  # noqa: F401 - here, so that no child has to

    count = Count()
    for artifact in artifacts:
        total = _changes(artifact, base / "count")
        gc.freeze()  # children that collect garbage need not look through all of this process
        for number, mode in enumerate(modes):
            told(f"{artifact.name}: {mode}, at {len(range(1 + number % every, total + 1, every)):,} changes")
            for at in range(1 + number % every, total + 1, every):
                _try(artifact, base / "try", at, mode, count)
        gc.unfreeze()
    return count


def _changes(artifact: Artifact, folder: Path) -> int:
    """How many changes of the disk one undisturbed writing makes."""
    with _fresh(artifact, folder):  # here, so that no child has to import anything
        artifact.write(folder)
        artifact.state(folder)
    with _fresh(artifact, folder):
        told = folder.parent / "changes"

        def counted() -> None:
            with injected(0, "error") as injector:
                artifact.write(folder)
            told.write_text(str(injector.count))

        if _child(counted) != 0:
            raise RuntimeError(f"{artifact.name} cannot be written even undisturbed")
        return int(told.read_text())


def _try(artifact: Artifact, folder: Path, at: int, mode: str, count: Count) -> None:
    label = f"{artifact.name}, {mode} at change {at}"
    with _fresh(artifact, folder):
        told = folder.parent / "change"
        told.unlink(missing_ok=True)

        def dying() -> None:
            with injected(at, mode) as injector:
                try:
                    artifact.write(folder)
                finally:
                    last = injector.last
            told.write_text(last)

        code = _child(dying)
        count.points += 1
        for table, key in ((count.by_artifact, artifact.name), (count.by_mode, mode)):
            table[key] = table.get(key, 0) + 1
        if mode in DEATHS and code not in (KILLED, 0):
            count.unclear.append(f"{label}: ended with {code}")
        if mode == "full" and code in (UNCLEAR, ERROR):
            count.unclear.append(f"{label}: the full disk is not named")
        found = _state(artifact, folder)
        if found not in (artifact.allowed if code != 0 else (artifact.again,)):
            count.lost.append(f"{label}: found {found}")
        if _child(lambda: artifact.write(folder)) != 0 and found != artifact.again:
            count.stuck.append(f"{label}: the following run failed")
        elif (after := _state(artifact, folder)) != artifact.again:
            count.stuck.append(f"{label}: {after} after the following run")
        elif extra := artifact.entries(folder):
            count.stuck.append(f"{label}: left behind {', '.join(extra)}")


def _state(artifact: Artifact, folder: Path) -> str | None:
    try:
        return artifact.state(folder)
    except Exception as error:
        return f"broken ({type(error).__name__}: {error})"


class _fresh:
    """A new folder in the artifact's old state, removed afterwards."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        artifact.prepare(folder)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child; how it ended."""
    from linearize.errors import LinearizeError
    from tests.artifacts.injector import Died

    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except Died:
            code = DIED
        except LinearizeError as error:
            code = REFUSED
            if os.environ.get("LINEARIZE_DEBUG"):
                sys.stderr.write(f"refused: {error}\n")
        except OSError as error:
            code = ERROR
            if os.environ.get("LINEARIZE_DEBUG"):
                sys.stderr.write(f"{error}\n")
        except BaseException as error:
            code = UNCLEAR
            if os.environ.get("LINEARIZE_DEBUG"):
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(argv: list[str] | None = None) -> int:
    """Try, print what was tried, and say by the exit code whether anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.artifacts.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th crash point (1: all)")
    parser.add_argument("--only", default="", metavar="WORD", help="only what has this in its name (streamed, export)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(argv)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="linearize-faults-") as place:
        chosen = [artifact for artifact in artifacts(Path(place)) if given.only in artifact.name]
        count = run_all(
            chosen, Path(place), every=max(1, given.every), told=lambda line: print(line, file=sys.stderr, flush=True)
        )
    result = {
        "crash_points": count.points,
        "artifacts_lost": len(count.lost),
        "following_runs_failed": len(count.stuck),
        "full_disk_not_named": len(count.unclear),
        "by_artifact": count.by_artifact,
        "by_mode": count.by_mode,
        "seconds": round(time.monotonic() - begin, 1),
        "failures": count.failures,
    }
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"{name.replace('_', ' ')}: {line}")
    return 1 if count.failures else 0


if __name__ == "__main__":
    sys.exit(main())
