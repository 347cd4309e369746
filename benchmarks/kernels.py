"""Our kernels beside other people's, in one run: times, memory, decode, whole models.

    python -m benchmarks.kernels [--only WORD ...] [--minutes 6] [--out FILE] [--again]
    python -m benchmarks.kernels --table FILE
    python -m benchmarks.kernels --plot FILE [--to docs/plots] [--format svg]

Times are medians of triton's do_bench on one GPU, the clocks as found. Every op is held against its float64 definition
before it is timed, and a wrong one is not. Peers run in processes of their own, under a time limit; a package that is
missing, a peer that fails or takes too long leaves a row that says so. Rows are appended to FILE as JSON lines with
machine, versions, date and commit. What FILE has already from the same machine and the same sources is not measured
again, so a run that was cut short goes on where it stopped.

--only takes words of ops (layer, window, scalar gate, channel gate, delta rule, decode, model), implementations
(linearize, SDPA, flex, composed, fla, TFLA) or workers (benchmarks/kernels_jobs.py lists them all).
Peers' packages: pip install fla-core mlstm_kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels_rows import ROOT, Row, append, figure, latest, measured, read, table

RESULTS = ROOT / "benchmarks/results/kernels.jsonl"
PREPARE = 150.0
"""Seconds that a worker may take to compile and be checked; workers do so side by side."""


class Worker:
    """A process that times some jobs; its lines arrive in a queue."""

    def __init__(self, name: str, only: Sequence[str], known: set[tuple[str, ...]]) -> None:
        self.name, self.started = name, time.monotonic()
        keys = json.dumps(sorted(known))
        command = [sys.executable, "-m", "benchmarks.kernels_worker", name, "--known", keys, "--only", *only]
        self.errors: list[str] = []
        self.lines: queue.Queue[Row | None] = queue.Queue()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
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
        for line in self.process.stderr:
            self.errors = [*self.errors, line.rstrip()][-5:]

    def next(self, until: float) -> Row | None:
        """Its next line, or None where it has ended or `until` (monotonic) has come."""
        try:
            return self.lines.get(timeout=max(until - time.monotonic(), 0.01))
        except queue.Empty:
            return None

    def go(self) -> None:
        """Give it the card."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def end(self) -> None:
        """Stop it, whatever it does."""
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """Why it stopped talking."""
        self.readers[0].join(timeout=0.1)
        if not self.readers[0].is_alive():  # its output has ended, so that it ends too, if not this instant
            for reader in self.readers:
                reader.join(timeout=5)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
        code = self.process.poll()
        if code is None:
            return "took too long"
        return f"ended with code {code}: {self.errors[-1] if self.errors else 'no message'}"[:200]


def rows_of(worker: Worker, *, limit: float, deadline: float) -> Iterator[Row]:
    """Let a prepared worker time; its rows, and one without a figure where it does not end by itself."""
    worker.go()
    until = min(time.monotonic() + limit, deadline)
    while True:
        row = worker.next(until)
        if row is None:
            yield unfinished(worker, f"{limit:.0f} s")
            return
        if row.get("done"):
            return
        yield row


def unfinished(worker: Worker, what: str) -> Row:
    """The row of a worker that did not end by itself."""
    note = f"{worker.last_words()} ({what})"
    return {"op": "unfinished", "implementation": worker.name, "shape": "", "pass": "", "ms": None, "note": note}


def measure(only: Sequence[str], *, out: Path, minutes: float, again: bool) -> list[Row]:
    """Run everything that is asked for and not yet known; rows are written as they come."""
    from benchmarks.kernels_jobs import LIMITS, PEER_LIMIT, workers

    known = set() if again else measured(out)
    deadline = time.monotonic() + 60 * minutes
    running = [Worker(name, only, known) for name in workers(only)]
    rows = []
    try:
        # All have compiled before the first is timed: nobody else is then on the card.
        prepared = {w.name: w.next(min(w.started + PREPARE, deadline)) is not None for w in running}
        for number, worker in enumerate(running):
            begin, limit = time.monotonic(), LIMITS.get(worker.name, PEER_LIMIT)
            found = (
                rows_of(worker, limit=limit, deadline=deadline)
                if prepared[worker.name]
                else iter([unfinished(worker, "preparing")])
            )
            for row in found:
                append(out, row)
                rows.append(row)
                label = " ".join(row[name] for name in ("op", "implementation", "shape", "pass"))
                print(f"{label}: {figure(row)}", flush=True)
            worker.end()
            print(f"[{number + 1}/{len(running)}] {worker.name}: {time.monotonic() - begin:.0f} s", flush=True)
    finally:
        for worker in running:
            worker.end()
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Our kernels beside other people's.")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--minutes", type=float, default=6.0, help="stop after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines, appended")
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a table of FILE and do nothing else")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw FILE and do nothing else")
    parser.add_argument("--to", type=Path, default=Path("docs/plots"), help="folder of the plots")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    asked: Any = parser.parse_args(argv)
    if asked.plot is not None:
        from benchmarks.kernels_plots import draw

        for path in draw(read(asked.plot), asked.to, asked.format):
            print(path)
        return
    if asked.table is not None:
        print(table(list(latest(read(asked.table)).values())))
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    rows = measure(asked.only, out=asked.out, minutes=asked.minutes, again=asked.again)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
