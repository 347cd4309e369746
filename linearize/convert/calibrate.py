"""Calibration: gates, write strengths and scales of every linear layer, set from the teacher before any training.

No gradients. Two passes of the teacher over a few windows. The first observes its attention and proposes values
(Taylor-Calibrate, arXiv 2606.16429: half-life = mean look-back distance, write strength from entropy; with biases, so
that the gates' means are what is meant). The second tries all proposals on the teacher's own inputs and solves each
one's scale by least squares. Every head then takes the proposal with the least error |y - y*|^2 against the teacher's
output y*; what it came with is one of them, so no head gets worse on these tokens. Maps that learn codes are first
started at keys of these tokens (codes.py); that is what a head then comes with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearize.convert import observe
from linearize.convert.capture import TeacherLayer, captured
from linearize.convert.codes import start_codes
from linearize.convert.observe import Observed, mixer_call
from linearize.convert.optim import derived_seed
from linearize.convert.trial import SCALES, Proposal, Trial, assign, pick, solve_scale, squared_error
from linearize.data import batches
from linearize.modeling.family_table import body
from linearize.modeling.mixer import Mixer
from linearize.progress import Progress

GENTLE = 0.1
"""A write strength below what entropy proposes: keys of an untrained map overlap, and hard writes erase."""
LEANINGS = (0.0, 1.0, 2.0, 4.0)
"""Log odds added to the teacher's mean share: an untrained linear branch cannot yet give all of the rest."""


