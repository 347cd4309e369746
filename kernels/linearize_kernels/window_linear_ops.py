"""torch.library ops of window + linear attention: torch.compile sees one node forward and one backward.

Import this only where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch

from . import window_linear_backward as backwards
from . import window_linear_launch as launch
from . import window_linear_tuning as tuning
from .compiled import found_for
from .tuning import capability
from .window_linear_inputs import LN2, Inputs, segments_of
from .window_linear_plan import PROJECTED, Plan

Maybe = torch.Tensor | None
GIVEN = ("q", "k", "v", "q_weight", "k_weight", "q_bias", "k_bias", "fq", "fk", "near", "sink_k", "sink_v")
"""Inputs that have gradients, in the order of the op's arguments."""


def make_plan(
    q: torch.Tensor, k: torch.Tensor, k_weight: Maybe, fk: Maybe, state_heads: int, map: str, window: int, lag: int,
    mix: str, own: bool, scale: float, window_weight: float, sinks: int, softcap: float | None,
) -> Plan:  # fmt: skip
    """The plan of a call, from the op's arguments."""
    width = 0
    if map == "precomputed":
        assert fk is not None
        width = fk.shape[-1]
    elif map == "softmax":
        width = q.shape[-1]
    elif map in PROJECTED:
        assert k_weight is not None
        width = k_weight.shape[-1]
    return Plan(
        batch=q.shape[0], tokens=q.shape[2], heads=q.shape[1], key_heads=k.shape[1], state_heads=state_heads,
        channels=q.shape[3], width=width, map=map, window=window, lag=lag, mix=mix, own=own, scale=scale,
        window_weight=window_weight, sinks=sinks, softcap=softcap,
    )  # fmt: skip


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Channels beside each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _inputs(
    plan: Plan, tensors: dict[str, Maybe], first: Maybe, sequences: Maybe, blocks: Maybe, *gradients: Maybe
) -> Inputs:
    def kept(name: str, dtype: torch.dtype | None = None, whole: bool = False) -> Maybe:
        x = tensors[name]
        if x is None:
            return None
        x = x if dtype is None else x.to(dtype)
        return x.contiguous() if whole else _dense(x)

    q, k, v = (kept(name) for name in "qkv")
    assert q is not None and k is not None and v is not None
    given = plan.map == "precomputed"
    xq, xk = (kept("fq", q.dtype), kept("fk", q.dtype)) if given else (q, k)
    assert xq is not None and xk is not None
    near = tensors["near"]
    own: dict[str, Any] = {
        "q": q, "k": k, "v": v, "xq": xq, "xk": xk,
        "q_weight": kept("q_weight", q.dtype, True), "k_weight": kept("k_weight", q.dtype, True),
        "q_bias": kept("q_bias", torch.float32, True), "k_bias": kept("k_bias", torch.float32, True),
        "near": None if near is None else near.float(), "sink_k": kept("sink_k"), "sink_v": kept("sink_v"),
        "first": first, "sequences": sequences, "blocks": blocks,
    }  # fmt: skip
    return Inputs(**own, found=found_for(plan, *own.values(), *gradients))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None, k_bias: torch.Tensor | None, fq: torch.Tensor | None, fk: torch.Tensor | None,
    near: torch.Tensor | None, sink_k: torch.Tensor | None, sink_v: torch.Tensor | None, first: torch.Tensor | None,
    sequences: torch.Tensor | None, blocks: torch.Tensor | None, state_heads: int, map: str, window: int, lag: int,
    mix: str, own: bool, scale: float, window_weight: float, sinks: int, softcap: float | None,
    last: bool, keep: bool, maps_only: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out, peak, total, final state, states, masses; empty where they were not asked for (`last`, `keep`).

    What was not kept for a way back is computed again on it.
    """
    plan = make_plan(q, k, k_weight, fk, state_heads, map, window, lag, mix, own, scale, window_weight, sinks, softcap)
    x = _inputs(plan, dict(zip(GIVEN, _given(locals()))), first, sequences, blocks)
    states = masses = None
    final = q.new_empty(0, dtype=torch.float32)
    if map != "none":
        states, masses, last_state, last_mass = launch.scan(plan, x, last=last)
        if last_state is not None and last_mass is not None:
            final = launch.packed_state(plan, last_state, last_mass)
    out, peak, total = launch.read(plan, x, states, masses, keep=keep)
    if not keep or states is None or masses is None:
        states, masses = q.new_empty(0), q.new_empty(0, dtype=torch.float32)
    return out, peak, total, final, states, masses


def _given(names: dict[str, Any]) -> list[Maybe]:
    return [names[name] for name in GIVEN]


window_linear_op = torch.library.custom_op("linearize::window_linear", forward, mutates_args=())


@window_linear_op.register_fake
def _(q, k, v, q_weight, k_weight, q_bias, k_bias, fq, fk, near, sink_k, sink_v, first, sequences, blocks, state_heads,
      map, window, lag, mix, own, scale, window_weight, sinks, softcap, last, keep, maps_only):  # type: ignore[no-untyped-def]  # fmt: skip
    plan = make_plan(q, k, k_weight, fk, state_heads, map, window, lag, mix, own, scale, window_weight, sinks, softcap)
    batch, heads, tokens, channels = q.shape
    count = batch if sequences is None else sequences.shape[0]
    every = batch * plan.blocks if blocks is None else blocks.shape[0]
    kept, alone = (batch, heads, tokens), map == "none"
    final = (count, state_heads, plan.features, channels + 1) if last and map != "none" else (0,)
    tiles: tuple[int, ...] = (0,)
    if keep and map != "none":
        segments, _each = segments_of(plan, q.device, q.dtype, count)
        tiles = (every + count * segments * (segments > 1), state_heads, plan.parts, channels, plan.tile)
    return (
        q.new_empty((batch, tokens, heads, channels)).transpose(1, 2),
        q.new_empty(kept if keep or alone else 0, dtype=torch.float32),
        q.new_empty(kept if keep and not alone else 0, dtype=torch.float32),
        q.new_empty(final, dtype=torch.float32),
        q.new_empty(tiles),
        q.new_empty((*tiles[:3], tiles[4]) if len(tiles) > 1 else tiles, dtype=torch.float32),
    )


def backward(
    grad: torch.Tensor, d_peak: torch.Tensor | None, out: torch.Tensor, peak: torch.Tensor, total: torch.Tensor,
    states: torch.Tensor, masses: torch.Tensor,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None, k_bias: torch.Tensor | None, fq: torch.Tensor | None, fk: torch.Tensor | None,
    near: torch.Tensor | None, sink_k: torch.Tensor | None, sink_v: torch.Tensor | None, first: torch.Tensor | None,
    sequences: torch.Tensor | None, blocks: torch.Tensor | None, state_heads: int, map: str, window: int, lag: int,
    mix: str, own: bool, scale: float, window_weight: float, sinks: int, softcap: float | None,
    maps_only: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of GIVEN, in order; empty where there is none."""
    plan = make_plan(q, k, k_weight, fk, state_heads, map, window, lag, mix, own, scale, window_weight, sinks, softcap)
    grad = _dense(grad)
    x = _inputs(plan, dict(zip(GIVEN, _given(locals()))), first, sequences, blocks, grad, d_peak)
    found: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    key_dy = d_states = dv = None
    if map != "none":
        if not states.numel():
            states, masses, _, _ = launch.scan(plan, x)
            _, peak, total = launch.read(plan, x, states, masses, keep=True)
        rows = backwards.query_maps(plan, x, states, masses, grad, out, peak, total, alone=maps_only)
        del states, masses
        d_states, d_masses, _, _ = launch.scan(plan, x, grad=grad, row_scale=rows["scale"], row_mass=rows["mass"])
        if plan.lag == 2:
            fused = tuning.window_linear_fused_values(capability(q.device), plan.channels)
            values = fused and not maps_only
            key_dy, dv = backwards.far_keys(plan, x, d_states, d_masses, values=values)
        else:
            key_dy = backwards.key_maps(plan, x, d_states, d_masses, grad, rows)
        if map == "precomputed":
            found |= {"fq": rows["dy"], "fk": key_dy}
        elif map in PROJECTED:
            found["q_weight"], q_sum = backwards.weight_grads(plan, x, x.xq, rows["dy"], q_bias)
            found["k_weight"], k_sum = backwards.weight_grads(plan, x, x.xk, key_dy, k_bias)
            found |= {name: y for name, y in (("q_bias", q_sum), ("k_bias", k_sum)) if y is not None}
    if not maps_only:
        scaled = None if d_peak is None else (d_peak / LN2).contiguous()
        found["q"], rows = backwards.query_pairs(plan, x, grad, peak, scaled, rows)
        found["k"], found["v"] = backwards.key_pairs(plan, x, grad, d_states, key_dy, rows, dv)
        if sinks and sink_k is not None:
            found["sink_k"], found["sink_v"] = backwards.sink_pairs(plan, x, grad, rows)
    if near is not None and map != "none" and window:
        found["near"] = _near_grad(plan, near, rows, maps_only, x.sequences is not None)
    tensors = dict(zip(GIVEN, _given(locals())))
    made = []
    for name in GIVEN:
        like = tensors[name]
        one = found.get(name)
        made.append(q.new_empty(0) if one is None or like is None else one.to(like.dtype))
    return made


