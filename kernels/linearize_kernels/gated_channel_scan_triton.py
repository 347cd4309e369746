"""States of gated linear attention with a decay per channel, chunk after chunk, and what is made where a state is.

    forwards    o = q^ S + P v                         S <- e^{G_last} S + k^^T v
    backwards   dv = k^ dS + P^T do                    dS <- e^{G_last} dS + q^^T do

q^, k^ and P hold all decays but a chunk's whole (gated_channel_prepare_triton.py), so that a step is products alone.
Sequential in the chunks, parallel in sequences, heads and tiles of V. Outputs are made where the state already is, and
no state goes to memory; for the backward pass the states are stored instead, and on the way back their gradients.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_plan import Plan, gate_signature
from .gated_tiles import chunk_span
from .tuning import gated_chunk, gated_states


@triton.jit(do_not_specialize=["T", "S", "NT"])
def states_kernel(
    queries, keys, y, totals, scores, first_state, out, states, final, table, offsets, syb, syh, syt, sob, soh, sot,
    sib, sih, sif, T, S, NT,
    G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, REVERSE: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr, HAS_FIRST: tl.constexpr,
    HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of V, sequences times heads). BF covers F.

    y: v [B, S / G, T, V], or in reverse do [B, S, T, V]; out: o or dv [B, S, T, V]; states [B, S, NT, F, V]: before its
    chunk, or in reverse the gradient after it; first_state, final [N, S, F, V] float32.
    """
    o = tl.program_id(0) * BV + tl.arange(0, BV)
    n = (tl.program_id(1) // S).to(tl.int64)
    s = (tl.program_id(1) % S).to(tl.int64)
    if PACKED:
        b = n * 0
        lead = tl.load(offsets + n)
        count = tl.load(offsets + n + 1) - lead
    else:
        b = n
        lead = 0
        count = NT
    f = tl.arange(0, BF)
    rows = tl.arange(0, C)
    in_f, in_o = f < F, o < V
    in_tile = in_f[:, None] & in_o[None, :]
    cell = f[:, None] * V + o[None, :]
    queries += (b * S + s) * T * F
    keys += (b * S + s) * T * F
    totals += (b * S + s) * NT * F
    scores += (b * S + s) * NT * C * C
    states += (b * S + s) * NT * F * V
    y += b * syb + (s if REVERSE else s // G) * syh
    out += b * sob + s * soh
    state = tl.zeros([BF, BV], tl.float32)
    if HAS_FIRST:
        base = first_state + n * sib + s * sih
        state = tl.load(base + f[:, None] * sif + o[None, :], mask=in_tile, other=0.0)
    for i in range(0, count):
        c = lead + (count - 1 - i if REVERSE else i)
        first, begin, end = chunk_span(c, table, T, C, False, PACKED)
        live = (first + rows >= begin) & (first + rows < end)
        in_y = live[:, None] & in_o[None, :]
        in_x = live[:, None] & in_f[None, :]
        at = rows[:, None] * F + f[None, :]
        kept = tl.exp2(tl.load(totals + c * F + f, mask=in_f, other=0.0))
        rounded = state.to(queries.dtype.element_ty)
        if KEEP:
            tl.store(states + tl.cast(c, tl.int64) * F * V + cell, rounded, mask=in_tile)
        state *= kept[:, None]
        yt = tl.load(y + first * syt + rows[:, None] * syt + o[None, :], mask=in_y, other=0.0)
        kf = tl.load(keys + first * F + at, mask=in_x, other=0.0)
        to = out + first * sot + rows[:, None] * sot + o[None, :]
        if REVERSE:
            qf = tl.load(queries + first * F + at, mask=in_x, other=0.0)
            pairs = tl.load(scores + tl.cast(c, tl.int64) * C * C + rows[:, None] * C + rows[None, :])
            made = tl.dot(kf, rounded, input_precision=PREC)
            made = tl.dot(tl.trans(pairs), yt, made, input_precision=PREC)
            state = tl.dot(tl.trans(qf), yt, state, input_precision=PREC)
            tl.store(to, made.to(out.dtype.element_ty), mask=in_y)
        else:
            state = tl.dot(tl.trans(kf), yt, state, input_precision=PREC)
            if OUT:
                qf = tl.load(queries + first * F + at, mask=in_x, other=0.0)
                pairs = tl.load(scores + tl.cast(c, tl.int64) * C * C + rows[:, None] * C + rows[None, :])
                made = tl.dot(qf, rounded, input_precision=PREC)
                made = tl.dot(pairs, yt, made, input_precision=PREC)
                tl.store(to, made.to(out.dtype.element_ty), mask=in_y)
    if HAS_FINAL:
        tl.store(final + (n * S + s) * F * V + cell, state, mask=in_tile)


Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _launch(plan, made, y, out, states, first, *, chunk, reverse, want_final):  # type: ignore[no-untyped-def]
    """One pass; `out` or `states` None where it is not wanted. Returns the last state, empty unless wanted."""
    queries, keys, totals, scores = made
    table, offsets, count = plan.chunks(chunk)
    programs = plan.sequences * plan.state_heads
    config = gated_states(plan.capability, plan.features, plan.values, y.dtype, programs=programs, reverse=reverse)
    shape = (plan.sequences, plan.state_heads, plan.features, plan.values)
    final = empty(shape if want_final else (0,), dtype=torch.float32, device=y.device)
    start, to = (final if x is None else x for x in (first, out))
    states_kernel[-(-plan.values // config["BV"]), plan.sequences * plan.state_heads](
        queries, keys, y, totals, scores, first, to, final if states is None else states, final, table, offsets,
        *y.stride()[:3], *(to.stride()[:3] if out is not None else (0, 0, 0)),
        *(start.stride()[:3] if first is not None else (0, 0, 0)), plan.length, plan.state_heads, count,
        G=plan.state_heads // plan.kv_heads, F=plan.features, V=plan.values,
        BF=max(16, triton.next_power_of_2(plan.features)), C=chunk, REVERSE=reverse, OUT=out is not None,
        KEEP=states is not None, HAS_FIRST=first is not None, HAS_FINAL=want_final, PACKED=table is not None,
        PREC="ieee" if y.dtype == torch.float32 else "tf32", **config,
    )  # fmt: skip
    return final


def _rows(plan: Plan, like: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, heads, T, V] over memory [B, T, heads, V]."""
    shape = (plan.batch, plan.length, heads, plan.values)
    return empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)


def outputs(
    plan: Plan, made: Prepared, v: torch.Tensor, first: torch.Tensor | None, *, chunk: int, want_final: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, H, T, V] and the last state [N, S, F, V] (empty unless wanted)."""
    out = _rows(plan, v, plan.heads)
    return out, _launch(plan, made, v, out, None, first, chunk=chunk, reverse=False, want_final=want_final)


def both_states(
    plan: Plan,
    made: Prepared,
    v: torch.Tensor,
    d_out: torch.Tensor,
    first: torch.Tensor | None,
    d_final: torch.Tensor | None,
    *,
    chunk: int,
    want_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """States before and their gradients after every chunk [B, S, NT, F, V] in v's dtype, dv [B, HK, T, V], and the
    first state's gradient [N, S, F, V] (empty unless wanted).
    """
    shape = (plan.batch, plan.state_heads, plan.chunks(chunk)[2], plan.features, plan.values)
    states, d_states = (empty(shape, dtype=v.dtype, device=v.device) for _ in range(2))
    _launch(plan, made, v, None, states, first, chunk=chunk, reverse=False, want_final=False)
    dv = _rows(plan, v, plan.state_heads)
    d_first = _launch(plan, made, d_out, dv, d_states, d_final, chunk=chunk, reverse=True, want_final=want_first)
    if plan.state_heads > plan.kv_heads:
        dv = dv.unflatten(1, (plan.kv_heads, -1)).sum(2)
    return states, d_states, dv, d_first


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    chunk = gated_chunk(arch, 128, 128, torch.bfloat16, "channel", backward=False)
    for label, reverse, out in (("outputs", False, True), ("states", False, False), ("reverse", True, True)):
        config = gated_states(arch, 128, 128, torch.bfloat16, programs=512, reverse=reverse)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            G=1, F=128, V=128, BF=128, C=chunk, REVERSE=reverse, OUT=out, KEEP=reverse or not out,
            HAS_FIRST=False, HAS_FINAL=False, PACKED=False, PREC="tf32", first_state=None, table=None, offsets=None,
            **config,
        )  # fmt: skip
        pointers = dict.fromkeys(("queries", "keys", "y", "scores", "out", "states"), "*bf16")
        pointers |= {"totals": "*fp32", "final": "*fp32"}
        cases.append((states_kernel, gate_signature(states_kernel, pointers, constants), constants, options, label))
    return cases
