"""Gated linear attention with its feature maps inside, as one operator for autograd and torch.compile.

Features live as long as the slice they belong to (gated_map_slices.py): the backward pass makes them again, from what
the forward pass was given. Kept are the inputs, the output, the denominators, and of a softmax the logs of its sums and
what rounding took off the output.
"""

import torch

from . import gated_map_slices as slices
from .gated_maps import SIGNS, SOFTMAXES, Mapped
from .gated_plan import Plan
from .gated_triton import DECAYS
from .tuning import capability


def _plan(q, v, g, q_weight, k_weight, cu_seqlens, kind, scale, norm) -> Plan:  # type: ignore[no-untyped-def]
    return Plan(
        batch=q.shape[0],
        heads=q.shape[1],
        state_heads=k_weight.shape[0],
        kv_heads=v.shape[1],
        length=q.shape[2],
        features=SIGNS[kind] * q_weight.shape[2],
        values=v.shape[3],
        decay=DECAYS[0 if g is None else g.ndim],
        norm=norm,
        lag=False,
        scale=scale,
        capability=capability(q.device),
        map=kind,
        signs=SIGNS[kind],
        cu_seqlens=cu_seqlens,
    )


def _mapped(q, k, v, g, q_weight, q_bias, k_weight, k_bias) -> Mapped:  # type: ignore[no-untyped-def]
    """Weights in the inputs' dtype, which is what tensor cores multiply."""
    q_weight, k_weight = (w.to(q.dtype).contiguous() for w in (q_weight, k_weight))
    q_bias, k_bias = (None if b is None else b.float().contiguous() for b in (q_bias, k_bias))
    return Mapped(q, k, v, g, q_weight, q_bias, k_weight, k_bias)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor,
    k_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    kind: str,
    scale: float,
    norm: bool,
    return_state: bool,
    train: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, H, T, V], denominators [B, H, T], last state, logs of a softmax's sums, of queries and keys, `rest`.

    rest [B, H, T, V] is what rounding took off the output, kept to `train` one softmax over a denominator. All but the
    output are empty where there are none.
    """
    plan = _plan(q, v, g, q_weight, k_weight, cu_seqlens, kind, scale, norm)
    x = _mapped(q, k, v, g, q_weight, q_bias, k_weight, k_bias)
    want_rest = train and _rounded(q, kind, norm)
    out, den, last, sums, rest = slices.forward(plan, x, state, want_final=return_state, want_rest=want_rest)
    return out, den, last, *sums, rest


mapped_gated_linear_op = torch.library.custom_op("linearize::mapped_gated_linear", forward, mutates_args=())


def _rounded(q: torch.Tensor, kind: str, norm: bool) -> bool:
    """Whether gradients need to know what rounding took off the output (Plan.spared)."""
    return kind == "learned_softmax" and norm and q.dtype != torch.float32


@mapped_gated_linear_op.register_fake
def _(q, k, v, g, q_weight, q_bias, k_weight, k_bias, state, cu_seqlens, kind, scale, norm, return_state, train):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = q.shape
    out = v.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    den = q.new_empty((batch, heads, length) if norm else (0,), dtype=torch.float32)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = (sequences, k_weight.shape[0], SIGNS[kind] * k_weight.shape[2], v.shape[3] + norm)
    softmax = kind in SOFTMAXES
    q_sums, k_sums = (
        q.new_empty((batch, x.shape[0], length, SIGNS[kind]) if softmax else (0,), dtype=torch.float32)
        for x in (q_weight, k_weight)
    )
    rest = torch.empty_like(out) if train and _rounded(q, kind, norm) else v.new_empty(0, 0, 0, 0).transpose(1, 2)
    return out, den, q.new_empty(last if return_state else (0,), dtype=torch.float32), q_sums, k_sums, rest


@torch.library.custom_op("linearize::mapped_gated_linear_backward", mutates_args=())
def mapped_gated_linear_backward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor,
    k_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    den: torch.Tensor,
    q_sums: torch.Tensor,
    k_sums: torch.Tensor,
    rest: torch.Tensor,
    d_out: torch.Tensor,
    d_final: torch.Tensor | None,
    kind: str,
    scale: float,
    norm: bool,
    want_g: bool,
    want_state: bool,
    want_maps: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    """dq, dk, dv, dg, those of q's weight and bias and of k's, and the first state's; empty where not wanted."""
    plan = _plan(q, v, g, q_weight, k_weight, cu_seqlens, kind, scale, norm)
    x = _mapped(q, k, v, g, q_weight, q_bias, k_weight, k_bias)
    wanted = dict(want_g=want_g, want_state=want_state, want_maps=want_maps)
    found = slices.backward(plan, x, state, out, den, (q_sums, k_sums), rest, d_out, d_final, **wanted)
    return found.dq, found.dk, found.dv, found.gates(plan), *found.maps, found.state


@mapped_gated_linear_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, g, q_weight, q_bias, k_weight, k_bias, state, cu_seqlens, out, den, q_sums, k_sums, rest, d_out, d_final,
    kind, scale, norm, want_g, want_state, want_maps,
):  # fmt: skip
    def like(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        return x.new_empty(batch, length, heads, width).transpose(1, 2)

    def single(shape: torch.Size | tuple[int, ...], wanted: bool) -> torch.Tensor:
        return q.new_empty(tuple(shape) if wanted else (0,), dtype=torch.float32)

    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = (sequences, k_weight.shape[0], SIGNS[kind] * k_weight.shape[2], v.shape[3] + norm)
    biased = want_maps and q_bias is not None
    return (
        like(q), like(k), like(v), single(() if g is None else g.shape, want_g),
        single(q_weight.shape, want_maps), single((q_weight.shape[0], q_weight.shape[2]), biased),
        single(k_weight.shape, want_maps), single((k_weight.shape[0], k_weight.shape[2]), biased),
        single(first, want_state),
    )  # fmt: skip


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:10], output[0], output[1], *output[3:])
    ctx.options = inputs[10:13]
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, _d_den, d_final, *_):  # type: ignore[no-untyped-def]
    *inputs, out, den, q_sums, k_sums, rest = ctx.saved_tensors
    g, q_weight, q_bias, k_weight, k_bias, state = inputs[3:9]
    need = ctx.needs_input_grad
    want_g = g is not None and need[3]
    want_state = state is not None and need[8]
    want_maps = any(need[4:8])
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    dq, dk, dv, dg, dwq, dbq, dwk, dbk, d_state = torch.ops.linearize.mapped_gated_linear_backward(
        *inputs, out, den, q_sums, k_sums, rest, d_out, d_final, *ctx.options, want_g, want_state, want_maps
    )
    maps: list[torch.Tensor | None] = [None] * 4
    if want_maps:
        pairs = zip((dwq, dbq, dwk, dbk), (q_weight, q_bias, k_weight, k_bias))
        maps = [None if of is None else grad.to(of.dtype) for grad, of in pairs]
    return dq, dk, dv, dg if want_g else None, *maps, d_state if want_state else None, *[None] * 6


mapped_gated_linear_op.register_autograd(_backward, setup_context=_keep)
