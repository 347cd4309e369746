"""Which implementation serves an op: torch, the definition that runs everywhere, or Triton, on a GPU.

`auto` takes Triton where it can serve. Asked for by name, Triton serves or says why it cannot: a slow path is never
taken in silence by somebody who asked for the fast one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from .tuning import capability

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "LINEARIZE_KERNELS"
"""Environment variable that stands in for `auto`."""
POISON = "LINEARIZE_POISON"
"""Environment variable under which fresh buffers are full of nan, so that a test sees what was never written."""
FOUND = find_spec("triton")
HAS_TRITON = FOUND is not None
"""Whether the triton package is here; it is not imported. A constant, for torch.compile traces what reads it."""


def _release(name: str) -> tuple[int, ...]:
    """Numbers of an installed package's version, (3, 6, 0); () where it is not known."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return ()
    numbers = found.split("+")[0].split(".")[:3]
    return tuple(int(x) for x in numbers if x.isdecimal())


TRITON = _release("triton")
"""Triton's release; () where it is unknown, which counts as older than all."""


PTXAS = "TRITON_PTXAS_PATH"
"""Environment variable by which Triton is told to use another assembler than its own."""


def _prefer_sound_assembler() -> None:
    """Let a Triton that brings ptxas 12.8 for Hopper use the 12.9 that lies beside it, unless the user has chosen one.

    ptxas 12.8 adds to a register that nothing has written where tiles with rows of 128 bytes and of fewer take turns
    in one place of shared memory; products then read from anywhere, in our kernels and in others' alike.
    """
    if PTXAS in os.environ or FOUND is None or FOUND.origin is None or not (3, 4) <= TRITON < (3, 7):
        return
    newer = Path(FOUND.origin).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    if newer.is_file() and os.access(newer, os.X_OK):
        os.environ[PTXAS] = str(newer)


def _assembler() -> tuple[int, ...]:
    """Release of the ptxas that the variable names, (12, 9, 86); () where it names none, older than all."""
    path = os.environ.get(PTXAS)
    if not path:
        return ()
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    numbers = said.rpartition(", V")[2].split("\n")[0].split(".")
    return tuple(int(x) for x in numbers if x.isdecimal())


_prefer_sound_assembler()
ASSEMBLER = _assembler()
"""Of the ptxas that Triton is told to use in place of its own."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a rule of UNTRUSTED reads: features F, value channels V and the kind of decay of one call.

    decay: none, fixed, scalar (a number a token) or channel (one a channel).
    """

    features: int
    values: int
    decay: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Gradients of an op that are not trusted on Hopper (capability 9.0) with a Triton older than `before`.

    sound: ptxas release from which they are, whatever Triton's; None: not known.
    """

    op: str
    when: Callable[[Call], bool]
    before: tuple[int, ...]
    reason: str
    sound: tuple[int, ...] | None = None


HOPPER = 90
UNTRUSTED = (
    Rule(
        op="gated_linear",
        when=lambda x: x.decay == "channel",
        before=(3, 7),
        reason="its gradients under a decay per channel are wrong",
        sound=(12, 9),
    ),
    Rule(
        op="gated_linear",
        when=lambda x: x.decay != "channel" and max(x.features, x.values) > 64,
        before=(3, 7),
        reason="its gradients are wrong with more than 64 features or value channels",
        sound=(12, 9),
    ),
    Rule(
        op="mapped_gated_linear",
        when=lambda x: True,
        before=(3, 7),
        reason="its gradients are wrong",
        sound=(12, 9),
    ),
    Rule(
        op="gated_delta",
        when=lambda x: x.decay != "none",
        before=(3, 7),
        reason="its gradients under a decay fail",
        sound=(12, 9),
    ),
)
"""What was seen to be wrong. A rule goes when tests/kernels/test_*_gpu.py pass without it on such a card."""


def untrusted(op: str, call: Call, *tensors: torch.Tensor | None) -> str | None:
    """Why this call's gradients are left to torch, or None; a call that wants none is always trusted.

    Args:
        op: name of the public op.
        call: its sizes.
        tensors: its inputs, the first on the device; None is passed over.
    """
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return None
    for rule in UNTRUSTED:
        if rule.op != op or not rule.when(call) or rule.before <= TRITON:
            continue
        if rule.sound is not None and rule.sound <= ASSEMBLER:
            continue
        if tensors[0] is not None and capability(tensors[0].device) == HOPPER:
            release = ".".join(map(str, TRITON)) or "of an unknown release"
            return f"{rule.reason} on Hopper with Triton {release}"
    return None


def decay_kind(g: torch.Tensor | None) -> str:
    """Name of the decay [S], [B, S, T] or [B, S, T, F], as in Call."""
    return "none" if g is None else {1: "fixed", 3: "scalar"}.get(g.ndim, "channel")


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def pick(backend: str, *tensors: torch.Tensor | None, unable: str | None = None) -> str:
    """The implementation for these tensors: `torch` or `triton`.

    Args:
        backend: auto, torch or triton; `auto` reads LINEARIZE_KERNELS first.
        tensors: inputs of the op; None is passed over.
        unable: why the op's kernels cannot serve these arguments, or None where they can.

    Raises:
        ValueError: an unknown name, or triton was asked for and cannot serve.
    """
    asked = os.environ.get(VARIABLE, "auto") if backend == "auto" else backend
    if asked not in BACKENDS:
        raise ValueError(f"backend {asked!r} is not one of {', '.join(BACKENDS)}")
    if asked == "torch":
        return "torch"
    reason = unable or _missing(tensors)
    if reason is None and not (asked == "auto" and interpreting()):
        return "triton"
    if asked == "triton" and reason is not None:
        raise ValueError(f"backend 'triton' cannot serve this: {reason}")
    return "torch"


def _missing(tensors: tuple[torch.Tensor | None, ...]) -> str | None:
    """What keeps Triton from reading these tensors, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    given = [x for x in tensors if x is not None]
    if any(x.dtype == torch.float64 for x in given):
        return "its kernels compute in float32"
    if interpreting():
        return "the interpreter gets bfloat16 wrong" if any(x.dtype == torch.bfloat16 for x in given) else None
    return None if all(x.is_cuda for x in given) else "the tensors are not on a GPU"


P = ParamSpec("P")
R = TypeVar("R")


def placed(op: Callable[P, R]) -> Callable[P, R]:
    """`op` on the GPU of its first argument: Triton launches on the current one, wherever the tensors are.

    Autograd and torch.compile see to that by themselves.
    """

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()), None)
        place = first.device if isinstance(first, torch.Tensor) and first.is_cuda else None
        if place is not None and not torch.compiler.is_compiling() and place.index != torch.cuda.current_device():
            with torch.cuda.device(place):
                return op(*args, **kwargs)
        return op(*args, **kwargs)

    return run


def unseen(*inputs: object) -> bool:
    """Whether nothing would see an op of these inputs: nothing traces it, and no gradient is wanted.

    It may then run as a plain function: the way through torch.library costs the host more than several launches.
    """
    if torch.compiler.is_compiling():
        return False
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer that a kernel will fill; full of nan where LINEARIZE_POISON is 1."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if os.environ.get(POISON) == "1" and made.is_floating_point():
        made.fill_(float("nan"))
    return made
