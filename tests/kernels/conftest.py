"""Fixtures of the kernel tests.

tests/conftest.py sets TRITON_INTERPRET=1 where there is no GPU, before anything imports triton. Fresh buffers are full
of nan in every test here, so that an output or a scratch cell that a kernel never wrote shows.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from linearize_kernels import backend
from linearize_kernels.backend import POISON, interpreting

TRUST = "LINEARIZE_TEST_UNTRUSTED"
"""Environment variable; 1 runs what backend.UNTRUSTED refuses, to see whether a rule can go. One fault ends the run."""


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rules, where that is asked for."""
    if os.environ.get(TRUST) == "1":
        monkeypatch.setattr(backend, "UNTRUSTED", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skips what a rule refuses on this card, with the rule's words."""
    try:
        return (yield)
    except ValueError as error:
        if item.get_closest_marker("gpu") is not None and "on Hopper with Triton" in str(error):
            pytest.skip(f"{error} ({TRUST}=1 runs it)")
        raise


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """nan in every buffer that `backend.empty` makes."""
    monkeypatch.setenv(POISON, "1")


@pytest.fixture
def interpreter() -> None:
    """Skips where kernels are compiled for a GPU: the test gives them tensors of the CPU."""
    if not interpreting():
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1), which is off where there is a GPU")


@pytest.fixture
def kernel_device() -> str:
    """Where kernels can run here: cpu in the interpreter, else cuda."""
    return "cpu" if interpreting() else "cuda"
