"""What the fused ops read of a call: rows of real tokens in the model's dtype, and what gates make of the input.

Padded and packed batches become one row of M real tokens with the bounds of its sequences. Tokens that go on from a
cache are put behind what the window's ring still holds, so that blocks are counted from where they began.
Shapes as in mixer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .feature_maps import OwnProjection
from .layout import Layout
from .mixer_state import MixerState, take

try:
    from linearize_kernels.unrotate import unrotate, unrotate_and_add
except ImportError:  # an exported model beside an older linearize, or beside none
    unrotate = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .mixer import Mixer

Rotation = tuple[Tensor, Tensor] | None


@dataclass(kw_only=True)
class Tokens:
    """One call of the ops.

    q [N, H, L, D], k, v [N, K, L, D]: the new tokens; near_q, near_k, near_v: the same behind the ring's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Tensor
    rotation: Rotation
    near_q: Tensor
    near_k: Tensor
    near_v: Tensor
    bounds: Tensor | None = None
    """[sequences + 1], where N is 1 and sequences follow one another."""
    layout: Layout | None = None
    index: Tensor | None = None
    """[M]: which tokens of the batch, [B * T] in order, are real; None: all."""
    state: MixerState | None = None
    fresh: bool = True
    """Whether the sequences begin here, and not in a cache."""
    region: Any = None
    """Where the new tokens lie behind the ring's; None: there is nothing before them."""
    known_inputs: Tensor | None = None
    """See `precise_inputs`."""

    # ------------------------------------------------------------------------------------------------------- rows

    def put_back(self, x: Tensor) -> Tensor:
        """[1, H, M, ...] -> [B, H, T, ...] of the batch, zeros at padding."""
        if self.layout is None:
            return x
        batch, length = self.layout.real.shape
        flat = x.transpose(1, 2).flatten(0, 1)
        if self.index is not None:
            flat = flat.new_zeros(batch * length, *flat.shape[1:]).index_copy(0, self.index, flat)
        return flat.unflatten(0, (batch, length)).transpose(1, 2)

    def new_rows(self, x: Tensor) -> Tensor:
        """Of the ops' rows, those of the new tokens: [N, H, region, ...] -> [N, H, L, ...]."""
        return x if self.region is None else take(x, self.region.new)

    def old_rows(self, x: Tensor) -> Tensor:
        """The reverse, zeros before the new tokens."""
        return x if self.region is None else self.region(x, None)

    def without_sinks(self, fk: Tensor, sinks: int) -> Tensor:
        """Keys [N, S, L, F], zero at the first tokens of every sequence, which stay in the softmax for good."""
        if not sinks or not self.fresh:
            return fk
        place = torch.arange(fk.shape[2], device=fk.device)
        if self.bounds is not None:
            place = place - self.bounds[torch.searchsorted(self.bounds, place, right=True) - 1]
        return fk * (place >= sinks)[:, None]

    # -------------------------------------------------------------------------------------------------- ingredients

    def precise(self, x: Tensor) -> Tensor:
        """float32, as gates and maps are computed outside the ops; float64 stays."""
        return x if x.dtype == torch.float64 else x.float()

    def precise_inputs(self) -> Tensor:
        """The layer's input in float32, made once."""
        if self.known_inputs is None:
            self.known_inputs = self.precise(self.inputs)
        return self.known_inputs

    def gate(self, mixer: Mixer) -> Tensor:
        """What a learned mix reads from the input [N, H, L]."""
        found = mixer.gate(self.precise_inputs())
        assert found is not None
        return found

    def linear_qk(self, mixer: Mixer) -> tuple[Tensor, Tensor]:
        """Queries [N, H, L, D] and keys [N, K or S, L, D] as the linear branch sees them, in the model's dtype."""
        spec = mixer.spec
        if not spec.own_qk and (spec.rope or self.rotation is None):
            return self.q, self.k
        if not spec.own_qk and self.rotation is not None and unrotate is not None:
            q, k = (unrotate(x, *self.rotation, backend=mixer.backend) for x in (self.q, self.k))
            return q, k
        if (spec.rope and self.rotation is not None) or unrotate is None:
            q, k = self.precise(self.q), self.precise(self.k)
            q, k = mixer.linear_qk(q, k, self.precise_inputs(), self.rotation)
            return q.to(self.q.dtype), k.to(self.k.dtype)
        # Own projections are as large as the teacher's, and multiply in the same dtype; sums are float32, rounded once.
        inputs = self.inputs.to(self.q.dtype)
        groups = mixer.state_heads // mixer.num_kv_heads
        k = self.k if groups == 1 else self.k.repeat_interleave(groups, dim=1)
        return self._with_own(mixer, self.q, mixer.q_own, inputs), self._with_own(mixer, k, mixer.k_own, inputs)

    def _with_own(self, mixer: Mixer, x: Tensor, projection: OwnProjection, inputs: Tensor) -> Tensor:
        """x [N, H, L, D], turned back where there is a rotation, and what its own projection adds; x's dtype."""
        own = projection.products(inputs)
        if self.rotation is None:
            return torch.add(x, own, alpha=projection.factor)
        return unrotate_and_add(x, *self.rotation, own, projection.factor, backend=mixer.backend)

    def gates(self, mixer: Mixer) -> tuple[Tensor | None, Tensor | None]:
        """Log decay, [S] where it is fixed, and write strength; float32, None where the spec has none."""
        spec, beta = mixer.spec, None
        if spec.decay == "fixed" and spec.write == "add":
            return mixer.decay.log_gamma.float(), None
        inputs, key = self.precise_inputs(), self.k
        if spec.decay == "key":
            _, key = mixer.linear_qk(self.precise(self.q), self.precise(self.k), inputs, self.rotation)
        g, beta = mixer.gates(inputs, key)
        return g, beta

    def features(self, mixer: Mixer) -> tuple[Tensor, Tensor]:
        """phi(q) [N, H, L, F], not scaled by the temperature of scores, and phi(k) [N, S, L, F], the model's dtype.

        For the delta rule they have not been made of length one yet.
        """
        spec, dtype = mixer.spec, self.q.dtype
        q, k = self.linear_qk(mixer)
        groups = mixer.state_heads // k.shape[1]
        k = k if groups == 1 else k.repeat_interleave(groups, dim=1)
        asis = "l2norm" if spec.write == "delta" else "identity"
        if spec.feature_map == asis and spec.key_map == "same" and not spec.dt_gain:
            return q, k
        q, k = self.precise(q), self.precise(k)
        if spec.key_map == "forget":
            fq, fk = mixer.q_map(q), 1.0 - k.sigmoid()
        else:
            fq, fk = mixer.q_map(q), mixer.k_map(k)
        if spec.dt_gain:
            g = self.gates(mixer)[0]
            assert g is not None
            fk = fk * mixer.decay.step_size(g).unsqueeze(-1)
        return fq.to(dtype), fk.to(dtype)

    def first_state(self, mixer: Mixer, *, always_z: bool = False) -> Tensor | None:
        """The state before the new tokens [N, S, F, V], with the denominator's column where the spec keeps one."""
        if self.state is None or self.fresh:
            return None
        joined = self.state._joined()
        return nnf.pad(joined, (0, 1)) if always_z and joined.shape[-1] == mixer.head_dim else joined