def _near_grad(plan: Plan, near: torch.Tensor, rows: dict[str, torch.Tensor], alone: bool, some: bool) -> torch.Tensor:
    """Of gamma: r summed over rows, over gamma. Of gate or mass: as the kernel wrote it."""
    if plan.mix == "shared":
        return rows["row"].sum(-1 if alone else (0, 2)) / near.float()
    return rows["row"] if alone else rows["far"]


window_linear_backward_op = torch.library.custom_op("linearize::window_linear_backward", backward, mutates_args=())


@window_linear_backward_op.register_fake
def _(grad, d_peak, out, peak, total, states, masses, q, k, v, q_weight, k_weight, q_bias, k_bias, fq, fk, near, sink_k,
      sink_v, first, sequences, blocks, state_heads, map, window, lag, mix, own, scale, window_weight, sinks,
      softcap, maps_only):  # type: ignore[no-untyped-def]  # fmt: skip
    tensors = dict(zip(GIVEN, _given(locals())))
    wanted = {"q_weight", "k_weight", "q_bias", "k_bias", "near"} if map in PROJECTED else {"near", "fq", "fk"}
    if map == "none":
        wanted = set()
    if not maps_only:
        wanted |= {"q", "k", "v", "sink_k", "sink_v"}
    if not window:
        wanted -= {"near"}
    made = []
    for name in GIVEN:
        x = tensors[name]
        if x is None or name not in wanted:
            made.append(q.new_empty(0))
        elif name in "qkv":
            made.append(q.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2))
        else:
            made.append(x.new_empty(x.shape))
    return made


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors, options, maps_only = inputs[:15], inputs[15:-3], inputs[-1]
    out, peak, total, final, states, masses = output
    ctx.options, ctx.maps_only = options, maps_only
    ctx.mark_non_differentiable(total, final, states, masses)
    ctx.set_materialize_grads(False)  # else zeros as large as the states are made, and never read
    ctx.save_for_backward(*tensors, out, peak, total, states, masses)


def _backward(ctx, grad, d_peak, *rest, run=window_linear_backward_op):  # type: ignore[no-untyped-def]
    *tensors, out, peak, total, states, masses = ctx.saved_tensors
    if ctx.options[1] != "none":
        d_peak = None
    if grad is None:
        grad = torch.zeros_like(out)
    found = run(grad, d_peak, out, peak, total, states, masses, *tensors, *ctx.options, ctx.maps_only)
    grads = [y if x is not None and y.shape == x.shape else None for x, y in zip(tensors, found)]
    return *grads, *([None] * (3 + len(ctx.options) + 3))


window_linear_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without torch.library, whose dispatch takes longer than the kernels on a short sequence."""

    @staticmethod
    def forward(*inputs):  # type: ignore[no-untyped-def,override]
        return forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def,override]
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        return _backward(ctx, *grads, run=backward)


def window_linear_call(*inputs: Any) -> Any:
    """window_linear_op(*inputs) by the shortest way: torch.library only where something has to see an op."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    plain = all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)
    if torch.compiler.is_compiling() or not plain:
        return window_linear_op(*inputs)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Eager.apply(*inputs)  # type: ignore[no-untyped-call]
    return forward(*inputs)
