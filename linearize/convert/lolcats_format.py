"""LoLCATs' published checkpoints (github.com/HazyResearch/lolcats, arXiv:2410.10254) and what they are as a mixer.

A `_distill.pt` holds the feature maps and the window's weights of every linear layer, a `_ft.pt` the low-rank adapters
that were trained after them; nothing says what they were trained with but the file's name. A linear layer computes
(paper, eq. 7), for the query at n, with phi(x) = [softmax(x W), softmax(-x W)], one W per query head for queries and
one for keys, on rotated vectors:

    y_n = (g sum_W exp(s_ni - c_n) v_i + sum_U phi(q_n).phi(k_j) v_j) / (the same without v),   g = sigmoid(factor)

with W the own block of tokens and the one before, U what lies before them, s = q.k / sqrt(D), c_n the largest s in W.
That is `mix: shared` with `feature_map: hedgehog_softmax`, `state_heads: query`. Files without window factors are pure
linear attention with these maps (`normaliser: own`, no window).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.artifacts.torch_file import read_torch_file
from linearize.errors import UsageError
from linearize.modeling.mixer_spec import MixerSpec

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "arXiv:2410.10254"
STATE = "model_state_dict"
WINDOW = 64
"""Block of the window in every published checkpoint."""
SCALE = 2.0
"""alpha / r of the adapters in every published configuration (8 and 16, 4 and 8)."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_KEY = re.compile(
    r"(?:base_model\.)?(?:model\.){0,3}layers\.(?P<layer>\d{1,4})\.self_attn\."
    r"(?:feature_map_(?P<map>[qk])\.mlp\.layer|(?P<window>window_factors)"
    r"|(?P<target>[qkvo]_proj)\.lora_(?P<side>[AB])(?:\.default)?\.weight)"
)
_UNLIKE: tuple[tuple[str, str], ...] = (
    (
        r"feature_map_[qk]\.mlp\.bias$",
        "maps with a bias (T2R's relu): their floor of 1e-12 is not that of our relu map",
    ),
    (r"feature_map_[qk]\.mlp\.(?:layer|bias)[01]$", "adapter maps (untied_head_adapter), which no mixer here computes"),
    (r"feature_map_[qk]s\.", "several maps a head (num_feature_maps), which no mixer here computes"),
    (r"conv", "convolutions in the attention, which no mixer here computes"),
    (r"_proj\.weight$|_proj\.bias$|norm|embed_tokens|lm_head", "weights trained in full, not maps or adapters"),
)
_NAMES: tuple[tuple[str, str], ...] = (
    (r"wsws?\d", "a sliding window of exactly N tokens: here windows are blocks, so a query sees N to 2N of them"),
    (r"(?<![a-z])t2r(?![a-z])", "T2R's relu maps, whose floor of 1e-12 is not that of our relu map"),
    (r"(?<![a-z])lsc=(?:1|True)", "maps with a skip connection, which the tensors do not show"),
)
"""What only a file's name tells, and cannot be carried over."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A pair of files, sorted."""

    maps: dict[int, dict[str, Tensor]]
    """{layer: {q_map.weight, k_map.weight: [H, D, F], window_logit: [H]}}, by the names of a Mixer's parameters."""
    adapters: dict[int, dict[str, tuple[Tensor, Tensor]]]
    """{layer: {q_proj: (A [r, in], B [out, r])}}."""
    window: int
    """Tokens of a block; 0: no window."""
    feature_dim: int
    rank: int | None

    def spec(self) -> MixerSpec:
        """The mixer that computes these layers."""
        if self.window:
            return MixerSpec(feature_map="hedgehog_softmax", feature_dim=self.feature_dim, window=self.window)
        return MixerSpec(
            feature_map="hedgehog_softmax",
            feature_dim=self.feature_dim,
            window=0,
            normaliser="own",
            mix="sum",
            coverage="all",
        )


