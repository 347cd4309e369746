"""Who runs when: the rows that are left, one process a row, as many at a time as the caller wants, until time is up."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.quality_rows import Row, leaders, references, reseeded
from benchmarks.quality_run import INTERRUPTED
from benchmarks.quality_table import recovered, render
from linearize.artifacts.atomic import write_bytes, write_json
from linearize.errors import RefusedError

ROOT = Path(__file__).resolve().parent.parent
GRACE = 75.0
"""Seconds that interrupted jobs get to save, or to finish measuring, before they are killed."""
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
"""So that Ctrl-C reaches this process alone, which tells its jobs once: a second signal would stop them unsaved."""


@dataclass(kw_only=True)
class Job:
    """Rows that one process works on: one conversion, or the teacher and its cuts."""

    name: str
    rows: list[Row]
    device: str
    shared: int
    """Most jobs that were on its device at a time."""
    process: subprocess.Popen[str]
    result: Path
    reader: threading.Thread


@dataclass(kw_only=True)
class Table:
    """What FOLDER holds, and how it grows."""

    folder: Path
    state: dict[str, Any]
    tried: set[str] = field(default_factory=set)
    """Rows that ended in this call, one way or the other."""

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """By key, as they finished."""
        return self.state["rows"]

    def write(self, left: Sequence[Row] = ()) -> None:
        """Both files."""
        self.state["left"] = [row.key for row in left]
        write_json(self.folder / "quality.json", self.state)
        write_bytes(self.folder / "quality.md", render(self.state).encode())

    def done(self, row: Row) -> bool:
        """Whether the row needs no further run in this call. Of failures only what a training showed lasts longer."""
        held = self.rows.get(row.key)
        if row.key in self.tried:
            return True
        return held is not None and ("error" not in held or held["error"]["kind"] == "VerificationError")


def open_table(folder: Path, setting: dict[str, Any]) -> Table:
    """The table in `folder`, or a new one.

    Raises:
        RefusedError: it holds rows of another setting.
    """
    (folder / "work").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    path = folder / "quality.json"
    state: dict[str, Any] = {"setting": setting, "plan": [], "notes": [], "rows": {}, "shared": {}}
    if path.is_file():
        state = json.loads(path.read_text())
        differing = [key for key, value in setting.items() if state["setting"].get(key) != value]
        if differing:
            raise RefusedError(
                f"{folder}: holds a table of another setting; differing: {', '.join(differing)}", "Choose another --out"
            )
    return Table(folder=folder, state=state)


def planned(table: Table, args: argparse.Namespace, first: Sequence[Row]) -> list[Row]:
    """All rows that are wanted as far as is known now: further seeds join once the leaders can be told."""
    rows = [*references(first), *first]
    if not args.leaders.isdigit() or all(table.done(row) for row in rows):
        scores = {key: recovered(row, table.rows) for key, row in table.rows.items() if "error" not in row}
        for row in leaders(first, scores, args.leaders):
            rows += [reseeded(row, seed) for seed in args.seeds[1:]]
    if args.only:
        names = {"teacher", "cut", *args.only}
        rows = [row for row in rows if row.name in names or row.kind in names]
    return rows


def forget_changed(table: Table, rows: Sequence[Row]) -> None:
    """Drop rows that another recipe of the same name has made."""
    for row in rows:
        held = table.rows.get(row.key)
        if held is not None and held.get("digest") != row.digest:
            print(f"{row.key}: its recipe has changed since, so it is run again", flush=True)
            del table.rows[row.key]


class Scheduler:
    """Runs rows, some at a time, until nothing is left or the slice is over."""

    def __init__(self, table: Table, args: argparse.Namespace, first: list[Row]) -> None:
        self.table, self.args, self.first = table, args, first
        self.running: list[Job] = []
        self.deadline = time.monotonic() + 60 * args.minutes
        self.stopped: float | None = None
        """When the slice ended and running jobs were told to stop."""
        self.todo = self.left()

    def left(self) -> list[Row]:
        """Rows to run, those that are running included."""
        rows = planned(self.table, self.args, self.first)
        forget_changed(self.table, rows)
        self.table.state["plan"] = list(dict.fromkeys([row.key for row in rows] + self.table.state["plan"]))
        return [row for row in rows if not self.table.done(row)]

    def run(self) -> list[Row]:
        """The rows that remain."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while True:
                if self.stopped is None:
                    if self.todo and time.monotonic() >= self.deadline:
                        self._stop("the slice is over")
                    else:
                        self._start()
                if not self.running:
                    return self.todo
                self._collect()
                if self.stopped is not None and time.monotonic() > self.stopped + GRACE:
                    for job in self.running:
                        job.process.kill()
        finally:
            for job in self.running:
                job.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        busy = {row.key for job in self.running for row in job.rows}
        idle = [row for row in self.todo if row.key not in busy]
        while idle and len(self.running) < self.args.jobs:
            baselines = [row for row in idle if row.recipe is None]
            rows = baselines or idle[:1]
            idle = [row for row in idle if row not in rows]
            load = {device: sum(job.device == device for job in self.running) for device in self.args.devices}
            device = min(load, key=lambda name: load[name])
            self.running.append(self._launch(rows, device, shared=load[device] + 1))
            for job in self.running:
                if job.device == device:
                    job.shared = max(job.shared, load[device] + 1)

    def _launch(self, rows: list[Row], device: str, *, shared: int) -> Job:
        folder, args = self.table.folder, self.args
        name = "baselines" if rows[0].recipe is None else rows[0].key
        # The recipe is part of the name: what another one of the same name left behind is not gone on from.
        stem = folder / "work" / (name if rows[0].digest is None else f"{name}-{rows[0].digest[:12]}")
        result = stem.with_name(stem.name + ".rows.json")
        result.unlink(missing_ok=True)
        job = {
            "rows": [row.as_dict() for row in rows],
            "teacher": args.teacher,
            "data": args.data,
            "heldout": args.heldout,
            "context": args.context,
            "windows": args.windows,
            "recall_queries": args.recall_queries,
            "lambada": args.lambada,
            "lambada_rows": args.lambada_rows,
            "out": str(stem),
            "keep": args.keep,
            "result": str(result),
            "code": self.table.state["code"],
        }
        path = stem.with_name(stem.name + ".job.json")
        write_json(path, job)
        process = subprocess.Popen(
            command(path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment(device),
            **OWN_GROUP,
        )
        print(f"[{name}] begins on {device}", flush=True)
        reader = threading.Thread(target=copy_lines, args=(process, name, folder / "logs" / f"{name}.log"), daemon=True)
        reader.start()
        return Job(name=name, rows=rows, device=device, shared=shared, process=process, result=result, reader=reader)

    def _collect(self) -> None:
        """Wait a moment, then take in what has ended."""
        time.sleep(0.2)
        ended = [job for job in self.running if job.process.poll() is not None]
        shared = self.table.state["shared"]
        for job in ended:
            job.reader.join()
            self.running.remove(job)
            code = job.process.returncode
            for row in job.rows:
                shared[row.key] = max(job.shared, shared.get(row.key, 1)) if row.recipe is not None else 1
            if code == INTERRUPTED or (self.stopped is not None and code < 0):
                continue
            if job.result.is_file():
                results = json.loads(job.result.read_text())
            else:
                reason = {"kind": "Died", "message": f"exit code {code}; see logs/{job.name}.log"}
                results = [{**row.as_dict(), "error": reason} for row in job.rows]
            for row, result in zip(job.rows, results, strict=True):
                self.table.rows.pop(row.key, None)
                self.table.rows[row.key] = result | {"shared": shared.pop(row.key)}
                self.table.tried.add(row.key)
        if ended:
            self.todo = self.left()
            self.table.write(self.todo)

    def _stop(self, why: str) -> None:
        self.stopped = time.monotonic()
        names = ", ".join(job.name for job in self.running)
        print(why + (f"; stopping {names}" if names else ""), flush=True)
        for job in self.running:
            job.process.terminate()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped is None:
            self._stop("interrupted")
        else:
            for job in self.running:
                job.process.kill()


def command(job: Path) -> list[str]:
    """What runs a job."""
    return [sys.executable, "-m", "benchmarks.quality", "--one", str(job)]


def environment(device: str) -> dict[str, str]:
    """Of a job: it finds this code, and no other GPU than its own.

    A device is chosen like this and not in the recipe, so that a run may be resumed on another one.
    """
    paths = [str(ROOT / part) for part in (".", "kernels", "cli")] + [os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    kind, _, index = device.partition(":")
    if kind == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif index:
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        env["CUDA_VISIBLE_DEVICES"] = seen[int(index)] if int(index) < len(seen) else index
    return env


def copy_lines(process: subprocess.Popen[str], name: str, log: Path) -> None:
    """What a job prints, into its log and behind its name."""
    assert process.stdout is not None
    with log.open("a", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            print(f"[{name}] {line.rstrip()}", flush=True)
