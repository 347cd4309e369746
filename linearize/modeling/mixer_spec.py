"""What a mixer computes: one point in the space of linear attentions.

A recipe of the literature is a value of `MixerSpec`, not a class of its own. This file needs nothing but the standard
library, so recipes can be read and checked without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

FEATURE_MAPS = (
    "identity",
    "softmax",
    "hedgehog_softmax",
    "hedgehog_exp",
    "learned_softmax",
    "relu",
    "elu",
    "taylor",
    "l2norm",
    "linear",
    "crelu",
)
KEY_MAPS = ("same", "forget")
DECAYS = ("none", "fixed", "scalar", "channel", "key")
WRITES = ("add", "delta", "none")
NORMALISERS = ("shared", "own", "norm", "scale", "none")
MIXES = ("shared", "sum", "gate", "mass")
COVERAGES = ("outside", "all")
STATE_HEADS = ("query", "kv")

CHOICES: dict[str, tuple[str, ...]] = {
    "feature_map": FEATURE_MAPS,
    "key_map": KEY_MAPS,
    "decay": DECAYS,
    "write": WRITES,
    "normaliser": NORMALISERS,
    "mix": MIXES,
    "coverage": COVERAGES,
    "state_heads": STATE_HEADS,
}

LEARNED_MAPS = ("hedgehog_softmax", "hedgehog_exp", "learned_softmax", "relu", "taylor", "linear", "crelu")
"""Feature maps with a trained projection; the others are fixed functions of the head vector."""

POSITIVE_MAPS = ("softmax", "hedgehog_softmax", "hedgehog_exp", "learned_softmax", "relu", "elu", "taylor")
"""Feature maps whose weights phi(q).phi(k) are never negative, so that dividing by their sum is safe."""


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """One linear attention, axis by axis.

    Raises:
        ValueError: an axis holds an unknown value, or two axes contradict each other.
    """

    feature_map: str = "hedgehog_softmax"
    """phi for queries and keys: identity | softmax (over channels) | hedgehog_softmax (LoLCATs: [softmax(Wx),
    softmax(-Wx)]) | hedgehog_exp (Hedgehog: exp([Wx+b, -Wx-b])) | learned_softmax (softmax(Wx+b): shares of learned
    codes) | relu (T2R: relu(Wx+b)) | elu (1+elu(x)) | taylor (Based: second order, of a projection) | l2norm (x/|x|) |
    linear (Wx, one W per head) | crelu ([relu(Wx), relu(-Wx)])."""
    key_map: str = "same"
    """phi for keys: same | forget (HGRN2: one minus the forget gate; needs decay `key`)."""
    feature_dim: int | None = None
    """Outputs F of a learned projection, per sign; None: head_dim."""
    state_heads: str = "query"
    """query: one state per query head; kv: one per key/value head, H/HK times smaller."""
    rope: bool = True
    """Whether the linear branch sees rotated queries and keys (the window always does)."""
    own_qk: bool = False
    """Whether the linear branch adds projections of its own, at first zero, to the teacher's queries and keys."""
    decay: str = "none"
    """none | fixed (RetNet, per head) | scalar (Mamba-2, per head and token) | channel (GLA) | key (Liger: sigmoid
    of the un-rotated key)."""
    decay_power: float = 1.0
    """Gates are raised to this power: 1/16 in GLA and Liger, 1 in HGRN2 and Mamba-2."""
    write: str = "add"
    """add | delta (gated delta rule, on features of length one) | none (no linear branch: the window alone)."""
    negative_eigenvalues: bool = False
    """Delta rule: beta in [0, 2], transition eigenvalues in [-1, 1], instead of beta in [0, 1]."""
    dt_gain: bool = False
    """Mamba-2: scale what is written by the step size that also sets the decay (needs decay `scalar`)."""
    normaliser: str = "shared"
    """shared (one denominator with the window) | own (the linear branch's own) | norm (RMSNorm per head) | scale (a
    learned factor per head) | none."""
    window: int = 64
    """Block size W of the softmax window (own block and the one before); 0: no window."""
    sinks: int = 0
    """First tokens of a sequence that stay in the softmax branch for good."""
    mix: str = "shared"
    """shared (LoLCATs: one denominator) | sum (Liger: fixed weights) | gate (the window's share is learned per token
    and head) | mass (its share follows from its own softmax mass, set against a learned mass of the rest)."""
    coverage: str = "outside"
    """Which keys the linear branch reads: outside (what the window cannot see) | all."""
    window_weight: float = 0.1
    """Initial weight of the window: gamma of the shared mix, alpha of the others (linear: 1 - alpha)."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"mixer.{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"mixer.{name}: {getattr(self, name)} is negative")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"mixer.feature_dim: {self.feature_dim} is not positive")
        if self.feature_dim is not None and self.feature_map not in LEARNED_MAPS:
            raise ValueError(f"mixer.feature_dim: the map {self.feature_map!r} has no projection to size")
        if not 0.0 < self.window_weight < 1.0:
            raise ValueError(f"mixer.window_weight: {self.window_weight} is not between 0 and 1")
        if not 0.0 < self.decay_power <= 1.0:
            raise ValueError(f"mixer.decay_power: {self.decay_power} is not in (0, 1]")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Refuse combinations that have no meaning, naming both axes."""
        if self.normaliser in ("shared", "own"):
            if self.feature_map not in POSITIVE_MAPS:
                raise ValueError(
                    f"mixer.normaliser: {self.normaliser!r} divides by a sum of weights, which the map "
                    f"{self.feature_map!r} does not keep positive; use norm or none"
                )
            if self.write == "delta":
                raise ValueError(f"mixer.normaliser: {self.normaliser!r} has no meaning under write 'delta'; use norm")
        if self.window == 0 and self.sinks:
            raise ValueError("mixer.sinks: there is no window to add them to (window is 0)")
        if self.window == 0 and self.coverage == "outside":
            raise ValueError("mixer.coverage: 'outside' needs a window; use all")
        if (self.normaliser == "shared") != (self.mix == "shared" and self.window > 0):
            raise ValueError("mixer.normaliser: 'shared' goes with mix 'shared' and a window, and they with it")
        if self.mix == "shared" and self.window > 0 and self.coverage != "outside":
            raise ValueError("mixer.coverage: mix 'shared' counts each pair once, so coverage must be outside")
        if self.coverage == "outside" and self.own_qk:
            raise ValueError("mixer.own_qk: keys leave the window as the teacher made them; use coverage all")
        if self.coverage == "outside" and not self.rope:
            raise ValueError("mixer.rope: keys leave the window rotated, so coverage 'outside' needs rope")
        if self.key_map == "forget" and self.decay != "key":
            raise ValueError("mixer.key_map: 'forget' is one minus the gate of decay 'key'")
        if self.decay == "key" and self.feature_map in LEARNED_MAPS:
            raise ValueError(
                "mixer.decay: 'key' gates the key's own channels, so the map must keep them (no projection)"
            )
        if self.decay == "key" and self.rope:
            raise ValueError("mixer.decay: 'key' is a gate of the un-rotated key; set rope to false")
        if self.write == "delta" and self.decay in ("channel", "key"):
            raise ValueError("mixer.write: 'delta' is built with decay none, fixed or scalar")
        if self.write == "none":
            self._check_window_alone()
        if self.negative_eigenvalues and self.write != "delta":
            raise ValueError("mixer.negative_eigenvalues: only the delta rule has them")
        if self.dt_gain and self.decay != "scalar":
            raise ValueError("mixer.dt_gain: needs decay 'scalar'")

    def _check_window_alone(self) -> None:
        """Without a linear branch nothing may be said about one."""
        plain = {"feature_map": "identity", "decay": "none", "normaliser": "none", "mix": "sum", "coverage": "all",
                 "own_qk": False}  # fmt: skip
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(f"mixer.{name}: write 'none' has no linear branch; use {value}")
        if not self.window:
            raise ValueError("mixer.write: 'none' needs a window (window is 0)")

    @property
    def lagged(self) -> bool:
        """Whether keys enter the state only when they leave the window."""
        return self.window > 0 and self.coverage == "outside"

    def as_dict(self) -> dict[str, Any]:
        """The axes as plain values."""
        return asdict(self)


AXES = tuple(f.name for f in fields(MixerSpec))