def read_published(distilled: Path, finetuned: Path | None, *, window: int | None) -> Published:
    """Read and sort a pair of files; the second one's tensors come after the first one's, and win.

    `window` is the block of the softmax window; None: what the file's name says (`wtk64`), else 64.

    Raises:
        UsageError: an unreadable file, or tensors that are not those of an attention that a mixer here can compute.
    """
    found: dict[tuple[int, str], Tensor] = {}
    for path in [distilled] if finetuned is None else [distilled, finetuned]:
        for pattern, what in _NAMES:
            if re.search(pattern, path.name, re.IGNORECASE):
                raise UsageError(f"{path}: its name says {what}", "It cannot be imported; rename it if that is wrong.")
        sorted_out = _sort(read_torch_file(path, inside=STATE), path)
        if path == distilled and any(".lora_" in name for _, name in sorted_out):
            raise UsageError(
                f"{path}: holds low-rank adapters, so it is no distilled file", "Give it as the finetuned one."
            )
        found |= sorted_out
    maps: dict[int, dict[str, Tensor]] = {}
    halves: dict[int, dict[str, dict[str, Tensor]]] = {}
    for (layer, name), tensor in found.items():
        target, _, side = name.partition(".lora_")
        if side:
            halves.setdefault(layer, {}).setdefault(target, {})[side] = tensor
        else:
            maps.setdefault(layer, {})[name] = tensor
    if not maps:
        raise UsageError(f"{distilled}: holds no feature map of any layer", "Give the file of the distillation.")
    has_window = _complete(maps, distilled)
    block = _window(distilled, window) if has_window else 0
    if not has_window and window:
        raise UsageError(f"{distilled}: holds no window factors, so its layers have no window", "Leave out the window.")
    width = {int(entry["q_map.weight"].shape[-1]) for entry in maps.values()}
    if len(width) > 1:
        raise UsageError(f"{distilled}: its layers have maps of different sizes ({sorted(width)})")
    adapters = {layer: {t: _pair(layer, t, both) for t, both in entry.items()} for layer, entry in halves.items()}
    ranks = {a.shape[0] for entry in adapters.values() for a, _ in entry.values()}
    if len(ranks) > 1:
        raise UsageError(f"{finetuned}: its adapters have different ranks ({sorted(ranks)})")
    return Published(
        maps=maps, adapters=adapters, window=block, feature_dim=width.pop(), rank=ranks.pop() if ranks else None
    )


def _sort(state: Mapping[str, Tensor], path: Path) -> dict[tuple[int, str], Tensor]:
    """Every tensor by layer and what it is; float32, finite."""
    import torch

    found: dict[tuple[int, str], Tensor] = {}
    for name, tensor in state.items():
        match = _KEY.fullmatch(name)
        if match is None:
            reason = next((text for pattern, text in _UNLIKE if re.search(pattern, name)), None)
            raise UsageError(
                f"{path}: cannot place {name!r:.120}" + (f": {reason}" if reason else ""),
                "Expected feature_map_q, feature_map_k, window_factors and lora_A, lora_B of self_attn.",
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{path}: {name!r:.120} holds numbers that are not finite or no floats")
        if match["map"]:
            key, value = f"{match['map']}_map.weight", tensor
        elif match["window"]:
            key, value = "window_logit", tensor.flatten()
        else:
            key, value = f"{match['target']}.lora_{match['side']}", tensor
        place = (int(match["layer"]), key)
        if place in found:
            raise UsageError(f"{path}: layer {place[0]} has {key} twice, under two names")
        found[place] = value.float()
    return found


def _complete(maps: dict[int, dict[str, Tensor]], path: Path) -> bool:
    """Fill in what tied maps share; whether the layers have a window.

    Raises:
        UsageError: a layer lacks what another one has.
    """
    tied = all("k_map.weight" not in entry for entry in maps.values())
    has_window = any("window_logit" in entry for entry in maps.values())
    for layer, entry in sorted(maps.items()):
        if tied and "q_map.weight" in entry:  # `tie_qk_kernels`: one map for queries and keys, saved once
            entry["k_map.weight"] = entry["q_map.weight"]
        needed = ("q_map.weight", "k_map.weight", *(("window_logit",) if has_window else ()))
        lacking = [name for name in needed if name not in entry]
        if lacking:
            raise UsageError(f"{path}: layer {layer} lacks {lacking[0]}, which other layers have")
    return has_window


def _window(path: Path, window: int | None) -> int:
    named = re.search(r"wtk(\d{1,5})", path.name)
    told = int(named[1]) if named else None
    if window is not None and told is not None and window != told:
        raise UsageError(
            f"--window {window}: the name of {path.name!r:.120} says a block of {told} tokens",
            f"Use {told}, or rename the file if its name is wrong.",
        )
    return window or told or WINDOW


def _pair(layer: int, target: str, both: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if set(both) != {"A", "B"}:
        raise UsageError(f"the finetuned file: layer {layer} has one half of an adapter of {target} and not the other")
    a, b = both["A"], both["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise UsageError(
            f"the finetuned file: layer {layer}: adapter of {target} with shapes {list(a.shape)} and {list(b.shape)}"
        )
    return a, b
