"""One process of the kernel benchmarks: compiles and checks its jobs, waits for its turn on the card, and times them.

    python -m benchmarks.kernels_worker NAME [--only WORD ...]

It prints JSON lines: {"ready": true} when it waits (a line on its standard input lets it go), then rows, then
{"done": true}. Words for humans go to standard error.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_jobs import Job, workers
from benchmarks.kernels_rows import KEY, Row
from benchmarks.kernels_shapes import Shape, Subject, check, check_prefix, drawn

WARMUP, REPEAT = 15, 60
"""Milliseconds of do_bench."""


def passes(subject: Subject, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed: forward without a graph, forward and backward for every input, the same for the maps alone."""
    upstream: list[Tensor] = []

    def both(forward: Callable[[], Tensor], names: tuple[str, ...]) -> Callable[[], Any]:
        chosen = [subject.leaves[name] for name in names]

        def run() -> Any:
            for name, x in subject.leaves.items():
                x.requires_grad_(name in names)
            out = forward()
            if not upstream:
                upstream.append(drawn(*out.shape, device=device, seed=9).to(out.dtype))
            return torch.autograd.grad(out, chosen, upstream[0], allow_unused=True)

        return run

    def forward() -> Any:
        with torch.no_grad():
            return subject.forward()

    yield "forward", forward
    if "both" in subject.passes:
        yield "both", both(subject.forward, tuple(subject.leaves))
    if "maps" in subject.passes:
        yield "maps", both(subject.maps_forward or subject.forward, subject.maps)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most device memory while `run` runs, its inputs included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def times(run: Callable[[], Any]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    median, low, high = do_bench(run, warmup=WARMUP, rep=REPEAT, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def layer_rows(job: Job, shape: Shape, known: set[tuple[str, ...]], device: str = "cuda") -> Iterator[Row]:
    """Rows of one job at one shape; a failure is a row too, with what went wrong as its note."""
    assert job.build is not None
    name = {"op": job.op, "implementation": job.implementation, "shape": shape.name}
    try:
        subject = job.build(shape, device)
        runs = list(passes(subject, device))
        if all((*name.values(), which) in known for which, _ in runs):
            return
        wrong = check_prefix(job.build, shape, runs[0][1](), device)
        if wrong is not None:
            yield name | {"pass": "forward", "ms": None, "note": f"wrong: {wrong}"}
            return
        for which, run in runs:
            peak = peak_bytes(run)
            median, low, high = times(run)
            scaled = {"ns_per_token_head": 1e6 * median / shape.token_heads, "peak_bytes": peak, "note": subject.note}
            yield name | {"pass": which, "ms": median, "ms_low": low, "ms_high": high} | scaled
    except Exception as error:  # a peer may fail in any way, and the next one is to run all the same
        yield name | {"pass": "forward", "ms": None, "note": words(error)}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def words(error: BaseException) -> str:
    """An error's kind and first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def checked(job: Job, device: str = "cuda") -> str | None:
    """Why a job must not be timed, or None: every distinct head shape is held against the definition first."""
    assert job.build is not None
    for shape in {(s.heads, s.kv_heads, s.head_dim): s for s in job.shapes}.values():
        try:
            wrong = check(job.build, shape, device)
        except Exception as error:
            return words(error)
        if wrong is not None:
            return f"wrong: {wrong}"
    return None


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="One worker of benchmarks.kernels.")
    parser.add_argument("name")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--known", default="[]", help="measurements not to be repeated, JSON")
    asked = parser.parse_args()
    known = {tuple(key) for key in json.loads(asked.known)}
    jobs = workers(asked.only)[asked.name]
    # What libraries print must not be taken for rows.
    out, sys.stdout = sys.stdout, sys.stderr

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    refused = {id(job): checked(job) for job in jobs if job.build is not None and job.early}
    torch.cuda.empty_cache()
    say({"ready": True})
    sys.stdin.readline()
    for job in jobs:
        if job.rows is not None:
            for row in job.rows(known):
                say(row)
            continue
        wrong = refused[id(job)] if id(job) in refused else checked(job)
        for shape in job.shapes:
            if wrong is not None:
                note = dict(zip(KEY, (job.op, job.implementation, shape.name, "forward"), strict=True))
                say(note | {"ms": None, "note": wrong})
                continue
            for row in layer_rows(job, shape, known):
                say(row)
    say({"done": True})


if __name__ == "__main__":
    main()
