"""Launches of the window + linear kernels: the scan, of both passes, and what queries read.

Import this only where Triton is installed.
"""

from __future__ import annotations

import torch

from . import window_linear_tuning as tuning
from .backend import empty
from .compiled import start
from .tuning import capability
from .window_linear_inputs import (
    Inputs,
    Maybe,
    bound,
    cut_of,
    even,
    features_of,
    grid_blocks,
    near_strides,
    sizes,
    strides,
    team_of,
    tuned,
)
from .window_linear_plan import Plan, cover
from .window_linear_read_triton import read_kernel
from .window_linear_scan_triton import join_kernel, scan_kernel
from .window_linear_tiles import LOG2E, MIX_CODES


def scan(
    plan: Plan, x: Inputs, *, grad: Maybe = None, row_scale: Maybe = None, row_mass: Maybe = None, last: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Maybe, Maybe]:
    """States [G, S, parts, D, BF] and masses [G, S, parts, BF] at every block; with `grad` their gradients.

    Of a scan in segments they are the segment's own, and N SEGMENTS rows follow: what each began with. Also the state
    and mass after everything that left the window [N, S, parts, D, BF], float32, if `last`.
    """
    backwards = grad is not None
    group = plan.heads // plan.state_heads if backwards else 1
    source, written = (x.xq, grad) if backwards else (x.xk, x.v)
    weight, bias = (x.q_weight, x.q_bias) if backwards else (x.k_weight, x.k_bias)
    assert written is not None
    own_heads = plan.map == "precomputed"
    table = tuned(plan, x.q, "scan")
    slices = -(-plan.channels // table["BV"])
    shape = (plan.state_heads, plan.parts, plan.channels, plan.tile)
    device, single = x.q.device, torch.float32
    base, segments, each = cut_of(plan, x)
    cut = segments > 1
    rows = base + x.count * segments * cut
    states = empty((rows, *shape), dtype=x.q.dtype, device=device)
    masses = empty((rows, *shape[:2], plan.tile), dtype=single, device=device)
    ends: tuple[Maybe, ...] = (None, None)
    if last:
        ends = tuple(empty((x.count, *size), dtype=single, device=device) for size in (shape, (*shape[:2], plan.tile)))
    first = first_mass = None
    if x.first is not None and not backwards:
        first, first_mass = _unpacked(plan, x.first)
    parts: tuple[Maybe, ...] = (None, None)
    if cut:
        held = x.count * segments
        parts = tuple(empty((held, *size), dtype=single, device=device) for size in (shape, (*shape[:2], plan.tile)))
    traits = {"BACKWARDS": backwards, "LAST": last, "TABLE": x.sequences is not None, "LAG": plan.lag}
    start(x.found, scan_kernel, x.count * segments * plan.state_heads * plan.parts * slices, (
        source, written, weight, bias, row_scale, row_mass, first, first_mass, *parts,
        states, masses, *ends, x.sequences, *strides(source), *strides(written),
        plan.tokens, plan.blocks, segments, each, plan.state_heads, plan.heads,
        0 if backwards or plan.lag == 1 else plan.sinks,
    ), {
        **sizes(plan), **features_of(plan), "SHARING": 1 if own_heads else plan.state_heads // plan.key_heads,
        "V_SHARING": plan.state_heads // plan.key_heads, "GROUP": group, "CUT": cut, "FIRST": first is not None,
        "EVEN": even(plan, x) and not plan.sinks, **traits, **table,
    })  # fmt: skip
    if cut:
        table = tuning.window_linear_join(capability(device), plan.channels)
        tiles = plan.state_heads * plan.parts
        start(x.found, join_kernel, x.count * tiles * -(-plan.channels // table["BV"]), (
            *parts, states, masses, *ends, x.sequences, plan.tokens, base, segments, each,
        ), {"D": plan.channels, "BF": plan.tile, "C": plan.chunk, "TILES": tiles, **traits, **table})  # fmt: skip
    return states, masses, ends[0], ends[1]


def read(
    plan: Plan, x: Inputs, states: Maybe, masses: Maybe, *, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, H, T, D] over memory [B, T, H, D]; peak and total [B, H, T] float32.

    Empty where nothing reads them: both unless a way back is to be kept, but that of the window alone is its log-sum.
    """
    shape = (plan.batch, plan.tokens, plan.heads, plan.channels)
    if x.sequences is None:
        out = empty(shape, dtype=x.q.dtype, device=x.q.device)
    else:
        out = torch.zeros(shape, dtype=x.q.dtype, device=x.q.device)  # padding stays zero
    peak = total = None
    rows = (plan.batch, plan.heads, plan.tokens)
    if keep or plan.map == "none":
        peak = empty(rows, dtype=torch.float32, device=x.q.device)
    if keep and plan.map != "none":
        total = empty(rows, dtype=torch.float32, device=x.q.device)
    table = tuned(plan, x.q, "read")
    slices = -(-plan.channels // table["BV"])
    team = team_of(plan, x, plan.heads // plan.key_heads)
    cut = cut_of(plan, x) if states is not None else (0, 1, 1)
    start(x.found, read_kernel, grid_blocks(plan, x) * plan.heads // team * slices, (
        x.q, x.k, x.v, x.xq, x.xk, x.q_weight, x.q_bias, x.k_weight, x.k_bias,
        states, masses, x.near, x.sink_k, x.sink_v, out, peak, total, x.blocks,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(x.xq), *strides(x.xk), *near_strides(x),
        out.stride(0), out.stride(1), *strides(x.sink_k), *strides(x.sink_v),
        plan.tokens, plan.blocks, *cut, plan.heads, plan.scale * LOG2E.value, plan.window_weight, plan.sinks,
    ), {
        **sizes(plan), **features_of(plan), "LAG": plan.lag, "WINDOW": plan.window > 0, "MIX": MIX_CODES[plan.mix],
        "OWN": plan.own, "KEYS": plan.heads // plan.key_heads, "STATES": plan.heads // plan.state_heads,
        "BZ": cover(plan.sinks) if plan.sinks else 0, "TEAM": team, "CUT": cut[1] > 1,
        "BOUND": bound(plan), "EVEN": even(plan, x), "TABLE": x.blocks is not None, **table,
    }, tag="kept" if keep else "")  # fmt: skip
    peak, total = (out.new_empty(0, dtype=torch.float32) if y is None else y for y in (peak, total))
    return out.transpose(1, 2), peak, total


def packed_state(plan: Plan, state: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """[N, S, parts, D, BF] and [N, S, parts, BF] -> [N, S, features, D + 1], as the cache keeps it: mass last."""
    both = torch.cat((state.transpose(-1, -2), mass.unsqueeze(-1)), dim=-1)
    if plan.parts == 2 and plan.map != "precomputed":
        both = both[:, :, :, : plan.width]
    return both.flatten(2, 3)[:, :, : plan.features].contiguous()


def _unpacked(plan: Plan, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The other way."""
    state = state.float()
    if plan.parts == 2 and plan.map != "precomputed":
        state = state.unflatten(2, (2, plan.width))
    else:
        missing = plan.parts * plan.tile - plan.features
        state = torch.nn.functional.pad(state, (0, 0, 0, missing)).unflatten(2, (plan.parts, plan.tile))
    state = torch.nn.functional.pad(state, (0, 0, 0, plan.tile - state.shape[3]))
    return state[..., :-1].transpose(-1, -2).contiguous(), state[..., -1].contiguous()
