"""Launch Triton kernels again without the work that Triton repeats at every launch.

Triton looks at every argument at every launch to find the machine code made for such arguments: for a kernel with
sixty of them that takes longer than the kernel runs on a short sequence. An op that knows what decides, its sizes and
the strides and alignment of its inputs, keeps what was found the first time. Import this only where Triton is
installed.
"""

from __future__ import annotations

from typing import Any

import torch

from .ahead import ahead
from .backend import interpreting

Found = dict[tuple[Any, ...], tuple[Any, list[Any]]]
"""Of one kind of call: the machine code of each kernel, by kernel and constants, and those constants in order."""
MOST = 512
_KINDS: dict[tuple[Any, ...], Found] = {}


def found_for(sizes: object, *tensors: torch.Tensor | None) -> Found | None:
    """What is known of calls with these sizes and such tensors; None under the interpreter, and where none is launched.

    sizes: hashable; it and the tensors' strides must give every number that a kernel is passed. Buffers that the op
    makes itself are aligned as the allocator does.
    """
    if interpreting() or ahead():
        return None
    kind = (
        sizes, torch.cuda.current_device(),
        *(None if x is None else (x.dtype, x.stride(), x.data_ptr() % 16) for x in tensors),
    )  # fmt: skip
    found = _KINDS.get(kind)
    if found is None:
        if len(_KINDS) >= MOST:
            _KINDS.clear()
        found = _KINDS[kind] = {}
    return found


def start(
    found: Found | None, kernel: Any, programs: int | tuple[int, int, int], given: tuple[Any, ...],
    constants: dict[str, Any], tag: str = "",
) -> None:  # fmt: skip
    """Launch `programs` programs of a @triton.jit kernel; a number, or one for each of the grid's three axes.

    given: its arguments in order, up to the first tl.constexpr; constants: those, by name, num_warps and num_stages.
    What is None among those given must follow from these, too. tag: tells apart launches of one kernel on different
    inputs of the call.
    """
    grid = (programs, 1, 1) if isinstance(programs, int) else programs
    if found is None:
        kernel[grid](*given, **constants)
        return
    key = (id(kernel), tag, *constants.values())
    known = found.get(key)
    if known is None:
        code = kernel[grid](*given, **constants)
        found[key] = code, [constants[name] for name in kernel.arg_names[len(given) :]]
    else:
        code, rest = known
        code[grid](*given, *rest)
