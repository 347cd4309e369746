"""Launches of the decode kernels (decode_{step,split,wide}_triton.py): their constants for a layer, what they ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton

from .backend import empty
from .decode import BIASED, LEARNED, SCALED, TWO_SIDED, StepRule, wide
from .decode_own_triton import PROGRAMMATIC, own_heads
from .decode_split_triton import far_kernel, near_kernel
from .decode_step_triton import decode_kernel
from .decode_wide_triton import features_kernel, state_kernel
from .tuning import capability
from .tuning import decode as decode_tuning
from .tuning import decode_split as split_tuning
from .tuning import decode_wide as wide_tuning

MEMORY = ("state", "z", "z_next", "position", "ring_k", "ring_v", "ring_g", "ring_beta", "sink_k", "sink_v")
WEIGHTS = (
    "q_weight", "q_bias", "k_weight", "k_bias", "decay", "decay_bias", "a_log", "beta_weight", "beta_bias",
    "mix_weight", "mix_bias", "window_logit", "linear_scale", "norm_weight",
)  # fmt: skip
SPLIT_WEIGHTS = ("q_weight", "q_bias", "k_weight", "k_bias", "window_logit")
FEATURE_WEIGHTS = ("q_weight", "q_bias", "k_weight", "k_bias", "decay", "decay_bias", "a_log")


def _power(size: int, least: int = 16) -> int:
    """The power of two that covers `size`."""
    return max(least, 1 << (size - 1).bit_length())


def constants(
    rule: StepRule, *, head_dim: int, heads: int, kv_heads: int, channels: int, batch: int, card: int, own: bool = False
) -> tuple[dict[str, Any], dict[str, int]]:
    """The kernel's constexpr arguments and its launch options for one layer."""
    width = rule.width if rule.write != "none" else 1
    learned = rule.feature_map in LEARNED and rule.write != "none"
    ratio = heads // rule.state_heads
    tiles = decode_tuning(
        card, head_dim, width, rule.window, batch, heads, heads // kv_heads, ratio, split=rule.normaliser != "norm"
    )
    made: dict[str, Any] = {
        "SCALE": rule.scaling,
        "BOUND": (rule.window and rule.softcap) or 0.0,
        "WINDOW_WEIGHT": rule.window_weight,
        "POWER": rule.decay_power,
        "D": head_dim,
        "DP": _power(head_dim),
        "F": width,
        "FP": _power(width if learned else head_dim) if rule.write != "none" else 16,
        "SIGNS": 2 if rule.feature_map in TWO_SIDED and rule.write != "none" else 1,
        "W": rule.window,
        "SLOTS": _power(2 * rule.window) if rule.window else 1,
        "PART": 16,
        "Z": rule.sinks,
        "ZP": _power(rule.sinks, 1) if rule.sinks else 1,
        "C": channels,
        "CT": min(_power(max(channels, 1)), 4096),
        "BV": tiles["BV"],
        "GROUP": tiles["GROUP"],
        "R": ratio,
        "G": heads // kv_heads,
        "MAP": rule.feature_map,
        "KEY_MAP": rule.key_map if rule.key_map != "same" else rule.feature_map,
        "LEARNED": learned,
        "BIASED": rule.feature_map in BIASED,
        "UNIT": rule.write == "delta" and rule.feature_map != "l2norm",
        "QUERY_SCALED": rule.feature_map in SCALED and rule.write != "delta",
        "UNROTATE": rule.unrotate,
        "OWN": own,
        "WRITE": rule.write,
        "LAGGED": rule.lagged,
        "DECAY": rule.decay if rule.write != "none" else "none",
        "DT_GAIN": rule.dt_gain,
        "NEGATIVE": rule.negative_eigenvalues,
        "NORM": rule.normaliser,
        "MIX": rule.mix,
        "PARTS": 0,
        "PP": 1,
        "EARLY": False,
    }
    held = made["FP"] * made["SIGNS"] * made["BV"] if rule.write != "none" else 0  # of the state, in registers
    made["HOLD"] = bool(tiles.get("HOLD", ratio == 1 or held < 1024 * tiles["num_warps"]))
    return made, {name: tiles[name] for name in ("num_warps", "maxnreg") if name in tiles} | {"num_stages": 1}


