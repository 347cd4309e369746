"""Kernels compile for Ampere, Hopper and Blackwell: without spills, on tensor cores, in the card's shared memory."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="triton is for Linux alone")


def _gate() -> ModuleType:
    """compile_gate.py, which lies beside this file; tests are no package."""
    name = "compile_gate"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("compile_gate.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


gate = _gate()
MAIN_MODULES = {
    "blend": "blend_triton",
    "decode": "decode_triton",
    "distill": "distill_triton",
    "gated_delta": "gated_delta_scan_triton",
    "gated_map": "gated_map_out_triton",
    "gated": "gated_out_triton",
    "window_linear": "window_linear_read_triton",
}
"""Of every op, what its modules' names begin with, and the module that is compiled for every card."""
PROBE = """
import triton
import triton.language as tl


@triton.jit
def product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def shares(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tile / tl.sum(tile, 1)[:, None])


def gate_cases():
    dot = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    plain = {"x": "*fp32", "out": "*fp32"}
    return [
        (product, dot, {"N": 64}, {"num_warps": 4}, "fits"),
        (shares, plain, {"N": 64}, {"num_warps": 4}, "no dot"),
        (shares, plain, {"N": 128}, {"num_warps": 1}, "spills"),
    ]
"""


def _ops() -> dict[str, list[str]]:
    """Modules by op, the main one first: one process each, for starting one costs as much as compiling a kernel."""
    found = {op: [module] for op, module in MAIN_MODULES.items()}
    for module in gate.gated_modules():
        if module not in MAIN_MODULES.values():
            found[next(op for op in MAIN_MODULES if module.startswith(op))].append(module)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("modules", _ops().values(), ids=_ops())
def test_default_configurations_fit(modules: list[str]) -> None:
    """On Hopper, and each op's main kernel on the cards before and after it too."""
    results = gate.compile_apart(*modules, timeout=280)
    everywhere = {(modules[0], arch) for arch in gate.ARCHITECTURES}
    assert {(r.label.split(":")[0], r.arch) for r in results} == everywhere | {(name, gate.MAIN) for name in modules}
    assert [line for r in results for line in r.complaints()] == []


def test_the_gate_sees_spills_and_tensor_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that never complains is no gate."""
    (tmp_path / "linearize_kernels").mkdir()
    (tmp_path / "linearize_kernels/__init__.py").touch()
    (tmp_path / "linearize_kernels/probe_triton.py").write_text(PROBE)
    root = tmp_path / "root"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels/linearize_kernels").symlink_to(tmp_path / "linearize_kernels")
    monkeypatch.setattr(gate, "ROOT", root)
    results = gate.compile_apart("probe_triton", timeout=120, first=False)
    fits, no_dot, spills = ([r for r in results if r.label.endswith(end)] for end in ("fits", "no dot", "spills"))
    assert [r.complaints() for r in fits + no_dot] == [[]] * 6
    assert {r.arch for r in fits} == set(gate.ARCHITECTURES)
    assert all(r.tensor_instructions > 0 and r.has_dot and r.shared > 0 for r in fits)
    assert not any(r.tensor_instructions or r.has_dot for r in no_dot)
    assert all("spills" in " ".join(r.complaints()) for r in spills)
    few = replace(fits[0], arch=90, spilled=8)
    assert replace(few, release=gate.TUNED).complaints() and not replace(few, release=(3, 5)).complaints()
    assert "shared memory" in replace(fits[0], shared=gate.SHARED_LIMIT[80] + 1).complaints()[0]
    assert "tensor cores" in replace(fits[0], tensor_instructions=0).complaints()[0]
