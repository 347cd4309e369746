"""Launches of the window + linear kernels: grids, strides, buffers. Import this only where Triton is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from . import window_linear_tuning as tuning
from .backend import empty
from .compiled import Found, start
from .tuning import capability
from .window_linear_far_triton import far_keys_kernel
from .window_linear_keys_triton import key_pairs_kernel, value_states_kernel
from .window_linear_maps_triton import key_maps_kernel, query_maps_kernel, weight_grad_kernel
from .window_linear_plan import Plan, cover
from .window_linear_queries_triton import query_pairs_kernel
from .window_linear_read_triton import read_kernel
from .window_linear_scan_triton import join_kernel, scan_kernel
from .window_linear_sinks_triton import sink_pairs_kernel
from .window_linear_tiles import LOG2E, MAP_CODES, MIX_CODES

LN2 = 0.6931471805599453
Maybe = torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of a call, as the kernels read them: weights in the data's dtype, features or q and k as `xq`, `xk`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    xq: torch.Tensor
    xk: torch.Tensor
    q_weight: Maybe
    k_weight: Maybe
    q_bias: Maybe
    k_bias: Maybe
    near: Maybe
    """gamma [H], gate or mass [B, H, T]."""
    sink_k: Maybe
    sink_v: Maybe
    first: Maybe
    sequences: Maybe
    blocks: Maybe
    found: Found | None = None
    """Machine code of the kernels for such inputs."""

    @property
    def count(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.sequences is None else self.sequences.shape[0]


def strides(x: Maybe, size: int = 3) -> tuple[int, ...]:
    """The first `size` strides; zeros without a tensor."""
    return (0,) * size if x is None else tuple(x.stride()[:size])


def grid_blocks(plan: Plan, x: Inputs) -> int:
    """Blocks of all sequences, or as many as there could be."""
    return plan.batch * plan.blocks if x.blocks is None else x.blocks.shape[0]


def even(plan: Plan, x: Inputs) -> bool:
    """Whether every sequence has whole blocks: then all rows of a tile are there, or none."""
    return x.blocks is None and plan.tokens % plan.chunk == 0


@lru_cache(256)
def sizes(plan: Plan) -> dict[str, int]:
    """The constants that every kernel takes; not to be changed."""
    return {"D": plan.channels, "BD": cover(plan.channels), "C": plan.chunk}


@lru_cache(256)
def features_of(plan: Plan) -> dict[str, int]:
    """The constants of a kernel that makes features; not to be changed."""
    return {"F": plan.width or 16, "BF": plan.tile, "PARTS": plan.parts, "MAP": MAP_CODES[plan.map]}


def tuned(plan: Plan, x: torch.Tensor, name: str, **more: bool) -> dict[str, int]:
    """This op's row of the tuning table."""
    look_up = getattr(tuning, f"window_linear_{name}")
    found: dict[str, int] = look_up(capability(x.device), plan.channels, plan.tile, plan.chunk, x.dtype, **more)
    return found


def team_of(plan: Plan, x: Inputs, group: int) -> int:
    """Heads of one program, of `group` that read the same keys."""
    programs = grid_blocks(plan, x) * plan.key_heads
    found: int = tuning.window_linear_team(capability(x.q.device), programs, group, x.q.dtype)
    return found


