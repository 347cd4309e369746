"""The state of gated linear attention at every chunk boundary, forwards, and its gradient, backwards.

    forwards   S_{c+1} = e^{G_last} S_c + sum_j e^{G_last - G_j} k_j v_j^T        stored: S_c, before chunk c
    backwards  dS_c = e^{G_last} dS_{c+1} + sum_i e^{G_i} q_i do_i^T              stored: dS_{c+1}, after chunk c

G is the running sum of log decays inside the chunk. Both directions are one kernel: rows x (k or q) and y (v or do) of
a chunk, a weight for each row, and the decay of the whole chunk. A vector z beside the matrix carries the denominator:
the same sum with 1, or with the denominator's gradient, in place of y.

Under a lag the readers of S_c are the queries of the chunk after c. An empty chunk put before the first gives those of
the first chunk a state to read.

Where heads and tiles are too few to fill a GPU, the chunks are cut into segments: a first pass finds what each segment
adds, a second starts each segment from the sum of those before it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .backend import empty
from .gated_plan import Plan, gate_signature
from .gated_tiles import LOG2E, channel_total, chunk_span, row_decay
from .tuning import gated_chunk, gated_scan


@triton.jit(do_not_specialize=["T", "S", "NT", "SEG"])
def scan_kernel(
    x, y, g, factor, extra, first_state, states, z_states, totals, z_totals, log_totals, final,
    table, offsets,
    sxb, sxh, sxt, syb, syh, syt, sgb, sgh, sgt, sib, sih, sif, scale, T, S, NT, SEG,
    R: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, NORM: tl.constexpr, LAG: tl.constexpr,
    TOTALS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_FINAL: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of F times tiles of V, segments, sequences times state heads).

    x [B, S R, T, F]; y [B, ., T, V]; g log decays, or with DECAY "channel" their running sums [B, S, T, F]; factor,
    extra [B, S R, T]: backwards, weights of rows in S and in z; states [B, S, NT, F, V], z_states [B, S, NT, F];
    totals [N, S, SEG, F, V], z_totals, log_totals [N, S, SEG, F].
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
    gone = tl.zeros([BF], tl.float32)  # log decay of this segment
    if not TOTALS:
        if HAS_FIRST:
            base = first_state + n * sib + s * sih
            state = tl.load(base + f[:, None] * sif + o[None, :], mask=in_tile, other=0.0)
            if NORM:
                z = tl.load(base + f * sif + V, mask=in_f, other=0.0)
        for before in range(0, seg):
            slot = (n * S + s) * SEG + before
            kept = tl.exp2(tl.load(log_totals + slot * F + f, mask=in_f, other=0.0))
            state = state * kept[:, None] + tl.load(totals + slot * F * V + tile, mask=in_tile, other=0.0)
            if NORM:
                z = z * kept + tl.load(z_totals + slot * F + f, mask=in_f, other=0.0)

    rows = tl.arange(0, C)
    g_base = b * sgb + s * sgh
    for i in range(low * R, high * R):
        r = i % R
        c = lead + (count - 1 - i // R if REVERSE else i // R)
        first, begin, end = chunk_span(c, table, T, C, LAG, PACKED)
        t = first + rows
        live = (t >= begin) & (t < end)
        if not TOTALS:  # noqa: SIM102 (known when compiled, and then not)
            if r == 0:
                slot = (b * S + s) * NT + c
                tl.store(states + slot * F * V + tile, state.to(states.dtype.element_ty), mask=in_tile)
                if NORM:
                    tl.store(z_states + slot * F + f, z, mask=own_z)

        if DECAY == "channel":
            total = channel_total(g, g_base, first, begin, end, sgt, f, in_f, C)
        else:
            running, total = row_decay(g, g_base, sgt, t, live, C, DECAY)
        if DECAY != "none":
            spent = tl.where(r == 0, total, 0.0)  # once a chunk, not once a query head
            gone += spent
            kept = tl.exp2(spent)
            z = z * kept
            state = state * (kept[:, None] if DECAY == "channel" else kept)
        if REVERSE and LAG:
            first += C
            t = first + rows
            live = (t >= begin) & (t < end)
            if DECAY != "channel":
                running, _ = row_decay(g, g_base, sgt, t, live, C, DECAY)

        x_head = x + b * sxb + (s * R + r) * sxh
        y_head = y + b * syb + ((s * R + r) if REVERSE else (s // G)) * syh
        in_x = live[None, :] & in_f[:, None]
        xt = tl.load(x_head + first * sxt + rows[None, :] * sxt + f[:, None], mask=in_x, other=0.0).to(tl.float32)
        yt = tl.load(
            y_head + first * syt + rows[:, None] * syt + o[None, :], mask=live[:, None] & in_o[None, :], other=0.0
        )
        if DECAY == "channel":
            sums = tl.load(g + g_base + first * sgt + rows[None, :] * sgt + f[:, None], mask=in_x, other=0.0) * LOG2E
            exponent = sums if REVERSE else total[:, None] - sums
            if REVERSE and LAG:
                exponent += total[:, None]
            weighted = xt * tl.exp2(exponent)
        else:
            exponent = running if REVERSE else total - running
            if REVERSE and LAG:
                exponent += total
            weighted = xt * tl.exp2(exponent)[None, :]
        if NORM:
            at = (b * S * R + s * R + r) * T + t
            if REVERSE:
                z += tl.sum(weighted * tl.load(extra + at, mask=live, other=0.0)[None, :], 1)
                weighted = weighted * tl.load(factor + at, mask=live, other=0.0)[None, :]
            else:
                z += tl.sum(weighted, 1)
        elif REVERSE:
            weighted = weighted * scale
        state = tl.dot(weighted.to(yt.dtype), yt, state, input_precision=PREC)

    if TOTALS:
        slot = (n * S + s) * SEG + seg
        tl.store(totals + slot * F * V + tile, state, mask=in_tile)
        tl.store(log_totals + slot * F + f, gone, mask=own_z)
        if NORM:
            tl.store(z_totals + slot * F + f, z, mask=own_z)
    elif HAS_FINAL:  # noqa: SIM102
        if seg == SEG - 1:
            base = final + (n * S + s) * F * (V + NORM)
            tl.store(base + f[:, None] * (V + NORM) + o[None, :], state, mask=in_tile)
            if NORM:
                tl.store(base + f * (V + NORM) + V, z, mask=own_z)


def scan(
    plan: Plan,
    x: torch.Tensor,
    y: torch.Tensor,
    g: torch.Tensor | None,
    first: torch.Tensor | None,
    *,
    chunk: int,
    reverse: bool,
    want_final: bool,
    factor: torch.Tensor | None = None,
    extra: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States at chunk boundaries.

    Args:
        plan: sizes of the op.
        x: k [B, S, T, F], or q [B, H, T, F] in reverse; y: v [B, HK, T, V], or the output's gradient [B, H, T, V].
        g: log decay as `plan.decay` says; running sums inside chunks where it is per channel.
        first: the state to start from [N, S, F, V (+ 1)], or None.
        factor, extra: float32 [B, H, T]: in reverse and with a denominator, weights of the rows in S and in z.

    Returns:
        states [B, S, NT, F, V], z [B, S, NT, F] (empty without a denominator) and the last state (empty unless wanted).
    """
    table, offsets, count = plan.chunks(chunk)
    config = gated_scan(plan.capability, plan.features, plan.values, x.dtype, plan.decay)
    f_size, v_size = config["BF"], config["BV"]
    sequences, norm = plan.sequences, plan.norm
    device, precise = x.device, torch.float32
    tiles = -(-plan.features // f_size) * -(-plan.values // v_size)
    segments = plan.segments(tiles * sequences * plan.state_heads, count)

    def made(*shape: int, dtype: torch.dtype = precise) -> torch.Tensor:
        return empty(shape, dtype=dtype, device=device)

    sizes = (plan.batch, plan.state_heads, count, plan.features)
    states = made(*sizes, plan.values, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else precise)
    z_states = made(*sizes) if norm else states.new_empty(0, dtype=precise)
    final_shape = (sequences, plan.state_heads, plan.features, plan.values + norm)
    final = made(*final_shape) if want_final else made(0)
    totals = z_totals = log_totals = final
    if segments > 1:
        log_totals = made(sequences, plan.state_heads, segments, plan.features)
        totals = made(*log_totals.shape, plan.values)
        z_totals = made(*log_totals.shape) if norm else final
    options: dict[str, Any] = dict(
        R=plan.readers if reverse else 1,
        G=plan.state_heads // plan.kv_heads,
        F=plan.features,
        V=plan.values,
        C=chunk,
        DECAY=plan.decay,
        REVERSE=reverse,
        NORM=norm,
        LAG=plan.lag,
        HAS_FIRST=first is not None,
        HAS_FINAL=want_final,
        PACKED=table is not None,
        PREC="ieee" if x.dtype == torch.float32 else "tf32",
        **config,
    )
    start = x if first is None else first
    arguments = (
        x, y, g, factor, extra, first, states, z_states, totals, z_totals, log_totals, final,
        table, offsets,
        *x.stride()[:3], *y.stride()[:3], *plan.decay_strides(g), *start.stride()[:3],
        plan.scale, plan.length, plan.state_heads, count, segments,
    )  # fmt: skip
    heads = sequences * plan.state_heads
    if segments > 1:
        scan_kernel[(tiles, segments - 1, heads)](*arguments, TOTALS=True, **options)
    scan_kernel[(tiles, segments, heads)](*arguments, TOTALS=False, **options)
    return states, z_states, final


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for features, values, decay, reverse in (
        (128, 128, "scalar", False),
        (128, 128, "scalar", True),
        (128, 128, "channel", False),
        (2048, 128, "scalar", False),
        (2048, 128, "scalar", True),
        (2048, 64, "scalar", True),
    ):
        config = gated_scan(arch, features, values, torch.bfloat16, decay)
        chunk = gated_chunk(arch, features, values, torch.bfloat16, decay, backward=reverse)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        constants: dict[str, Any] = dict(
            R=1, G=1, F=features, V=values, C=chunk, DECAY=decay, REVERSE=reverse, NORM=True, LAG=False, TOTALS=False,
            HAS_FIRST=False, HAS_FINAL=False, PACKED=False, PREC="tf32", first_state=None, table=None, offsets=None,
            **config,
        )  # fmt: skip
        pointers = {"x": "*bf16", "y": "*bf16", "states": "*bf16"}
        names = ("g", "factor", "extra", "z_states", "totals", "z_totals", "log_totals", "final")
        pointers |= dict.fromkeys(names, "*fp32")
        signature = gate_signature(scan_kernel, pointers, constants)
        cases.append((scan_kernel, signature, constants, options, f"{decay} F {features} V {values} reverse {reverse}"))
    return cases
