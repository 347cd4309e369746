"""One process of the kernel benchmarks: compiles, tunes and checks its jobs, waits for its turn, and times them.

    python -m benchmarks.kernels_worker NAME [--keys JSON] [--locks FOLDER] [--warm-up SECONDS]

It prints JSON lines: {"ready": true} when it waits (a line on its standard input lets it go), then rows, then
{"done": true}. Words for humans go to standard error. What could not be compiled, tuned or checked within --warm-up is
not timed and has a row that says so; memory that ran out beside the others is tried again alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_jobs import GRAPH, Job, wanted, workers
from benchmarks.kernels_model import captured
from benchmarks.kernels_rows import Key, Row, failure, without
from benchmarks.kernels_shapes import Shape, Subject, check, drawn
from benchmarks.kernels_tuning import OutOfTime, tune_briefly

WARMUP, REPEAT = 15, 60
"""Milliseconds of do_bench."""
SPENT = "not compiled, tuned and checked within"


def passes(subject: Subject, which: Collection[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed: forward without gradients, forward and backward for every input, the same for the maps alone."""
    kept: list[Tensor] = []

    def upstream(out: Tensor) -> Tensor:
        if not kept:
            kept.append(drawn(*out.shape, device=str(out.device), seed=9).to(out.dtype))
        return kept[0]

    for name in which:
        yield name, partial(subject.run, name.removesuffix(GRAPH), upstream)


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most device memory while `run` runs, its inputs included."""
    free()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def times(run: Callable[[], Any]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    median, low, high = do_bench(run, warmup=WARMUP, rep=REPEAT, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


class WarmUp:
    """Compiles, tunes and checks jobs; `refused` holds the rows of what is not to be timed."""

    def __init__(self, keys: Collection[Key], device: str) -> None:
        self.keys, self.device, self.begun = set(keys), device, time.monotonic()
        self.refused: dict[Key, Row] = {}
        self.warm: set[Key] = set()
        """What has run and is right; what is in neither is to be tried again alone."""

    def tell(self, words: str) -> None:
        """A line of progress for humans."""
        print(f"{time.monotonic() - self.begun:6.1f} s  {words}", file=sys.stderr, flush=True)

    def attempt(self, keys: Collection[Key], run: Callable[[], str | None]) -> bool:
        """Run; what it says or raises becomes the row of `keys`. Whether all went well."""
        begun, label = time.monotonic(), " ".join(min(keys))
        try:
            wrong = run()
            if self.device != "cpu":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            self.tell(f"{label}: no memory beside the others")
            return False
        except Exception as error:  # a peer may fail in any way, and the next one is to run all the same
            self.refuse(keys, partial(failure, error=error, seconds=time.monotonic() - begun))
            self.tell(f"{label}: {type(error).__name__}: {str(error)[:300]}")
            return False
        spent = time.monotonic() - begun
        if wrong:
            self.refuse(keys, partial(without, status="wrong", note=wrong, seconds=spent))
        else:
            self.warm |= set(keys)
        self.tell(f"{label}: {wrong or 'well'}, {spent:.1f} s")
        return not wrong

    def refuse(self, keys: Collection[Key], row: Callable[[Key], Row]) -> None:
        """Measurements that are not to be taken."""
        self.refused.update((key, row(key)) for key in keys if key not in self.refused)

    def job(self, job: Job) -> None:
        """Run every pass at every shape once, and hold it against float64."""
        if job.warm_up is not None and (mine := [key for key in job.measurements() if key in self.keys]):
            self.attempt(mine, partial(job.warm_up, mine))
        for shape in job.shapes if job.build is not None else ():
            self.shape(job, shape)
            free()

    def shape(self, job: Job, shape: Shape) -> None:
        """The same for one shape."""
        assert job.build is not None
        keys = [key for x in job.passes if (key := (job.op, job.implementation, shape.name, x)) in self.keys]
        for key in keys:
            if self.attempt([key], partial(check, job.build, shape, self.device, key[3].removesuffix(GRAPH))):
                continue
            if key[3].startswith("forward") and key in self.refused:  # what goes wrong forward goes wrong in every pass
                self.refuse(keys, lambda x: self.refused[key] | {"pass": x[3]})  # noqa: B023
                return
            free()

    def end(self) -> None:
        """The time is over: whatever was not reached has a row that says so."""
        spent = time.monotonic() - self.begun
        for key in self.keys - self.warm:
            self.refused.setdefault(key, without(key, "unfinished", f"{SPENT} {spent:.0f} s", spent))


def warmed(jobs: Collection[Job], keys: Collection[Key], seconds: float, device: str = "cuda") -> WarmUp:
    """Compile, tune and check. An alarm ends what takes longer than `seconds`."""
    state = WarmUp(keys, device)

    def over(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        try:
            for job in jobs:
                state.job(job)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except OutOfTime:  # from the alarm, or from the tuner, which may come first
        state.end()
    signal.signal(signal.SIGALRM, before)
    free()
    return state


def layer_rows(job: Job, shape: Shape, keys: Collection[Key], warm: Collection[Key], device: str) -> Iterator[Row]:
    """Rows of one job at one shape; a failure is a row too. What is not `warm` is checked first."""
    assert job.build is not None
    subject: Subject | None = None
    for which in job.passes:
        key, begun = (job.op, job.implementation, shape.name, which), time.monotonic()
        if key not in keys:
            continue
        try:
            if key not in warm:
                subject = None
                wrong = check(job.build, shape, device, which.removesuffix(GRAPH))
                free()
                if wrong is not None:
                    yield without(key, "wrong", wrong, time.monotonic() - begun)
                    continue
            subject = job.build(shape, device) if subject is None else subject
            ((_, run),) = passes(subject, [which])
            peak = peak_bytes(run)
            median, low, high = times(captured(run).replay if which.endswith(GRAPH) else run)
        except Exception as error:
            yield failure(key, error, time.monotonic() - begun)
            continue
        yield without(key, "ok", subject.note, time.monotonic() - begun) | {
            "ms": median, "ms_low": low, "ms_high": high,
            "ns_per_token_head": 1e6 * median / shape.token_heads, "peak_bytes": peak,
        }  # fmt: skip
    del subject
    free()


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="One worker of benchmarks.kernels.")
    parser.add_argument("name")
    parser.add_argument("--keys", help="measurements to take, JSON; all")
    parser.add_argument("--locks", type=Path, help="folder of locks that all workers share")
    parser.add_argument("--warm-up", type=float, default=600.0, metavar="SECONDS")
    asked = parser.parse_args()
    jobs = workers()[asked.name]
    keys = wanted(jobs, ()) if asked.keys is None else [tuple(key) for key in json.loads(asked.keys)]
    # What libraries print must not be taken for rows.
    out, sys.stdout = sys.stdout, sys.stderr

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    begun = time.monotonic()
    until = begun + asked.warm_up
    if asked.locks is not None:
        tune_briefly(asked.locks, until=lambda: until)
    state = warmed(jobs, keys, asked.warm_up)
    until = float("inf")
    say({"ready": True, "seconds": round(time.monotonic() - begun, 1), "refused": len(state.refused)})
    sys.stdin.readline()
    for row in state.refused.values():
        say(row)
    left = set(keys) - set(state.refused)
    for job in jobs:
        if job.rows is not None:
            for row in job.rows(left):
                say(row)
        for shape in job.shapes:
            for row in layer_rows(job, shape, left, state.warm, "cuda"):
                say(row)
    say({"done": True})


if __name__ == "__main__":
    main()
