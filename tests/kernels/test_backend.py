"""Which implementation serves, and what is said where the one asked for cannot."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import linearize_kernels as kernels
from linearize_kernels import backend, gated, gated_delta, gated_linear, gated_mapped, mapped_gated_linear
from linearize_kernels.backend import HAS_TRITON, POISON, VARIABLE, Call, empty, pick, unseen, untrusted
from linearize_kernels.tuning import capability

X = torch.zeros(2)
DECAYS = ("none", "fixed", "scalar", "channel")
gated_delta_module = import_module("linearize_kernels.gated_delta")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of auto, torch, triton"):
        pick("cuda", X)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast' is not one of"):
        pick("auto", X)


def test_auto_on_a_cpu_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for interpret in ("0", "1"):  # the interpreter is for tests: nobody gets it without asking
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        assert pick("auto", X) == "torch"


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_variable_stands_in_for_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(VARIABLE, "triton")
    assert pick("auto", X) == "triton"
    assert pick("torch", X) == "torch"
    monkeypatch.setenv(VARIABLE, "torch")
    assert pick("auto", X) == "torch"
    assert pick("triton", X) == "triton"


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    ("interpret", "tensors", "unable", "reason"),
    [
        ("0", (X,), None, "not on a GPU"),
        ("1", (X, None, X.double()), None, "compute in float32"),
        ("1", (X.bfloat16(),), None, "bfloat16 wrong"),
        ("1", (X,), "a window of 63", "a window of 63"),
    ],
)
def test_triton_serves_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch,
    interpret: str,
    tensors: tuple[torch.Tensor | None, ...],
    unable: str | None,
    reason: str,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ValueError, match=f"cannot serve this: .*{reason}"):
        pick("triton", *tensors, unable=unable)
    assert pick("auto", *tensors, unable=unable) == "torch"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pick("auto", X) == "torch"
    with pytest.raises(ValueError, match="triton is not installed"):
        pick("triton", X)


def _delta(backend: str, **x: torch.Tensor) -> torch.Tensor:
    out = gated_delta(x["q"], x["q"], x["q"], x["beta"], x.get("g"), backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


def _linear(backend: str, **x: torch.Tensor) -> torch.Tensor:
    out = gated_linear(x["q"], x["q"], x["q"], x.get("g"), backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


def _mapped(backend: str, **x: torch.Tensor) -> torch.Tensor:
    maps = x["weight"], None, x["weight"], None
    out = mapped_gated_linear(x["q"], x["q"], x["q"], x.get("g"), *maps, map="linear", backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


NARROW, WIDE = torch.rand(1, 1, 6, 16), torch.rand(1, 1, 6, 80)
SCALAR, CHANNEL = -torch.rand(1, 1, 6), -torch.rand(1, 1, 6, 16)
RULED_OUT = [
    (_linear, {"q": NARROW, "g": CHANNEL}, "a decay per channel"),
    (_linear, {"q": WIDE, "g": SCALAR}, "64 features"),
    (_linear, {"q": WIDE}, "64 features"),
    (_mapped, {"q": NARROW, "g": SCALAR, "weight": torch.rand(1, 16, 80)}, "wrong"),
    (_delta, {"q": NARROW, "beta": SCALAR.exp(), "g": SCALAR}, "under a decay"),
]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of capability 9.0 with Triton 3.6; its kernels still run in the interpreter."""
    if HAS_TRITON:  # before it is patched: what is imported later would keep the patched functions
        import_module("linearize_kernels.compiled")
    monkeypatch.setattr(backend, "TRITON", (3, 6, 0))
    monkeypatch.setattr(backend, "ASSEMBLER", ())
    monkeypatch.setattr(backend, "capability", lambda device: 90)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.setattr(backend, "_missing", lambda tensors: None)


