"""Window + linear attention in one op: a softmax over near keys, a linear branch over the others (or over all).

    out_i = (gamma sum_near exp(s_ij - m_i) v_j + sum_far phi(q_i).phi(k_j) v_j) / (the same with v = 1)

is the shared mix (LoLCATs, arXiv 2410.10254, eq. 7; m_i is the largest near score). The split mixes are
share softmax(near) v + (1 - share) linear, the linear branch over its own denominator (Hedgehog, arXiv 2402.04347) or
none; without a window it is all there is (T2R, arXiv 2103.13076). Near: own block of W tokens, the one before, sinks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf

from .backend import pick, placed
from .linear import chunk_linear
from .window import chunk_window
from .window_linear_plan import CHUNK, MAPS, PROJECTED, Plan, sequence_tables, spans_of

FLOOR, EXP_LIMIT, RELU_FLOOR, TINY = 1e-12, 15.0, 1e-6, 1e-30
"""As in the models' feature maps; the kernels compute the same."""
MIXES = ("shared", "sum", "gate", "mass")
Maybe = torch.Tensor | None


def apply_map(x: torch.Tensor, name: str, weight: Maybe, bias: Maybe) -> torch.Tensor:
    """phi of head vectors [N, H, L, D]; weight [H, D, F], bias [H, F]."""
    if name == "softmax":
        return x.softmax(-1)
    assert weight is not None
    y = torch.einsum("nhld,hdf->nhlf", x, weight.to(x.dtype))
    if bias is not None:
        y = y + bias.to(x.dtype)[:, None]
    if name == "hedgehog_softmax":
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1).clamp_min(FLOOR)
    if name == "hedgehog_exp":
        y = y.clamp(-EXP_LIMIT, EXP_LIMIT)
        return torch.cat((y.exp(), (-y).exp()), dim=-1)
    return y.relu().clamp_min(RELU_FLOOR)


