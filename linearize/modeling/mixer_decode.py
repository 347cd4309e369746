"""A mixer's step by the decode kernel, where it is installed and can serve: what the kernel needs, from the mixer.

The definition is MixerState.step; the kernel changes the same tensors in place, but for the position and the
denominator, which LinearStateLayer.settle brings up to date after the launch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from .mixer_spec import LEARNED_MAPS, MixerSpec
from .softcap import BOUNDED

try:
    from linearize_kernels.backend import pick
    from linearize_kernels.decode import StepRule, decode_step, unable
except ImportError:  # an exported model without linearize
    pick = decode_step = None  # type: ignore[assignment]
try:
    from linearize_kernels.decode import PROJECTS
except ImportError:  # or with an older one
    PROJECTS = False

if TYPE_CHECKING:
    from .mixer import Mixer


@lru_cache(maxsize=64)
def step_rule(
    spec: MixerSpec, head_dim: int, state_heads: int, scaling: float, rotated: bool, softcap: float | None = None
) -> Any:
    """The kernel's rule for a mixer; rotated: whether it is given queries and keys with a rotation to undo."""
    learned = spec.feature_map in LEARNED_MAPS
    return StepRule(
        feature_map=spec.feature_map,
        key_map=spec.key_map,
        width=(spec.feature_dim or head_dim) if learned else head_dim,
        write=spec.write,
        decay=spec.decay,
        decay_power=float(spec.decay_power),
        normaliser=spec.normaliser,
        mix=spec.mix,
        window=spec.window,
        sinks=spec.sinks,
        lagged=spec.lagged,
        unrotate=rotated and not spec.rope and spec.write != "none",
        dt_gain=spec.dt_gain,
        negative_eigenvalues=spec.negative_eigenvalues,
        window_weight=float(spec.window_weight),
        scaling=float(scaling),
        state_heads=state_heads,
        **({"softcap": softcap} if softcap is not None and spec.window else {}),
    )


def step_backend(mixer: Mixer, q: torch.Tensor) -> tuple[str, str | None]:
    """Which implementation reads a token q [B, H, 1, D], `torch` or `triton`, and why not the kernel, if not.

    Raises:
        ValueError: the kernel was asked for by name and cannot serve.
    """
    if decode_step is None:
        return "torch", "linearize_kernels is not installed"
    reason: str | None
    if mixer.softcap is not None and mixer.spec.window and not BOUNDED:
        reason = "a bound on attention scores has no kernel in this release of linearize_kernels"
    elif mixer.record:
        reason = "the mixer records its branches"
    elif torch.is_grad_enabled() and q.requires_grad:
        reason = "a step of the kernel has no gradient"
    else:
        rule = step_rule(mixer.spec, mixer.head_dim, mixer.state_heads, mixer.scaling, True, mixer.softcap)
        reason = unable(rule, mixer.head_dim)
    found = pick(mixer.backend, q, unable=reason)
    return found, None if found == "triton" else reason or "kernels are switched off, or not for this device and dtype"


def decode_token(
    mixer: Mixer,
    cache: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inputs: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor | None:
    """One token through the kernel: [B, H, 1, D], or None where the torch step has to do it. Shapes as Mixer.forward.

    Raises:
        ValueError: as `step_backend`.
    """
    if step_backend(mixer, q)[0] != "triton":
        return None
    spec, own = mixer.spec, None
    # The kernel pairs the channels of a whole head; of one that is rotated in part, the rotation is undone here.
    partly = rotation is not None and rotation[0].shape[-1] != mixer.head_dim
    # Its projections are of unrotated vectors.
    projects = spec.own_qk and PROJECTS and not partly and not (spec.rope and rotation is not None)
    weights = step_weights(mixer)
    if projects:
        weights |= {"q_own": mixer.q_own.weight, "k_own": mixer.k_own.weight}
    elif spec.own_qk or (partly and not spec.rope and spec.write != "none"):
        found = mixer.linear_qk(q.float(), k.float(), inputs.float(), rotation)
        own = tuple(x.squeeze(2).contiguous() for x in found)
    rotated = rotation is not None and own is None
    rule = step_rule(spec, mixer.head_dim, mixer.state_heads, mixer.scaling, rotated, mixer.softcap)
    if spec.decay == "channel":
        weights["decay"] = mixer.decay(inputs.float(), k).squeeze(2).contiguous()
    out = decode_step(
        q.squeeze(2),
        k.squeeze(2),
        v.squeeze(2),
        rule=rule,
        memory=cache.tensors | cache.workspace,
        weights=weights,
        inputs=inputs[:, 0],
        rotation=None if rotation is None or partly else (rotation[0][:, 0], rotation[1][:, 0]),
        own=own,  # type: ignore[arg-type]
        backend="triton",
    )
    return out.unsqueeze(2)


def step_weights(mixer: Mixer) -> dict[str, torch.Tensor]:
    """The mixer's parameters under the kernel's names; log decays per channel come from their own projection."""
    owners = {
        "q_weight": (mixer.q_map, "weight"),
        "q_bias": (mixer.q_map, "bias"),
        "k_weight": (mixer.k_map, "weight"),
        "k_bias": (mixer.k_map, "bias"),
        "decay": (mixer.decay, "log_gamma" if mixer.spec.decay == "fixed" else "weight"),
        "decay_bias": (mixer.decay, "dt_bias"),
        "a_log": (mixer.decay, "a_log"),
        "window_logit": (mixer, "window_logit"),
        "linear_scale": (mixer, "linear_scale"),
        "norm_weight": (mixer, "norm_weight"),
    }
    for name, module in (("beta", "beta"), ("mix", "mix_gate"), ("mix", "far_mass")):
        if hasattr(mixer, module):
            owners |= {f"{name}_{part}": (getattr(mixer, module), part) for part in ("weight", "bias")}
    found = {name: getattr(owner, attribute, None) for name, (owner, attribute) in owners.items()}
    return {name: x for name, x in found.items() if x is not None}
