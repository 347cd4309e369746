"""Gated linear attention with its maps, slice by slice: features are made once a slice, and every kernel reads them.

A slice is some rows of the batch, or some key-value heads of one, with all heads that read them. Products over features
(F = 2048 in the default recipe) are then those of large matrices, which is what makes them fast; what a slice holds is
bounded (tuning.gated_map_slice), and the next one takes the same memory.

Counted for D = V = 128, 2048 codes, chunks of 64 and four query heads a state, per token and query head: the forward
pass multiplies 2.2 MFLOP, 1.3 of them for the map (once for a softmax's sums, once for its features), the backward pass
4.3 (5.4 ns at 800 TFLOP/s). Writing and reading features, states and their gradients is 54 KB backwards (12.6 ns at
4.3 TB/s), less than it costs to make them again in every kernel. Sums of a softmax are kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .backend import empty
from .compiled import found_for
from .gated_dq_triton import factors
from .gated_map_dk_triton import map_key_gradients, small_ends
from .gated_map_dq_triton import map_query_gradients
from .gated_map_dv_triton import map_value_gradients
from .gated_map_features_triton import map_features, map_log_sums
from .gated_map_out_triton import map_outputs
from .gated_map_rows_triton import map_rows
from .gated_map_scan_triton import map_scan, map_through
from .gated_map_scores_triton import map_scores
from .gated_map_weights_triton import input_gradient, weight_gradient
from .gated_maps import SOFTMAXES, Mapped
from .gated_plan import Plan, Slice
from .tuning import gated_map_chunk, gated_map_dk, gated_map_dq, gated_map_slice

PARTS = 2
"""Programs that share the product of a chunk's state with its gradient."""


