"""Kernels launched a second time: the same machine code, and other code for other inputs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is for Linux alone")

import torch

from linearize_kernels import compiled


class Kernel:
    """Stands for a @triton.jit function of two arguments and two constants."""

    arg_names = ("x_ptr", "T", "C", "D")

    def __init__(self) -> None:
        self.looked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **constants: int) -> Any:
            self.looked.append((grid, given, constants))
            return Code(self)

        return launch


class Code:
    """Stands for its machine code."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given: self.kernel.launched.append((grid, given))


def test_triton_looks_once() -> None:
    kernel, found = Kernel(), {}
    options = {"D": 4, "C": 3, "num_warps": 4}
    compiled.start(found, kernel, 7, ("first", 1), options)
    compiled.start(found, kernel, 8, ("second", 2), options)
    assert kernel.looked == [((7, 1, 1), ("first", 1), options)]
    # Constants follow the arguments in the kernel's order, and options of the launch are no arguments.
    assert kernel.launched == [((8, 1, 1), ("second", 2, 3, 4))]
    compiled.start(found, kernel, (2, 3, 5), ("third", 2), options)
    assert kernel.launched[1:] == [((2, 3, 5), ("third", 2, 3, 4))]


@pytest.mark.parametrize("change", [{"constants": {"C": 5, "D": 4}}, {"tag": "keys"}, {"kernel": True}])
def test_what_makes_other_code(change: dict[str, Any]) -> None:
    kernel, found = Kernel(), {}
    compiled.start(found, kernel, 7, ("x", 1), {"C": 3, "D": 4})
    other = Kernel() if "kernel" in change else kernel
    compiled.start(found, other, 7, ("x", 1), change.get("constants", {"C": 3, "D": 4}), change.get("tag", ""))
    assert not kernel.launched and not other.launched and len(found) == 2


def test_without_memory_every_launch_is_triton_s() -> None:
    kernel = Kernel()
    for _ in range(2):
        compiled.start(None, kernel, 7, ("x", 1), {"C": 3, "D": 4})
    assert len(kernel.looked) == 2 and not kernel.launched


def test_kinds_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compiled, "_KINDS", {})
    x = torch.zeros(2, 64, 64)
    usual = compiled.found_for("sizes", x, None)
    assert usual is compiled.found_for("sizes", torch.ones(2, 64, 64), None)
    shifted = torch.zeros(2 * 64 * 64 + 1)[1:].view(2, 64, 64)  # four bytes off: loads of 16 bytes would fail
    others = [("other", x, None), ("sizes", x.mT, None), ("sizes", x.bfloat16(), None), ("sizes", x, x)]
    for call in [*others, ("sizes", shifted, None)]:
        assert compiled.found_for(*call) is not usual
    monkeypatch.setattr(compiled, "MOST", 3)
    assert compiled.found_for("one more", x) is not None and len(compiled._KINDS) == 1


def test_the_interpreter_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "interpreting", lambda: True)
    assert compiled.found_for("sizes", torch.zeros(2)) is None
