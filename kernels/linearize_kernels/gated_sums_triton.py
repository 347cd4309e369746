"""Running sums of per-channel log decays inside chunks."""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span


@triton.jit(do_not_specialize=["T", "S", "NT"])
def sums_kernel(
    g, out, table, sgb, sgh, sgt, T, S, NT, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, state heads, tiles of F, flat). out [B, S, T, F]."""
    FT: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    f = pid % FT * BF + tl.arange(0, BF)
    s = (pid // FT % S).to(tl.int64)
    c = pid // FT // S % NT
    b = (pid // FT // S // NT).to(tl.int64)
    first, begin, end = chunk_span(c, table, T, C, LAG, PACKED)
    t = first + tl.arange(0, C)
    mask = ((t >= begin) & (t < end))[:, None] & (f < F)[None, :]
    own = tl.load(g + b * sgb + s * sgh + t[:, None] * sgt + f[None, :], mask=mask, other=0.0)
    tl.store(out + (b * S + s) * T * F + t[:, None] * F + f[None, :], tl.cumsum(own, 0), mask=mask)


def running_sums(plan: Plan, g: torch.Tensor, chunk: int) -> torch.Tensor:
    """g [B, S, T, F] float32 summed along T from the start of each chunk."""
    table, _, count = plan.chunks(chunk)
    out = empty(tuple(g.shape), dtype=torch.float32, device=g.device)
    tile = max(16, min(32, triton.next_power_of_2(plan.features)))
    programs = plan.batch * count * plan.state_heads * -(-plan.features // tile)
    sums_kernel[(programs,)](
        g, out, table, *g.stride()[:3], plan.length, plan.state_heads, count, F=plan.features, BF=tile, C=chunk,
        LAG=plan.lag, PACKED=table is not None, num_warps=4,
    )  # fmt: skip
    return out


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations, for the compile gate."""
    constants: dict[str, Any] = dict(F=128, BF=32, C=64, LAG=False, PACKED=False, table=None)
    signature = gate_signature(sums_kernel, {"g": "*fp32", "out": "*fp32"}, constants)
    return [(sums_kernel, signature, constants, {"num_warps": 4}, "F 128")]
