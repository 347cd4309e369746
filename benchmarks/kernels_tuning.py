"""Triton's tuner, made fit for a dozen processes on one card: compile side by side, time alone, and briefly.

Libraries tune their kernels at the first call. Left alone, one process compiles hundreds of configurations one after
the other, and times each for a tenth of a second, whoever else is on the card: minutes an op. Here

- the configurations of a kernel are compiled by many threads (triton.AsyncCompileMode),
- one process at a time has the card while a configuration is timed, which takes some milliseconds instead of 125,
- processes that tune the same kernel wait for each other, and find what was compiled, and chosen, in Triton's cache
  (a choice holds for all sizes that the library's own key does not tell apart: the first to come tunes for all),
- tuning ends with OutOfTime at a given moment.

What else runs on the card meanwhile (checks, first runs of others) is not held back, so that a choice between
configurations a few per cent apart can come out otherwise than on an idle card.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FEWEST, MOST, LONG = 3, 20, 5.0
"""Runs of a configuration that are timed, and the milliseconds that are enough between the two."""
THREADS = 8
"""That compile, a process; Python's lock lets no more of them run at once."""
PAUSE = 0.002
"""Seconds between two looks at a lock."""


class OutOfTime(BaseException):
    """The time for tuning and compiling is over. No Exception, so that no library takes it for a failure of its own."""


@contextmanager
def held(path: Path, until: float = float("inf")) -> Iterator[None]:
    """Hold a lock between processes; one that dies lets go of it.

    Raises:
        OutOfTime: `until` (monotonic) has come and somebody else still holds it.
    """
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OutOfTime from None
                time.sleep(PAUSE)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def brief(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """Median, least and most milliseconds of a few runs, each on an empty L2 cache, as do_bench has it."""
    import torch
    from triton.runtime import driver

    call()
    cache = driver.active.get_empty_cache_for_benchmark()
    spent: list[float] = []
    while len(spent) < FEWEST or (len(spent) < MOST and sum(spent) < LONG):
        driver.active.clear_cache(cache)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    spent.sort()
    return [spent[len(spent) // 2], spent[0], spent[-1]]


def compile_all(function: Any, args: Sequence[Any], meta: dict[str, Any], configs: Sequence[Any]) -> None:
    """Compile a kernel in all `configs` by many threads; one that does not compile fails again when it is timed."""
    import triton

    given = {name: value for name, value in meta.items() if name != "warmup"}
    with ThreadPoolExecutor(THREADS) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            function.warmup(*args, **given, **config.all_kwargs())


def variant(name: str, key: Sequence[Any]) -> str:
    """A file's name for a kernel and what it is compiled for, as far as its tuning key tells: flags and dtypes."""
    told = [x for x in key if isinstance(x, bool | str)]
    return f"{name}-{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"


def tune_briefly(folder: Path, *, until: Callable[[], float], tuner: Any = None) -> None:
    """Change Triton's Autotuner in this process, as the module says.

    Args:
        folder: of the locks, shared by all processes of the benchmark.
        until: says when tuning ends, by time.monotonic().
        tuner: the class to change; Triton's own.

    A Triton whose tuner is made otherwise is left as it is: it tunes as slowly as for everybody else.
    """
    if tuner is None:
        import triton
        from triton.runtime.autotuner import Autotuner

        if not hasattr(triton, "AsyncCompileMode"):
            return
        tuner = Autotuner
    if not all(hasattr(tuner, name) for name in ("_bench", "check_disk_cache", "do_bench")):
        return
    plain_bench, plain_check = tuner._bench, tuner.check_disk_cache

    def check_disk_cache(self: Any, key: Any, configs: Any, bench: Callable[[], None]) -> Any:
        self.to_compile = list(configs)
        with held(folder / f"{variant(self.base_fn.__name__, key)}.lock", until()):
            return plain_check(self, key, configs, bench)

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        if time.monotonic() > until():
            raise OutOfTime
        waiting, self.to_compile = getattr(self, "to_compile", None), None
        if waiting:
            compile_all(self.fn, args, meta, waiting)
        with held(folder / "card.lock", until()):
            return plain_bench(self, *args, config=config, **meta)

    tuner._bench, tuner.check_disk_cache = bench, check_disk_cache
    tuner.do_bench = property(lambda self: self._do_bench or brief)