def _ways(op: Callable[..., torch.Tensor], x: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `pick` answers while the op runs under `auto`."""
    found: list[str] = []
    for module in (gated, gated_delta_module, gated_mapped):

        def watched(*given: Any, **options: Any) -> str:
            found.append(pick(*given, **options))
            return found[-1]

        monkeypatch.setattr(module, "pick", watched)
    out = op("auto", **x)
    assert bool(out.isfinite().all())
    return found


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.usefixtures("hopper", "interpreter")
@pytest.mark.parametrize(("op", "given", "reason"), RULED_OUT)
def test_gradients_that_are_not_trusted_are_left_to_torch(
    op: Callable[..., torch.Tensor], given: dict[str, torch.Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {name: x.clone().requires_grad_() for name, x in given.items()}
    assert "triton" not in _ways(op, trained, monkeypatch)
    with pytest.raises(ValueError, match=f"cannot serve this: .*{reason}.* on Hopper with Triton 3.6.0"):
        op("triton", **trained)
    with torch.no_grad():
        assert _ways(op, trained, monkeypatch) == ["triton"]
    assert _ways(op, given, monkeypatch) == ["triton"], "nothing wants a gradient"


@pytest.mark.parametrize(
    ("card", "release", "trusted"), [(90, (3, 6, 0), False), (90, (), False), (90, (3, 7, 1), True), (80, (3, 6), True)]
)
def test_rules_hold_for_a_card_and_a_release(
    monkeypatch: pytest.MonkeyPatch, card: int, release: tuple[int, ...], trusted: bool
) -> None:
    monkeypatch.setattr(backend, "ASSEMBLER", ())
    monkeypatch.setattr(backend, "capability", lambda device: card)
    monkeypatch.setattr(backend, "TRITON", release)
    leaf = torch.zeros(1, requires_grad=True)
    for rule in backend.UNTRUSTED:
        assert rule.op in kernels.__all__
        calls = [Call(features=f, values=v, decay=g) for f, v, g in product((64, 65), (64, 65), DECAYS)]
        served = [untrusted(rule.op, call, X, None, leaf) is None for call in calls]
        assert all(served) if trusted else not all(served)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("assembler", "trusted"), [((), False), ((12, 8, 93), False), ((12, 9, 86), True)])
def test_a_sound_assembler_lifts_the_rules_it_is_known_to_cure(
    monkeypatch: pytest.MonkeyPatch, assembler: tuple[int, ...], trusted: bool
) -> None:
    monkeypatch.setattr(backend, "ASSEMBLER", assembler)
    leaf = torch.zeros(1, requires_grad=True)
    for op, decay in (("gated_delta", "scalar"), ("gated_linear", "channel"), ("mapped_gated_linear", "none")):
        assert (untrusted(op, Call(features=64, values=64, decay=decay), leaf) is None) == trusted


@pytest.mark.parametrize(
    ("release", "chosen", "expected"),
    [((3, 6, 0), None, "newer"), ((3, 6, 0), "own", "own"), ((3, 7, 1), None, None), ((), None, None)],
)
def test_the_assembler_beside_triton_s_own_is_preferred(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: tuple[int, ...], chosen: str | None, expected: str | None
) -> None:
    tool = tmp_path / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(backend, "FOUND", SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(backend, "TRITON", release)
    monkeypatch.delenv(backend.PTXAS, raising=False)
    if chosen is not None:
        monkeypatch.setenv(backend.PTXAS, chosen)
    backend._prefer_sound_assembler()
    found = os.environ.pop(backend.PTXAS, None)
    assert found == (str(tool) if expected == "newer" else expected)


def test_the_assembler_is_asked_for_its_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\necho Build cuda_12.9.r12.9")
    tool.chmod(0o755)
    for named, release in (("", ()), (str(tmp_path / "none"), ()), (str(tool), (12, 9, 86))):
        monkeypatch.setenv("TRITON_PTXAS_PATH", named)
        assert backend._assembler() == release


@pytest.mark.usefixtures("hopper")
def test_what_was_seen_to_be_right_is_trusted() -> None:
    leaf = torch.zeros(1, requires_grad=True)
    right = [("gated_linear", 64, 64, "scalar"), ("gated_delta", 256, 256, "none"), ("window_linear", 512, 128, "none")]
    for op, features, values, decay in right:
        assert untrusted(op, Call(features=features, values=values, decay=decay), leaf) is None


def test_fresh_buffers_are_poisoned_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POISON, "1")
    assert empty((2, 3), dtype=torch.float16, device=X.device).isnan().all()
    assert empty((2, 3), dtype=torch.int32, device=X.device).shape == (2, 3)


def test_an_op_is_seen_by_gradients_compilers_and_subclasses_of_tensors() -> None:
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert unseen(plain, None, 1.0)
    assert not unseen(plain, leaf)
    with torch.no_grad():
        assert unseen(plain, leaf, torch.nn.Parameter(plain))
        assert not unseen(plain, torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), plain))
        told = []
        torch.compile(lambda x: (told.append(unseen(x)), x + 1)[1], backend="eager")(plain)
        assert told == [False]


class OnSecondGpu(torch.Tensor):
    """A tensor that says it lies on another GPU than the current one."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_an_op_runs_on_the_gpu_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under device_map="auto": Triton launches on the current GPU, wherever the tensors are."""
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    there, here = torch.ones(2).as_subclass(OnSecondGpu), torch.ones(2)
    where = backend.placed(lambda x, y=None: current[-1])
    assert where(there) == 1 and where(there, y=here) == 1 and where(x=there) == 1
    assert current == [0]
    assert where(here) == 0 and where(here, there) == 0 and where(None) == 0


def test_every_public_op_is_placed() -> None:
    modules = ("blend", "decode", "distill", "gated", "gated_delta", "gated_mapped", "gated_unit", "rms_norm", "rotate")
    for name in (*modules, "unrotate", "window_attention", "window_linear"):
        module = import_module(f"linearize_kernels.{name}")
        ops = [x for x in vars(module).values() if callable(x) and getattr(x, "__module__", "") == module.__name__]
        launching = [x for x in ops if not x.__name__.startswith("_") and "backend" in inspect.signature(x).parameters]
        assert launching and all(hasattr(x, "__wrapped__") for x in launching), name


def test_a_cpu_has_no_capability() -> None:
    assert capability(X.device) == 0


def test_importing_the_kernels_imports_no_triton(source_env: dict[str, str]) -> None:
    code = "import sys, linearize_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=source_env, check=False).returncode == 0


def test_the_kernels_work_where_triton_is_missing(source_env: dict[str, str]) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, linearize_kernels as kernels\n"
        "x = torch.ones(1, 1, 1, 8, 4)\n"
        "assert kernels.chunk_linear(x, x[:, :, 0], x[:, :, 0])[0].isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", code], env=source_env, check=True)