def wide_constants(
    rule: StepRule,
    *,
    head_dim: int,
    heads: int,
    kv_heads: int,
    channels: int,
    batch: int,
    card: int,
    own: bool = False,
    fresh: bool = False,
) -> dict[str, tuple[dict[str, Any], dict[str, int]]]:
    """As `constants`, of the three kernels that read a wide map: features, state, step.

    fresh: whether what they map was made by the launch before, own_kernel's, for which the first of them waits.
    """
    made, options = constants(
        rule, head_dim=head_dim, heads=heads, kv_heads=kv_heads, channels=channels, batch=batch, card=card, own=own
    )
    tiles = wide_tuning(card, head_dim, rule.width * made["SIGNS"], batch, batch * rule.state_heads, made["R"])
    made["EARLY"] = card >= PROGRAMMATIC
    shared = {name: made[name] for name in ("D", "DP", "F", "SIGNS", "DECAY", "DT_GAIN", "EARLY")}
    features = shared | {name: made[name] for name in ("SCALE", "C", "CT", "MAP", "BIASED", "QUERY_SCALED", "UNROTATE")}
    features |= {"BF": tiles["features"]["BF"], "ROWS": tiles["features"]["ROWS"], "WAIT": made["EARLY"] and fresh}
    features |= {"TILES": triton.cdiv(rule.width, features["BF"]), "KEYS": 1 if own else rule.state_heads // kv_heads}
    state = {name: made[name] for name in ("D", "DP", "DECAY", "DT_GAIN", "EARLY", "R", "G", "MAP")}
    state |= {
        "N": rule.width * made["SIGNS"],
        "RP": _power(made["R"], 1),
        "HAS_Z": rule.normaliser in ("shared", "own"),
    }
    state |= {"BF": tiles["state"]["BF"], "EACH": tiles["state"]["EACH"]}
    state |= {"SPLITS": triton.cdiv(state["N"], state["BF"] * state["EACH"])}
    state |= {"CUTS": features["TILES"], "CP": _power(features["TILES"], 1)}
    # Each head reads its sums by itself: what heads share, the state, has been read.
    step = made | {
        "R": 1,
        "GROUP": 1,
        "BV": tiles["step"]["BV"],
        "PARTS": state["SPLITS"],
        "F": 1,
        "FP": 16,
        "HOLD": True,
    }
    step["PP"] = _power(step["PARTS"])
    warps = {name: {"num_warps": tiles[name]["num_warps"], "num_stages": 1} for name in tiles}
    if made["EARLY"]:
        warps["state"]["launch_pdl"] = warps["step"]["launch_pdl"] = True
    if features["WAIT"]:
        warps["features"]["launch_pdl"] = True
    return {
        "features": (features, warps["features"]),
        "state": (state, warps["state"]),
        "step": (step, options | warps["step"]),
    }


def split_constants(
    rule: StepRule,
    *,
    head_dim: int,
    heads: int,
    kv_heads: int,
    batch: int,
    card: int,
    dtype: torch.dtype,
    own: bool = False,
    **_: Any,
) -> dict[str, tuple[dict[str, Any], dict[str, int]]] | None:
    """As `constants`, of the two kernels of decode_split_triton: near, far; None where one launch is to do."""
    if rule.write != "add" or not rule.lagged or rule.decay != "none" or rule.normaliser != "shared":
        return None
    if own or rule.sinks or rule.unrotate or rule.state_heads != heads or rule.feature_map in SCALED:
        return None
    made, _ = constants(rule, head_dim=head_dim, heads=heads, kv_heads=kv_heads, channels=0, batch=batch, card=card)
    tiles = split_tuning(card, head_dim, made["F"] * made["SIGNS"], rule.window, batch, kv_heads, dtype)
    if tiles is None:
        return None
    early = card >= PROGRAMMATIC
    shared = {name: made[name] for name in ("D", "DP", "F", "FP", "SIGNS", "W", "G", "LEARNED", "BIASED")}
    near = shared | {name: made[name] for name in ("SCALE", "BOUND", "MAP")}
    near |= {"SLOTS": max(16, made["SLOTS"]), "GP": _power(made["G"]), "ROWS": tiles["near"]["ROWS"], "EARLY": early}
    near["TILE"] = min(made["DP"], tiles["near"]["TILE"])
    far = shared | {"KEY_MAP": made["KEY_MAP"], "NP": _power(made["F"] * made["SIGNS"]), "EARLY": early}
    far |= {name: tiles["far"][name] for name in ("BV", "VT", "PART")}
    options = {
        name: {key: x for key, x in chosen.items() if key in ("num_warps", "maxnreg")} | {"num_stages": 1}
        for name, chosen in tiles.items()
    }
    if early:
        options["near"]["launch_pdl"] = options["far"]["launch_pdl"] = True
    return {"near": (near, options["near"]), "far": (far, options["far"])}


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rule: StepRule,
    memory: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    inputs: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    own: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """decode.decode_step on tensors that the kernel can read."""
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    cos, sin = rotation if rule.unrotate and rotation is not None else (None, None)
    sizes: dict[str, Any] = {
        "head_dim": head_dim, "heads": heads, "kv_heads": kv_heads,
        "channels": 0 if inputs is None else inputs.shape[-1],
        "batch": batch, "card": capability(q.device), "own": own is not None,
    }  # fmt: skip
    token = 0 if inputs is None else inputs.stride(0)
    turned = cos.stride(0) if cos is not None and len(cos) > 1 else 0
    parts = masses = None
    fresh = own is None and "q_own" in weights
    if fresh:
        assert inputs is not None
        turn = rotation if rule.unrotate else None
        own = own_heads(q, k, inputs, turn, weights, state_heads=rule.state_heads, card=sizes["card"])
        rule, sizes["own"] = replace(rule, unrotate=False), True
    out = empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    split = split_constants(rule, **sizes, dtype=q.dtype)
    if split is not None:
        _split(q, k, v, out, memory, weights, split)
        return out
    if wide(rule):
        every = wide_constants(rule, **sizes, fresh=fresh)
        given = [inputs, cos, sin], [weights.get(name) for name in FEATURE_WEIGHTS]
        parts, masses = _wide(q, k, v, rule, memory, every, given, own, token, turned)
        made, options = every["step"]
    else:
        made, options = constants(rule, **sizes)
    grid = (triton.cdiv(head_dim, made["BV"]), batch * heads // made["GROUP"])
    rest: list[torch.Tensor | None] = [*(own or (None, None)), inputs, cos, sin, out]
    rest += [memory.get(name) for name in MEMORY] + [weights.get(name) for name in WEIGHTS] + [parts, masses]
    decode_kernel[grid](
        q, k, v, *(q if x is None else x for x in rest),  # an absent tensor is never read; q stands for its address
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), token, turned,
        heads, kv_heads, rule.state_heads, **made, **options,
    )  # fmt: skip
    return out


def _split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    memory: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    every: Mapping[str, tuple[dict[str, Any], dict[str, int]]],
) -> None:
    """Write `out` and change `memory` by the kernels of decode_split_triton."""
    (batch, heads, head_dim), kv_heads = q.shape, k.shape[1]
    state, z, z_next, position, ring_k, ring_v = (memory[name] for name in MEMORY[:6])
    q_weight, q_bias, k_weight, k_bias, logit = (q if weights.get(x) is None else weights[x] for x in SPLIT_WEIGHTS)
    made, options = every["near"]
    features, near, masses = (
        empty((batch, heads, size), dtype=torch.float32, device=q.device)
        for size in (made["F"] * made["SIGNS"], head_dim, 1)
    )
    near_kernel[(batch * kv_heads + heads * triton.cdiv(batch, made["ROWS"]),)](
        q, k, v, position, ring_k, ring_v, q_weight, q_bias, logit, features, near, masses,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), batch, heads, kv_heads,
        **made, **options,
    )  # fmt: skip
    made, options = every["far"]
    far_kernel[(triton.cdiv(head_dim, made["BV"]), batch * heads)](
        features, near, masses, out, state, z, z_next, position, ring_k, ring_v, k_weight, k_bias, heads, kv_heads,
        **made, **options,
    )  # fmt: skip