def segments_of(plan: Plan, device: torch.device, dtype: torch.dtype, count: int) -> tuple[int, int]:
    """Into how many segments a scan over `count` sequences is cut, and blocks of each."""
    table = tuning.window_linear_scan(capability(device), plan.channels, plan.tile, plan.chunk, dtype)
    programs = count * plan.state_heads * plan.parts * -(-plan.channels // table["BV"])
    segments = tuning.window_linear_segments(capability(device), programs, plan.blocks)
    return segments, -(-(plan.blocks + 1) // segments)


def cut_of(plan: Plan, x: Inputs) -> tuple[int, int, int]:
    """What readers of states are told of the scan: row of the first segment's beginning, segments, blocks of each."""
    return grid_blocks(plan, x), *segments_of(plan, x.q.device, x.q.dtype, x.count)


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


def read(plan: Plan, x: Inputs, states: Maybe, masses: Maybe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, H, T, D] over memory [B, T, H, D]; peak and total [B, H, T] float32."""
    shape = (plan.batch, plan.tokens, plan.heads, plan.channels)
    if x.sequences is None:
        out = empty(shape, dtype=x.q.dtype, device=x.q.device)
    else:
        out = torch.zeros(shape, dtype=x.q.dtype, device=x.q.device)  # padding stays zero
    rows = (plan.batch, plan.heads, plan.tokens)
    peak, total = (empty(rows, dtype=torch.float32, device=x.q.device) for _ in range(2))
    table = tuned(plan, x.q, "read")
    slices = -(-plan.channels // table["BV"])
    team = team_of(plan, x, plan.heads // plan.key_heads)
    cut = cut_of(plan, x) if states is not None else (0, 1, 1)
    start(x.found, read_kernel, grid_blocks(plan, x) * plan.heads // team * slices, (
        x.q, x.k, x.v, x.xq, x.xk, x.q_weight, x.q_bias, x.k_weight, x.k_bias,
        states, masses, x.near, x.sink_k, x.sink_v, out, peak, total, x.blocks,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(x.xq), *strides(x.xk), *_near_strides(x),
        out.stride(0), out.stride(1), *strides(x.sink_k), *strides(x.sink_v),
        plan.tokens, plan.blocks, *cut, plan.heads, plan.scale * LOG2E.value, plan.window_weight, plan.sinks,
    ), {
        **sizes(plan), **features_of(plan), "LAG": plan.lag, "WINDOW": plan.window > 0, "MIX": MIX_CODES[plan.mix],
        "OWN": plan.own, "KEYS": plan.heads // plan.key_heads, "STATES": plan.heads // plan.state_heads,
        "BZ": cover(plan.sinks) if plan.sinks else 0, "TEAM": team, "CUT": cut[1] > 1,
        "EVEN": even(plan, x), "TABLE": x.blocks is not None, **table,
    })  # fmt: skip
    return out.transpose(1, 2), peak, total


def query_maps(
    plan: Plan, x: Inputs, states: torch.Tensor, masses: torch.Tensor, grad: torch.Tensor, out: torch.Tensor,
    peak: torch.Tensor, total: torch.Tensor, *, alone: bool,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What query_maps_kernel writes: dy [B, H, T, F] and the rows' numbers [B, H, T], by name."""
    rows = (plan.batch, plan.heads, plan.tokens)
    names = ("scale", "mass", "row", "shift")
    fresh = dict(zip(names, _gradient(plan, x, (len(names), *rows), torch.float32).unbind(0)))
    made = _gradient(plan, x, (*rows, plan.width), x.q.dtype)
    laid, cut = out.transpose(1, 2), cut_of(plan, x)
    start(x.found, query_maps_kernel, grid_blocks(plan, x) * plan.heads, (
        x.xq, x.xk, x.v, grad, laid, x.q_weight, x.q_bias, x.k_weight, x.k_bias, states, masses, x.near, peak, total,
        made, fresh["scale"], fresh["mass"], fresh["row"], fresh["shift"], x.blocks,
        *strides(x.xq), *strides(x.xk), *strides(x.v), *strides(grad), laid.stride(0), laid.stride(1),
        *_near_strides(x), plan.tokens, plan.blocks, *cut, plan.heads, plan.window_weight,
    ), {
        **sizes(plan), **features_of(plan), "LAG": plan.lag, "WINDOW": plan.window > 0, "MIX": MIX_CODES[plan.mix],
        "OWN": plan.own, "KEYS": plan.heads // plan.key_heads, "STATES": plan.heads // plan.state_heads, "ALONE": alone,
        "CUT": cut[1] > 1, "EVEN": even(plan, x), "TABLE": x.blocks is not None, **tuned(plan, x.q, "maps"),
    })  # fmt: skip
    return fresh | {"dy": made}


def key_maps(
    plan: Plan, x: Inputs, states: torch.Tensor, masses: torch.Tensor, grad: torch.Tensor,
    rows: dict[str, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """dy of the keys [B, S, T, F], from the gradients of the states."""
    made = _gradient(plan, x, (plan.batch, plan.state_heads, plan.tokens, plan.width), x.q.dtype)
    cut = cut_of(plan, x)
    start(x.found, key_maps_kernel, grid_blocks(plan, x) * plan.state_heads, (
        x.xq, x.xk, x.v, grad, x.q_weight, x.q_bias, x.k_weight, x.k_bias, states, masses, rows["scale"], rows["mass"],
        made, x.blocks, *strides(x.xq), *strides(x.xk), *strides(x.v), *strides(grad),
        plan.tokens, plan.blocks, *cut, plan.state_heads, plan.sinks if plan.lag == 2 else 0,
    ), {
        **sizes(plan), **features_of(plan), "LAG": plan.lag, "SHARING": plan.state_heads // plan.key_heads,
        "STATES": plan.heads // plan.state_heads, "CUT": cut[1] > 1, "TABLE": x.blocks is not None,
        **tuned(plan, x.q, "maps"),
    })  # fmt: skip
    return made


def far_keys(
    plan: Plan, x: Inputs, states: torch.Tensor, masses: torch.Tensor, *, values: bool
) -> tuple[torch.Tensor, Maybe]:  # fmt: skip
    """dy of the keys [B, S, T, F] and, with `values`, the linear branch's part of dv [B, T, HK, D]; lag 2 alone."""
    made = _gradient(plan, x, (plan.batch, plan.state_heads, plan.tokens, plan.width), x.q.dtype)
    sharing = plan.state_heads // plan.key_heads
    team = sharing if values else team_of(plan, x, sharing)
    dv = _heads_last(plan, x, plan.key_heads) if values else None
    cut = cut_of(plan, x)
    start(x.found, far_keys_kernel, grid_blocks(plan, x) * plan.state_heads // team, (
        x.xk, x.v, x.k_weight, x.k_bias, states, masses, made, dv, x.blocks, *strides(x.xk), *strides(x.v),
        *((0, 0) if dv is None else dv.stride()[:2]), plan.tokens, plan.blocks, *cut, plan.state_heads, plan.sinks,
    ), {
        **sizes(plan), **features_of(plan), "SHARING": sharing, "TEAM": team, "VALUES": values,
        "CUT": cut[1] > 1, "EVEN": even(plan, x), "TABLE": x.blocks is not None,
        **tuned(plan, x.q, "far", alone=even(plan, x) and not values),
    })  # fmt: skip
    return made, dv


def weight_grads(
    plan: Plan, x: Inputs, source: torch.Tensor, made: torch.Tensor, bias: Maybe
) -> tuple[torch.Tensor, Maybe]:
    """Gradients of a map's weight [heads, D, F] and bias [heads, F], float32."""
    heads, count = made.shape[1], grid_blocks(plan, x)
    pieces = max(1, min(count, 4 * 132 // heads))
    each = -(-count // pieces)
    pieces = -(-count // each)
    device = x.q.device
    grads = empty((pieces, heads, plan.channels, plan.width), dtype=torch.float32, device=device)
    sums = None if bias is None else empty((pieces, heads, plan.width), dtype=torch.float32, device=device)
    sized = {name: value for name, value in features_of(plan).items() if name in ("F", "BF")}
    start(x.found, weight_grad_kernel, pieces * heads, (
        source, made, grads, sums, x.blocks, *strides(source), plan.tokens, plan.blocks, heads, count, each,
    ), {
        **sizes(plan), **sized, "SHARING": heads // source.shape[1], "TABLE": x.blocks is not None,
        **tuned(plan, x.q, "weights"),
    }, tag="queries" if source is x.xq else "keys")  # fmt: skip
    return grads.sum(0), None if sums is None else sums.sum(0)


def query_pairs(
    plan: Plan, x: Inputs, grad: torch.Tensor, peak: torch.Tensor, d_peak: Maybe, rows: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """dq [B, H, T, D], and the rows' numbers that the keys' gradients need (`far`: of gate or mass)."""
    dq = _heads_last(plan, x, plan.heads)
    shape, device = (plan.batch, plan.heads, plan.tokens), x.q.device
    rows = dict(rows)
    rows["level"] = empty(shape, dtype=torch.float32, device=device)
    rows["pick"] = empty(shape, dtype=torch.int32, device=device)
    rows.setdefault("shift", empty(shape, dtype=torch.float32, device=device))
    if plan.mix != "sum" and plan.map != "none" and plan.window:
        rows["far"] = _gradient(plan, x, shape, torch.float32)
    table = tuned(plan, x.q, "queries")
    slices = -(-plan.channels // table["BN"])
    codes = {name: value for name, value in features_of(plan).items() if name != "PARTS"}
    team = team_of(plan, x, plan.heads // plan.key_heads)
    start(x.found, query_pairs_kernel, grid_blocks(plan, x) * plan.heads // team * slices, (
        x.q, x.k, x.v, grad, rows.get("dy"), x.q_weight, x.near, x.sink_k, x.sink_v,
        peak, d_peak, rows.get("row"), rows["shift"], rows["pick"], rows.get("far"), rows["level"], dq, x.blocks,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), *_near_strides(x), dq.stride(0), dq.stride(1),
        *strides(x.sink_k), *strides(x.sink_v),
        plan.tokens, plan.blocks, plan.heads, plan.scale * LOG2E.value, plan.window_weight, plan.sinks,
    ), {
        **sizes(plan), **codes, "WINDOW": plan.window > 0, "MIX": MIX_CODES[plan.mix],
        "KEYS": plan.heads // plan.key_heads, "BZ": cover(plan.sinks) if plan.sinks else 0,
        "TEAM": team, "EVEN": even(plan, x) and plan.mix != "shared", "TABLE": x.blocks is not None, **table,
    })  # fmt: skip
    if plan.mix == "shared" and "far" in rows:
        rows["row"] = rows["far"]
    return dq.transpose(1, 2), rows


def key_pairs(
    plan: Plan, x: Inputs, grad: torch.Tensor, states: Maybe, made: Maybe, rows: dict[str, torch.Tensor],
    dv: Maybe = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dk and dv [B, HK, T, D]; `states` are the gradients of the states, `made` the keys' dy, dv what far_keys gave."""
    dk = _heads_last(plan, x, plan.key_heads)
    codes, states_each = features_of(plan), plan.heads // plan.state_heads
    shared = sizes(plan) | {
        "KEYS": plan.heads // plan.key_heads, "STATES": states_each, "TABLE": x.blocks is not None,
    }  # fmt: skip
    ends = (dk.stride(0), dk.stride(1), plan.tokens, plan.blocks)
    if dv is None:
        dv = _heads_last(plan, x, plan.key_heads)
        if plan.map != "none":
            table = tuned(plan, x.q, "values")
            slices, cut = -(-plan.channels // table["BN"]), cut_of(plan, x)
            start(x.found, value_states_kernel, grid_blocks(plan, x) * plan.key_heads * slices, (
                x.k, x.xq, x.xk, grad, x.q_weight, x.q_bias, x.k_weight, x.k_bias, states, rows.get("scale"), dv,
                x.blocks, *strides(x.k), *strides(x.xq), *strides(x.xk), *strides(grad), *ends, *cut, plan.key_heads,
                plan.sinks if plan.lag == 2 else 0,
            ), {**shared, **codes, "LAG": plan.lag, "CUT": cut[1] > 1, **table})  # fmt: skip
    table = tuned(plan, x.q, "keys", even=even(plan, x))
    slices = -(-plan.channels // table["BN"])
    start(x.found, key_pairs_kernel, grid_blocks(plan, x) * plan.key_heads * slices, (
        x.q, x.k, x.v, grad, made, x.k_weight,
        rows.get("level"), rows.get("row"), rows.get("shift"), rows.get("pick"), dk, dv, x.blocks,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), *ends, plan.key_heads,
        plan.scale * LOG2E.value,
    ), {
        **shared, **{name: codes[name] for name in ("F", "BF", "MAP")}, "WINDOW": plan.window > 0,
        "MIX": MIX_CODES[plan.mix], "EVEN": even(plan, x), **table,
    })  # fmt: skip
    return dk.transpose(1, 2), dv.transpose(1, 2)


def sink_pairs(
    plan: Plan, x: Inputs, grad: torch.Tensor, rows: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the sinks' keys and values [N, HK, Z, D], float32."""
    pieces = max(1, min(plan.blocks, 2 * 132 // (x.count * plan.heads)))
    each = -(-plan.blocks // pieces)
    rows_z = cover(plan.sinks)
    shape = (x.count, pieces, plan.heads, rows_z, plan.channels)
    dk, dv = (empty(shape, dtype=torch.float32, device=x.q.device) for _ in range(2))
    assert x.sink_k is not None
    table = tuned(plan, x.q, "queries")
    slices = -(-plan.channels // table["BN"])
    start(x.found, sink_pairs_kernel, x.count * pieces * plan.heads * slices, (
        x.q, grad, x.sink_k, x.sink_v, rows["level"], rows.get("row"), rows["shift"], rows["pick"], dk, dv, x.sequences,
        *strides(x.q), *strides(grad), *strides(x.sink_k), *strides(x.sink_v),
        plan.tokens, plan.heads, pieces, each, plan.scale * LOG2E.value, plan.sinks,
    ), {
        **sizes(plan), "MAP": MAP_CODES[plan.map], "MIX": MIX_CODES[plan.mix],
        "KEYS": plan.heads // plan.key_heads, "BZ": rows_z, "TABLE": x.sequences is not None, **table,
    })  # fmt: skip
    summed = (y.sum(1).unflatten(1, (plan.key_heads, -1)).sum(2)[:, :, : plan.sinks] for y in (dk, dv))
    return tuple(summed)  # type: ignore[return-value]


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


def _near_strides(x: Inputs) -> tuple[int, ...]:
    return strides(x.near) if x.near is not None and x.near.ndim == 3 else (0, 0, 0)


def _gradient(plan: Plan, x: Inputs, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A gradient that a kernel writes for every token; zeros first where some tokens are padding."""
    if x.sequences is None:
        return empty(shape, dtype=dtype, device=x.q.device)
    return torch.zeros(shape, dtype=dtype, device=x.q.device)


def _heads_last(plan: Plan, x: Inputs, heads: int) -> torch.Tensor:
    return _gradient(plan, x, (plan.batch, plan.tokens, heads, plan.channels), x.q.dtype)
