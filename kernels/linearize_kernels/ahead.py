"""Compile the kernels of a computation side by side, before it runs.

Triton compiles a kernel when it is first launched, about half a second each, one after the other. A model's first step
has dozens. Whoever is to run something large can run it once in `compiling_ahead`, which launches no kernel of ours,
and then in earnest. Compilers are threads: most of their work is outside Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .backend import HAS_TRITON, interpreting

MOST = 16
"""Compilers at a time."""
OURS = __name__.rpartition(".")[0]
"""The package whose kernels are not launched; those of others run as ever."""
_active = False


def ahead() -> bool:
    """Whether kernels are now compiled and not launched."""
    return _active


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[bool]:
    """Within the block our kernels are compiled and not launched: what they would have written stays undefined.

    A kernel that does not compile says so when it is launched in earnest. Gives whether there is anything to it: False
    off a GPU, without Triton, or with a Triton that cannot compile in threads; everything then runs as ever. Not for
    two threads at once.
    """
    global _active
    mode = _mode() if device.type == "cuda" else None
    if mode is None or _active:
        yield False
        return
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    with ThreadPoolExecutor(min(MOST, os.cpu_count() or 1)) as pool, mode(pool, ignore_errors=True) as compilers:

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            if self.fn.__module__.partition(".")[0] != OURS:
                return launch(self, *args, grid=grid, warmup=warmup, **options)
            with _compiled_by(compilers):
                return launch(self, *args, grid=grid, warmup=True, **options)

        JITFunction.run, _active = run, True
        try:
            yield True
        finally:
            JITFunction.run, _active = launch, False


def _mode() -> Any:
    """Triton's way to compile in threads, or None."""
    if not HAS_TRITON or interpreting():
        return None
    import triton

    return getattr(triton, "AsyncCompileMode", None)


def _compiled_by(compilers: Any) -> Any:
    """The same compilers in this thread: gradients are computed in one of their own, which does not inherit them."""
    try:
        from triton.runtime._async_compile import active_mode
    except ImportError:
        return nullcontext()
    return _set(active_mode, compilers)


@contextmanager
def _set(variable: Any, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
