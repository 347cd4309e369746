"""Gated linear attention as one operator for autograd and torch.compile: states, outputs, and their gradients.

The forward pass keeps its inputs, its output and the denominators, and under a decay per channel the chunks' scores, C
numbers a token and head; states are computed again on the way back, which costs a scan of k and v and saves F V / C.
"""

import torch

from . import gated_channel_grads_triton, gated_channel_scan_triton
from .gated_channel_prepare_triton import prepare
from .gated_channel_triton import channel_gradients
from .gated_dkv_triton import key_gradients
from .gated_dq_triton import factors, query_gradients
from .gated_out_triton import outputs
from .gated_plan import Plan
from .gated_scan_triton import scan
from .gated_sums_triton import running_sums
from .tuning import capability, gated_at_hand, gated_chunk

WIDEST = 256
"""Features of a state that one program holds."""
DECAYS = {0: "none", 1: "fixed", 3: "scalar", 4: "channel"}


def make_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    norm: bool,
    lag: int,
) -> Plan:
    """Sizes from the tensors; see `gated.gated_linear`."""
    batch, heads, length, features = q.shape
    return Plan(
        batch=batch,
        heads=heads,
        state_heads=k.shape[1],
        kv_heads=v.shape[1],
        length=length,
        features=features,
        values=v.shape[3],
        decay=DECAYS[0 if g is None else g.ndim],
        norm=norm,
        lag=lag > 0,
        scale=scale,
        capability=capability(q.device),
        cu_seqlens=cu_seqlens,
    )


