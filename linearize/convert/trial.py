"""Trying values of a mixer on a window: what its output would be against the teacher's, for every proposal at once.

The output is affine in the linear branch's scale, so the best scale of each proposal follows from three sums. Shapes:
H query heads, S state heads, D head channels, T tokens; P proposals of the state, M of the mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.convert import observe
from linearize.convert.observe import MixerCall
from linearize.modeling.mixer import Mixer

SCALES = {"scale": "linear_scale", "norm": "norm_weight"}
"""The parameter, by normaliser, that the linear branch's output is proportional to."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """New values of some of a mixer's parameters, by name; the others stay."""

    name: str
    values: dict[str, Tensor]


@dataclass(kw_only=True)
class Trial:
    """What came of every pair of proposals; sums over all tokens, in fp64."""

    states: list[Proposal]
    """Of decay and write strength; the first is what the mixer has."""
    mixes: list[Proposal]
    moments: Tensor | float = 0.0
    """[P, M, 3, H, D]: <r, r>, <r, p>, <p, p>, where the output is y0 + c p with the scale c, and r = y* - y0."""
    shares: Tensor | float = 0.0
    """[P, M, H]: the window's share, over tokens that have something beyond it."""
    gates: Tensor | float = 0.0
    """[P, 2, S]: decay rate -g (mean of its channels) and write strength."""
    target: Tensor | float = 0.0
    """[H]: |y*|^2."""
    alone: Tensor | float = 0.0
    """[H]: |y* - w|^2 of the window alone."""
    tokens: int = 0
    beyond: int = 0
    """Tokens that have something beyond the window."""

    def add(self, mixer: Mixer, call: MixerCall, heads: Tensor) -> None:
        """Take in one window: `heads` [1, T, H, D] is the teacher's output. The mixer is left as it was."""
        parameters: dict[str, Tensor] = dict(mixer.named_parameters())
        before = {name: parameter.clone() for name, parameter in parameters.items()}
        target = heads.transpose(1, 2).float()
        window = observe.window_of(mixer, call)
        _, has_far = observe.reach(mixer, target.shape[2], target.device)
        moments, shares, gates = [], [], []
        for state in self.states:
            assign(parameters, state.values)
            linear, g, beta = observe.linear_of(mixer, call)
            gates.append(torch.stack((_rate(g, linear, mixer.state_heads), _rate(beta, linear, mixer.state_heads))))
            for mix in self.mixes:
                assign(parameters, mix.values)
                gate = mixer.gate(call.inputs)
                moments.append(_moments(mixer, parameters, window, linear, gate, target))
                shares.append(_sum(_share(mixer, window, linear, gate)[:, :, has_far, None])[:, 0])
                assign(parameters, {name: before[name] for name in mix.values})
            assign(parameters, before)
        size = (len(self.states), len(self.mixes))
        self.moments += torch.stack(moments).unflatten(0, size)
        self.shares += torch.stack(shares).unflatten(0, size)
        self.gates += torch.stack(gates)
        self.target += _sum(target.square()).sum(-1)
        if window is not None:
            self.alone += _sum((target - window[0] / window[1]).square()).sum(-1)
        self.tokens += len(has_far)
        self.beyond += int(has_far.sum())


def solve_scale(moments: Tensor, *, channels: bool) -> Tensor:
    """The scale c [..., H, D] that minimises |r - c p|^2, one a head or, with `channels`, one a channel.

    `moments` [..., 3, H, D] holds <r, r>, <r, p>, <p, p>. Where p is zero, so is c.
    """
    _, cross, square = moments.unbind(-3)
    if not channels:
        cross, square = (x.sum(-1, keepdim=True).expand_as(x) for x in (cross, square))
    return torch.where(square > 0, cross / square.clamp_min(observe.LEAST), 0.0)


def squared_error(moments: Tensor, scale: Tensor) -> Tensor:
    """|r - c p|^2 [..., H] for moments [..., 3, H, D] and scale [..., H, D]."""
    rest, cross, square = moments.unbind(-3)
    return (rest - 2 * scale * cross + scale.square() * square).sum(-1)


def assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set parameters in place, by name."""
    for name, value in values.items():
        parameters[name].copy_(value)


def pick(choices: list[Proposal], chosen: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each head's part of the proposal it chose: the first axis of every parameter counts heads (times channels)."""
    every = torch.arange(len(chosen), device=chosen.device)
    picked = {}
    for name in {name: None for choice in choices for name in choice.values}:
        found = torch.stack([c.values.get(name, parameters[name]) for c in choices])
        picked[name] = found.unflatten(1, (len(chosen), -1))[chosen, every].flatten(0, 1)
    return picked


def _moments(
    mixer: Mixer, parameters: Mapping[str, Tensor], window: Any, linear: Tensor, gate: Tensor | None, target: Tensor
) -> Tensor:
    """[3, H, D] of one window; without a scale, p is zero."""
    name = SCALES.get(mixer.spec.normaliser)
    if name is None:
        rest = _sum((target - mixer.combine(window, linear, gate)).square())
        return torch.stack((rest, torch.zeros_like(rest), torch.zeros_like(rest)))
    old = parameters[name].clone()
    parameters[name].zero_()
    without = mixer.combine(window, linear, gate)
    parameters[name].fill_(1.0)
    part = mixer.combine(window, linear, gate) - without
    parameters[name].copy_(old)
    rest = target - without
    return torch.stack((_sum(rest.square()), _sum(rest * part), _sum(part.square())))


def _share(mixer: Mixer, window: Any, linear: Tensor, gate: Tensor | None) -> Tensor:
    """The window's share of the output [1, H, T]; zeros without a window."""
    spec = mixer.spec
    if window is None:
        return linear.new_zeros(linear.shape[:3])
    if spec.mix == "shared":
        mass = mixer.window_share(linear.dtype)[:, None] * window[1][..., 0]
        return mass / (mass + linear[..., -1])
    if gate is None:
        return linear.new_full(linear.shape[:3], spec.window_weight)
    return torch.sigmoid((window[1].log() + window[2])[..., 0] - gate) if spec.mix == "mass" else gate


def _rate(gate: Tensor | None, like: Tensor, heads: int) -> Tensor:
    """|log decay| or write strength summed over tokens, in mean over channels: [S]; zeros where there is none."""
    if gate is None:
        return like.new_zeros(heads, dtype=torch.float64)
    return _sum(gate.abs().flatten(3) if gate.ndim == 4 else gate.abs().unsqueeze(3)).mean(-1)


def _sum(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [H, D] in fp64."""
    return x.sum((0, 2), dtype=torch.float64)
