"""The fused ops under the mixer: whether they can serve it, what they are given, and how their outputs meet.

There are two ways. A linear branch that reads what the window cannot see is one op with the window, and so is one that
is all there is: `window_linear`. A branch that reads all tokens, beside a window, under a decay or by the delta rule,
is `gated_linear` or `gated_delta`; the window is then `window_attention`, and both are blended. Tensors are read as the
attention has them, in the model's dtype; states, gates and denominators stay in float32.

Shapes as in mixer.py; padded and packed rows have become one row (fused_tokens.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .feature_maps import SCALED
from .fused_tokens import Tokens, fresh_tokens, later_tokens, remember
from .layout import Layout
from .mixer_state import MixerState
from .softcap import BOUNDED

try:
    from linearize_kernels.backend import pick
    from linearize_kernels.blend import blend
    from linearize_kernels.gated import gated_linear
    from linearize_kernels.gated_delta import gated_delta
    from linearize_kernels.gated_mapped import mapped_gated_linear
    from linearize_kernels.window_attention import window_attention
    from linearize_kernels.window_linear import window_linear
except ImportError:  # an exported model without linearize: torch serves
    pick = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .mixer import Mixer

OWN_MAPS = ("hedgehog_softmax", "hedgehog_exp", "relu", "softmax")
"""Feature maps inside `window_linear`."""
INNER_MAPS = ("hedgehog_exp", "hedgehog_softmax", "learned_softmax", "relu", "crelu", "linear")
"""Feature maps inside `mapped_gated_linear`."""
WIDE_MAPS = ("hedgehog_exp", "hedgehog_softmax", "learned_softmax")
"""Feature maps with a wider range than float16."""
BOUNDED_MAPS = ("softmax", "hedgehog_softmax", "l2norm")
"""Feature maps whose features are at most 1."""
FLOAT16_TOKENS = 8192
"""So many such features, of 1 each, add up values of 8 to what float16 holds."""
WINDOWS = (16, 32, 64, 128)
NORM_EPS = 1e-6


def mix(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    layout: Layout | None,
    cache: Any,
    *,
    dtype: torch.dtype,
) -> Tensor | None:
    """The output [B, H, T, D] in `dtype` by the fused ops, or None where torch is to do it.

    Arguments as Mixer.forward; queries, keys and values are read in `dtype`.

    Raises:
        ValueError: the mixer's backend is `triton` and cannot serve, or is no backend.
    """
    if cache is not None and (mixer.branches != "full" or (q.shape[2] == 1 and layout is None)):
        return None  # refused there, or a single token
    if pick is None:
        if mixer.backend == "triton":
            raise ValueError("backend 'triton' cannot serve this: linearize_kernels is not installed")
        return None
    if pick(mixer.backend, q, k, v, unable=unable(mixer, q, layout, cache, dtype=dtype)) != "triton":
        return None
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    state = None
    if cache is not None:
        state = MixerState(mixer, cache)
        if not cache.is_initialized:
            state.create(q, k)
        state._check_batch(q.shape[0] if layout is None else len(layout.lengths))
        cache.settle()
    if state is None or cache.seen == 0:
        x = fresh_tokens(q, k, v, inputs, rotation, layout, state)
    else:
        x = later_tokens(q, k, v, inputs, rotation, state)
    out, last = attend(mixer, x, keep=state is not None)
    if state is not None:
        remember(state, x, k, v, inputs, last)
    return x.put_back(out)


def unable(
    mixer: Mixer, q: Tensor, layout: Layout | None = None, cache: Any = None, *, dtype: torch.dtype | None = None
) -> str | None:
    """Why no fused op serves this mixer as it is set, or None. `dtype`: in which it would read; None: q's."""
    spec = mixer.spec
    tokens = q.shape[2] + (0 if cache is None else cache.seen)
    if (dtype or q.dtype) == torch.float16 and _beyond_float16(mixer, tokens):
        return f"features of the map {spec.feature_map!r}, or their sums, leave the range of float16; bfloat16 has it"
    if mixer.execution == "quadratic" or mixer.record_weights:
        return "the quadratic form has no kernel"
    if mixer.softcap is not None and spec.window and mixer.branches != "linear" and not BOUNDED:
        return "a bound on attention scores has no kernel in this release of linearize_kernels"
    if spec.feature_map == "taylor" and mixer.branches != "window":
        return "there is no kernel for the map 'taylor'"
    if spec.window and spec.window not in WINDOWS and mixer.branches != "linear":
        return f"the window has {spec.window} tokens, kernels have {', '.join(map(str, WINDOWS))}"
    if spec.lagged and spec.decay != "none" and spec.write == "add":
        return "a decay over what the window cannot see has no kernel; coverage 'all' has one"
    if spec.write == "delta" and spec.dt_gain:
        return "keys of the delta rule that are scaled by a step size have no kernel"
    if spec.lagged and spec.write == "add" and spec.normaliser in ("norm", "scale"):
        return f"normaliser {spec.normaliser!r} of what the window cannot see has no kernel"
    if cache is not None and torch.is_grad_enabled() and q.requires_grad:
        return "a cache that gradients flow through has no kernel"
    if cache is not None and cache.seen and (layout is not None or cache.uniform is None):
        return "rows of unequal length that go on from a cache have no kernel"
    if cache is not None and cache.seen and spec.lagged and spec.write == "delta":
        return "the delta rule over what the window cannot see has no kernel that goes on from a cache"
    if cache is not None and cache.seen and spec.sinks:
        return "sinks that lie in a cache have no kernel"
    return None