def _wide(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rule: StepRule,
    memory: Mapping[str, torch.Tensor],
    every: Mapping[str, tuple[dict[str, Any], dict[str, int]]],
    given: tuple[list[torch.Tensor | None], list[torch.Tensor | None]],
    own: tuple[torch.Tensor, torch.Tensor] | None,
    token: int,
    turned: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Update the state tile by tile: its sums for every query head, [B, H, tiles, D] and [B, H, tiles], float32."""
    (batch, heads, head_dim), states = q.shape, rule.state_heads

    def fresh(*shape: int) -> torch.Tensor:
        return empty(shape, dtype=torch.float32, device=q.device)

    made, options = every["features"]
    x, y = own or (q, k)
    features, gates = fresh(batch, states + heads, made["SIGNS"] * made["F"]), fresh(batch, states, 2)
    peaks = fresh(batch, states + heads, made["TILES"], 2) if made["MAP"] == "learned_softmax" else features
    gated = min(made["ROWS"], batch) if rule.decay != "none" else 0
    features_kernel[made["TILES"] + gated, states + heads, triton.cdiv(batch, made["ROWS"])](
        x, y, *(q if t is None else t for t in given[0]), features, peaks, gates,
        *(q if t is None else t for t in given[1]),
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), token, turned, batch, heads, states, **made, **options,
    )  # fmt: skip
    made, options = every["state"]
    parts, masses = fresh(batch, heads, made["SPLITS"], head_dim), fresh(batch, heads, made["SPLITS"])
    state, z = memory["state"], memory.get("z")
    state_kernel[made["SPLITS"], batch * states](
        v, features, peaks, gates, state, *((state, state) if z is None else (z, memory["z_next"])), parts, masses,
        v.stride(0), v.stride(1), heads, states, **made, **options,
    )  # fmt: skip
    return parts, masses


def lolcats_rule(**other: Any) -> StepRule:
    """A LoLCATs layer at the size of Llama-3-8B, for the compile gate."""
    plain: dict[str, Any] = {
        "key_map": "same", "decay": "none", "decay_power": 1.0, "window": 64, "sinks": 0, "unrotate": False,
        "dt_gain": False, "negative_eigenvalues": False, "window_weight": 0.1, "scaling": 128**-0.5, "state_heads": 32,
        "feature_map": "hedgehog_softmax", "width": 64, "write": "add", "normaliser": "shared", "mix": "shared",
        "lagged": True,
    }  # fmt: skip
    return StepRule(**(plain | other))


def gate_cases() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations for the compile gate: layers at the size of Llama-3-8B.

    LoLCATs' in one launch, with bounded scores too, a delta rule, wide maps that act on each feature alone, and `pure`.
    """
    lolcats = lolcats_rule()
    pure = lolcats_rule(
        decay="scalar", sinks=4, state_heads=8, unrotate=True, feature_map="hedgehog_exp", width=1024,
        normaliser="own", mix="mass", lagged=False,
    )  # fmt: skip
    codes = replace(pure, feature_map="learned_softmax", width=2048, unrotate=False)
    delta = lolcats_rule(
        decay="scalar", state_heads=8, unrotate=True, feature_map="l2norm", width=128, write="delta",
        normaliser="norm", mix="gate", lagged=False,
    )  # fmt: skip
    exact = {
        "state": "*fp32",
        "z": "*fp32",
        "z_next": "*fp32",
        "position": "*i64",
        "ring_g": "*fp32",
        "ring_beta": "*fp32",
    }
    exact |= dict.fromkeys(("parts", "masses", "features", "peaks", "gates"), "*fp32")
    exact |= dict.fromkeys(("sqb", "sqh", "skb", "skh", "svb", "svh", "sxb", "scb"), "i32:16")
    exact |= dict.fromkeys(("B", "H", "HK", "S"), "i32")
    cases = []
    bound = replace(lolcats, softcap=50.0)
    for rule, label in (
        (lolcats, "lolcats"), (bound, "lolcats, bounded"), (delta, "delta rule"), (pure, "wide exp"), (codes, "pure"),
    ):  # fmt: skip
        for batch in (1, 16):
            sizes: dict[str, Any] = {
                "head_dim": 128, "heads": 32, "kv_heads": 8, "channels": 4096, "batch": batch, "card": 90,
            }  # fmt: skip
            kernels = {"step": (decode_kernel, constants(rule, **sizes))}
            if wide(rule):
                sizes["own"] = sizes["fresh"] = rule is codes
                named = {"features": features_kernel, "state": state_kernel, "step": decode_kernel}
                found = wide_constants(rule, **sizes)
                kernels = {name: (kernel, found[name]) for name, kernel in named.items()}
            for name, (kernel, (made, options)) in kernels.items():
                types = {argument: "*bf16" for argument in kernel.arg_names if argument not in made}
                types |= {argument: kind for argument, kind in exact.items() if argument in types}
                if rule is codes and name == "features":  # projections of their own, made in float32
                    types |= {"q": "*fp32", "k": "*fp32"}
                known = {key: x for key, x in options.items() if key != "launch_pdl"}
                cases.append((kernel, types, made, known, f"{label}, {name}, batch {batch}"))
    return cases
