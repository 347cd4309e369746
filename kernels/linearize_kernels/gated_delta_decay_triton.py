"""The last step of the log decays' gradient under a lag, where queries reach back past the start of their chunk.

dg_t = what the keys' kernel found, and what all queries from t on carry that read from before this chunk
"""

from typing import Any

import triton
import triton.language as tl

from .gated_delta_tiles import span_of_chunk


@triton.jit(do_not_specialize=["T", "NC"])
def decay_kernel(
    carried, along_q, d_g, table, T, S, NC, R: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr, PACKED: tl.constexpr
):
    """Grid (chunks times batch times state heads). carried: the keys' part [B, S, T]; along_q [B, S R, T] -> d_g."""
    pid = tl.program_id(0)
    c = pid % NC
    s = (pid // NC % S).to(tl.int64)
    b = (pid // NC // S).to(tl.int64)
    first, end, number = span_of_chunk(table, c, T, C, PACKED)
    left = end - first
    at = tl.cast(first, tl.int64)
    i = tl.arange(0, C)
    per_key = (b * S + s) * T + at
    along_q += (b * S + s) * R * T + at
    kept = tl.load(carried + per_key + i, mask=i < left, other=0.0)
    own = tl.zeros([C], tl.float32)
    later = tl.zeros([C], tl.float32)
    # Chunks after this one, to the end of the block after its own, read a state that was before this chunk.
    chunks = tl.minimum((number // LAG + 2) * LAG - number, tl.cdiv(left, C))
    for r in tl.static_range(R):
        own += tl.load(along_q + (r * T + i), mask=i < left, other=0.0)
        for m in range(1, chunks):
            later += tl.load(along_q + (r * T + m * C + i), mask=i < left - m * C, other=0.0)
    tl.store(d_g + per_key + i, kept + tl.cumsum(own, 0, reverse=True) + tl.sum(later), mask=i < left)


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """What the compile gate builds: see tests/kernels/compile_gate.py."""
    signature = dict.fromkeys(("carried", "along_q", "d_g"), "*fp32") | dict.fromkeys(("T", "S", "NC"), "i32")
    constants = {"table": None, "R": 1, "C": 64, "LAG": 1, "PACKED": False}
    return [(decay_kernel, signature, constants, {"num_warps": 1, "num_stages": 1}, "C=64")]