@placed
def window_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    map: str = "hedgehog_softmax",
    q_weight: Maybe = None,
    k_weight: Maybe = None,
    q_bias: Maybe = None,
    k_bias: Maybe = None,
    fq: Maybe = None,
    fk: Maybe = None,
    window: int = 64,
    scale: float,
    mix: str = "shared",
    normaliser: str = "own",
    coverage: str = "outside",
    gamma: Maybe = None,
    window_weight: float = 0.5,
    gate: Maybe = None,
    mass: Maybe = None,
    sinks: int = 0,
    softcap: float | None = None,
    cu_seqlens: Maybe = None,
    starts: Maybe = None,
    state: Maybe = None,
    return_state: bool = False,
    train: str = "all",
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend.

    Args:
        q: [B, H, T, D]; k, v: [B, HK, T, D], H a multiple of HK; fp32, fp16 or bf16, any strides.
        map: hedgehog_softmax | hedgehog_exp | relu | softmax | precomputed (features given as fq, fk).
        q_weight: [H, D, F]; k_weight: [S, D, F] with S = H (a state per query head) or HK. q_bias, k_bias: [., F].
        fq: features [B, H, T, F]; fk: [B, S, T, F]; for map `precomputed`.
        window: W, tokens of a block; 0: no softmax, coverage `all`.
        scale: factor of the scores, usually D^-0.5.
        mix: shared (gamma) | sum (window_weight) | gate | mass; without a window it says nothing.
        normaliser: own | none: the linear branch's denominator in a split mix or without a window.
        coverage: outside (the linear branch reads what the window cannot see) | all.
        gamma: the window's factor per head [H], above 0, float32 (shared mix).
        window_weight: the window's share, for mix `sum`.
        gate: the window's share [B, H, T] float32; mass: the log mass of the rest [B, H, T] float32.
        sinks: the first tokens of a sequence that stay in the softmax; at most W.
        softcap: c, a bound on the window's scores, which become c tanh(s / c) (Gemma 2); None: none.
        cu_seqlens: [N + 1], where packed sequences begin and end; B is then 1.
        starts: [B], the first real token of left-padded rows; padding gives zeros.
        state: the linear branch's state before the first token [N, S, F, D + 1] float32, mass in the last column.
        return_state: also return the state of all that left the window (of everything for coverage `all`).
        train: all, or maps: gradients of map weights, biases, fq, fk, gamma, gate and mass only.
        backend: auto | torch | triton.

    Returns:
        [B, H, T, D] in q's dtype; with return_state also [N, S, F, D + 1] float32, which carries no gradient.

    Raises:
        ValueError: arguments contradict each other, or triton was asked for and cannot serve.
    """
    if window == 0:
        coverage, mix, softcap = "all", "sum", None
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    _check(map, mix, normaliser, coverage, train, q_weight, k_weight, fq, fk, gamma, gate, mass, cu_seqlens, starts, q)
    near = {"shared": gamma, "gate": gate, "mass": mass}.get(mix) if window else None
    if map == "precomputed":
        assert fk is not None
        state_heads = fk.shape[1]
    elif map == "softmax":
        state_heads = k.shape[1]
    else:
        assert k_weight is not None
        state_heads = k_weight.shape[0]
    lag = 2 if coverage == "outside" else 1
    own = normaliser == "own"

    width = {"precomputed": fk, "softmax": q}.get(map, k_weight)
    assert width is not None
    plan = Plan(
        batch=q.shape[0], tokens=q.shape[2], heads=q.shape[1], key_heads=k.shape[1], state_heads=state_heads,
        channels=q.shape[3], width=width.shape[-1], map=map, window=window, lag=lag, mix=mix, own=own, scale=scale,
        window_weight=window_weight, sinks=sinks, softcap=softcap,
    )  # fmt: skip
    unable = plan.unable(q.dtype, k.dtype, v.dtype)
    if state is not None and state.requires_grad:
        unable = "the initial state wants a gradient"
    maps_only = train == "maps"
    if maps_only:
        q, k, v = q.detach(), k.detach(), v.detach()
    if pick(backend, q, k, v, unable=unable) == "torch":
        out, final = _torch(
            q, k, v, map, q_weight, k_weight, q_bias, k_bias, fq, fk, window, scale, mix, own, lag, near,
            window_weight, sinks, softcap, cu_seqlens, starts, state, state_heads,
        )  # fmt: skip
        return (out, final.detach()) if return_state else out
    from .window_linear_ops import window_linear_call

    sequences, blocks = tables_of(q, plan.chunk, cu_seqlens, starts)
    sink_k = sink_v = None
    if sinks and window:
        sink_k, sink_v = (first_tokens(x, sinks, sequences) for x in (k, v))
    leaves = (q, k, v, q_weight, k_weight, q_bias, k_bias, fq, fk, near)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    found = window_linear_call(
        q, k, v, q_weight, k_weight, q_bias, k_bias, fq, fk, near, sink_k, sink_v, state, sequences, blocks,
        state_heads, map, window, lag, mix, own, float(scale), float(window_weight), sinks if window else 0,
        softcap, return_state, wanted, maps_only,
    )  # fmt: skip
    return (found[0], found[3]) if return_state else found[0]


def _check(map, mix, normaliser, coverage, train, q_weight, k_weight, fq, fk, gamma, gate, mass, cu_seqlens, starts, q):  # type: ignore[no-untyped-def]
    """Refuse what contradicts itself, by name."""
    for name, value, allowed in (
        ("map", map, MAPS),
        ("mix", mix, MIXES),
        ("normaliser", normaliser, ("own", "none")),
        ("coverage", coverage, ("outside", "all")),
        ("train", train, ("all", "maps")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    if map in PROJECTED and (q_weight is None or k_weight is None):
        raise ValueError(f"map {map!r} needs q_weight and k_weight")
    if map == "precomputed" and (fq is None or fk is None):
        raise ValueError("map 'precomputed' needs fq and fk")
    if mix == "shared" and coverage == "all":
        raise ValueError("mix 'shared' counts each pair once: coverage must be outside")
    for name, value in (("shared", gamma), ("gate", gate), ("mass", mass)):
        if mix == name and value is None:
            raise ValueError(f"mix {name!r} needs {'gamma' if name == 'shared' else name}")
    if cu_seqlens is not None and (starts is not None or q.shape[0] != 1):
        raise ValueError("cu_seqlens is for one row of packed sequences, without starts")


def tables_of(q: torch.Tensor, chunk: int, cu_seqlens: Maybe, starts: Maybe) -> tuple[Maybe, Maybe]:
    """Tables of sequences and blocks for the kernels; None where a sequence fills each row."""
    batch, _, tokens, _ = q.shape
    if cu_seqlens is not None:
        low, high = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        return sequence_tables(low, high, torch.zeros_like(low), chunk, tokens // chunk + low.shape[0])
    if starts is not None:
        low = starts.long()
        rows = torch.arange(batch, device=q.device)
        return sequence_tables(low, torch.full_like(low, tokens), rows, chunk, batch * -(-tokens // chunk))
    return None, None


def first_tokens(x: torch.Tensor, sinks: int, sequences: Maybe) -> torch.Tensor:
    """The first tokens of each sequence [N, HK, Z, D]; what lies beyond the row is never read."""
    if sequences is None:
        return nnf.pad(x[:, :, :sinks], (0, 0, 0, max(0, sinks - x.shape[2])))
    rows, low = sequences[:, 0].long(), sequences[:, 1].long()
    place = (low[:, None] + torch.arange(sinks, device=x.device)).clamp_max(x.shape[2] - 1)
    return x.transpose(1, 2)[rows[:, None], place].transpose(1, 2)


def _torch(q, k, v, map, q_weight, k_weight, q_bias, k_bias, fq, fk, window, scale, mix, own, lag, near, window_weight,
           sinks, softcap, cu_seqlens, starts, state, state_heads):  # type: ignore[no-untyped-def]  # fmt: skip
    """The reference: sequence by sequence, in float32 (float64 stays)."""
    out, states = torch.zeros_like(q), []
    for index, (row, a, b) in enumerate(spans_of(q.shape[0], q.shape[2], cu_seqlens, starts)):
        cut = (row, slice(None), slice(a, b))
        first = state if state is None or row.stop - row.start == state.shape[0] else state[index : index + 1]
        q_own, k_own, v_own = (x[cut] if x.dtype == torch.float64 else x[cut].float() for x in (q, k, v))
        made, final = _sequence(
            q_own, k_own, v_own, map, q_weight, k_weight,
            q_bias, k_bias, None if fq is None else fq[cut], None if fk is None else fk[cut], window, scale, mix, own,
            lag, near if near is None or near.ndim == 1 else near[cut], window_weight, sinks, softcap, first,
            state_heads,
        )  # fmt: skip
        states.append(final)
        out[cut] = made.to(q.dtype)
    return out, torch.cat(states)


def _sequence(q, k, v, map, q_weight, k_weight, q_bias, k_bias, fq, fk, window, scale, mix, own, lag, near,
              window_weight, sinks, softcap, state, state_heads):  # type: ignore[no-untyped-def]  # fmt: skip
    """Sequences of one length, from their start: out [N, H, L, D] and the final state."""
    key_heads, tokens = k.shape[1], q.shape[2]
    chunk = window or CHUNK
    if map == "precomputed":
        fq, fk = fq.to(q.dtype), fk.to(q.dtype)
    else:
        fq = apply_map(q, map, q_weight, q_bias)
        fk = apply_map(k.repeat_interleave(state_heads // key_heads, dim=1), map, k_weight, k_bias)
    if lag == 2 and sinks:
        fk = torch.cat((torch.zeros_like(fk[:, :, :sinks]), fk[:, :, sinks:]), dim=2)
    values = nnf.pad(v.repeat_interleave(state_heads // key_heads, dim=1), (0, 1), value=1.0)
    first = None if state is None else state.to(q.dtype)
    linear, states = chunk_linear(
        fq.unflatten(1, (state_heads, -1)), fk, values, state=first, chunk=chunk, lag=lag == 2
    )
    gone = max(tokens // chunk - 1, 0) if lag == 2 else states.shape[2] - 1
    linear = linear.flatten(1, 2)
    top, total = linear[..., :-1], linear[..., -1:]
    if window:
        sink = (k[:, :, :sinks], v[:, :, :sinks]) if sinks else (None, None)
        grouped = q.unflatten(1, (key_heads, -1))
        found = chunk_window(grouped, k, v, window=window, scale=scale, softcap=softcap, sink_k=sink[0], sink_v=sink[1])
        above, below, largest = (x.flatten(1, 2) for x in found)
        if mix == "shared":
            gamma = near.to(q.dtype)[:, None, None]
            return (gamma * above + top) / (gamma * below + total), states[:, :, gone]
        if mix == "sum":
            share = window_weight
        elif mix == "gate":
            share = near.to(q.dtype).unsqueeze(-1)
        else:
            share = torch.sigmoid(below.log() + largest - near.to(q.dtype).unsqueeze(-1))
    far = top / total.clamp_min(TINY) if own else top
    return (share * above / below + (1 - share) * far if window else far), states[:, :, gone]
