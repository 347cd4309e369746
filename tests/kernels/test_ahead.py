"""Kernels compiled side by side before they are launched: which are held back, and by whom they are compiled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is for Linux alone")

import torch
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

from linearize_kernels import ahead, compiled

CARD = torch.device("cuda")


class Mode:
    """Stands for triton.AsyncCompileMode."""

    def __init__(self, pool: ThreadPoolExecutor, *, ignore_errors: bool) -> None:
        assert ignore_errors  # what does not compile is to fail where it is launched
        self.over = False

    def __enter__(self) -> Mode:
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True


def kernel(module: str) -> Any:
    """Stands for a @triton.jit function of a module."""

    def function() -> None: ...

    function.__module__ = module
    return SimpleNamespace(fn=function)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, object]]:
    """What Triton is asked to launch (or only to compile), and the compilers that the thread then has."""
    active: ContextVar[Any] = ContextVar("active", default=None)
    seen: list[tuple[str, bool, object]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((self.fn.__module__, warmup, active.get()))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_async_compile, "active_mode", active)
    monkeypatch.setattr(ahead, "_mode", lambda: Mode)
    return seen


def launch(of: Any) -> None:
    JITFunction.run(of, 1, grid=(1,), warmup=False)


def test_our_kernels_are_compiled_and_not_launched(launches: list[tuple[str, bool, object]]) -> None:
    ours, theirs = kernel("linearize_kernels.blend_triton"), kernel("linearize_kernels_of_others.ops")
    plain = JITFunction.run
    with ahead.compiling_ahead(CARD) as useful:
        assert useful and ahead.ahead()
        launch(ours)
        launch(theirs)
        other = threading.Thread(target=launch, args=(ours,))  # where autograd computes gradients
        other.start()
        other.join()
    assert JITFunction.run is plain and not ahead.ahead()
    launch(ours)
    assert [warmup for _, warmup, _ in launches] == [True, False, True, False]
    assert isinstance(launches[0][2], Mode) and launches[2][2] is launches[0][2]
    assert launches[1][2] is None and launches[3][2] is None


def test_nothing_of_it_is_remembered(launches: list[tuple[str, bool, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """`compiled` would keep what the compilers have not made yet."""
    monkeypatch.setattr(compiled, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with ahead.compiling_ahead(CARD):
        assert compiled.found_for("sizes", torch.zeros(2)) is None
    assert compiled.found_for("sizes", torch.zeros(2)) is not None


def test_triton_comes_back_after_an_error(launches: list[tuple[str, bool, object]]) -> None:
    plain = JITFunction.run
    with pytest.raises(torch.OutOfMemoryError), ahead.compiling_ahead(CARD):
        raise torch.OutOfMemoryError
    assert JITFunction.run is plain and not ahead.ahead()


def test_where_there_is_nothing_to_it(
    launches: list[tuple[str, bool, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = JITFunction.run
    with ahead.compiling_ahead(torch.device("cpu")) as useful:
        assert not useful and JITFunction.run is plain
    with ahead.compiling_ahead(CARD), ahead.compiling_ahead(CARD) as again:
        assert not again
    monkeypatch.setattr(ahead, "_mode", lambda: None)
    with ahead.compiling_ahead(CARD) as useful:
        assert not useful and JITFunction.run is plain


def test_triton_s_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(ahead, "interpreting", lambda: False)
    assert ahead._mode() is getattr(triton, "AsyncCompileMode", None)
    monkeypatch.setattr(ahead, "interpreting", lambda: True)
    assert ahead._mode() is None
