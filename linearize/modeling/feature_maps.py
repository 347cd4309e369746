"""Feature maps phi: head vectors to features, so that phi(q).phi(k) stands in for exp(q.k / sqrt(D)).

One registry entry a map. Maps with a projection keep one matrix per head, used in the input's dtype (float32).
Shapes: N sequences, H heads, L tokens, D head channels, F outputs of the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import nn

from .mixer_spec import LEARNED_MAPS

FLOOR = 1e-12
"""Least weight of a feature (LoLCATs, arXiv 2410.10254, clamps there): a denominator can then not be zero."""
EXP_LIMIT = 15.0
"""hedgehog_exp exponentiates at most this: e^30 times a long sequence is still far from the end of float32."""
CODE_SCALE = 2.0
"""Length of learned_softmax's first columns: with 1 all codes take about the same of a token, and learn slowly."""


def _two_sided_softmax(y: torch.Tensor) -> torch.Tensor:
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1).clamp_min(FLOOR)


def _two_sided_exp(y: torch.Tensor) -> torch.Tensor:
    y = y.clamp(-EXP_LIMIT, EXP_LIMIT)
    return torch.cat((y.exp(), (-y).exp()), dim=-1)


def _one_sided_softmax(y: torch.Tensor) -> torch.Tensor:
    """softmax(y): how much of a token each of F learned codes takes, a soft assignment that sums to one."""
    shares = y.softmax(-1)
    return shares.clamp_min(FLOOR) if shares.requires_grad else shares.clamp_min_(FLOOR)


def _taylor(y: torch.Tensor) -> torch.Tensor:
    """[1, y, y_i y_j] with phi(a).phi(b) = 1 + s + s^2 / 2, s = a.b / sqrt(F) (Based, arXiv 2402.18668, eq. 2)."""
    width = y.shape[-1]
    y = y * width**-0.25
    row, column = torch.triu_indices(width, width, device=y.device).unbind()
    # The square is symmetric: keep j >= i and count the others twice.
    weight = torch.where(row == column, 0.5**0.5, 1.0)
    return torch.cat((torch.ones_like(y[..., :1]), y, y[..., row] * y[..., column] * weight), dim=-1)


def _two_sided_relu(y: torch.Tensor) -> torch.Tensor:
    """[relu(y), relu(-y)] (arXiv 1603.05201): keeps all of y, and vectors that point apart become orthogonal."""
    return torch.cat((y.relu(), (-y).relu()), dim=-1)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
    "hedgehog_softmax": _two_sided_softmax,
    "hedgehog_exp": _two_sided_exp,
    "learned_softmax": _one_sided_softmax,
    "relu": lambda y: y.relu().clamp_min(1e-6),
    "elu": lambda x: 1.0 + nnf.elu(x),
    "taylor": _taylor,
    "l2norm": lambda x: nnf.normalize(x, dim=-1, eps=1e-6),
    "linear": lambda y: y,
    "crelu": _two_sided_relu,
}
BIASED = ("hedgehog_exp", "learned_softmax", "relu")
SCALED = ("identity", "l2norm", "linear", "crelu")
"""Maps without a temperature of their own: queries are scaled like the teacher's scores."""


def feature_size(name: str, head_dim: int, feature_dim: int | None) -> int:
    """Number of features the map `name` makes of a head vector."""
    width = feature_dim or head_dim
    if name in ("hedgehog_softmax", "hedgehog_exp", "crelu"):
        return 2 * width
    if name == "taylor":
        return 1 + width + width * (width + 1) // 2
    return width if name in LEARNED_MAPS else head_dim


def start_values(make: Callable[[Any], dict[str, torch.Tensor]]) -> Callable[[Any], dict[str, torch.Tensor]]:
    """A module's method for start values, run on the CPU and in float32 whatever device and dtype tensors get now.

    from_config(dtype=torch.bfloat16) makes a whole model in bfloat16, which no QR decomposition knows, and under
    `with torch.device(...)` a generator may be elsewhere. Nothing is computed for a module on the meta device.
    """

    @wraps(make)
    def run(module: Any) -> dict[str, torch.Tensor]:
        tensors = [*module.parameters(), *module.buffers()]
        if tensors and all(x.is_meta for x in tensors):
            return {}
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.no_grad(), torch.device("cpu"):
                return make(module)
        finally:
            torch.set_default_dtype(default)

    return run


