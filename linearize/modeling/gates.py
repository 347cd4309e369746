"""What a token says about memory: how much of the past to keep (log decay g <= 0) and how hard to write (beta).

All from the layer's input [N, L, C] or the un-rotated key, in float32; one value per state head S, or per channel F.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import nn

from .feature_maps import start_values

LOW_RANK = 16
"""Inner width of the per-channel gate (GLA, arXiv 2312.06635, section 4.4)."""


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return nnf.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Decay(nn.Module):
    """Log decay of the state; `kind` is an axis value of MixerSpec.decay.

    fixed:   g = log gamma_s, gamma_s from 1 - 1/32 to 1 - 1/512 over the heads (RetNet, arXiv 2307.08621, eq. 8)
    scalar:  g = -exp(A_s) dt, dt = softplus(w_s.x + b_s) (Mamba-2, arXiv 2405.21060)
    channel: g = p log sigmoid(W2 W1 x + b) (GLA)
    key:     g = p log sigmoid(k), k un-rotated (Liger, arXiv 2503.01496, table 1)
    """

    def __init__(self, kind: str, *, power: float, hidden_size: int, heads: int, features: int) -> None:
        super().__init__()
        self.kind, self.power, self.heads, self.features = kind, power, heads, features
        if kind == "fixed":
            self.log_gamma = nn.Buffer(torch.empty(heads))
        elif kind == "scalar":
            self.weight = nn.Parameter(torch.empty(heads, hidden_size))
            self.dt_bias = nn.Parameter(torch.empty(heads))
            self.a_log = nn.Parameter(torch.empty(heads))
        elif kind == "channel":
            self.down = nn.Parameter(torch.empty(LOW_RANK, hidden_size))
            self.up = nn.Parameter(torch.empty(heads * features, LOW_RANK))
            self.bias = nn.Parameter(torch.empty(heads * features))

    @start_values
    def initial_values(self) -> dict[str, torch.Tensor]:
        """Start values: memories from tens to hundreds of tokens, spread over the heads."""
        if self.kind == "fixed":
            spread = torch.linspace(math.log(1 / 32), math.log(1 / 512), self.heads)
            return {"log_gamma": torch.log1p(-spread.exp())}
        if self.kind == "scalar":
            step = torch.logspace(-3, -1, self.heads)
            return {
                "weight": torch.randn(self.weight.shape) * 0.1 * self.weight.shape[1] ** -0.5,
                "dt_bias": step + torch.log(-torch.expm1(-step)),  # softplus of it is `step`
                "a_log": torch.zeros(self.heads),
            }
        if self.kind == "channel":
            return {
                "down": torch.randn(self.down.shape) * self.down.shape[1] ** -0.5,
                "up": torch.randn(self.up.shape) * 0.1 * LOW_RANK**-0.5,
                "bias": torch.full(self.bias.shape, 2.0),
            }
        return {}

    def forward(self, inputs: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Log decay [N, S, L] or [N, S, L, F] from inputs [N, L, C] and the un-rotated key [N, S, L, D]."""
        if self.kind == "none":
            return None
        if self.kind == "fixed":
            return self.log_gamma.to(inputs.dtype)[:, None].expand(inputs.shape[0], -1, inputs.shape[1])
        if self.kind == "scalar":
            step = nnf.softplus(_linear(inputs, self.weight, self.dt_bias)).transpose(1, 2)
            return -self.a_log.to(step.dtype).exp()[:, None] * step
        if self.kind == "channel":
            gate = _linear(_linear(inputs, self.down), self.up, self.bias).unflatten(-1, (self.heads, -1))
            return self.power * nnf.logsigmoid(gate).transpose(1, 2)
        return self.power * nnf.logsigmoid(key)

    def step_size(self, log_decay: torch.Tensor) -> torch.Tensor:
        """dt of a scalar decay, recovered from g = -exp(A) dt: [N, S, L]."""
        return -log_decay * (-self.a_log.to(log_decay.dtype)).exp()[:, None]


class TokenScore(nn.Module):
    """w_h.x + b_h: one number per head and token, [N, L, C] -> [N, H, L]; `start` is its first mean."""

    def __init__(self, hidden_size: int, heads: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(heads))

    @start_values
    def initial_values(self) -> dict[str, torch.Tensor]:
        """Weights near zero and a bias that sets the mean."""
        return {
            "weight": torch.randn(self.weight.shape) * 0.1 * self.weight.shape[1] ** -0.5,
            "bias": torch.full(self.bias.shape, self.start),
        }

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _linear(inputs, self.weight, self.bias).transpose(1, 2)


class TokenGate(TokenScore):
    """sigmoid(w_h.x + b_h), about `start` at first: a gate without a bias could not start anywhere but 1/2."""

    def __init__(self, hidden_size: int, heads: int, start: float) -> None:
        super().__init__(hidden_size, heads, math.log(start / (1 - start)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(super().forward(inputs))
