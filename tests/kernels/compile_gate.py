"""Compiles kernels for cards that are not here, and reads what the machine code needs.

Triton's wheel brings ptxas and cuobjdump, so neither a GPU nor CUDA has to be installed. Every module of
`linearize_kernels` that launches kernels, its name ending in `_triton`, offers their default configurations as

    def gate_cases(arch: int) -> list[tuple[kernel, signature, constants, options, label]]

arch: the card, 90 for sm_90; a module whose cases are the same everywhere takes none. kernel: the @triton.jit
function. signature: {argument: type}, such as "*bf16", "i32" or "fp32"; "i32:16" for a number that is a multiple of
16, as pointers are taken to be; arguments that are missing are constants. constants: {argument: value} of the
tl.constexpr arguments (None for an absent pointer). options: num_warps and num_stages. label: words for the test's
message; the module's name is put before it. The first case is the default, which the suite compiles.

    python tests/kernels/compile_gate.py MODULE... [--arch 80,90,100] [--first]

prints one JSON line a kernel and card, and ends with exit code 3 where one of them does not fit.

Kernels are compiled in a process of their own, without TRITON_INTERPRET: under it there is nothing to compile.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from machine_code import overwritten, refilled

ARCHITECTURES = (80, 90, 100)
MAIN = 90
"""The card that kernels are tuned for."""
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block can have, by architecture (CUDA programming guide, compute capabilities)."""
TUNED = (3, 6)
"""The Triton release with which block sizes were chosen: nothing may spill there on MAIN."""
SPILL_LIMIT = {80: 512, 90: 128, 100: 512}
"""Most bytes a thread may spill under other releases, which place a few registers otherwise, and on cards that nothing
was tuned for. A tile too large for a card spills thousands."""
TENSOR_CORE = re.compile(r"\b(HMMA|IMMA|QMMA|OMMA|DMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b")
"""Instructions of the tensor cores: mma (Ampere), wgmma (Hopper), tcgen05 (Blackwell)."""
UNFIT = 3
"""Exit code where a kernel has complaints."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one kernel needs on one card."""

    label: str
    arch: int
    release: tuple[int, ...]
    """Major and minor number of Triton."""
    registers: int
    spilled: int
    """Bytes a thread keeps in local memory, because registers ran out."""
    shared: int
    """Bytes of shared memory a block."""
    tensor_instructions: int
    has_dot: bool
    """Whether the source multiplies matrices."""
    faults: tuple[str, ...] = ()
    """Known faults of the compilers that the machine code shows (machine_code.py)."""

    def complaints(self) -> list[str]:
        """What is wrong with it, in words; empty where nothing is."""
        found = []
        tuned = self.arch == MAIN and tuple(self.release) == TUNED
        if self.spilled > (0 if tuned else SPILL_LIMIT[self.arch]):
            found.append(f"spills {self.spilled} bytes a thread at {self.registers} registers")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"needs {self.shared} bytes of shared memory of {SHARED_LIMIT[self.arch]}")
        if self.has_dot and not self.tensor_instructions:
            found.append("multiplies matrices without tensor cores")
        return [f"{self.label} on sm_{self.arch}: {x}" for x in (*found, *self.faults)]


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    *,
    label: str = "",
    **options: Any,
) -> Compiled:
    """Compile `kernel` for compute capability `arch`; arguments as in the module's docstring.

    Raises:
        RuntimeError: cuobjdump failed. Errors of the compiler go through.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind, _, multiple = signature.get(name, "constexpr").partition(":")
        types[name] = kind
        if kind.startswith("*") or multiple == "16":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=types, constexprs=dict(constants), attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _output([str(tools / "cuobjdump"), "-res-usage", file.name])
        code = _output([str(tools / "nvdisasm"), "-c", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing of registers: {usage[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return Compiled(
        label=label or kernel.__name__,
        arch=arch,
        release=tuple(int(x) for x in triton.__version__.split(".")[:2]),
        registers=registers,
        spilled=stack + local,
        shared=made.metadata.shared,
        tensor_instructions=len(TENSOR_CORE.findall(code)),
        has_dot="tt.dot" in made.asm["ttir"],
        faults=(*overwritten(code), *refilled(made.asm["ttgir"])) if arch == MAIN else (),
    )


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def gated_modules() -> list[str]:
    """Names of the modules with kernels; nothing is imported but the package itself."""
    import linearize_kernels

    names = [module.name for module in pkgutil.iter_modules(linearize_kernels.__path__)]
    return sorted(name for name in names if name.endswith("_triton") and "def gate_cases" in _source(name))


def _source(name: str) -> str:
    return (ROOT / f"kernels/linearize_kernels/{name}.py").read_text()


def compile_module(
    name: str, architectures: tuple[int, ...] = ARCHITECTURES, *, first: bool = False
) -> Iterator[Compiled]:
    """A module's gate cases on every card; with `first`, the first alone."""
    gate_cases = importlib.import_module(f"linearize_kernels.{name}").gate_cases
    for arch in architectures:
        cases = gate_cases(arch) if inspect.signature(gate_cases).parameters else gate_cases()
        for kernel, signature, constants, options, label in cases[:1] if first else cases:
            yield compiled(kernel, signature, constants, arch, label=f"{name}: {label}", **options)


def compile_apart(*names: str, timeout: float, first: bool = True) -> list[Compiled]:
    """What the command prints, from one process without the interpreter; `first` as in `main`.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))
    command = [sys.executable, __file__, *names, *(["--first"] if first else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)
    if done.returncode not in (0, UNFIT):
        raise RuntimeError(f"{', '.join(names)}: a kernel does not compile:\n{done.stderr[-2000:]}")
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compile a module's kernels and print what they need.")
    parser.add_argument("module", nargs="+")
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)))
    parser.add_argument("--first", action="store_true", help=f"first cases on sm_{MAIN}; elsewhere the first MODULE's")
    asked = parser.parse_args()
    bad = False
    cards = tuple(int(x) for x in asked.arch.split(","))
    for name in asked.module:
        some = cards if not asked.first or name == asked.module[0] else tuple(x for x in cards if x == MAIN)
        for result in compile_module(name, some, first=asked.first):
            print(json.dumps(asdict(result)), flush=True)
            for line in result.complaints():
                bad = True
                print(line, file=sys.stderr, flush=True)
    sys.exit(UNFIT if bad else 0)


if __name__ == "__main__":
    main()
