"""Runs the workers of the kernel benchmarks: all compile and tune side by side, then one after the other is timed.

Nothing is left out in silence: every measurement that was asked for has a row in the end, with a figure or with the
reason why it has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.kernels_rows import ROOT, Key, Row, key_of, without

WARM_UP = 100.0
"""Seconds that compiling, tuning and checking may take."""
SHARE = 0.5
"""The most of --minutes that it may take."""
GRACE = 8.0
"""Seconds after which a worker that has not noticed the end of its warm-up is killed."""
SETTINGS = {"TRITON_CACHE_AUTOTUNING": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Environment of the workers: tuned configurations go to Triton's cache, and no worker starts a pool of compilers."""


OVER = "no time was left for it"


class Worker:
    """A process that times some measurements; its lines arrive in a queue."""

    def __init__(self, name: str, keys: Sequence[Key], locks: Path, warm_up: float, logs: Path | None = None) -> None:
        self.name, self.keys, self.started = name, list(keys), time.monotonic()
        self.log = None if logs is None else logs / f"{name.replace(' ', '-')}.log"
        command = [sys.executable, "-m", "benchmarks.kernels_worker", name, "--keys", json.dumps(self.keys)]
        command += ["--locks", str(locks), "--warm-up", f"{warm_up:.1f}"]
        self.errors: list[str] = []
        self.lines: queue.Queue[Row | None] = queue.Queue()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **SETTINGS},
        )
        self.readers = [threading.Thread(target=x, daemon=True) for x in (self._read, self._listen)]
        for reader in self.readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with contextlib.nullcontext() if self.log is None else self.log.open("a") as log:
            for line in self.process.stderr:
                if line.strip():
                    self.errors = [*self.errors, line.rstrip()][-5:]
                if log is not None:
                    log.write(line)
                    log.flush()

    def next(self, until: float) -> Row | None:
        """Its next line, or None where it has ended or `until` (monotonic) has come."""
        try:
            return self.lines.get(timeout=max(until - time.monotonic(), 0.01))
        except queue.Empty:
            return None

    def go(self) -> None:
        """Give it the card."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Stop it, whatever it does."""
        self.process.kill()
        self.process.wait()

    def fate(self) -> tuple[str, str]:
        """Status and words for what it has not measured: it died, or is too slow."""
        self.readers[0].join(timeout=0.1)
        if not self.readers[0].is_alive():  # its output has ended, so that it ends too, if not this instant
            for reader in self.readers:
                reader.join(timeout=5)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
        code = self.process.poll()
        if code is None:
            return "unfinished", "took longer than its limit"
        return "failed", f"its process ended with code {code}: {self.errors[-1] if self.errors else 'no message'}"[:240]


def missing(keys: Sequence[Key], status: str, note: str, seconds: float) -> Iterator[Row]:
    """Rows of measurements that a worker did not get to."""
    return (without(key, status, note, seconds) for key in keys)


def prepare(running: Sequence[Worker], until: float, said: Callable[[str], None]) -> dict[str, list[Row]]:
    """Wait until all are warm or have died; rows of those that are neither are made, and their processes stopped."""
    lost: dict[str, list[Row]] = {}
    for worker in running:
        ready = worker.next(until)
        if ready is not None:
            less = f", {ready['refused']} of {len(worker.keys)} not to be timed" if ready.get("refused") else ""
            said(f"{worker.name}: warm after {ready.get('seconds', 0.0):.0f} s{less}")
        else:
            status, note = worker.fate()
            spent = time.monotonic() - worker.started
            lost[worker.name] = list(missing(worker.keys, status, f"while compiling and tuning: {note}", spent))
            worker.end()
    return lost


def rows_of(worker: Worker, *, limit: float, deadline: float) -> Iterator[Row]:
    """Let a warm worker time: its rows, and for what it did not get to, rows that say why."""
    begun, left = time.monotonic(), dict.fromkeys(worker.keys)
    if begun > deadline:
        yield from missing(worker.keys, "unfinished", OVER, 0.0)
        return
    worker.go()
    until = min(begun + limit, deadline)
    while (row := worker.next(until)) is not None and not row.get("done"):
        left.pop(key_of(row), None)
        yield row
    if left:
        status, note = worker.fate() if row is None else ("failed", "its worker said nothing of it")
        yield from missing(list(left), status, note, time.monotonic() - begun)


def turn(worker: Worker, lost: Mapping[str, list[Row]], *, limit: float, deadline: float) -> Iterator[Row]:
    """All rows of a worker that has been prepared, or lost; then it is stopped."""
    if worker.name in lost:
        yield from lost[worker.name]
    else:
        yield from rows_of(worker, limit=limit, deadline=deadline)
    worker.end()


def run(
    chosen: Mapping[str, Sequence[Key]],
    *,
    minutes: float,
    limit: Callable[[str], float],
    last: Sequence[str] = (),
    heard: Callable[[Row], None],
    said: Callable[[str], None] = print,
    logs: Path | None = None,
) -> None:
    """Measure.

    Args:
        chosen: measurements by worker, in the order of timing.
        minutes: when everything ends, workers that still run included.
        limit: seconds that a worker may time.
        last: workers that start only when all others have ended.
        heard: gets every row as it comes.
        said: gets lines of progress.
        logs: folder for what the workers say.
    """
    begun = time.monotonic()
    deadline = begun + 60 * minutes
    warm_up = min(WARM_UP, SHARE * 60 * minutes)
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    running: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:

        def start(name: str) -> Worker:
            running.append(Worker(name, chosen[name], Path(folder), warm_up, logs))
            return running[-1]

        try:
            first = [start(name) for name in chosen if name not in last]
            lost = prepare(first, begun + warm_up + GRACE, said)
            if first:
                said(f"warm after {time.monotonic() - begun:.0f} s: {len(first) - len(lost)} of {len(first)} processes")
            for number, name in enumerate([*(x for x in chosen if x not in last), *(x for x in last if x in chosen)]):
                begin = time.monotonic()
                if name in last and begin > deadline:
                    rows = missing(chosen[name], "unfinished", OVER, 0.0)
                elif name in last:
                    worker = start(name)
                    rows = turn(worker, prepare([worker], deadline, said), limit=limit(name), deadline=deadline)
                else:
                    rows = turn(first[number], lost, limit=limit(name), deadline=deadline)
                for row in rows:
                    heard(row)
                said(f"[{number + 1}/{len(chosen)}] {name}: {time.monotonic() - begin:.0f} s")
        finally:
            for worker in running:
                worker.end()
