"""The state at every chunk boundary, and its gradient, from stored features (gated_scan_triton.py).

    forwards   S_{c+1} = e^{G_last} S_c + sum_j phi(k_j) (e^{G_last - G_j} v_j)^T
    backwards  dS_c = e^{G_last} dS_{c+1} + sum_i phi(q_i) (e^{G_i} do_i)^T

Weights of rows are put on the values beforehand (gated_map_rows_triton.py): in the loop, which is as long as the
sequence, everything goes to the tensor cores as it lies in memory. z is a product with the weights alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .compiled import start
from .gated_map_rows_triton import Rows
from .gated_plan import LEAST_SEGMENT, Plan, gate_signature
from .gated_tiles import chunk_span, product, row_decay
from .tuning import gated_map_chunk, gated_map_scan

WORTHWHILE = 4
"""Segments with which a scan is cut at all: each is walked twice."""


@triton.jit(do_not_specialize=["T", "S", "NT", "SEG"])
def map_scan_kernel(
    x, values, columns, spent, first_state, states, z_states, totals, z_totals, log_totals, final, table, offsets,
    sib, sih, sif, T, S, NT, SEG,
    R: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, NORM: tl.constexpr, TOTALS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of F times tiles of V, segments, sequences times state heads).

    x [B, S R, T, F]; values, columns and spent as Rows, of S R heads; states [B, S, NT, F, V], z_states [B, S, NT, F];
    totals [N, S, SEG, F, V], z_totals [N, S, SEG, F], log_totals [N, S, SEG]. Forwards R is 1.
    """
    VT: tl.constexpr = (V + BV - 1) // BV
    f = tl.program_id(0) // VT * BF + tl.arange(0, BF)
    o = tl.program_id(0) % VT * BV + tl.arange(0, BV)
    seg = tl.program_id(1)
    n = (tl.program_id(2) // S).to(tl.int64)
    s = (tl.program_id(2) % S).to(tl.int64)
    in_f, in_o = f < F, o < V
    own_z = in_f & (f * 0 + tl.program_id(0) % VT == 0)  # vectors are written once, by the first tile of values
    tile = f[:, None] * V + o[None, :]
    in_tile = in_f[:, None] & in_o[None, :]
    if PACKED:
        b = n * 0
        lead = tl.load(offsets + n)
        count = tl.load(offsets + n + 1) - lead
    else:
        b = n
        lead = 0
        count = NT
    share = tl.cdiv(count, SEG)
    low = tl.minimum(seg * share, count)
    high = tl.minimum(low + share, count)

    state = tl.zeros([BF, BV], tl.float32)
    z = tl.zeros([BF], tl.float32)
    if not TOTALS:
        if HAS_FIRST:
            base = first_state + n * sib + s * sih
            state = tl.load(base + f[:, None] * sif + o[None, :], mask=in_tile, other=0.0)
            if NORM:
                z = tl.load(base + f * sif + V, mask=in_f, other=0.0)
        for before in range(0, seg):
            slot = (n * S + s) * SEG + before
            kept = tl.exp2(tl.load(log_totals + slot))
            state = state * kept + tl.load(totals + slot * F * V + tile, mask=in_tile, other=0.0)
            if NORM:
                z = z * kept + tl.load(z_totals + slot * F + f, mask=in_f, other=0.0)
    place = tl.arange(0, 16)[None, :]
    mass = tl.where(place == 0, z[:, None], 0.0)  # z is the sum of its columns
    gone = 0.0  # log decay of this segment

    rows = tl.arange(0, C)
    for i in range(low * R, high * R):
        r = i % R
        c = lead + (count - 1 - i // R if REVERSE else i // R)
        first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
        t = first + rows
        live = (t >= begin) & (t < end)
        if not TOTALS:  # noqa: SIM102 (known when compiled, and then not)
            if r == 0:
                slot = (b * S + s) * NT + c
                tl.store(states + slot * F * V + tile, state.to(states.dtype.element_ty), mask=in_tile)
                if NORM:
                    tl.store(z_states + slot * F + f, tl.sum(mass, 1), mask=own_z)
        if DECAY != "none":
            total = tl.where(r == 0, tl.load(spent + (b * S + s) * NT + c), 0.0)  # once a chunk, not once a query head
            gone += total
            state = state * tl.exp2(total)
            mass = mass * tl.exp2(total)
        head = b * S * R + s * R + r
        xt = tl.load(
            x + (head * T + first) * F + rows[None, :] * F + f[:, None],
            mask=live[None, :] & in_f[:, None], other=0.0,
        )  # fmt: skip
        row = (head * NT + c) * C + rows
        yt = tl.load(values + row[:, None] * V + o[None, :], mask=in_o[None, :], other=0.0)
        state = product(xt, yt, state, PREC)
        if NORM:
            mass = product(xt, tl.load(columns + row[:, None] * 16 + place), mass, PREC)

    if TOTALS:
        slot = (n * S + s) * SEG + seg
        tl.store(totals + slot * F * V + tile, state, mask=in_tile)
        tl.store(log_totals + slot, gone)
        if NORM:
            tl.store(z_totals + slot * F + f, tl.sum(mass, 1), mask=own_z)
    elif HAS_FINAL:  # noqa: SIM102
        if seg == SEG - 1:
            base = final + (n * S + s) * F * (V + NORM)
            tl.store(base + f[:, None] * (V + NORM) + o[None, :], state, mask=in_tile)
            if NORM:
                tl.store(base + f * (V + NORM) + V, tl.sum(mass, 1), mask=own_z)


@triton.jit(do_not_specialize=["T", "S", "NT"])
def through_kernel(
    g, states, z_states, d_states, dz_states, gates, table, sgb, sgh, sgt, part, T, S, NT,
    F: tl.constexpr, V: tl.constexpr, FP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gates' gradient of what passes a whole chunk, e^{G_last} (<S_c, dS> + z_c dz), on each of its tokens.

    Grid (batch, chunks, state heads, parts of the state, flat). gates [PARTS, ., S, T], `part` apart; FP covers F.
    """
    pid = tl.program_id(0)
    share = pid % PARTS
    s = (pid // PARTS % S).to(tl.int64)
    c = pid // PARTS // S % NT
    b = (pid // PARTS // S // NT).to(tl.int64)
    slot = (b * S + s) * NT + c
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(share, (F * V + BLOCK - 1) // BLOCK, PARTS):
        at = i * BLOCK + tl.arange(0, BLOCK)
        state = tl.load(states + slot * F * V + at, mask=at < F * V, other=0.0).to(tl.float32)
        sums += state * tl.load(d_states + slot * F * V + at, mask=at < F * V, other=0.0).to(tl.float32)
    through = tl.sum(sums, 0)
    if NORM:
        f = tl.arange(0, FP)
        once = (f < F) & (f * 0 + share == 0)
        z = tl.load(z_states + slot * F + f, mask=once, other=0.0)
        through += tl.sum(z * tl.load(dz_states + slot * F + f, mask=once, other=0.0), 0)
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    t = first + tl.arange(0, C)
    live = (t >= begin) & (t < end)
    _, total = row_decay(g, b * sgb + s * sgh, sgt, t, live, C, DECAY)
    passed = tl.zeros([C], tl.float32) + through * tl.exp2(total)
    tl.store(gates + share.to(tl.int64) * part + (b * S + s) * T + t, passed, mask=live)


def map_scan(
    plan: Plan,
    x: torch.Tensor,
    y: Rows,
    first: torch.Tensor | None,
    *,
    chunk: int,
    reverse: bool,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, z and the last state, as `gated_scan_triton.scan`, from features x [B, heads, T, F]."""
    table, offsets, count = plan.chunks(chunk)
    config = gated_map_scan(plan.capability, plan.features, plan.values, x.dtype, reverse=reverse)
    tiles = -(-plan.features // config["BF"]) * -(-plan.values // config["BV"])
    heads = plan.sequences * plan.state_heads
    programs = config.pop("PROGRAMS")
    segments = min(programs // (tiles * heads), count // LEAST_SEGMENT)
    segments = segments if segments >= WORTHWHILE else 1

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return empty(shape, dtype=dtype, device=x.device)

    sizes = (plan.batch, plan.state_heads, count, plan.features)
    states = made(*sizes, plan.values, dtype=y.values.dtype)
    z_states = made(*(sizes if plan.norm else (0,)))
    last = (plan.sequences, plan.state_heads, plan.features, plan.values + plan.norm)
    final = made(*(last if want_final else (0,)))
    totals = z_totals = log_totals = final
    if segments > 1:
        log_totals = made(plan.sequences, plan.state_heads, segments)
        totals = made(*log_totals.shape, plan.features, plan.values)
        z_totals = made(*log_totals.shape, plan.features) if plan.norm else final
    arguments = (
        x, *y, first, states, z_states, totals, z_totals, log_totals, final, table, offsets,
        *(x if first is None else first).stride()[:3], plan.length, plan.state_heads, count, segments,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        R=plan.readers if reverse else 1, F=plan.features, V=plan.values, C=chunk, DECAY=plan.decay, REVERSE=reverse,
        NORM=plan.norm, HAS_FIRST=first is not None, HAS_FINAL=want_final, PACKED=table is not None,
        PREC="ieee" if x.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
    if segments > 1:
        start(plan.found, map_scan_kernel, (tiles, segments - 1, heads), arguments, options | {"TOTALS": True})
    start(plan.found, map_scan_kernel, (tiles, segments, heads), arguments, options | {"TOTALS": False})
    return states, z_states, final


def map_through(
    plan: Plan,
    g: torch.Tensor | None,
    states: tuple[torch.Tensor, torch.Tensor],
    d_states: tuple[torch.Tensor, torch.Tensor],
    gates: torch.Tensor,
    *,
    chunk: int,
) -> None:
    """Fills gates [parts, B, S, T]: parts whose sum is the gates' gradient of what passes each token's whole chunk."""
    table, _, count = plan.chunks(chunk)
    parts = gates.shape[0]
    start(plan.found, through_kernel, plan.batch * count * plan.state_heads * parts, (
        g, *states, *d_states, gates, table, *plan.decay_strides(g), gates.stride(0), plan.length, plan.state_heads,
        count,
    ), dict(
        F=plan.features, V=plan.values, FP=triton.next_power_of_2(plan.features), BLOCK=4096, PARTS=parts,
        C=chunk, DECAY=plan.decay, NORM=plan.norm, PACKED=table is not None, num_warps=8,
    ))  # fmt: skip


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width, reverse in ((128, 1024, True), (64, 1024, True), (128, 1024, False)):
        config = gated_map_scan(arch, 2 * width, size, torch.bfloat16, reverse=reverse)
        config.pop("PROGRAMS")
        launch = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            R=4 if reverse else 1, F=2 * width, V=size, C=gated_map_chunk(arch, torch.bfloat16), DECAY="scalar",
            REVERSE=reverse, NORM=True, TOTALS=False, HAS_FIRST=False, HAS_FINAL=False, PACKED=False, PREC="tf32",
            first_state=None, table=None, offsets=None, **config,
        )  # fmt: skip
        pointers = dict.fromkeys(("x", "values", "columns", "states"), "*bf16")
        names = ("spent", "z_states", "totals", "z_totals", "log_totals", "final")
        pointers |= dict.fromkeys(names, "*fp32")
        signature = gate_signature(map_scan_kernel, pointers, constants)
        cases.append((map_scan_kernel, signature, constants, launch, f"D {size} f {width} reverse {reverse}"))
    constants = dict(
        F=2048, V=128, FP=2048, BLOCK=4096, PARTS=2, C=64, DECAY="scalar", NORM=True, PACKED=False, table=None
    )
    pointers = dict.fromkeys(("states", "d_states"), "*bf16")
    pointers |= dict.fromkeys(("g", "z_states", "dz_states", "gates"), "*fp32")
    signature = gate_signature(through_kernel, pointers, constants)
    return [*cases, (through_kernel, signature, constants, {"num_warps": 8}, "through D 128 f 1024")]
