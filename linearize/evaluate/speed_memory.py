"""How much memory a point takes: what the allocator says on a GPU, what a fresh process grows by on a CPU.

Resident memory of a process that has done anything before is a poor measure: freed memory stays with the allocator, and
the next point finds it there. So each point on a CPU has a process of its own, which loads the model, touches its
weights, runs once on a few tokens, and then notes how far resident memory rises above that during the point.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_METHOD = "weights + peak of torch.cuda's allocated memory above them, in prefill and decode"
CPU_METHOD = "weights + peak resident growth of a fresh process, in prefill and the first new tokens"
SHARE_OF_FREE = 0.8
"""Of the memory that is free when a point begins: what it may take unless a limit is given."""
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Has glibc give tensors' memory back as soon as it is freed: what is resident is then what is in use. By itself it
keeps some back, more or less of it from run to run."""
CHILD_EXTRA_SECONDS = 120.0
"""Time for a process to start and load the model, beside the point's own limit."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a fresh process found."""

    bytes: int | None
    reason: str | None = None
    """Why there is no figure."""
    fatal: bool = False
    """Whether the point must not be tried in this process either."""


def free_bytes(device: Any) -> int:
    """Memory that is free now, on the GPU, or on this machine for a CPU. 0 where it is not known."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, and free
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return field_bytes("/proc/meminfo", "MemAvailable")


def expected_bytes(config: Any, *, batch: int, tokens: int, dtype_bytes: int) -> int:
    """About what a point takes besides weights: cache, activations of one layer, logits of the last token. A low guess.

    For refusing what cannot fit before it is tried; what is reported is measured.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = text.num_hidden_layers - len(getattr(text, "linear_layers", ()))
    cache = 2 * layers * kv_heads * width * tokens * dtype_bytes
    if hasattr(text, "mixer_spec") and text.linear_layers:
        from linearize.modeling.configuration_linearized import state_bytes

        cache += state_bytes(text, dtype_bytes=dtype_bytes)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    activations = tokens * (8 * text.hidden_size + 3 * inner) * dtype_bytes
    return int(batch * (cache + activations + 4 * text.vocab_size))


def child_growth(
    folder: Path,
    *,
    dtype: str,
    vocabulary: int,
    batch: int,
    context: int,
    seed: int,
    max_bytes: int | None,
    seconds: float,
) -> Growth:
    """Peak resident growth of a fresh process that does the point on the CPU; see the module."""
    import linearize
    import linearize_kernels

    roots = sorted({str(Path(str(m.__file__)).resolve().parent.parent) for m in (linearize, linearize_kernels)})
    request = {
        "folder": str(Path(folder).resolve()),
        "roots": roots,
        "dtype": dtype,
        "vocabulary": vocabulary,
        "batch": batch,
        "context": context,
        "seed": seed,
        "max_bytes": max_bytes,
        "share_of_free": SHARE_OF_FREE,
        "threads": _threads(),
    }
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "request.json"
        path.write_text(json.dumps(request))
        command = [sys.executable, "-I", str(Path(__file__).with_name("speed_child.py")), str(path)]
        try:
            done = subprocess.run(
                command,
                cwd=room,
                env={**os.environ, **ALLOCATOR, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                timeout=CHILD_EXTRA_SECONDS + seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Growth(bytes=None, reason=f"took longer than {seconds:.0f} s in a process of its own", fatal=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        killed = done.returncode < 0  # by the kernel, as a rule for its memory
        why = "the process was killed" if killed else (lines[-1] if lines else f"exit code {done.returncode}")
        return Growth(bytes=None, reason=f"no memory figure: {why}", fatal=killed)
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["bytes"] is None:
        return Growth(bytes=None, reason=answer["reason"], fatal=answer["fatal"])
    return Growth(bytes=answer["bytes"])


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def field_bytes(path: str, name: str) -> int:
    """A field of a file of /proc in bytes; 0 where there is none."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
