"""The gated delta rule as one operator for autograd and torch.compile.

The forward pass keeps its inputs, and the systems and scores of the chunks (4 C bytes a token and head in bfloat16);
states are computed again on the way back.
"""

import torch
from torch import Tensor

from .gated_delta_launch import Inputs, Prepared, gradients, prepare, reverse, scan
from .gated_delta_plan import Plan
from .tuning import capability


def make_plan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, unit: bool, chunk: int, lag: int
) -> Plan:
    """Sizes from the tensors; chunk: tokens; lag: tokens of a block, or 0."""
    return Plan(
        batch=q.shape[0],
        heads=q.shape[1],
        state_heads=k.shape[1],
        value_heads=v.shape[1],
        length=q.shape[2],
        features=q.shape[3],
        values=v.shape[3],
        dtype=q.dtype,
        chunk=chunk,
        lag=lag // chunk,
        gated=g is not None,
        unit=unit,
        capability=capability(q.device),
        cu_seqlens=cu_seqlens,
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    stops: Tensor | None, unit: bool, chunk: int, lag: int, return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [B, H, T, V], last state [N, S, F, V], and what the backward pass needs again (see `Prepared`)."""
    plan = make_plan(q, k, v, g, cu_seqlens, unit, chunk, lag)
    x = Inputs(q=q, k=k, v=v, beta=beta, g=g, state=state, stops=stops)
    made = prepare(plan, x)
    out, *_, last = scan(plan, x, made, last=return_state)
    return out, last, made.system, made.scores, made.g_cum, made.r_q, made.r_k


gated_delta_op = torch.library.custom_op("linearize::gated_delta", forward, mutates_args=())


@gated_delta_op.register_fake
def _(q, k, v, beta, g, state, cu_seqlens, stops, unit, chunk, lag, return_state):  # type: ignore[no-untyped-def]
    plan = make_plan(q, k, v, g, cu_seqlens, unit, chunk, lag)
    out = v.new_empty(plan.batch, plan.length, plan.heads, plan.values).transpose(1, 2)
    heads, keys, chunks = (plan.batch, plan.heads), (plan.batch, plan.state_heads), plan.chunks
    last = (plan.sequences, plan.state_heads, plan.features, plan.values)

    def made(wanted: bool, *shape: int, like: Tensor | None = None) -> Tensor:
        dtype = torch.float32 if like is None else like.dtype
        return q.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        out,
        made(return_state, *last),
        made(True, *keys, chunks, chunk, chunk, like=k),
        made(not plan.lag, *heads, chunks, chunk, chunk, like=k),
        made(plan.gated, *keys, plan.length),
        made(unit, *heads, plan.length),
        made(unit, *keys, plan.length),
    )


@torch.library.custom_op("linearize::gated_delta_backward", mutates_args=())
def gated_delta_backward_op(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    stops: Tensor | None, system: Tensor, scores: Tensor, g_cum: Tensor, r_q: Tensor, r_k: Tensor, d_out: Tensor,
    d_last: Tensor | None, unit: bool, chunk: int, lag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, g and the first state; the last two empty where there are none."""
    plan = make_plan(q, k, v, g, cu_seqlens, unit, chunk, lag)
    x = Inputs(q=q, k=k, v=v, beta=beta, g=g, state=state, stops=stops)
    made = Prepared(system=system, scores=scores, g_cum=g_cum, r_q=r_q, r_k=r_k)
    d_states, d_right, d_v, d_first = reverse(plan, x, made, d_out, d_last, first=state is not None)
    _, states, update, d_beta, _ = scan(plan, x, made, d_right=d_right)
    d_q, d_k, d_g = gradients(plan, x, made, d_out, states, d_states, update, d_right[0])
    if plan.state_heads > plan.value_heads:
        d_v = d_v.unflatten(1, (plan.value_heads, -1)).sum(2)
    return d_q, d_k, d_v, d_beta, d_g, d_first


@gated_delta_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, beta, g, state, cu_seqlens, stops, system, scores, g_cum, r_q, r_k, d_out, d_last, unit, chunk, lag
):
    def like(x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        return x.new_empty(batch, length, heads, width).transpose(1, 2)

    def exact(x: Tensor | None) -> Tensor:
        return q.new_empty((0,) if x is None else x.shape, dtype=torch.float32)

    return like(q), like(k), like(v), exact(beta), exact(g), exact(state)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, unit, chunk, lag, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.sizes = unit, chunk, lag
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_last, *_):  # type: ignore[no-untyped-def]
    q, k, v, beta, g, state, *rest = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(v.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    elif d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    d_last = None if d_last is None else d_last.contiguous()
    d_q, d_k, d_v, d_beta, d_g, d_first = gated_delta_backward_op(
        q, k, v, beta, g, state, *rest, d_out, d_last, *ctx.sizes
    )
    d_g, d_first = (None if x is None else y for x, y in ((g, d_g), (state, d_first)))
    return d_q, d_k, d_v, d_beta, d_g, d_first, *(None,) * 6


gated_delta_op.register_autograd(_backward, setup_context=_keep)
