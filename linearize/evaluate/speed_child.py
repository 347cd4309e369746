"""Run by a fresh Python to see how far resident memory rises during one point on the CPU.

    python -I speed_child.py REQUEST.json

Prints one JSON object: `bytes`, or None with `reason` and `fatal` (the point takes more memory than it may).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    """Load, settle, measure, print."""
    request = json.loads(Path(request_path).read_text())
    sys.path[:0] = request["roots"]
    import torch

    torch.set_num_threads(request["threads"])
    from linearize.artifacts.load import load_model
    from linearize.evaluate.speed_memory import field_bytes
    from linearize.evaluate.speed_run import LEAST_NEW, run_once, same_tokens

    model = load_model(request["folder"], device="cpu", dtype=request["dtype"], finite=False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()  # pages of a mapped file are not resident until they are read
    size = {"batch": 1, "context": min(16, request["context"])}
    run_once(model, same_tokens(request["vocabulary"], seed=0, **size), new_tokens=LEAST_NEW)
    ids = same_tokens(request["vocabulary"], batch=request["batch"], context=request["context"], seed=request["seed"])
    _give_back()
    allowed = int(request["share_of_free"] * field_bytes("/proc/meminfo", "MemAvailable"))
    if request["max_bytes"] is not None:
        allowed = min(allowed, request["max_bytes"]) if allowed else request["max_bytes"]
    status = "/proc/self/status"
    before = field_bytes(status, "VmRSS")
    if not before:
        return _answer(None, "no memory figure: this system has no /proc")
    _restart_peak()
    _limit(field_bytes(status, "VmData") + allowed)
    try:
        run_once(model, ids, new_tokens=LEAST_NEW)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return _answer(None, f"takes more than {allowed / 2**30:.1f} GiB of memory", fatal=True)
        raise
    _answer(max(field_bytes(status, "VmHWM") - before, 0))


def _answer(found: int | None, reason: str | None = None, *, fatal: bool = False) -> None:
    print(json.dumps({"bytes": found, "reason": reason, "fatal": fatal}), flush=True)


def _give_back() -> None:
    """Freed memory back to the system, where the C library can: the point would otherwise hide in it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _restart_peak() -> None:
    """Make VmHWM begin anew; where that is not allowed it is the peak since the start, which can only be higher."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _limit(data_bytes: int) -> None:
    """Have an allocation fail rather than the machine."""
    import resource

    hard: Any = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes if hard < 0 else min(data_bytes, hard), hard))


if __name__ == "__main__":
    main(sys.argv[1])
