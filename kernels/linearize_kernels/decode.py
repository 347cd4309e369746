"""One token of a whole mixer: every branch, and all that is kept.

One launch; two where a batch of LoLCATs' mixer fills a card, three where a map is wide.

The torch definition of the same step is modeling's MixerState.step, from the functions of step.py. Nothing that is read
depends on how many tokens came before, and nothing goes to the host: one CUDA graph serves every step.

Shapes: B sequences, H query heads, S state heads, K key heads, D head channels, F outputs of a projection a sign, N all
features of a head, W block, Z sinks, C input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .backend import pick, placed

MAPS = (
    "identity",
    "softmax",
    "hedgehog_softmax",
    "hedgehog_exp",
    "learned_softmax",
    "relu",
    "elu",
    "l2norm",
    "linear",
    "crelu",
)
"""Feature maps with a kernel; taylor's features are too many for registers."""
TWO_SIDED = ("hedgehog_softmax", "hedgehog_exp", "crelu")
LEARNED = ("hedgehog_softmax", "hedgehog_exp", "learned_softmax", "relu", "linear", "crelu")
BIASED = ("hedgehog_exp", "learned_softmax", "relu")
SCALED = ("identity", "l2norm", "linear", "crelu")
TILED = ("hedgehog_exp", "learned_softmax", "relu", "linear", "crelu")
"""Learned maps whose features can be read in tiles: each by itself, or with a sum over all of one sign."""
WIDE = 256
"""From how many features a sign they are read in tiles, where they can be: three launches instead of one."""
MOST_FEATURES, MOST_CHANNELS, MOST_SLOTS = 512, 256, 512
"""Largest map a sign read at once, head and pair of blocks whose tiles fit into registers."""
PROJECTS = True
"""That a step takes the weights of a mixer's own projections; modeling asks, for a release before this did not."""
MOST_WIDE = 4096
"""Largest map a sign read in tiles, whose sums fit into registers."""


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """What a step computes: the mixer's axes, as in modeling's MixerSpec, and sizes that its tensors do not show."""

    feature_map: str
    key_map: str
    width: int
    """F, outputs of the projection a sign; D where the map has none."""
    write: str
    decay: str
    decay_power: float
    normaliser: str
    mix: str
    window: int
    sinks: int
    lagged: bool
    unrotate: bool
    """Undo the rotation of queries and keys before their maps."""
    dt_gain: bool
    negative_eigenvalues: bool
    window_weight: float
    scaling: float
    state_heads: int
    softcap: float | None = None
    """The bound on the window's scores."""


def wide(rule: StepRule) -> bool:
    """Whether the features are read in tiles: the map is wide, and every token enters an additive state at once."""
    return (
        rule.width >= WIDE
        and rule.feature_map in TILED
        and rule.key_map in ("same", rule.feature_map)
        and rule.write == "add"
        and not rule.lagged
        and rule.decay in ("none", "fixed", "scalar")
        and rule.normaliser != "norm"
    )


def unable(rule: StepRule, head_dim: int) -> str | None:
    """Why the kernel cannot take this step, or None where it can."""
    if rule.write != "none" and rule.feature_map not in MAPS:
        return f"there is no decode kernel for the map {rule.feature_map!r}"
    most = MOST_WIDE if wide(rule) else MOST_FEATURES
    if head_dim > MOST_CHANNELS or rule.width > most or 2 * rule.window > MOST_SLOTS:
        return (
            f"decode takes heads of up to {MOST_CHANNELS} channels, maps of up to {most} features a sign and "
            f"blocks of up to {MOST_SLOTS // 2} tokens, not {head_dim}, {rule.width} and {rule.window}"
        )
    if rule.softcap is not None and rule.softcap <= 0:
        return f"scores are bounded by more than 0, not by {rule.softcap}"
    if rule.unrotate and head_dim % 2:
        return "a rotated head has an even number of channels"
    return None


@placed
def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    rule: StepRule,
    memory: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    inputs: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    own: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Read one token and change `memory` in place.

    Args:
        q: [B, H, D]; k, v: [B, K, D], after RoPE, one dtype, any strides but the last.
        rule: what to compute.
        memory: state [B, S, N, D] and, where a denominator is kept, z and z_next [B, S, N], all float32; position [B]
            int64; with a window ring_k, ring_v [B, K, 2W, D] and, under a lag, ring_g [B, S, 2W] or [B, S, 2W, N] and
            ring_beta [B, S, 2W]; with sinks sink_k, sink_v [B, K, Z, D].
        weights: of the maps q_weight [H, D, F], k_weight [S, D, F], q_bias [H, F], k_bias [S, F]; `decay`: [S] log
            decays where fixed, [S, C] with decay_bias and a_log [S] where scalar, this token's log decays [B, S, N]
            float32 per channel; beta_weight [S, C], beta_bias [S]; mix_weight [H, C], mix_bias [H] of a learned mix;
            window_logit [H], linear_scale [H], norm_weight [H, D]. Each where `rule` needs it. With q_own [H D, C] and
            k_own [S D, C] the linear branch's queries and keys are x W^T / sqrt(C) more than what `unrotate` leaves.
        inputs: the layer's input [B, C], where a gate reads it.
        rotation: cos, sin [B or 1, D], under `unrotate`.
        own: queries [B, H, D] and keys [B, S, D] of the linear branch where they are not q and k, and have not the
            weights to be made of them.
        backend: auto | torch | triton; there is no torch form here, so that torch is an error.

    Returns:
        [B, H, D] in q's dtype. The position is as it was, and the new denominator is in z_next: call `settle` once
        every layer has read the token, for a launch must not change what its own programs read.

    Raises:
        ValueError: no kernel serves these arguments.
    """
    if pick(backend, q, k, v, memory["position"], unable=unable(rule, q.shape[-1])) != "triton":
        raise ValueError("decode_step has no torch form here: it is MixerState.step")
    from .decode_triton import launch

    return launch(q, k, v, rule, memory, weights, inputs, rotation, own)


def settle(memories: list[Mapping[str, torch.Tensor]]) -> None:
    """End a step of these layers: count the token, and put the new denominators where the next step reads them."""
    torch._foreach_add_([x["position"] for x in memories], 1)
    kept = [x for x in memories if "z_next" in x]
    if kept:
        torch._foreach_copy_([x["z"] for x in kept], [x["z_next"] for x in kept])