@torch.no_grad()
def set_start_values(module: nn.Module, *, recurse: bool = True) -> None:
    """Give `module`'s tensors their `initial_values`, but for those that a checkpoint has set.

    recurse: those of its children too. transformers visits every module by itself, children first.
    """
    tensors = dict(module.named_parameters(recurse=recurse)) | dict(module.named_buffers(recurse=recurse))
    missing = {name: x for name, x in tensors.items() if not getattr(x, "_is_hf_initialized", False)}
    if missing:
        made = module.initial_values()  # type: ignore[operator]
        for name in missing.keys() & made.keys():  # on meta nothing is made
            missing[name].copy_(made[name])


@lru_cache(maxsize=8)
def _bases(head_dim: int, width: int) -> torch.Tensor:
    """[D, width]: the identity and, beyond D columns, rotations of it; the same for queries and keys (fixed seeds).

    Zeros in their place would all get the same gradient and never tell each other apart. Made once for all layers:
    shared out among many threads, products as small as these take long. Not to be written into.
    """
    blocks = [torch.eye(head_dim)]
    for n in range(1, -(-width // head_dim)):
        draw = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(n))
        blocks.append(torch.linalg.qr(draw)[0])
    return torch.cat(blocks, dim=1)[:, :width]


class OwnProjection(nn.Module):
    """x W_h^T / sqrt(C): the layer's input to one vector a head, [N, L, C] -> [N, H, L, D]; zero at first.

    A step of the optimiser moves every weight by about its rate: divided so, a sum over C inputs moves as one over D
    channels in a feature map does.
    """

    def __init__(self, hidden_size: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(heads * head_dim, hidden_size))

    @start_values
    def initial_values(self) -> dict[str, torch.Tensor]:
        """Zero: the teacher's own queries and keys are where learning starts."""
        return {"weight": torch.zeros(self.weight.shape)}

    @property
    def factor(self) -> float:
        """1 / sqrt(C)."""
        return float(self.weight.shape[1] ** -0.5)

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """x W_h^T, not divided yet, in x's dtype."""
        return nnf.linear(x, self.weight.to(x.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.products(x) * self.factor


class FeatureMap(nn.Module):
    """phi for every head: [N, H, L, D] -> [N, H, L, features], float32."""

    def __init__(self, name: str, heads: int, head_dim: int, feature_dim: int | None) -> None:
        super().__init__()
        self.name = name  # and not its function: a lambda cannot be pickled
        if name in LEARNED_MAPS:
            width = feature_dim or head_dim
            self.weight = nn.Parameter(torch.empty(heads, head_dim, width))
            if name in BIASED:
                self.bias = nn.Parameter(torch.empty(heads, width))

    @start_values
    def initial_values(self) -> dict[str, torch.Tensor]:
        """What each parameter starts as: bases of the head, or for Taylor a projection that keeps dot products."""
        if self.name not in LEARNED_MAPS:
            return {}
        heads, head_dim, width = self.weight.shape
        if self.name == "taylor":
            # The same matrix for queries and keys (a fixed seed): (qP).(kP)/sqrt(F) then estimates q.k/sqrt(D).
            draw = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(0))
            basis = torch.linalg.qr(draw)[0][:, :width] if width < head_dim else torch.eye(head_dim, width)
            basis = basis * (max(head_dim, width) / min(head_dim, width)) ** 0.25
        else:
            basis = _bases(head_dim, width) * (CODE_SCALE if self.name == "learned_softmax" else 1.0)
        values = {"weight": basis.expand(heads, -1, -1).clone()}
        if self.name in BIASED:
            values["bias"] = torch.zeros(heads, width)
        return values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.name not in LEARNED_MAPS:
            return ACTIVATIONS[self.name](x)
        rows = x.transpose(0, 1).flatten(1, 2)  # [H, N L, D]: one product a head
        weight = self.weight.to(x.dtype)
        if self.name in BIASED:
            made = torch.baddbmm(self.bias.to(x.dtype)[:, None], rows, weight)
        else:
            made = torch.bmm(rows, weight)
        return ACTIVATIONS[self.name](made).unflatten(1, (x.shape[0], -1)).transpose(0, 1)
