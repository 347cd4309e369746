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
    "gated_unit": "gated_unit_triton",
    "gated": "gated_out_triton",
    "rms_norm": "rms_norm_triton",
    "rotate": "rotate_triton",
    "unrotate": "unrotate_triton",
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


SASS = """
        /*0000*/                   F2FP.BF16.F32.PACK_AB R8, R1, R2 ;
        /*0010*/                   F2FP.BF16.F32.PACK_AB R9, R1, R2 ;
        /*0020*/                   F2FP.BF16.F32.PACK_AB R10, R1, R2 ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R11, R1, R2 ;
.L_x_0:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   {code} ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("LDSM.16.M88.4 R8, [R7+UR4]", True),
        ("LDG.E.128 R4, desc[UR4][R2.64]", False),
        ("LDG.E.128 R6, desc[UR4][R2.64]", True),
        ("@!P0 FADD R11, R1, R2", True),
        ("STS.128 [R8+UR4], R12", False),
        ("FADD R12, R8, R2", False),
    ],
)
def test_the_gate_sees_a_left_factor_that_a_loop_overwrites(code: str, wrong: bool) -> None:
    found = gate.overwritten(SASS.replace("{code}", code))
    assert bool(found) is wrong
    assert not wrong or "R8" in found[0] or "R11" in found[0]


def test_a_left_factor_that_each_turn_makes_is_its_own() -> None:
    made = SASS.replace(".L_x_0:\n", "").replace("\n        /*0000*/", "\n.L_x_0:\n        /*0000*/")
    assert gate.overwritten(made.replace("{code}", "LDSM.16.M88.4 R8, [R7+UR4]")) == []


TTGIR = """
    %q = ttg.local_alloc : () -> !ttg.memdesc<SLOTSx64x64xbf16, #shared, #smem, mutable>
    %view = ttg.memdesc_index %q[%i] : !ttg.memdesc<1x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %turned = ttg.memdesc_trans %view {order = array<i32: 1, 0>}
    %a = ttng.warp_group_dot %turned, %k, %acc {isAsync = true}
    %b = ttng.warp_group_dot_wait %a, %view {pendings = LATE : i32}
    %c = ttg.async_copy_global_to_local %at, %view mask %m
"""


@pytest.mark.parametrize(("slots", "late", "wrong"), [(1, 2, True), (2, 2, False), (1, 0, False)])
def test_the_gate_sees_a_slot_that_is_refilled_too_soon(slots: int, late: int, wrong: bool) -> None:
    found = gate.refilled(TTGIR.replace("SLOTS", str(slots)).replace("LATE", str(late)))
    assert bool(found) is wrong
