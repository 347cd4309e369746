"""The mixer: one small formula, three executions.

It takes queries, keys and values exactly as the teacher's attention would use them, and gives the output of every
head. `quadratic` writes out all weights (tests, audits, weight transfer), `chunked` is linear in time and memory
(training and prefill), `step` reads one token (decode). All compute in float32 whatever the model's dtype.

Shapes: B batch, N sequences, H query heads, K key heads, S state heads (H or K), R = H/S, T tokens, L aligned tokens,
D head channels, F features, V = D, or D + 1 where a column of ones carries the denominator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import nn

from .feature_maps import SCALED, FeatureMap, OwnProjection, feature_size, set_start_values, start_values
from .fused import mix as fused_mix
from .gates import Decay, TokenGate, TokenScore
from .layout import Layout
from .mixer_spec import MixerSpec
from .mixer_state import MixerState
from .offload import at_hand, hooked_parts
from .rotary import rotate, unrotate
from .softcap import chunk_window, window_weights
from .stretches import CHUNK, in_stretches

try:
    from linearize_kernels import block_window_mask, chunk_delta, chunk_linear, linear_weights
except ImportError:  # an exported model without linearize: the same files lie beside this one
    from .delta import chunk_delta  # type: ignore[import-not-found,no-redef]
    from .linear import chunk_linear  # type: ignore[import-not-found,no-redef]
    from .quadratic import linear_weights  # type: ignore[import-not-found,no-redef]
    from .window import block_window_mask  # type: ignore[import-not-found,no-redef]

BRANCHES = ("full", "window", "linear", "none")
TINY = 1e-30
NORM_EPS = 1e-6


class Mixer(nn.Module):
    """Linear attention of one layer, as `spec` says.

    `branches` switches parts off for audits and training: `window` is the softmax window alone, `linear` the linear
    branch alone and then over all past tokens, `none` gives zeros. `record` keeps `last_output` [B, T, H, D], and in
    `last_linear`, likewise, what the linear branch gives alone, where it reads the same tokens in the mix;
    `record_weights` keeps `last_weights` [N, H, L, L], each pair's share of the row, and runs the quadratic form.
    `backend` is auto, torch or triton: which kernels mix whole sequences (fused.py) and single tokens.
    `softcap` bounds the window's scores as the teacher does its own (softcap.py).
    """

    def __init__(
        self, spec: MixerSpec, *, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, scaling: float
    ) -> None:
        super().__init__()
        self.spec, self.scaling = spec, scaling
        self.softcap: float | None = None
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.state_heads = num_heads if spec.state_heads == "query" else num_kv_heads
        self.features = 0 if spec.write == "none" else feature_size(spec.feature_map, head_dim, spec.feature_dim)
        self.value_size = head_dim + (spec.normaliser in ("shared", "own"))
        self.branches = "full"
        self.execution = "chunked"
        self.backend = "auto"
        self.record = self.record_weights = False
        self.last_output: torch.Tensor | None = None
        self.last_linear: torch.Tensor | None = None
        self.last_weights: torch.Tensor | None = None

        self.q_map = FeatureMap(spec.feature_map, num_heads, head_dim, spec.feature_dim)
        self.k_map = FeatureMap(spec.feature_map, self.state_heads, head_dim, spec.feature_dim)
        self.decay = Decay(
            spec.decay, power=spec.decay_power, hidden_size=hidden_size, heads=self.state_heads, features=self.features
        )
        if spec.own_qk:
            self.q_own = OwnProjection(hidden_size, num_heads, head_dim)
            self.k_own = OwnProjection(hidden_size, self.state_heads, head_dim)
        if spec.write == "delta":
            self.beta = TokenGate(hidden_size, self.state_heads, 0.5)
        if spec.mix == "gate" and spec.window:
            self.mix_gate = TokenGate(hidden_size, num_heads, spec.window_weight)
        if spec.mix == "mass" and spec.window:
            # As if all scores were zero: the window's log mass is then about log(3/2 W).
            odds = (1 - spec.window_weight) / spec.window_weight
            self.far_mass = TokenScore(hidden_size, num_heads, math.log(1.5 * spec.window * odds))
        if spec.normaliser == "scale":
            self.linear_scale = nn.Parameter(torch.empty(num_heads))
        if spec.normaliser == "shared":
            self.window_logit = nn.Parameter(torch.empty(num_heads))
        if spec.normaliser == "norm":
            self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()

    @property
    def scores(self) -> dict[str, Any]:
        """What makes the window's scores of q.k."""
        return {"scale": self.scaling, "softcap": self.softcap}

    @start_values
    def initial_values(self) -> dict[str, torch.Tensor]:
        """Start value of every parameter and buffer of the mixer, by name, on the CPU in float32; none on meta."""
        values: dict[str, torch.Tensor] = {}
        for name, module in self.named_children():
            made = module.initial_values()  # type: ignore[operator]
            values |= {f"{name}.{key}": value for key, value in made.items()}
        if self.spec.normaliser == "shared":
            weight = self.spec.window_weight
            values["window_logit"] = torch.full((self.num_heads,), math.log(weight / (1 - weight)))
        if self.spec.normaliser == "scale":
            values["linear_scale"] = torch.ones(self.num_heads)
        if self.spec.normaliser == "norm":
            values["norm_weight"] = torch.ones(self.num_heads, self.head_dim)
        return values

    def reset_parameters(self) -> None:
        """Initialise everything that no checkpoint has set."""
        set_start_values(self)

    # ------------------------------------------------------------------------------------------------- executions

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        inputs: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        layout: Layout | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        """Mix tokens.

        Args:
            q: [B, H, T, D]; k, v: [B, K, T, D], after q/k norm and RoPE, any float dtype.
            inputs: the attention layer's input [B, T, C], for gates.
            rotation: RoPE's (cos, sin), [B or 1, T, D] each; needed where the linear branch undoes it.
            layout: where the sequences lie, if rows are padded or packed.
            cache: a LinearStateLayer to continue from and write to, or None.

        Returns:
            [B, T, H, D] in q's dtype (the fused ops: in autocast's, where it is on); zeros at padding.
        """
        if parts := hooked_parts(self):
            with at_hand(parts):
                return self._mix(q, k, v, inputs, rotation, layout, cache)
        return self._mix(q, k, v, inputs, rotation, layout, cache)

    def _mix(self, q, k, v, inputs, rotation, layout, cache) -> torch.Tensor:  # type: ignore[no-untyped-def]
        dtype, length, kind = q.dtype, q.shape[2], q.device.type
        wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        with torch.autocast(kind, enabled=False):
            if self.branches == "none" or (self.branches == "linear" and self.spec.write == "none"):
                out = torch.zeros_like(q)
            elif (found := fused_mix(self, q, k, v, inputs, rotation, layout, cache, dtype=wanted)) is not None:
                out, dtype = found, wanted
            elif cache is None:
                out = self._aligned(q, k, v, inputs, rotation, layout, None)
            else:
                out = self._cached(q, k, v, inputs, rotation, layout, cache)
        if cache is not None:
            cache.seen += length
        out = out.transpose(1, 2).to(dtype)
        if self.record:
            self.last_output = out
        return out

    def _cached(self, q, k, v, inputs, rotation, layout, cache) -> torch.Tensor:  # type: ignore[no-untyped-def]
        if self.branches != "full":
            raise ValueError(f"branches {self.branches!r} is for whole sequences; use_cache must be False")
        state = MixerState(self, cache)
        if not cache.is_initialized:
            state.create(q, k)
        if q.shape[2] == 1 and layout is None:
            return state.read_token(q, k, v, inputs, rotation)
        return self._aligned(q, k, v, inputs, rotation, layout, state)

    def token_parts(self, q, k, v, inputs, rotation):  # type: ignore[no-untyped-def]
        """What one token brings, each without its time axis."""
        q, k, v, inputs = _precise(q, k, v, inputs)
        q_lin, k_lin = self.linear_qk(q, k, inputs, rotation)
        g, beta = self.gates(inputs, k_lin)
        fq, fk = self.map_queries(q_lin), self.map_keys(k_lin, g)
        token = (q, k, v, fq.flatten(1, 2), fk, g, beta, self.gate(inputs))
        return tuple(None if x is None else x.squeeze(2) for x in token)

    def _aligned(self, q, k, v, inputs, rotation, layout, state):  # type: ignore[no-untyped-def]
        """Whole stretches of tokens: align left, mix, put back; out [B, H, T, D]."""
        valid = None
        if layout is not None:
            q, k, v = (layout.gather(x, 2) for x in (q, k, v))
            inputs = layout.gather(inputs, 1)
            rotation = None if rotation is None else tuple(layout.gather(x, 1) for x in rotation)
            valid = layout.valid
        out = in_stretches(self, q, k, v, inputs, rotation, valid, state)
        return out if layout is None else layout.scatter(out, 2)

    def stretch(self, q, k, v, inputs, rotation, valid, state):  # type: ignore[no-untyped-def]
        """Aligned tokens by the execution that is asked for: out [N, H, L, D]."""
        q, k, v, inputs = _precise(q, k, v, inputs)
        q_lin, k_lin = self.linear_qk(q, k, inputs, rotation)
        g, beta = self.gates(inputs, k_lin)
        gate = self.gate(inputs)
        if self.execution == "quadratic" or self.record_weights:
            if state is not None:
                raise ValueError("the quadratic execution has no state; use_cache must be False")
            return self._quadratic(q, k, v, q_lin, k_lin, g, beta, gate)
        if state is not None:
            return state.extend(q, k, v, q_lin, k_lin, g, beta, gate, valid)
        return self._chunked(q, k, v, q_lin, k_lin, g, beta, gate)

    def _chunked(self, q, k, v, q_lin, k_lin, g, beta, gate) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """A whole sequence from its start: out [N, H, L, D]."""
        window = linear = None
        sinks = self.spec.sinks
        if self.spec.window and self.branches != "linear":
            sink = (k[:, :, :sinks], v[:, :, :sinks]) if sinks else (None, None)
            window = self.window_branch(q, k, v, *sink, first_block=0)
        if self.branches != "window" and self.spec.write != "none":
            lag = self.spec.lagged and self.branches == "full"
            fk = self.map_keys(k_lin, g)
            if lag and sinks:
                fk = torch.cat((torch.zeros_like(fk[:, :, :sinks]), fk[:, :, sinks:]), dim=2)
            linear, _ = self.linear_branch(self.map_queries(q_lin), fk, v, g, beta, lag=lag)
        return self.combine(window, linear, gate)

    def _quadratic(self, q, k, v, q_lin, k_lin, g, beta, gate) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """The definition, from the weights of all pairs: out [N, H, L, D]."""
        spec, length = self.spec, q.shape[2]
        values = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        seen = block_window_mask(length, spec.window, spec.sinks, q.device) if spec.window else None
        window = linear = largest = None
        if seen is not None and self.branches != "linear":
            grouped = q.unflatten(1, (self.num_kv_heads, -1))
            window, largest = (x.flatten(1, 2) for x in window_weights(grouped, k, **self.scores, seen=seen))
        if self.branches != "window" and spec.write != "none":
            covered, fk = causal, self.map_keys(k_lin, g)
            if seen is not None and spec.lagged and self.branches == "full":
                covered = causal & ~seen
                fk = torch.cat((torch.zeros_like(fk[:, :, : spec.sinks]), fk[:, :, spec.sinks :]), dim=2)
            linear = linear_weights(self.map_queries(q_lin), fk, log_decay=g, beta=beta, covered=covered).flatten(1, 2)
        if spec.normaliser == "norm" and linear is not None and not self.record_weights:
            ones = None if window is None else (window @ values, window.sum(-1, keepdim=True), largest)
            return self.combine(ones, linear @ values, gate)
        weights = self._row_weights(window, largest, linear, gate)
        if self.record_weights:
            self.last_weights = weights
        return weights @ values

    def _row_weights(self, window, largest, linear, gate) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Weight of every value in every output [N, H, L, L]."""
        normaliser = self.spec.normaliser
        if linear is None:
            return window / window.sum(-1, keepdim=True)
        if normaliser == "norm":
            raise ValueError("weights of single pairs: an output norm (normaliser 'norm') leaves none")
        if window is not None and normaliser == "shared":
            total = window * self.window_share(window.dtype)[:, None, None] + linear
            return total / total.sum(-1, keepdim=True)
        if normaliser in ("shared", "own"):
            linear = linear / linear.sum(-1, keepdim=True).clamp_min(TINY)
        elif normaliser == "scale":
            linear = self._scaled(linear)
        if window is None:
            return linear
        total = window.sum(-1, keepdim=True)
        share = self._share(total, largest, gate)
        return share * window / total + (1 - share) * linear

    # --------------------------------------------------------------------------------------------------- ingredients

    def linear_qk(self, q, k, inputs, rotation):  # type: ignore[no-untyped-def]
        """Queries [N, H, L, D] and keys [N, S, L, D] as the linear branch sees them."""
        if not self.spec.rope and rotation is not None:
            q, k = unrotate(q, *rotation), unrotate(k, *rotation)
        k = k.repeat_interleave(self.state_heads // self.num_kv_heads, dim=1)
        if self.spec.own_qk:
            q_own, k_own = self.q_own(inputs), self.k_own(inputs)
            if self.spec.rope and rotation is not None:
                q_own, k_own = rotate(q_own, *rotation), rotate(k_own, *rotation)
            q, k = q + q_own, k + k_own
        return q, k

    def gates(self, inputs: torch.Tensor, k_lin: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Log decay [N, S, L] or [N, S, L, F], and write strength [N, S, L]; None where the spec has none."""
        beta = None
        if self.spec.write == "delta":
            beta = self.beta(inputs) * (2.0 if self.spec.negative_eigenvalues else 1.0)
        return self.decay(inputs, k_lin), beta

    def gate(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """What a learned mix reads from the input: the window's share, or the log mass of the rest [N, H, L]."""
        if not self.spec.window or self.spec.mix not in ("gate", "mass"):
            return None
        made: torch.Tensor = (self.mix_gate if self.spec.mix == "gate" else self.far_mass)(inputs)
        return made

    def map_queries(self, q_lin: torch.Tensor) -> torch.Tensor:
        """phi(q): [N, H, L, D] -> [N, S, R, L, F]."""
        fq = self._unit(self.q_map(q_lin))
        if self.spec.feature_map in SCALED and self.spec.write != "delta":
            fq = fq * self.scaling
        return fq.unflatten(1, (self.state_heads, -1))

    def map_keys(self, k_lin: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        """phi(k): [N, S, L, D] -> [N, S, L, F], times the step size where that is what is written."""
        if self.spec.key_map == "forget":
            return 1.0 - k_lin.sigmoid()
        fk = self._unit(self.k_map(k_lin))
        return fk * self.decay.step_size(g).unsqueeze(-1) if self.spec.dt_gain and g is not None else fk

    def _unit(self, features: torch.Tensor) -> torch.Tensor:
        """The delta rule reads and writes along directions; other features stay as they are."""
        if self.spec.write != "delta" or self.spec.feature_map == "l2norm":
            return features
        return nnf.normalize(features, dim=-1, eps=NORM_EPS)

    def values(self, v: torch.Tensor) -> torch.Tensor:
        """[N, K, ..., D] -> [N, S, ..., V]: per state head, with a column of ones where a denominator is kept."""
        v = v.repeat_interleave(self.state_heads // self.num_kv_heads, dim=1)
        return nnf.pad(v, (0, 1), value=1.0) if self.value_size > self.head_dim else v

    def linear_branch(self, fq, fk, v, g, beta, *, lag, state=None):  # type: ignore[no-untyped-def]
        """Unnormalised output [N, H, L, V] of the linear branch, and the states at chunk boundaries."""
        chunk = self.spec.window if lag else CHUNK
        options: dict[str, Any] = {"log_decay": g, "state": state, "chunk": chunk, "lag": lag}
        if self.spec.write == "delta":
            out, states = chunk_delta(fq, fk, self.values(v), beta, **options)
        else:
            out, states = chunk_linear(fq, fk, self.values(v), **options)
        return out.flatten(1, 2), states

    def window_branch(self, q, k, v, sink_k, sink_v, *, first_block):  # type: ignore[no-untyped-def]
        """Of the softmax window: unnormalised numerator [N, H, L, D], denominator and largest score [N, H, L, 1]."""
        grouped = q.unflatten(1, (self.num_kv_heads, -1))
        options: dict[str, Any] = {"sink_k": sink_k, "sink_v": sink_v, "first_block": first_block}
        found = chunk_window(grouped, k, v, window=self.spec.window, **self.scores, **options)
        return tuple(x.flatten(1, 2) for x in found)

    def combine(self, window, linear, gate) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Both branches' unnormalised results to the output [N, H, L, D]. A branch left alone gets all the weight."""
        normaliser = self.spec.normaliser
        if window is not None and linear is not None and normaliser == "shared":
            gamma = self.window_share(linear.dtype)[:, None, None]
            numerator = gamma * window[0] + linear[..., :-1]
            return numerator / (gamma * window[1] + linear[..., -1:])
        if linear is not None:
            if normaliser in ("shared", "own"):
                linear = linear[..., :-1] / linear[..., -1:].clamp_min(TINY)
            elif normaliser == "norm":
                linear = self._norm(linear)
            elif normaliser == "scale":
                linear = self._scaled(linear)
            if self.record and not self.spec.lagged:
                self.last_linear = linear.transpose(1, 2)
            if window is None:
                return linear
        softmax = window[0] / window[1]
        if linear is None:
            return softmax
        share = self._share(window[1], window[2], gate)
        return share * softmax + (1 - share) * linear

    def _share(self, total, largest, gate):  # type: ignore[no-untyped-def]
        """The window's share of the output [N, H, L, 1], from its softmax sum `total` relative to exp(largest)."""
        if gate is None:
            return self.spec.window_weight
        if self.spec.mix == "mass":  # softmax over all keys would divide its mass in the same way
            return torch.sigmoid(total.log() + largest - gate.unsqueeze(-1))
        return gate.unsqueeze(-1)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.linear_scale.to(x.dtype)[:, None, None]

    def window_share(self, dtype: torch.dtype) -> torch.Tensor:
        """gamma, the window's weight in the shared mix: [H]."""
        return self.window_logit.to(dtype).sigmoid()

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return scaled * self.norm_weight.to(x.dtype)[:, None]


def _precise(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """float32 whatever the model's dtype, for states drift in less; float64 stays, for tests."""
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)
