"""Launches of the kernels of window + linear gradients. Import this only where Triton is installed."""

from __future__ import annotations

import torch

from .backend import empty
from .compiled import start
from .window_linear_far_triton import far_keys_kernel
from .window_linear_inputs import (
    Inputs,
    Maybe,
    bound,
    cut_of,
    even,
    features_of,
    gradient,
    grid_blocks,
    heads_last,
    near_strides,
    sizes,
    strides,
    team_of,
    tuned,
)
from .window_linear_keys_triton import key_pairs_kernel, value_states_kernel
from .window_linear_maps_triton import key_maps_kernel, query_maps_kernel, weight_grad_kernel
from .window_linear_plan import Plan, cover
from .window_linear_queries_triton import query_pairs_kernel
from .window_linear_sinks_triton import sink_pairs_kernel
from .window_linear_tiles import LOG2E, MAP_CODES, MIX_CODES


def query_maps(
    plan: Plan, x: Inputs, states: torch.Tensor, masses: torch.Tensor, grad: torch.Tensor, out: torch.Tensor,
    peak: torch.Tensor, total: torch.Tensor, *, alone: bool,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What query_maps_kernel writes: dy [B, H, T, F] and the rows' numbers [B, H, T], by name.

    For the maps `alone`, and gamma, there is no shift, and `row` is summed over blocks, [H, G].
    """
    rows = (plan.batch, plan.heads, plan.tokens)
    summed = alone and plan.window > 0 and plan.mix == "shared"
    names = ("scale", "mass") if summed else ("scale", "mass", "row", "shift")
    fresh: dict[str, torch.Tensor] = dict(zip(names, gradient(plan, x, (len(names), *rows), torch.float32).unbind(0)))
    if summed:
        fresh["row"] = gradient(plan, x, (plan.heads, grid_blocks(plan, x)), torch.float32)
    made = gradient(plan, x, (*rows, plan.width), x.q.dtype)
    laid, cut = out.transpose(1, 2), cut_of(plan, x)
    start(x.found, query_maps_kernel, grid_blocks(plan, x) * plan.heads, (
        x.xq, x.xk, x.v, grad, laid, x.q_weight, x.q_bias, x.k_weight, x.k_bias, states, masses, x.near, peak, total,
        made, fresh["scale"], fresh["mass"], fresh["row"], fresh.get("shift"), x.blocks,
        *strides(x.xq), *strides(x.xk), *strides(x.v), *strides(grad), laid.stride(0), laid.stride(1),
        *near_strides(x), plan.tokens, plan.blocks, *cut, plan.heads, plan.window_weight,
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
    made = gradient(plan, x, (plan.batch, plan.state_heads, plan.tokens, plan.width), x.q.dtype)
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
    made = gradient(plan, x, (plan.batch, plan.state_heads, plan.tokens, plan.width), x.q.dtype)
    sharing = plan.state_heads // plan.key_heads
    team = sharing if values else team_of(plan, x, sharing)
    dv = heads_last(plan, x, plan.key_heads) if values else None
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
    dq = heads_last(plan, x, plan.heads)
    shape, device = (plan.batch, plan.heads, plan.tokens), x.q.device
    rows = dict(rows)
    rows["level"] = empty(shape, dtype=torch.float32, device=device)
    rows["pick"] = empty(shape, dtype=torch.int32, device=device)
    rows.setdefault("shift", empty(shape, dtype=torch.float32, device=device))
    if plan.mix != "sum" and plan.map != "none" and plan.window:
        rows["far"] = gradient(plan, x, shape, torch.float32)
    table = tuned(plan, x.q, "queries", bounded=plan.softcap is not None)
    slices = -(-plan.channels // table["BN"])
    codes = {name: value for name, value in features_of(plan).items() if name != "PARTS"}
    team = team_of(plan, x, plan.heads // plan.key_heads)
    start(x.found, query_pairs_kernel, grid_blocks(plan, x) * plan.heads // team * slices, (
        x.q, x.k, x.v, grad, rows.get("dy"), x.q_weight, x.near, x.sink_k, x.sink_v,
        peak, d_peak, rows.get("row"), rows["shift"], rows["pick"], rows.get("far"), rows["level"], dq, x.blocks,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), *near_strides(x), dq.stride(0), dq.stride(1),
        *strides(x.sink_k), *strides(x.sink_v),
        plan.tokens, plan.blocks, plan.heads, plan.scale * LOG2E.value, plan.window_weight, plan.sinks,
    ), {
        **sizes(plan), **codes, "WINDOW": plan.window > 0, "MIX": MIX_CODES[plan.mix],
        "KEYS": plan.heads // plan.key_heads, "BZ": cover(plan.sinks) if plan.sinks else 0,
        "TEAM": team, "BOUND": bound(plan), "EVEN": even(plan, x) and plan.mix != "shared" and plan.softcap is None,
        "TABLE": x.blocks is not None, **table,
    })  # fmt: skip
    if plan.mix == "shared" and "far" in rows:
        rows["row"] = rows["far"]
    return dq.transpose(1, 2), rows


def key_pairs(
    plan: Plan, x: Inputs, grad: torch.Tensor, states: Maybe, made: Maybe, rows: dict[str, torch.Tensor],
    dv: Maybe = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dk and dv [B, HK, T, D]; `states` are the gradients of the states, `made` the keys' dy, dv what far_keys gave."""
    dk = heads_last(plan, x, plan.key_heads)
    codes, states_each = features_of(plan), plan.heads // plan.state_heads
    shared = sizes(plan) | {
        "KEYS": plan.heads // plan.key_heads, "STATES": states_each, "TABLE": x.blocks is not None,
    }  # fmt: skip
    ends = (dk.stride(0), dk.stride(1), plan.tokens, plan.blocks)
    if dv is None:
        dv = heads_last(plan, x, plan.key_heads)
        if plan.map != "none":
            table = tuned(plan, x.q, "values")
            slices, cut = -(-plan.channels // table["BN"]), cut_of(plan, x)
            start(x.found, value_states_kernel, grid_blocks(plan, x) * plan.key_heads * slices, (
                x.k, x.xq, x.xk, grad, x.q_weight, x.q_bias, x.k_weight, x.k_bias, states, rows.get("scale"), dv,
                x.blocks, *strides(x.k), *strides(x.xq), *strides(x.xk), *strides(grad), *ends, *cut, plan.key_heads,
                plan.sinks if plan.lag == 2 else 0,
            ), {**shared, **codes, "LAG": plan.lag, "CUT": cut[1] > 1, **table})  # fmt: skip
    table = tuned(plan, x.q, "keys", even=even(plan, x), bounded=plan.softcap is not None)
    slices = -(-plan.channels // table["BN"])
    start(x.found, key_pairs_kernel, grid_blocks(plan, x) * plan.key_heads * slices, (
        x.q, x.k, x.v, grad, made, x.k_weight,
        rows.get("level"), rows.get("row"), rows.get("shift"), rows.get("pick"), dk, dv, x.blocks,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), *ends, plan.key_heads,
        plan.scale * LOG2E.value,
    ), {
        **shared, **{name: codes[name] for name in ("F", "BF", "MAP")}, "WINDOW": plan.window > 0,
        "MIX": MIX_CODES[plan.mix], "BOUND": bound(plan), "EVEN": even(plan, x), **table,
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
    table = tuned(plan, x.q, "queries", bounded=plan.softcap is not None)
    slices = -(-plan.channels // table["BN"])
    start(x.found, sink_pairs_kernel, x.count * pieces * plan.heads * slices, (
        x.q, grad, x.sink_k, x.sink_v, rows["level"], rows.get("row"), rows["shift"], rows["pick"], dk, dv, x.sequences,
        *strides(x.q), *strides(grad), *strides(x.sink_k), *strides(x.sink_v),
        plan.tokens, plan.heads, pieces, each, plan.scale * LOG2E.value, plan.sinks,
    ), {
        **sizes(plan), "MAP": MAP_CODES[plan.map], "MIX": MIX_CODES[plan.mix],
        "KEYS": plan.heads // plan.key_heads, "BZ": rows_z, "BOUND": bound(plan), "TABLE": x.sequences is not None,
        **table,
    })  # fmt: skip
    summed = (y.sum(1).unflatten(1, (plan.key_heads, -1)).sum(2)[:, :, : plan.sinks] for y in (dk, dv))
    return tuple(summed)  # type: ignore[return-value]
