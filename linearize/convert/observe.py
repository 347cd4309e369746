"""What calibration needs to know of a layer: how far the teacher's heads look, and what a student's gates read.

Everything is gathered window by window in one forward pass of the teacher; nothing carries gradients. Shapes: H query
heads, S state heads (H or HK), C hidden size, T tokens of a window, n sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as nnf
from torch import Tensor

from linearize.convert.capture import TeacherLayer
from linearize.modeling.mixer import Mixer
from linearize_kernels import block_window_mask

SAMPLE = 4096
"""Most tokens of a layer whose input is kept: the means of gates are solved for on these."""
LEAST = 1e-30
"""Least share of attention whose logarithm is taken."""
LOG_ODDS = 8.0
"""Shares are matched within these log odds: what lies beyond cannot be seen in the output, but would rule a fit."""
BOUND = 30.0
"""Biases are looked for in [-BOUND, BOUND]."""
GATE_VALUES = 1 << 22
"""Most values of a per-channel gate that its mean is taken over."""


@dataclass(frozen=True, kw_only=True)
class MixerCall:
    """What a student's mixer reads on one window."""

    q: Tensor
    """[1, H, T, D] fp32, after q/k norm and RoPE."""
    k: Tensor
    """[1, HK, T, D]"""
    v: Tensor
    inputs: Tensor
    """[1, T, C]: the layer's input."""
    rotation: tuple[Tensor, Tensor] | None


def mixer_call(attention: torch.nn.Module, layer: TeacherLayer) -> MixerCall:
    """The student's own projections of the teacher's input, as they reach its mixer (which does not run)."""
    mixer: Mixer = attention.mixer  # type: ignore[assignment]
    taken: list[MixerCall] = []

    def take(module, args, kwargs) -> None:  # type: ignore[no-untyped-def]
        q, k, v = (x.float() for x in args)
        taken.append(MixerCall(q=q, k=k, v=v, inputs=kwargs["inputs"].float(), rotation=kwargs["rotation"]))

    handle = mixer.register_forward_pre_hook(take, with_kwargs=True)
    before, mixer.branches = mixer.branches, "none"
    try:
        attention(layer.hidden_states, **layer.kwargs)
    finally:
        handle.remove()
        mixer.branches = before
    return taken[0]


def window_of(mixer: Mixer, call: MixerCall) -> tuple[Tensor, Tensor, Tensor] | None:
    """The softmax window's numerator [1, H, T, D], denominator and largest score [1, H, T, 1]; None: no window."""
    if not mixer.spec.window:
        return None
    sinks = mixer.spec.sinks
    sink = (call.k[:, :, :sinks], call.v[:, :, :sinks]) if sinks else (None, None)
    found: tuple[Tensor, Tensor, Tensor] = mixer.window_branch(call.q, call.k, call.v, *sink, first_block=0)
    return found