def sliced(plan: Plan, dtype: torch.dtype, chunk: int, *, backward: bool) -> list[tuple[Plan, Slice]]:
    """The call in slices that hold no more than they should, or one key-value head."""
    size = dtype.itemsize
    count = plan.chunks(chunk)[2]
    states, heads = plan.state_heads // plan.kv_heads, plan.heads // plan.kv_heads
    stored = states * count * plan.features * plan.values * (2 if dtype == torch.bfloat16 else 4)
    held = plan.length * (heads + states) * plan.features * size + stored
    if backward:
        width = plan.features // plan.signs
        held += stored + (plan.length * (heads + states) * width + 2 * heads * count * chunk * chunk) * size
    return plan.slices(gated_map_slice(plan.capability) // held)


Sums = tuple[torch.Tensor, torch.Tensor]
"""Logs of a softmax's sums, of queries [B, H, T, signs] and of keys [B, S, T, signs], float32; of other maps empty."""


def _sums(at: Slice, sums: Sums) -> Sums:
    """Of one slice."""
    q, k = sums
    return (q[at.rows, at.heads], k[at.rows, at.states]) if q.numel() and not at.whole else sums


def _features(plan: Plan, x: Mapped, sums: Sums) -> tuple[torch.Tensor, torch.Tensor]:
    q_sums, k_sums = (s if plan.map in SOFTMAXES else None for s in sums)
    fq = map_features(plan, x.q, x.q_weight, x.q_bias, q_sums, "q")
    return fq, map_features(plan, x.k, x.k_weight, x.k_bias, k_sums, "k")


def _known(plan: Plan, x: Mapped, *others: torch.Tensor | None) -> Plan:
    """The plan with what is known of calls like this one; others: all else that kernels are given from outside."""
    return replace(plan, found=found_for(plan.sizes(), *x, *others, plan.cu_seqlens))


def forward(
    plan: Plan, x: Mapped, state: torch.Tensor | None, *, want_final: bool, want_rest: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sums, torch.Tensor]:
    """Output [B, H, T, V], scale times the denominators [B, H, T], the last state, sums, and what rounding took off.

    The latter is of the output, and kept with want_rest. Empty is what there is not.
    """
    chunk = gated_map_chunk(plan.capability, x.q.dtype)
    device, single = x.q.device, torch.float32
    shape = (plan.batch, plan.length, plan.heads, plan.values)
    out = empty(shape, dtype=x.v.dtype, device=device).transpose(1, 2)
    rest = empty(shape if want_rest else (0, 0, 0, 0), dtype=x.v.dtype, device=device).transpose(1, 2)
    den = empty((plan.batch, plan.heads, plan.length) if plan.norm else (0,), dtype=single, device=device)
    last = (plan.sequences, plan.state_heads, plan.features, plan.values + plan.norm)
    final = empty(last if want_final else (0,), dtype=single, device=device)
    softmax = plan.map in SOFTMAXES
    sums = tuple(
        empty((plan.batch, heads, plan.length, plan.signs) if softmax else (0,), dtype=single, device=device)
        for heads in (plan.heads, plan.state_heads)
    )
    for part, at in sliced(plan, x.q.dtype, chunk, backward=False):
        own, begin = x.part(at), at.of_states(state)
        to = at.of_heads(out), at.of_heads(rest) if want_rest else None, at.of_heads(den) if plan.norm else den
        mine = _sums(at, (sums[0], sums[1]))
        part = _known(part, own, begin, *to, *mine)
        if softmax:
            map_log_sums(part, own.q, own.q_weight, own.q_bias, mine[0], "q")
            map_log_sums(part, own.k, own.k_weight, own.k_bias, mine[1], "k")
        features = _features(part, own, mine)
        *states, end = map_scan(
            part, features[1], map_rows(part, own.v, own.g, chunk=chunk, reverse=False), begin,
            chunk=chunk, reverse=False, want_final=want_final,
        )  # fmt: skip
        map_outputs(part, own.v, own.g, features, (states[0], states[1]), *to, chunk=chunk)
        if want_final:
            at.of_states(final).copy_(end)  # type: ignore[union-attr]
    return out, den, final, (sums[0], sums[1]), rest


class Gradients:
    """Gradients of a whole call, which slices fill; those of maps are float32, [maps, D, f] and [maps, f]."""

    def __init__(self, plan: Plan, x: Mapped, *, want_g: bool, want_state: bool, want_maps: bool) -> None:
        def like(t: torch.Tensor) -> torch.Tensor:
            batch, heads, length, width = t.shape
            return empty((batch, length, heads, width), dtype=t.dtype, device=t.device).transpose(1, 2)

        def single(shape: tuple[int, ...], wanted: bool) -> torch.Tensor:
            return empty(shape if wanted else (0,), dtype=torch.float32, device=x.q.device)

        width = plan.features // plan.signs
        shapes = (plan.capability, width, plan.values)
        span = gated_map_dq(*shapes, x.q.dtype)
        tiles = (
            -(-width // (span["BF"] * span["SPAN"])),
            -(-width // gated_map_dk(*shapes, x.q.dtype)["BF"]),
        )
        self.dq, self.dk, self.dv = like(x.q), like(x.k), like(x.v)
        self.q_gates = single((tiles[0] + 1, plan.batch, plan.heads, plan.length), want_g)
        self.k_gates = single((tiles[1] + PARTS, plan.batch, plan.state_heads, plan.length), want_g)
        self.biased = want_maps and x.q_bias is not None
        self.maps = (
            single(x.q_weight.shape, want_maps), single((plan.heads, width), self.biased),
            single(x.k_weight.shape, want_maps), single((plan.state_heads, width), self.biased),
        )  # fmt: skip
        first = (plan.sequences, plan.state_heads, plan.features, plan.values + plan.norm)
        self.state = single(first, want_state)
        self.want_g, self.want_state, self.want_maps = want_g, want_state, want_maps

    def gates(self, plan: Plan) -> torch.Tensor:
        """Gradient of the log decays, as they are; empty unless wanted."""
        if not self.want_g:
            return self.q_gates
        dg = self.q_gates.sum(0).unflatten(1, (plan.state_heads, -1)).sum(2) + self.k_gates.sum(0)
        return dg.sum((0, 2)) if plan.decay == "fixed" else dg


def backward(
    plan: Plan,
    x: Mapped,
    state: torch.Tensor | None,
    out: torch.Tensor,
    den: torch.Tensor,
    sums: Sums,
    rest: torch.Tensor,
    d_out: torch.Tensor,
    d_final: torch.Tensor | None,
    **wanted: bool,
) -> Gradients:
    """Gradients of everything, from what `forward` gave; wanted: want_g, want_state and want_maps."""
    chunk = gated_map_chunk(plan.capability, x.q.dtype)
    found = Gradients(plan, x, **wanted)
    pair = factors(plan, out, den, d_out, rest if rest.numel() else None)
    small = small_ends(plan, den) if plan.spared else None
    for part, at in sliced(plan, x.q.dtype, chunk, backward=True):
        own = x.part(at)
        weights = tuple(f if f is None else at.of_heads(f) for f in pair)
        ends = at.of_states(state), at.of_states(d_final)
        near = at.of_heads(den) if plan.norm else den, None if small is None else small[at.rows, at.states]
        mine = _sums(at, sums)
        _backward_slice(part, at, own, ends, mine, near, at.of_heads(d_out), (weights[0], weights[1]), found, chunk)
    return found


def _backward_slice(
    plan: Plan,
    at: Slice,
    x: Mapped,
    ends: tuple[torch.Tensor | None, torch.Tensor | None],
    sums: Sums,
    near: tuple[torch.Tensor, torch.Tensor | None],
    d_out: torch.Tensor,
    pair: tuple[torch.Tensor | None, torch.Tensor | None],
    found: Gradients,
    chunk: int,
) -> None:
    q_gates = k_gates = None
    if found.want_g:
        q_gates, k_gates = found.q_gates[:, at.rows, at.heads], found.k_gates[:, at.rows, at.states]
    dq, dk, dv = at.of_heads(found.dq), at.of_keys(found.dk), at.of_keys(found.dv)
    plan = _known(plan, x, *ends, *sums, *near, d_out, *pair, q_gates, k_gates, dq, dk, dv)
    fq, fk = features = _features(plan, x, sums)
    rows = map_rows(plan, x.v, x.g, chunk=chunk, reverse=False)
    *states, _ = map_scan(plan, fk, rows, ends[0], chunk=chunk, reverse=False, want_final=False)
    rows = map_rows(plan, d_out, x.g, chunk=chunk, reverse=True, factors=pair)
    *d_states, d_first = map_scan(plan, fq, rows, ends[1], chunk=chunk, reverse=True, want_final=found.want_state)
    before, after = (states[0], states[1]), (d_states[0], d_states[1])
    if found.want_state:
        at.of_states(found.state).copy_(d_first)  # type: ignore[union-attr]
    crossing = None if q_gates is None else q_gates[-1]
    reads, pairs, totals = map_scores(plan, x, features, d_out, pair, crossing, chunk=chunk)
    along = map_value_gradients(plan, x.v, x.g, fk, reads, d_out, after, totals, dv, chunk=chunk)
    if k_gates is not None:
        map_through(plan, x.g, before, after, k_gates[-PARTS:], chunk=chunk)
    dy_k, sums_k = map_key_gradients(
        plan, x.v, x.g, features, pairs, after, (along, near[1]), k_gates, chunk=chunk, bias=found.biased
    )
    dy_q, sums_q = map_query_gradients(
        plan, x.g, features, pairs, d_out, pair, before, near[0], q_gates, chunk=chunk, bias=found.biased
    )
    input_gradient(plan, dy_q, x.q_weight, dq, "q")
    input_gradient(plan, dy_k, x.k_weight, dk, "k")
    if found.want_maps:
        _add_up(weight_gradient(plan, x.q, dy_q, "q"), (0,), found.maps[0][at.heads], at)
        _add_up(weight_gradient(plan, x.k, dy_k, "k"), (0,), found.maps[2][at.states], at)
    if found.biased:
        for parts, total, heads in ((sums_q, found.maps[1], at.heads), (sums_k, found.maps[3], at.states)):
            _add_up(parts, (0, 2), total[heads], at)


def _add_up(parts: torch.Tensor, over: tuple[int, ...], total: torch.Tensor, at: Slice) -> None:
    """Adds the sum of `parts` to `total`, which the batch's first rows fill."""
    if at.rows.start == 0:
        torch.sum(parts, over, out=total)
    else:
        total += parts.sum(over)