def fresh_tokens(
    q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, rotation: Rotation, layout: Layout | None, state: MixerState | None
) -> Tokens:
    """Whole sequences from their start; arguments as Mixer.forward."""
    if layout is None:
        given: dict[str, Any] = {"q": q, "k": k, "v": v, "inputs": inputs, "rotation": rotation}
        return Tokens(**given, near_q=q, near_k=k, near_v=v, state=state)
    batch = layout.real.shape[0]
    found = layout.real.flatten().nonzero().squeeze(1)
    index = None if len(found) == layout.real.numel() else found

    def packed(x: Tensor, dim: int) -> Tensor:
        x = x.expand(batch, *x.shape[1:]).movedim(dim, 1).flatten(0, 1)
        return (x if index is None else x[index]).unsqueeze(0).movedim(1, dim)

    q, k, v = (packed(x, 2) for x in (q, k, v))
    turned = None if rotation is None else (packed(rotation[0], 1), packed(rotation[1], 1))
    bounds = nnf.pad(layout.lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Tokens(
        q=q, k=k, v=v, inputs=packed(inputs, 1), rotation=turned, near_q=q, near_k=k, near_v=v, bounds=bounds,
        layout=layout, index=index, state=state,
    )  # fmt: skip


def later_tokens(q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, rotation: Rotation, state: MixerState) -> Tokens:
    """Tokens that go on from a cache whose rows have all read as many."""
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "inputs": inputs, "rotation": rotation, "state": state}
    if not state.mixer.spec.window:
        return Tokens(**given, near_q=q, near_k=k, near_v=v, fresh=False)
    region = state._region(state.tensors["position"], q.shape[2])
    near: dict[str, Any] = {"near_q": region(q, None), "near_k": region(k, "ring_k"), "near_v": region(v, "ring_v")}
    return Tokens(**given, **near, fresh=False, region=region)


@torch.no_grad()
def remember(state: MixerState, x: Tokens, k: Tensor, v: Tensor, inputs: Tensor, last: Tensor | None) -> None:
    """Write the state after the tokens, their last two blocks and the sinks to the cache.

    Args:
        k, v, inputs: the call's keys and values [B, K, T, D] and input [B, T, C], as Mixer.forward was given them.
        last: [B, S, F, D or D + 1], or None where there is no linear branch.
    """
    mixer, spec = state.mixer, state.mixer.spec
    parts: dict[str, Tensor] = {"k": k, "v": v}
    if spec.lagged and spec.write == "delta":  # written with these once a block leaves the window
        g, beta = mixer.gates(x.precise(inputs), k)
        parts |= {name: made for name, made in (("g", g), ("beta", beta)) if made is not None}
    if last is not None:
        state._keep(last)
    if x.layout is None and x.fresh:
        state.begin(parts)
        return
    before = state.tensors["position"].clone()
    if x.layout is None:
        after = before + k.shape[2]
    else:
        parts = {name: x.layout.gather(part, 2) for name, part in parts.items()}
        after = before + x.layout.lengths
    state._store_sinks(parts["k"], parts["v"], before, after)
    if spec.window:
        if x.region is None:
            state._store_ring(parts, torch.zeros_like(before), after)
        else:
            state._store_ring({"k": x.near_k, "v": x.near_v}, x.region.start, after)
    state._put("position", after)
    state.cache.count(k.shape[2] if x.layout is None else None)