def linear_of(mixer: Mixer, call: MixerCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The linear branch's unnormalised output [1, H, T, V] as it is in the mix, log decay and write strength."""
    q_lin, k_lin = mixer.linear_qk(call.q, call.k, call.inputs, call.rotation)
    g, beta = mixer.gates(call.inputs, k_lin)
    fk, sinks = mixer.map_keys(k_lin, g), mixer.spec.sinks
    if mixer.spec.lagged and sinks:
        fk = torch.cat((torch.zeros_like(fk[:, :, :sinks]), fk[:, :, sinks:]), dim=2)
    out, _ = mixer.linear_branch(mixer.map_queries(q_lin), fk, call.v, g, beta, lag=mixer.spec.lagged)
    return out, g, beta


def reach(mixer: Mixer, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs beyond the window and the sinks [T, T] bool, and tokens that have any [T] bool; without a window, all."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if mixer.spec.window:
        causal &= ~block_window_mask(length, mixer.spec.window, mixer.spec.sinks, device)
    return causal, causal.any(dim=1)


@dataclass(kw_only=True)
class Observed:
    """Sums over the windows seen so far; per-token lists cover tokens that have something beyond the window."""

    rows: int = 0
    """Tokens seen."""
    near_look: Tensor | float = 0.0
    """[H] fp64: sum over rows of the mean look-back distance of all attention, in tokens."""
    far_look: Tensor | float = 0.0
    """[H]: the same of what lies beyond the window."""
    far_mass: Tensor | float = 0.0
    """[H]: sum over rows of the share of attention beyond the window."""
    spread: Tensor | float = 0.0
    """[H]: sum over rows of the entropy of the row over its largest, log(keys)."""
    gram: Tensor | float = 0.0
    """[C + 1, C + 1] fp64: of the inputs with a one appended."""
    cross: Tensor | float = 0.0
    """[C + 1, H] fp64: of those with the score that a learned mix should give."""
    keys: list[Tensor] = field(default_factory=list)
    """[S, n, D] each: keys of the linear branch, of all tokens; where the map learns codes."""
    inputs: list[Tensor] = field(default_factory=list)
    """[n, C] each."""
    share: list[Tensor] = field(default_factory=list)
    """[n, H]: the teacher's share of attention in window and sinks."""
    balance: list[Tensor] = field(default_factory=list)
    """[n, H]: the log odds of the student's window that no parameter of the mix sets: its log mass (mix `mass`), that
    less the linear branch's (`shared`), zero (`gate`)."""

    def distance(self, which: str, heads: int) -> Tensor:
        """Mean look-back in tokens [heads] fp64 of `all` attention or of what is `far`; at least half a token.

        Query heads that share a state are averaged; far attention counts by its mass. Where there is none, all counts.
        """
        assert isinstance(self.near_look, Tensor) and isinstance(self.far_look, Tensor)
        assert isinstance(self.far_mass, Tensor)
        everything = self.near_look.unflatten(0, (heads, -1)).mean(1) / self.rows
        if which == "far":
            mass, look = (x.unflatten(0, (heads, -1)).sum(1) for x in (self.far_mass, self.far_look))
            everything = torch.where(mass > self.rows * 1e-6, look / mass.clamp_min(LEAST), everything)
        return everything.clamp_min(0.5)

    def mean_share(self) -> float | None:
        """The teacher's share of attention in window and sinks, over heads and sampled tokens; None: all is near."""
        return float(torch.cat(self.share).double().mean()) if self.share else None

    def entropy(self, heads: int) -> Tensor:
        """Mean entropy of the rows over log(keys), in [0, 1]: [heads] fp64."""
        assert isinstance(self.spread, Tensor)
        return self.spread.unflatten(0, (heads, -1)).mean(1) / self.rows

    def add(self, mixer: Mixer, layer: TeacherLayer, call: MixerCall, *, every: int, offset: int) -> None:
        """Take in one window; of its tokens, every `every`-th from `offset` on goes into the sample."""
        assert layer.weights is not None
        weights = layer.weights[0]
        length = weights.shape[-1]
        position = torch.arange(length, dtype=weights.dtype, device=weights.device)
        pairs, has_far = reach(mixer, length, weights.device)
        beyond = weights * pairs
        far = beyond.sum(-1)  # [H, T]
        near = (weights * ~pairs).sum(-1)
        surprise = -(weights * weights.clamp_min(LEAST).log()).sum(-1)[:, 1:] / (position[1:] + 1).log()
        self.rows += length
        self.near_look += (position - weights @ position).sum(-1, dtype=torch.float64)
        self.far_look += (far * position - beyond @ position).sum(-1, dtype=torch.float64)
        self.far_mass += far.sum(-1, dtype=torch.float64)
        self.spread += surprise.sum(-1, dtype=torch.float64) * length / max(1, length - 1)
        part = slice(offset % every, None, every)
        if mixer.spec.feature_map == "learned_softmax":
            self.keys.append(mixer.linear_qk(call.q, call.k, call.inputs, call.rotation)[1][0, :, part])
        kept = has_far.nonzero().squeeze(1)
        if not len(kept):
            return
        inputs, share = call.inputs[0, kept], near[:, kept].T
        balance = self._balance(mixer, call, kept)
        if mixer.spec.window and mixer.spec.mix in ("gate", "mass"):
            odds = (share.clamp_min(LEAST).log() - far[:, kept].T.clamp_min(LEAST).log()).clamp(-LOG_ODDS, LOG_ODDS)
            wide = nnf.pad(inputs, (0, 1), value=1.0).double()
            self.gram += wide.T @ wide
            self.cross += wide.T @ (odds if mixer.spec.mix == "gate" else balance - odds).double()
        self.inputs.append(inputs[part])
        self.share.append(share[part])
        self.balance.append(balance[part])

    def _balance(self, mixer: Mixer, call: MixerCall, kept: Tensor) -> Tensor:
        window = window_of(mixer, call) if mixer.spec.mix in ("mass", "shared") else None
        if window is None:
            return call.inputs.new_zeros(len(kept), mixer.num_heads)
        mass = window[1].log()
        mass = mass + window[2] if mixer.spec.mix == "mass" else mass - linear_of(mixer, call)[0][..., -1:].log()
        return mass[0, :, kept, 0].T


def solve_bias(mean: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """The bias [S] fp64 at which `mean`, rising in each bias, is `target` [S] fp64; to 1e-10 in [-BOUND, BOUND]."""
    low, high = torch.full_like(target, -BOUND), torch.full_like(target, BOUND)
    for _ in range(40):  # 60 / 2^40
        middle = (low + high) / 2
        short = mean(middle) < target
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (low + high) / 2


def decay_bias(mixer: Mixer, inputs: Tensor, half_life: Tensor) -> dict[str, Tensor]:
    """The decay's bias at which its mean over `inputs` [n, C] halves a state head's memory in `half_life` [S] tokens.

    Log decays add up along a sequence, so it is their mean that is set: E[-g] = ln 2 / half-life, over tokens and, for
    a per-channel gate, over its channels, whose biases move together.
    """
    decay, rate = mixer.decay, math.log(2) / half_life
    if decay.kind == "scalar":
        score = (inputs @ decay.weight.T).double()
        scale = decay.a_log.double().exp()
        return {"decay.dt_bias": solve_bias(lambda b: scale * nnf.softplus(score + b).mean(0), rate).float()}
    if decay.kind == "channel":
        inputs = inputs[:: 1 + len(inputs) * len(decay.bias) // GATE_VALUES]
        score = (inputs @ decay.down.T @ decay.up.T + decay.bias).double().unflatten(-1, (decay.heads, -1))
        power = decay.power
        shift = solve_bias(lambda b: power * nnf.logsigmoid(score + b[:, None]).mean((0, 2)), -rate)
        return {"decay.bias": decay.bias + shift.float().repeat_interleave(decay.features)}
    return {}


def write_bias(mixer: Mixer, inputs: Tensor, strength: Tensor) -> dict[str, Tensor]:
    """The bias at which the delta rule's mean write strength over `inputs` [n, C] is `strength` [S]."""
    if mixer.spec.write != "delta":
        return {}
    score = (inputs @ mixer.beta.weight.T).double()
    top = 2.0 if mixer.spec.negative_eigenvalues else 1.0
    return {"beta.bias": solve_bias(lambda b: top * torch.sigmoid(score + b).mean(0), strength).float()}


def ridge(gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [H, C] and bias [H], fp64, of a linear map of the inputs fitted to scores by penalised least squares.

    The penalty takes w.x to have variance one and the score's noise too: lambda = E|x|^2. The bias is free.
    """
    count, inner = gram[-1, -1], gram[:-1, :-1]
    penalty = torch.zeros_like(gram)
    penalty[:-1, :-1].diagonal().fill_(inner.diagonal().sum() / count)
    found = torch.linalg.solve(gram + penalty, cross)
    return found[:-1].T.contiguous(), found[-1]


def mix_values(mixer: Mixer, seen: Observed) -> dict[str, Tensor]:
    """The mix at which the window's mean share, of tokens with something beyond it, is the teacher's.

    gate: w.x fits the log odds of the teacher's share | mass: m(x) fits the log of the teacher's softmax mass beyond
    the window | shared: gamma alone, for the student's maps as they are | sum: nothing to set.
    """
    if not seen.share or not mixer.spec.window or mixer.spec.mix == "sum":
        return {}
    balance, target = torch.cat(seen.balance).double(), torch.cat(seen.share).double().mean(0)
    if mixer.spec.mix == "shared":
        shift = solve_bias(lambda b: torch.sigmoid(balance + b).mean(0), target)
        return {"window_logit": _gamma_logit(shift)}
    assert isinstance(seen.gram, Tensor) and isinstance(seen.cross, Tensor)
    weight, _ = ridge(seen.gram, seen.cross)
    weight = weight.float()
    fitted = (torch.cat(seen.inputs) @ weight.T).double()
    if mixer.spec.mix == "gate":
        shift = solve_bias(lambda b: torch.sigmoid(fitted + b).mean(0), target)
        return {"mix_gate.weight": weight, "mix_gate.bias": shift.float()}
    shift = solve_bias(lambda b: torch.sigmoid(balance - fitted + b).mean(0), target)
    return {"far_mass.weight": weight, "far_mass.bias": -shift.float()}


def leaning(values: dict[str, Tensor], offset: float) -> dict[str, Tensor]:
    """`values` of a mix with the window's log odds raised by `offset`."""
    moved = dict(values)
    if "mix_gate.bias" in values:
        moved["mix_gate.bias"] = values["mix_gate.bias"] + offset
    elif "far_mass.bias" in values:
        moved["far_mass.bias"] = values["far_mass.bias"] - offset
    elif "window_logit" in values:
        moved["window_logit"] = _gamma_logit(nnf.logsigmoid(values["window_logit"].double()) + offset)
    return moved


def _gamma_logit(log_gamma: Tensor) -> Tensor:
    """logit of gamma = exp(log_gamma), which must stay below one, in float32."""
    return torch.logit(log_gamma.exp().clamp(1e-6, 1 - 1e-2)).float()