@torch.no_grad()
def calibrate(
    student: Any, teacher: Any, *, windows: np.ndarray, tokens: int, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """Set the mixers of `student`'s linear layers from what `teacher` does on about `tokens` tokens of `windows`.

    Both are on one device; the student is fresh from surgery. Only mixers change, in place: biases of decay and write
    strength, weight and bias of a learned mix, the window's weight in a shared mix, the linear branch's scale, and
    the maps where they learn codes.

    Args:
        windows: token ids [N, T]; round(`tokens` / T) of them (one at least) are read, drawn by `seed`.

    Returns:
        A row a layer: `error` |y - y*|^2 / |y*|^2 of the heads' outputs `_before` and `_after`, and of the window
        alone; the window's `share` of the teacher's attention and the student's, in mean over tokens that have
        something beyond the window; median half-life in tokens, mean write strength; how many of the heads took a new
        state and a new mix, as a share. None where the mixer has no such thing.
    """
    from linearize.modeling.modeling_linearized import attention_layers

    found: dict[int, Any] = dict(attention_layers(student))
    attentions = {index: module for index, module in found.items() if module.mixer.spec.write != "none"}
    if not attentions:
        return []
    picked = picked_windows(windows, tokens=tokens, seed=seed)
    progress.message(f"calibrating {len(attentions)} layers on {picked.size:,} tokens")
    every = math.ceil(picked.size / observe.SAMPLE)
    seen = {index: Observed() for index in attentions}

    def look(number: int, layer: TeacherLayer) -> None:
        attention = attentions[layer.index]
        seen[layer.index].add(attention.mixer, layer, mixer_call(attention, layer), every=every, offset=number)

    _run(teacher, list(attentions), picked, look, weights=True)
    for index, module in attentions.items():
        if seen[index].keys:
            start_codes(module.mixer, torch.cat(seen[index].keys, dim=1))
    trials = {index: propose(module.mixer, seen[index]) for index, module in attentions.items()}

    def attempt(number: int, layer: TeacherLayer) -> None:
        attention = attentions[layer.index]
        trials[layer.index].add(attention.mixer, mixer_call(attention, layer), layer.heads)

    _run(teacher, list(attentions), picked, attempt)
    return [
        {"layer": index, "share_teacher": seen[index].mean_share() if module.mixer.spec.window else None}
        | settle(module.mixer, trials[index])
        for index, module in attentions.items()
    ]


def picked_windows(windows: np.ndarray, *, tokens: int, seed: int) -> np.ndarray:
    """The rows of `windows` [N, T] that a calibration on about `tokens` tokens reads: whole windows, one at least."""
    count = max(1, min(len(windows), round(tokens / windows.shape[1])))
    return batches(windows, batch_size=count, seed=derived_seed(seed, "calibrate"), step=0)


def propose(mixer: Mixer, seen: Observed) -> Trial:
    """What to try for decay and write strength, and for the mix; the first of each is what the mixer has.

    Where a window sees all there is, its linear branch carries nothing: nothing is known to propose.
    """
    trial = Trial(states=[Proposal(name="kept", values={})], mixes=[Proposal(name="kept", values={})])
    if not seen.inputs:
        return trial
    inputs, entropy = torch.cat(seen.inputs), seen.entropy(mixer.state_heads)
    strengths = {"entropy": 0.3 + 0.4 * (1.0 - entropy), "gentle": torch.full_like(entropy, GENTLE)}
    for which in ("all", "far") if mixer.spec.window else ("all",):
        decay = observe.decay_bias(mixer, inputs, seen.distance(which, mixer.state_heads))
        for name, strength in strengths.items():
            values = decay | observe.write_bias(mixer, inputs, strength)
            if values and not any(_same(values, other.values) for other in trial.states):
                trial.states.append(Proposal(name=f"{which}, {name}", values=values))
    balanced = observe.mix_values(mixer, seen)
    if balanced:
        trial.mixes += [Proposal(name=f"{by:+g}", values=observe.leaning(balanced, by)) for by in LEANINGS]
    return trial


def settle(mixer: Mixer, trial: Trial) -> dict[str, Any]:
    """Give every head the best of what was tried, and say what came of it."""
    parameters: dict[str, Tensor] = dict(mixer.named_parameters())
    moments, shares, gates, target, alone = (
        torch.as_tensor(x) for x in (trial.moments, trial.shares, trial.gates, trial.target, trial.alone)
    )
    name = SCALES.get(mixer.spec.normaliser)
    scale = parameters[name].double() if name else moments.new_zeros(mixer.num_heads)
    scales = solve_scale(moments, channels=scale.ndim == 2)
    before = squared_error(moments[0, 0], scale if scale.ndim == 2 else scale[:, None].expand(-1, mixer.head_dim))

    # Heads that share a state must agree on it; each then has a mix of its own.
    errors, mix = squared_error(moments, scales).min(dim=1)  # [P, H]
    state = errors.unflatten(1, (mixer.state_heads, -1)).sum(-1).argmin(0)  # [S]
    group = state.repeat_interleave(mixer.num_heads // mixer.state_heads)
    every = torch.arange(mixer.num_heads, device=group.device)
    after, mix = errors[group, every], mix[group, every]
    assign(parameters, pick(trial.states, state, parameters) | pick(trial.mixes, mix, parameters))
    if name:
        chosen = scales[group, mix, every]
        assign(parameters, {name: chosen if scale.ndim == 2 else chosen[:, 0]})

    rates = gates / trial.tokens
    settled = rates[state, :, torch.arange(mixer.state_heads, device=state.device)]  # [S, 2]
    window, decay, delta = mixer.spec.window > 0, mixer.spec.decay != "none", mixer.spec.write == "delta"
    far = window and trial.beyond > 0
    return {
        "error_before": float(before.sum() / target.sum()),
        "error_after": float(after.sum() / target.sum()),
        "error_window": float(alone.sum() / target.sum()) if window else None,
        "share_before": float(shares[0, 0].mean() / trial.beyond) if far else None,
        "share_after": float(shares[group, mix, every].mean() / trial.beyond) if far else None,
        "half_life_before": _half_life(rates[0, 0]) if decay else None,
        "half_life_after": _half_life(settled[:, 0]) if decay else None,
        "write_before": float(rates[0, 1].mean()) if delta else None,
        "write_after": float(settled[:, 1].mean()) if delta else None,
        "new_state": float((state > 0).double().mean()) if len(trial.states) > 1 else None,
        "new_mix": float((mix > 0).double().mean()) if len(trial.mixes) > 1 else None,
    }


def _run(
    teacher: Any,
    layers: Sequence[int],
    rows: np.ndarray,
    on_layer: Callable[[int, TeacherLayer], None],
    *,
    weights: bool = False,
) -> None:
    """Show every layer of every row to `on_layer`, with the row's number."""
    device = next(teacher.parameters()).device
    for number, row in enumerate(rows):  # one at a time: its attention weights are T x T for every head
        with captured(teacher, layers, partial(on_layer, number), weights=weights):
            body(teacher)(input_ids=torch.from_numpy(row[None]).to(device).long(), use_cache=False)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _half_life(rates: Tensor) -> float:
    return float((math.log(2) / rates.clamp_min(observe.LEAST)).median())
