"""Gradient of the values, from stored features (gated_dkv_triton.py): dv_j = e^{G_last - G_j} dS^T phi(k_j) + P^T do.

State heads that share a key-value head are added up in the program.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .compiled import start
from .gated_maps import MAP_POINTERS, map_gate_constants, options
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, product, row_decay
from .tuning import gated_map_chunk, gated_map_dv


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_dv_kernel(
    fk, reads, g, dout, d_states, dv, table, sgb, sgh, sgt, sdb, sdh, sdt, sob, soh, sot, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SIGNED: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, key-value heads, tiles of V, flat)."""
    F: tl.constexpr = WIDTH * SIGNED
    VT: tl.constexpr = (V + BV - 1) // BV
    HK = H // (R * G)
    S = H // R
    pid = tl.program_id(0)
    o = pid % VT * BV + tl.arange(0, BV)
    hk = (pid // VT % HK).to(tl.int64)
    c = pid // VT // HK % NT
    b = (pid // VT // HK // NT).to(tl.int64)
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    rows = tl.arange(0, C)
    t = first + rows
    live = (t >= begin) & (t < end)
    in_o = o < V
    in_v = live[:, None] & in_o[None, :]
    v_grad = tl.zeros([C, BV], tl.float32)
    for j in tl.range(0, G, disable_licm=True):
        s = hk * G + j
        slot = (b * S + s) * NT + c
        keys = ((b * S + s) * T + first) * F
        from_state = tl.zeros([C, BV], tl.float32)
        for i in tl.range(0, (F + BF - 1) // BF):
            f = i * BF + tl.arange(0, BF)
            in_f = f < F
            kf = tl.load(fk + keys + rows[:, None] * F + f[None, :], mask=live[:, None] & in_f[None, :], other=0.0)
            d_state = tl.load(
                d_states + slot * F * V + f[:, None] * V + o[None, :], mask=in_f[:, None] & in_o[None, :], other=0.0
            )
            from_state = product(kf, d_state, from_state, PREC)
        running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
        v_grad += from_state * tl.exp2(total - running)[:, None]
        for r in tl.range(0, R):
            h = s * R + r
            read = tl.load(reads + ((b * H + h) * NT + c) * C * C + rows[None, :] * C + rows[:, None])
            do = tl.load(
                dout + b * sdb + h * sdh + first * sdt + rows[:, None] * sdt + o[None, :], mask=in_v, other=0.0
            )
            v_grad = tl.dot(read, do, v_grad, input_precision=PREC)
    to = dv + b * sob + hk * soh + first * sot + rows[:, None] * sot + o[None, :]
    tl.store(to, v_grad.to(dv.dtype.element_ty), mask=in_v)


def map_value_gradients(
    plan: Plan,
    g: torch.Tensor | None,
    fk: torch.Tensor,
    reads: torch.Tensor,
    dout: torch.Tensor,
    d_states: torch.Tensor,
    dv: torch.Tensor,
    *,
    chunk: int,
) -> None:
    """Fills dv [B, HK, T, V], any strides."""
    config = gated_map_dv(plan.capability, plan.features, plan.values, fk.dtype)
    known = {name: x for name, x in options(plan, chunk, fk.dtype).items() if name not in ("BV", "NORM")}
    table, _, count = plan.chunks(chunk)
    start(plan.found, map_dv_kernel, plan.batch * count * plan.kv_heads * -(-plan.values // config["BV"]), (
        fk, reads, g, dout, d_states, dv, table,
        *plan.decay_strides(g), *dout.stride()[:3], *dv.stride()[:3], plan.length, plan.heads, count,
    ), dict(G=plan.state_heads // plan.kv_heads, **known, **config))  # fmt: skip


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width in ((64, 1024), (128, 1024)):
        config = gated_map_dv(arch, 2 * width, size, torch.bfloat16)
        launch = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, torch.bfloat16)
        constants = map_gate_constants(size, width, chunk) | {"G": 1} | config
        constants = {name: x for name, x in constants.items() if name not in ("MAP", "NORM")}
        signature = gate_signature(map_dv_kernel, MAP_POINTERS | {"dv": "*bf16"}, constants)
        cases.append((map_dv_kernel, signature, constants, launch, f"D {size} f {width}"))
    return cases
