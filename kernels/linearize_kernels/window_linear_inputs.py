"""What the launches of the window + linear kernels share: their tensors, constants, strides and buffers.

Import this only where Triton is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from . import window_linear_tuning as tuning
from .backend import empty
from .compiled import Found
from .tuning import capability
from .window_linear_plan import Plan, cover
from .window_linear_tiles import LOG2E, MAP_CODES

LN2 = 0.6931471805599453
Maybe = torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of a call, as the kernels read them: weights in the data's dtype, features or q and k as `xq`, `xk`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    xq: torch.Tensor
    xk: torch.Tensor
    q_weight: Maybe
    k_weight: Maybe
    q_bias: Maybe
    k_bias: Maybe
    near: Maybe
    """gamma [H], gate or mass [B, H, T]."""
    sink_k: Maybe
    sink_v: Maybe
    first: Maybe
    sequences: Maybe
    blocks: Maybe
    found: Found | None = None
    """Machine code of the kernels for such inputs."""

    @property
    def count(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.sequences is None else self.sequences.shape[0]


def strides(x: Maybe, size: int = 3) -> tuple[int, ...]:
    """The first `size` strides; zeros without a tensor."""
    return (0,) * size if x is None else tuple(x.stride()[:size])


def grid_blocks(plan: Plan, x: Inputs) -> int:
    """Blocks of all sequences, or as many as there could be."""
    return plan.batch * plan.blocks if x.blocks is None else x.blocks.shape[0]


def even(plan: Plan, x: Inputs) -> bool:
    """Whether every sequence has whole blocks: then all rows of a tile are there, or none."""
    return x.blocks is None and plan.tokens % plan.chunk == 0


@lru_cache(256)
def sizes(plan: Plan) -> dict[str, int]:
    """The constants that every kernel takes; not to be changed."""
    return {"D": plan.channels, "BD": cover(plan.channels), "C": plan.chunk}


@lru_cache(256)
def features_of(plan: Plan) -> dict[str, int]:
    """The constants of a kernel that makes features; not to be changed."""
    return {"F": plan.width or 16, "BF": plan.tile, "PARTS": plan.parts, "MAP": MAP_CODES[plan.map]}


def bound(plan: Plan) -> float:
    """BOUND of the kernels, whose scores are in base 2; 0.0: no bound."""
    return 0.0 if plan.softcap is None else plan.softcap * LOG2E.value


def tuned(plan: Plan, x: torch.Tensor, name: str, **more: bool) -> dict[str, int]:
    """This op's row of the tuning table."""
    look_up = getattr(tuning, f"window_linear_{name}")
    found: dict[str, int] = look_up(capability(x.device), plan.channels, plan.tile, plan.chunk, x.dtype, **more)
    return found


def team_of(plan: Plan, x: Inputs, group: int) -> int:
    """Heads of one program, of `group` that read the same keys."""
    programs = grid_blocks(plan, x) * plan.key_heads
    bounded = plan.softcap is not None
    found: int = tuning.window_linear_team(capability(x.q.device), programs, group, x.q.dtype, bounded=bounded)
    return found


def segments_of(plan: Plan, device: torch.device, dtype: torch.dtype, count: int) -> tuple[int, int]:
    """Into how many segments a scan over `count` sequences is cut, and blocks of each."""
    table = tuning.window_linear_scan(capability(device), plan.channels, plan.tile, plan.chunk, dtype)
    programs = count * plan.state_heads * plan.parts * -(-plan.channels // table["BV"])
    segments = tuning.window_linear_segments(capability(device), programs, plan.blocks)
    return segments, -(-(plan.blocks + 1) // segments)


def cut_of(plan: Plan, x: Inputs) -> tuple[int, int, int]:
    """What readers of states are told of the scan: row of the first segment's beginning, segments, blocks of each."""
    return grid_blocks(plan, x), *segments_of(plan, x.q.device, x.q.dtype, x.count)


def near_strides(x: Inputs) -> tuple[int, ...]:
    """Of gates or masses [B, H, T]; zeros for gamma, and without any."""
    return strides(x.near) if x.near is not None and x.near.ndim == 3 else (0, 0, 0)


def gradient(plan: Plan, x: Inputs, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A gradient that a kernel writes for every token; zeros first where some tokens are padding."""
    if x.sequences is None:
        return empty(shape, dtype=dtype, device=x.q.device)
    return torch.zeros(shape, dtype=dtype, device=x.q.device)


def heads_last(plan: Plan, x: Inputs, heads: int) -> torch.Tensor:
    """The same, [B, T, heads, D] in the data's dtype."""
    return gradient(plan, x, (plan.batch, plan.tokens, heads, plan.channels), x.q.dtype)
