"""Launches of the kernels of the gated delta rule, and the buffers between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tuning
from .backend import empty
from .gated_delta_decay_triton import decay_kernel
from .gated_delta_keys_triton import keys_kernel
from .gated_delta_plan import Plan, strides
from .gated_delta_queries_triton import queries_kernel
from .gated_delta_reverse_triton import reverse_kernel
from .gated_delta_scan_triton import scan_kernel
from .gated_delta_scores_triton import scores_kernel
from .gated_delta_system_triton import system_kernel


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q [B, H, T, F], k [B, S, T, F], v [B, HK, T, V], beta and log decay [B, S, T], first state [N, S, F, V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    state: Tensor | None
    stops: Tensor | None
    """Before which chunk of each sequence its last state is taken [N]; None: after the last."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known of each chunk before the scan, forwards and backwards; empty tensors for what is not needed."""

    system: Tensor
    scores: Tensor
    g_cum: Tensor
    r_q: Tensor
    r_k: Tensor


def fresh(plan: Plan, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A buffer on `like`'s device."""
    return empty(shape, dtype=dtype or like.dtype, device=like.device)


def rows(plan: Plan, like: Tensor, heads: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """[B, heads, T, width] that lies in memory as [B, T, heads, width]."""
    return fresh(plan, like, plan.batch, plan.length, heads, width, dtype=dtype).transpose(1, 2)


def _tile(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def prepare(plan: Plan, x: Inputs) -> Prepared:
    """The chunks' systems and scores, running decays, and lengths of queries and keys."""
    _, _, table = plan.packing
    batch, heads, state_heads, chunks, size = plan.batch, plan.heads, plan.state_heads, plan.chunks, plan.chunk
    system = fresh(plan, x.k, batch, state_heads, chunks, size, size)
    scores = fresh(plan, x.k, *((batch, heads, chunks, size, size) if not plan.lag else (0,)))
    per_key = (batch, state_heads, plan.length)
    g_cum = fresh(plan, x.k, *(per_key if plan.gated else (0,)), dtype=torch.float32)
    r_k = fresh(plan, x.k, *(per_key if plan.unit else (0,)), dtype=torch.float32)
    r_q = fresh(plan, x.k, *((batch, heads, plan.length) if plan.unit else (0,)), dtype=torch.float32)
    known = tuning.gated_delta_system(plan.capability, plan.features, plan.dtype)
    exact = plan.dtype == torch.float32
    system_kernel[(chunks * batch * state_heads,)](
        x.k, x.beta, x.g, system, g_cum, r_k, table, *strides(x.k), *strides(x.beta), *strides(x.g), plan.length,
        state_heads, chunks, ROUND="ieee" if exact else "tf32", **plan.common, **known,
    )  # fmt: skip
    if not plan.lag or plan.unit:
        scores_kernel[(chunks * batch * heads,)](
            x.q, x.k, g_cum, r_q, r_k, scores, table, *strides(x.q), *strides(x.k), plan.length, heads, chunks,
            R=heads // state_heads, SCORES=not plan.lag, BF=_tile(plan.features), **plan.common,
            **tuning.gated_delta_scores(plan.capability, plan.features, plan.dtype),
        )  # fmt: skip
    return Prepared(system=system, scores=scores, g_cum=g_cum, r_q=r_q, r_k=r_k)


def scan(
    plan: Plan, x: Inputs, made: Prepared, *, last: bool = False, d_right: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs and, if asked for, the last state; or with `d_right`, both parts of what `reverse` found, the states
    before the chunks, the updates u and the gradient of beta. In this order: o, states, u, d_beta, last state.
    """
    out = d_right is None
    bounds, firsts, _ = plan.packing
    batch, state_heads, features, values = plan.batch, plan.state_heads, plan.features, plan.values
    o = rows(plan, x.v, plan.heads, values) if out else fresh(plan, x.v, 0, 0, 0, 0)
    states = fresh(plan, x.k, *((0,) if out else (batch, state_heads, plan.chunks, features, values)))
    update = fresh(plan, x.k, *((0,) if out else (batch, state_heads, plan.length, values)))
    shape = (plan.sequences, state_heads, features, values)
    final = fresh(plan, x.k, *(shape if last else (0,)), dtype=torch.float32)
    known = tuning.gated_delta_scan(
        plan.capability,
        features,
        values,
        plan.dtype,
        programs=plan.sequences * state_heads,
        out=out,
        readers=plan.heads // state_heads,
    )
    tiles = -(-values // known["BV"])
    d_beta = fresh(plan, x.k, *((0,) if out else (batch, state_heads, tiles, plan.length)), dtype=torch.float32)
    scan_kernel[(plan.sequences * state_heads * tiles,)](
        x.q, x.k, x.v, x.beta, made.system, made.scores, made.g_cum, made.r_q, made.r_k, x.state,
        *(d_right or (None, None)), o, states, update, d_beta, final, bounds, firsts, x.stops,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(x.beta), *strides(o),
        plan.length, state_heads, plan.chunks,
        R=plan.heads // state_heads, GV=state_heads // plan.value_heads, V=values, BF=_tile(features), LAG=plan.lag,
        OUT=out, KEEP=not out, HAS_FIRST=x.state is not None, HAS_LAST=last, **plan.common, **known,
    )  # fmt: skip
    return o, states, update, d_beta if out else d_beta.sum(2), final


def reverse(
    plan: Plan, x: Inputs, made: Prepared, d_out: Tensor, d_last: Tensor | None, *, first: bool
) -> tuple[Tensor, tuple[Tensor, Tensor | None], Tensor, Tensor]:
    """Gradients of states after the chunks, of u in two parts, of v per state head, and of the first state."""
    bounds, firsts, _ = plan.packing
    batch, state_heads, features, values = plan.batch, plan.state_heads, plan.features, plan.values
    d_states = fresh(plan, x.k, batch, state_heads, plan.chunks, features, values)
    d_right = fresh(plan, x.k, batch, state_heads, plan.length, values)
    d_rest = fresh(plan, x.k, *d_right.shape) if plan.lag and plan.dtype != torch.float32 else None
    d_v = rows(plan, x.v, state_heads, values)
    shape = (plan.sequences, state_heads, features, values)
    d_first = fresh(plan, x.k, *(shape if first else (0,)), dtype=torch.float32)
    known = tuning.gated_delta_reverse(
        plan.capability, features, values, plan.dtype, programs=plan.sequences * state_heads
    )
    tiles = -(-values // known["BV"])
    reverse_kernel[(plan.sequences * state_heads * tiles,)](
        x.q, x.k, x.beta, made.system, made.scores, made.g_cum, made.r_q, made.r_k, d_out, d_last, d_states, d_right,
        d_rest, d_v, d_first, bounds, firsts, x.stops, *strides(x.q), *strides(x.k), *strides(x.beta), *strides(d_out),
        *strides(d_v), plan.length, state_heads, plan.chunks, R=plan.heads // state_heads, V=values,
        BF=_tile(features), LAG=plan.lag, HAS_FIRST=first, HAS_LAST=d_last is not None, **plan.common, **known,
    )  # fmt: skip
    return d_states, (d_right, d_rest), d_v, d_first


def gradients(
    plan: Plan, x: Inputs, made: Prepared, d_out: Tensor, states: Tensor, d_states: Tensor, update: Tensor,
    d_right: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, and of the log decay (empty without one)."""
    _, _, table = plan.packing
    batch, heads, state_heads, chunks = plan.batch, plan.heads, plan.state_heads, plan.chunks
    d_q, d_k = rows(plan, x.q, heads, plan.features), rows(plan, x.k, state_heads, plan.features)
    d_g = fresh(plan, x.k, *((batch, state_heads, plan.length) if plan.gated else (0,)), dtype=torch.float32)
    along = fresh(plan, x.k, *((batch, heads, plan.length) if plan.gated else (0,)), dtype=torch.float32)
    shape = {**plan.common, "R": heads // state_heads, "V": plan.values, "LAG": plan.lag}
    queries_kernel[(chunks * batch * heads,)](
        x.q, x.k, made.scores, made.g_cum, made.r_q, made.r_k, d_out, states, update, d_q, along, table, *strides(x.q),
        *strides(x.k), *strides(d_out), *strides(d_q), plan.length, heads, chunks, **shape,
        **tuning.gated_delta_queries(plan.capability, plan.features, plan.values, plan.dtype),
    )  # fmt: skip
    keys_kernel[(chunks * batch * state_heads,)](
        x.q, x.k, x.beta, made.g_cum, made.r_q, made.r_k, d_out, states, d_states, update, d_right, along, d_k, d_g,
        table, *strides(x.q), *strides(x.k), *strides(x.beta), *strides(d_out), *strides(d_k), plan.length,
        state_heads, chunks, **shape,
        **tuning.gated_delta_keys(plan.capability, plan.features, plan.values, plan.dtype),
    )  # fmt: skip
    if plan.gated and plan.lag:
        carried, d_g = d_g, torch.empty_like(d_g)
        decay_kernel[(chunks * batch * state_heads,)](
            carried, along, d_g, table, plan.length, state_heads, chunks, R=heads // state_heads, C=plan.chunk,
            LAG=plan.lag, PACKED=plan.cu_seqlens is not None, num_warps=1,
        )  # fmt: skip
    return d_q, d_k, d_g
