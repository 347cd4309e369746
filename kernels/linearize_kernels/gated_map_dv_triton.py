"""Gradient of the values, from stored features (gated_dkv_triton.py): dv_j = e^{G_last - G_j} dS^T phi(k_j) + P^T do.

State heads that share a key-value head are added up in the program. On the way, where sums are spared (Plan.spared),
what features of keys times their gradients add up to: phi_j dphi_j = e^{G_last - G_j} phi_j (dS v_j + dz), and what
pairs inside the chunk give.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_maps import GATE_SHAPES, MAP_POINTERS, SIGNS, map_gate_constants, options, two_columns
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span, product, row_decay
from .tuning import gated_map_chunk, gated_map_dv


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_dv_kernel(
    fk, reads, v, g, dout, d_states, dz_states, totals, dv, along, table, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt,
    sob, soh, sot, part, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SIGNED: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, SPARED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, key-value heads, tiles of V, flat).

    SPARED: along [tiles of V, ., S, T], tiles `part` apart, is filled, from totals [B, H, T] of pairs in the chunk.
    """
    F: tl.constexpr = WIDTH * SIGNED
    VT: tl.constexpr = (V + BV - 1) // BV
    HK = H // (R * G)
    S = H // R
    pid = tl.program_id(0)
    tile = pid % VT
    o = tile * BV + tl.arange(0, BV)
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
        mass = tl.zeros([C, 16], tl.float32)
        for i in tl.range(0, (F + BF - 1) // BF):
            f = i * BF + tl.arange(0, BF)
            in_f = f < F
            kf = tl.load(fk + keys + rows[:, None] * F + f[None, :], mask=live[:, None] & in_f[None, :], other=0.0)
            d_state = tl.load(
                d_states + slot * F * V + f[:, None] * V + o[None, :], mask=in_f[:, None] & in_o[None, :], other=0.0
            )
            from_state = product(kf, d_state, from_state, PREC)
            if SPARED:
                dz = tl.load(dz_states + slot * F + f, mask=in_f, other=0.0)
                mass = two_columns(kf, dz, mass, PREC)
        running, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
        write = tl.exp2(total - running)
        v_grad += from_state * write[:, None]
        if SPARED:
            vt = tl.load(v + b * svb + hk * svh + first * svt + rows[:, None] * svt + o[None, :], mask=in_v, other=0.0)
            first_tile = tl.where(tile == 0, 1.0, 0.0)
            sums = (tl.sum(from_state * vt.to(tl.float32), 1) + tl.sum(mass, 1) * first_tile) * write
            for r in tl.range(0, R):
                sums += tl.load(totals + (b * H + s * R + r) * T + t, mask=live, other=0.0) * first_tile
            tl.store(along + tile.to(tl.int64) * part + (b * S + s) * T + t, sums, mask=live)
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
    v: torch.Tensor,
    g: torch.Tensor | None,
    fk: torch.Tensor,
    reads: torch.Tensor,
    dout: torch.Tensor,
    d_states: tuple[torch.Tensor, torch.Tensor],
    totals: torch.Tensor | None,
    dv: torch.Tensor,
    *,
    chunk: int,
) -> torch.Tensor | None:
    """Fills dv [B, HK, T, V], any strides; where sums are spared, those of keys [B, S, T], all features counted."""
    config = gated_map_dv(plan.capability, plan.features, plan.values, fk.dtype)
    known = {name: x for name, x in options(plan, chunk, fk.dtype).items() if name not in ("BV", "NORM")}
    table, _, count = plan.chunks(chunk)
    tiles, rows = -(-plan.values // config["BV"]), (plan.batch, plan.state_heads, plan.length)
    along = empty((tiles, *rows), dtype=torch.float32, device=fk.device) if plan.spared else None
    start(plan.found, map_dv_kernel, plan.batch * count * plan.kv_heads * tiles, (
        fk, reads, v, g, dout, *d_states, totals, dv, along, table, *v.stride()[:3],
        *plan.decay_strides(g), *dout.stride()[:3], *dv.stride()[:3], plan.batch * plan.state_heads * plan.length,
        plan.length, plan.heads, count,
    ), dict(G=plan.state_heads // plan.kv_heads, SPARED=plan.spared, **known, **config))  # fmt: skip
    return None if along is None else along[0] if tiles == 1 else along.sum(0)


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width, name in GATE_SHAPES:
        config = gated_map_dv(arch, SIGNS[name] * width, size, torch.bfloat16)
        launch = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, torch.bfloat16)
        constants = (
            map_gate_constants(size, width, name, chunk) | {"G": 1, "SPARED": name == "learned_softmax"} | config
        )
        constants = {key: x for key, x in constants.items() if key not in ("MAP", "NORM")}
        signature = gate_signature(map_dv_kernel, MAP_POINTERS | {"dv": "*bf16"}, constants)
        cases.append((map_dv_kernel, signature, constants, launch, f"D {size} f {width} {name}"))
    return cases