def at_hand(plan: Plan, dtype: torch.dtype) -> bool:
    """Whether a decay per channel is paid once, before the states are scanned, and outputs are made while they are.

    States are then read in `dtype`, of which float16 may be too small, and which in float32 does not fit.
    """
    if plan.decay != "channel" or plan.norm or plan.lag or plan.readers > 1 or plan.features > WIDEST:
        return False
    return gated_at_hand(plan.capability, dtype, plan.sequences * plan.state_heads)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    norm: bool,
    lag: int,
    return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, H, T, V]; denominators [B, H, T], last state and scores [B, H, NT, C, C], empty where there are none.

    lag: tokens of a block, where queries read the state of two blocks ago; 0: no lag.
    """
    plan = make_plan(q, k, v, g, cu_seqlens, scale, norm, lag)
    chunk = lag or gated_chunk(plan.capability, plan.features, plan.values, q.dtype, plan.decay, backward=False)
    if g is not None and at_hand(plan, q.dtype):
        made = prepare(plan, q, k, g, chunk=chunk)
        out, final = gated_channel_scan_triton.outputs(plan, made, v, state, chunk=chunk, want_final=return_state)
        return out, final.new_empty(0), final, made[3]
    if g is not None and plan.decay == "channel":
        g = running_sums(plan, g, chunk)
    states, z_states, final = scan(plan, k, v, g, state, chunk=chunk, reverse=False, want_final=return_state)
    out, den = outputs(plan, q, k, v, g, states, z_states, chunk=chunk)
    return out, den, final, q.new_empty(0)


gated_linear_op = torch.library.custom_op("linearize::gated_linear", forward, mutates_args=())


@gated_linear_op.register_fake
def _(q, k, v, g, state, cu_seqlens, scale, norm, lag, return_state):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = q.shape
    out = v.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    den = q.new_empty((batch, heads, length) if norm else (0,), dtype=torch.float32)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = (sequences, k.shape[1], k.shape[3], v.shape[3] + norm)
    plan = make_plan(q, k, v, g, cu_seqlens, scale, norm, lag)
    scores: tuple[int, ...] = (0,)
    if g is not None and at_hand(plan, q.dtype):
        chunk = gated_chunk(plan.capability, plan.features, plan.values, q.dtype, plan.decay, backward=False)
        scores = (batch, heads, plan.count(chunk), chunk, chunk)
    return out, den, q.new_empty(last if return_state else (0,), dtype=torch.float32), q.new_empty(scores)


@torch.library.custom_op("linearize::gated_linear_backward", mutates_args=())
def gated_linear_backward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    den: torch.Tensor,
    scores: torch.Tensor,
    d_out: torch.Tensor,
    d_final: torch.Tensor | None,
    scale: float,
    norm: bool,
    lag: int,
    want_g: bool,
    want_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, dg as g (empty unless wanted) and the initial state's gradient (likewise)."""
    plan = make_plan(q, k, v, g, cu_seqlens, scale, norm, lag)
    chunk = lag or gated_chunk(plan.capability, plan.features, plan.values, q.dtype, plan.decay, backward=True)
    if g is not None and at_hand(plan, q.dtype):
        made = prepare(plan, q, k, g, chunk=chunk, scores=scores)
        states, d_states, dv, d_state = gated_channel_scan_triton.both_states(
            plan, made, v, d_out, state, d_final, chunk=chunk, want_first=want_state
        )
        dq, dk, dg = gated_channel_grads_triton.channel_gradients(
            plan, q, k, v, g, made[2], d_out, states, d_states, chunk=chunk, want_g=want_g
        )
        return dq, dk, dv, dg, d_state
    if g is not None and plan.decay == "channel":
        g = running_sums(plan, g, chunk)
    factor, extra = factors(plan, out, den, d_out)
    states, z_states, _ = scan(plan, k, v, g, state, chunk=chunk, reverse=False, want_final=False)
    d_states, dz_states, d_state = scan(
        plan, q, d_out, g, d_final, chunk=chunk, reverse=True, want_final=want_state, factor=factor, extra=extra
    )
    known = (plan, q, k, v, g, d_out, factor, extra)
    both = (states, z_states), (d_states, dz_states)
    dq, dg_read = query_gradients(*known, *both, chunk=chunk, want_g=want_g)
    if g is not None and plan.decay == "channel":
        known = (plan, q, k, v, g, d_out, factor, extra)
        dk, dv, dg = channel_gradients(*known, *both, chunk=chunk, dg_read=dg_read, want_g=want_g)
    else:
        dk, dv, dg = key_gradients(*known, both[1], chunk=chunk, want_g=want_g)
        dg = dg + dg_read if want_g else dg
    if want_g and plan.decay == "fixed":
        dg = dg.sum((0, 2))
    return dq, dk, dv, dg, d_state


@gated_linear_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, g, state, cu_seqlens, out, den, scores, d_out, d_final, scale, norm, lag, want_g, want_state
):
    def like(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        return x.new_empty(batch, length, heads, width).transpose(1, 2)

    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = (sequences, k.shape[1], k.shape[3], v.shape[3] + norm)
    dg = q.new_empty(g.shape if want_g else (0,), dtype=torch.float32)
    return like(q), like(k), like(v), dg, q.new_empty(first if want_state else (0,), dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, g, state, cu_seqlens, scale, norm, lag, _ = inputs
    out, den, _, scores = output
    ctx.save_for_backward(q, k, v, g, state, cu_seqlens, out, den, scores)
    ctx.options = scale, norm, lag
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, _d_den, d_final, _d_scores):  # type: ignore[no-untyped-def]
    q, k, v, g, state, cu_seqlens, out, den, scores = ctx.saved_tensors
    want_g = g is not None and ctx.needs_input_grad[3]
    want_state = state is not None and ctx.needs_input_grad[4]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    dq, dk, dv, dg, d_state = torch.ops.linearize.gated_linear_backward(
        q, k, v, g, state, cu_seqlens, out, den, scores, d_out, d_final, *ctx.options, want_g, want_state
    )
    return dq, dk, dv, dg if want_g else None, d_state if want_state else None, None, None, None, None, None


gated_linear_op.register_autograd(_backward, setup_context=_keep)