def _beyond_float16(mixer: Mixer, tokens: int) -> bool:
    """Whether features of the linear branch, or sums of them over `tokens` kept in the model's dtype, leave float16."""
    spec = mixer.spec
    if spec.write == "none" or mixer.branches == "window":
        return False
    near = bool(spec.window) and mixer.branches != "linear"
    one = _one_op(mixer, near=near)
    if spec.feature_map in WIDE_MAPS and not (one and _own_maps(mixer, near=near)):
        return True
    if not one:  # states are float32 there, or those of the delta rule, which do not add up
        return False
    # Of `window_linear`: features of at most 1 have small enough sums over some tokens, and such as are rounded to
    # nothing are missed only where they make up a denominator.
    apart = spec.normaliser in ("shared", "own") and not (near and spec.mix == "shared")
    return spec.feature_map not in BOUNDED_MAPS or tokens > FLOAT16_TOKENS or (apart and spec.feature_map in WIDE_MAPS)


def _one_op(mixer: Mixer, *, near: bool) -> bool:
    """Whether the linear branch, with the window if `near`, is one call of `window_linear`."""
    spec = mixer.spec
    return spec.write == "add" and spec.decay == "none" and (spec.lagged or not near)


def _own_maps(mixer: Mixer, *, near: bool) -> bool:
    """Whether that call makes the features, of the queries and keys that its window reads."""
    spec = mixer.spec
    plain = spec.key_map == "same" and spec.feature_map in OWN_MAPS
    return plain and not (near and (spec.own_qk or not spec.rope))


def attend(mixer: Mixer, x: Tokens, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Output [N, H, L, D] of whole sequences and, with `keep`, the state after them [N, S, F, D or D + 1]."""
    spec = mixer.spec
    near_wanted = bool(spec.window) and mixer.branches != "linear"
    far_wanted = spec.write != "none" and mixer.branches != "window"
    if far_wanted and _one_op(mixer, near=near_wanted):
        return together(mixer, x, near=near_wanted, keep=keep)
    near = log_sum = far = last = None
    if near_wanted:
        near, log_sum = window_attention(
            x.near_q, x.near_k, x.near_v, window=spec.window, scale=mixer.scaling, sinks=spec.sinks,
            cu_seqlens=x.bounds, backend=mixer.backend, **_bound(mixer),
        )  # fmt: skip
        near, log_sum = x.new_rows(near), x.new_rows(log_sum)
    if far_wanted:
        far, last = far_branch(mixer, x, keep=keep)
        if mixer.record and not spec.lagged:
            mixer.last_linear = x.put_back(far).transpose(1, 2)
    if near is None or far is None:
        found = far if near is None else near
        assert found is not None
        return found, last
    assert log_sum is not None
    return blend(near, far, share_of(mixer, x, log_sum), backend=mixer.backend), last


def together(mixer: Mixer, x: Tokens, *, near: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The linear branch without decay, with the window or alone, in one op; arguments as `attend`."""
    spec = mixer.spec
    options: dict[str, Any] = {}
    q, k, v = (x.near_q, x.near_k, x.near_v) if near else (x.q, x.k, x.v)
    if near:
        options = {"window": spec.window, "sinks": spec.sinks, "mix": spec.mix, "window_weight": spec.window_weight}
        options |= _bound(mixer)
        if spec.mix == "shared":
            options["gamma"] = mixer.window_share(torch.float32)
        elif spec.mix in ("gate", "mass"):
            options[spec.mix] = x.old_rows(x.gate(mixer))
    else:
        options = {"window": 0, "coverage": "all"}
    maps: dict[str, Any] = {"map": spec.feature_map}
    first, copies = x.first_state(mixer, always_z=True), 1
    if _own_maps(mixer, near=near):
        if not near:
            q, k = x.linear_qk(mixer)
            v = v if k.shape[1] == v.shape[1] else _per_state(mixer, v)
        if spec.feature_map == "softmax":  # without weights, states that share a key head are the same
            copies = mixer.state_heads // k.shape[1]
            first = first if first is None else first[:, ::copies]
        for name, module in (("q", mixer.q_map), ("k", mixer.k_map)):
            maps |= {f"{name}_{part}": getattr(module, part) for part in ("weight", "bias") if hasattr(module, part)}
    else:
        fq, fk = x.features(mixer)
        fq = fq * mixer.scaling if spec.feature_map in SCALED else fq
        maps = {"map": "precomputed", "fq": x.old_rows(fq), "fk": fk}
    own = spec.normaliser in ("shared", "own")
    found = window_linear(
        q, k, v, **maps, **options, scale=mixer.scaling, normaliser="own" if own else "none", cu_seqlens=x.bounds,
        state=first, return_state=keep, train=_trained(q, k, v), backend=mixer.backend,
    )  # fmt: skip
    out, last = _both(found)
    last = last if last is None or copies == 1 else last.repeat_interleave(copies, dim=1)
    out = x.new_rows(out) if near else out
    return (out if own or near else finished(mixer, out)), last


def far_branch(mixer: Mixer, x: Tokens, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The linear branch over all tokens, normalised: [N, H, L, D], and with `keep` the state after them."""
    spec = mixer.spec
    g, beta = x.gates(mixer)
    first = x.first_state(mixer)
    options: dict[str, Any] = {"state": first, "return_state": keep, "cu_seqlens": x.bounds, "backend": mixer.backend}
    if spec.write == "delta":
        fq, fk = x.features(mixer)
        lag = spec.lagged and mixer.branches == "full"
        fk = x.without_sinks(fk, spec.sinks) if lag else fk
        assert beta is not None
        rule: dict[str, Any] = {"normalise": True, "lag": lag} | ({"chunk": spec.window} if lag else {})
        found = gated_delta(fq, fk, x.v, beta, g, **rule, **options)
    else:
        options["normaliser"] = "own" if spec.normaliser in ("shared", "own") else "none"
        options["scale"] = mixer.scaling if spec.feature_map in SCALED else 1.0
        if _map_inside(mixer, g):
            q, k = x.linear_qk(mixer)
            k = k[:, :: k.shape[1] // x.v.shape[1]]  # one a key head, where they were repeated for state heads
            options |= {f"{n}_bias": getattr(m, "bias", None) for n, m in (("q", mixer.q_map), ("k", mixer.k_map))}
            options |= {"q_weight": mixer.q_map.weight, "k_weight": mixer.k_map.weight}
            found = mapped_gated_linear(q, k, x.v, g, map=spec.feature_map, **options)
        else:
            found = gated_linear(*x.features(mixer), x.v, g, **options)
    out, last = _both(found)
    return finished(mixer, out), last


def _map_inside(mixer: Mixer, g: Tensor | None) -> bool:
    """Whether features can be made in the op, from queries and keys, so that no tensor of all of them exists."""
    spec = mixer.spec
    own = spec.own_qk and mixer.state_heads != mixer.num_kv_heads  # keys of a state head, not of a key head
    same = spec.key_map == "same" and not own and not spec.dt_gain
    return same and spec.feature_map in INNER_MAPS and (g is None or g.ndim < 4)


def finished(mixer: Mixer, out: Tensor) -> Tensor:
    """What the normaliser does after the op, on [N, H, L, D]: RMSNorm or a factor per head."""
    if mixer.spec.normaliser == "norm":
        # In float32: three roundings more, and gates feel each, for what changes a row's length has no gradient.
        normed = nnf.rms_norm(out.float(), out.shape[-1:], eps=NORM_EPS)
        return (normed * mixer.norm_weight.float()[:, None]).to(out.dtype)
    if mixer.spec.normaliser == "scale":
        return out * mixer.linear_scale.to(out.dtype)[:, None, None]
    return out


def share_of(mixer: Mixer, x: Tokens, log_sum: Tensor) -> Tensor:
    """The window's share [N, H, L], float32, from the log of its softmax sum."""
    spec = mixer.spec
    if spec.mix == "gate":
        return x.gate(mixer)
    if spec.mix == "mass":  # softmax over all keys would divide its mass in the same way
        return torch.sigmoid(log_sum - x.gate(mixer))
    return torch.full_like(log_sum, spec.window_weight)


def _bound(mixer: Mixer) -> dict[str, Any]:
    """The bound on the window's scores; nothing without one, which an earlier release of the kernels did not know."""
    return {} if mixer.softcap is None else {"softcap": mixer.softcap}


def _trained(*tensors: Tensor) -> str:
    """`maps` where no gradient is wanted of queries, keys and values, as in alignment."""
    return "all" if any(x.requires_grad for x in tensors) else "maps"


def _per_state(mixer: Mixer, k: Tensor) -> Tensor:
    """[N, K, L, D] -> [N, S, L, D]."""
    return k if k.shape[1] == mixer.state_heads else k.repeat_interleave(mixer.state_heads // k.shape[1], dim=1)


def _both(found: Any) -> tuple[Tensor, Tensor | None]:
    """What an op gives, with or without a state."""
    return found if isinstance(found, tuple) else (found, None)
