"""Alignment: every linear layer learns the teacher's attention, on the hidden states that the teacher's layer reads.

The teacher runs once a micro-batch. After each of its attention layers the student's layer runs on the same input, its
loss is differentiated at once and its activations are freed, so one layer's activations are held at a time. Layers
share nothing but the step counter: the gradients are those of the summed loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.convert.align_loss import FLOOR, joint_loss, layer_loss, same_projections
from linearize.convert.capture import TeacherLayer, captured
from linearize.convert.checkpoint import Checkpoint, Run, pack_state, save
from linearize.convert.lanes import Lanes
from linearize.convert.norms import in_one_launch
from linearize.convert.optim import (
    autocast,
    clip,
    derived_uniform,
    highest_rate,
    make_optimizer,
    rate_groups,
    set_learning_rate,
    trainable,
)
from linearize.convert.replay import Replay, gradient_buffers, worth_recording
from linearize.convert.restore import restoring, state_of, unpack_state
from linearize.convert.stages import RECENT, StageShape, StageState, note
from linearize.convert.surgery import trained_names
from linearize.data import batches
from linearize.errors import VerificationError
from linearize.modeling.family_table import body, lookup
from linearize.progress import Progress
from linearize.recipe import Align
from linearize.task import CAUSAL, Task

DEAD_AFTER = 10
"""Optimiser steps after which a layer must have moved."""
DIVERGED = 10.0
"""A running loss this many times the first one has diverged."""


@dataclass(kw_only=True)
class LayerTrack:
    """How one layer has fared so far."""

    first: float | None = None
    """Loss of its first step."""
    loss: float = 0.0
    """Mean of its last steps."""
    nmse_first: float | None = None
    nmse: float = 0.0
    """Mean of the last steps' |y_student - y_teacher|^2 / |y_teacher|^2, of the heads or of the module."""
    recent: list[list[float]] = field(default_factory=list)
    """Loss and normalised error of the last steps."""

    def add(self, loss: float, nmse: float) -> None:
        """Take in one step."""
        if self.first is None:
            self.first, self.nmse_first = loss, nmse
        self.recent = [*self.recent, [loss, nmse]][-RECENT:]
        self.loss, self.nmse = (sum(values) / len(self.recent) for values in zip(*self.recent, strict=True))


def branches_of(align: Align, *, hidden: bool) -> tuple[str, ...]:
    """The branches whose losses are summed for one micro-batch; `hidden`: window dropout has struck."""
    if hidden or align.branch == "linear":
        return ("linear",)
    return ("full",) if align.branch == "mix" else ("full", "linear")


def window_hidden(align: Align, layer: int, *, seed: int, step: int, micro: int) -> bool:
    """Whether the layer runs without its window: a function of seed, step, micro-batch and layer alone."""
    return align.window_dropout > 0 and derived_uniform(seed, "window", step, micro, layer) < align.window_dropout


@dataclass(frozen=True, kw_only=True)
class MicroResult:
    """One micro-batch, and the layers that ran without their window."""

    table: Tensor
    """[2, layers] fp32, on the device: losses, and normalised errors."""
    hidden: tuple[int, ...]


def transfer_micro_batch(
    teacher: Any,
    attentions: dict[int, nn.Module],
    ids: Tensor,
    align: Align,
    *,
    hidden: Collection[int] = (),
    scale: float = 1.0,
    task: Task = CAUSAL,
    lanes: Lanes | None = None,
    projected: Collection[int] = (),
) -> Tensor:
    """Run the teacher on ids [B, T]; add `scale` times every layer's gradients to its parameters.

    Layers in `hidden` run without their window; layers run side by side in `lanes`; those in `projected` take the
    teacher's queries, keys and values, which are theirs (align_loss.same_projections). Returns losses and normalised
    errors, fp32 [2, layers].
    """
    lanes = Lanes(ids.device) if lanes is None else lanes
    losses, errors = [], []
    real, layout = task.real(ids), task.layout(ids)

    def on_layer(layer: TeacherLayer) -> None:
        with lanes.beside(layer.index, layer):
            learn(layer)

    def learn(layer: TeacherLayer) -> None:
        attention = attentions[layer.index]
        if layout is not None:
            layer = replace(layer, kwargs=layer.kwargs | {"mixer_layout": layout})
        total: Tensor | None = None
        error: Tensor | None = None
        todo = branches_of(align, hidden=layer.index in hidden)
        shared = len(todo) == 2 and align.objective != "weights" and not attention.mixer.spec.lagged  # type: ignore[union-attr]
        shared &= layout is None  # the linear branch alone is kept as it was computed, a document a row
        for branches in todo[:1] if shared else todo:
            with torch.enable_grad():
                if shared:
                    loss, branch_error = joint_loss(attention, layer, align.objective)
                else:
                    loss, branch_error = layer_loss(attention, layer, branches, align.objective, real)
                # Outside autocast: the mixer's own fp32 products must not be differentiated in bf16.
                with torch.autocast(ids.device.type, enabled=False):
                    (loss * scale).backward()
            total = loss.detach() if total is None else total + loss.detach()
            error = branch_error if error is None else error
        assert total is not None and error is not None
        losses.append(total)
        errors.append(error)

    with (
        torch.no_grad(),
        autocast(ids.device),
        captured(teacher, list(attentions), on_layer, weights=align.objective == "weights", projected=projected),
    ):
        body(teacher)(**task.call(ids))
    lanes.join()
    return torch.stack((torch.stack(losses), torch.stack(errors))).float()


def shared_projections(teacher: Any, attentions: dict[int, nn.Module], members: dict[int, list[str]]) -> frozenset[int]:
    """Layers whose queries, keys and values are the teacher's, and stay so: only the mixer is among their `members`."""
    family = lookup(teacher.config)
    if family.bidirectional:
        return frozenset()
    frozen = {i for i, names in members.items() if all(".mixer." in name for name in names)}
    return frozenset(i for i in frozen if same_projections(attentions[i], family.attention_of(teacher, i)))


def align_layers(
    student: Any,
    teacher: Any,
    *,
    align: Align,
    shape: StageShape,
    micro: int,
    seed: int,
    windows: np.ndarray,
    run: Run,
    start: Checkpoint | None,
    progress: Progress,
    task: Task = CAUSAL,
) -> StageState:
    """Train the linear layers of `student` on `windows` [N, T], `micro` windows at a time.

    Raises:
        VerificationError: a layer did not move, is not finite or diverged; it is named.
        KeyboardInterrupt: after saving, when a signal asked for it.
    """
    from linearize.modeling.modeling_linearized import attention_layers

    attentions = dict(attention_layers(student))
    members = {i: aligned_names(student, align, [i]) for i in attentions}
    everything = dict(student.named_parameters())
    parameters = {name: everything[name] for names in members.values() for name in names}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = make_optimizer(
        align.optimizer, rate_groups(parameters, align.lr, align.mixer_lr), weight_decay=align.weight_decay
    )
    state = StageState()
    if start is not None:
        with restoring(start):
            unpack_state(start.tensors(), parameters, optimizer)
            state = StageState(**state_of(start))
            match(state)
    with restoring(start):
        tracks = {i: LayerTrack(**state.extra.get(str(i), {})) for i in attentions}
    device = next(student.parameters()).device
    begin, first = time.monotonic(), state.step
    spent = state.seconds

    # With hidden windows there are as many kinds of steps as sets of layers, too many to record.
    recorded = worth_recording(teacher, device)
    plain = recorded and not align.window_dropout and not task.varied
    lanes = Lanes.fitting(device, micro * shape.context * body(teacher).config.hidden_size, recorded=plain)
    projected = shared_projections(teacher, attentions, members)

    def micro_batch(ids: Tensor, hidden: tuple[int, ...]) -> Tensor:
        scale = len(ids) / shape.batch
        return transfer_micro_batch(
            teacher, attentions, ids, align, hidden=hidden, scale=scale, task=task, lanes=lanes, projected=projected
        )

    replay = Replay(micro_batch, device, enabled=plain)

    def clipped(kind: str) -> Tensor:
        # Each layer by itself: none is slowed down by another one's large gradient.
        nothing = torch.zeros((), device=device)
        norms = [clip((parameters[n] for n in names), align.clip) if names else nothing for names in members.values()]
        return torch.stack(norms)

    clipping = Replay(clipped, device, enabled=recorded)

    @lru_cache(2)
    def example(step: int) -> Tensor:
        rows = batches(windows, batch_size=shape.batch, seed=seed, step=shape.offset + step)
        return task.examples(rows, seed, "mask", shape.name, step)[0]

    def launched(step: int) -> list[MicroResult]:
        """A step's micro-batches; nothing waits for them."""
        results = []
        for number, part in enumerate(example(step).to(device).split(micro)):
            hidden = tuple(i for i in attentions if window_hidden(align, i, seed=seed, step=step, micro=number))
            results.append(MicroResult(table=replay(part, kind=hidden), hidden=hidden))
        return results

    buffers = gradient_buffers(parameters.values())
    with trainable(parameters.values()), buffers, in_one_launch(student, teacher), run.listening():
        ready: list[MicroResult] | None = None
        for step in range(first, shape.steps):
            set_learning_rate(optimizer, step, steps=shape.steps, warmup=align.warmup, min_lr=align.min_lr)
            results = launched(step) if ready is None else ready
            seen = _take_in(tracks, results, clipping(kind="clip"), step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            # A recorded step runs by itself: meanwhile the host notes what came of the one before.
            if ready := launched(step + 1) if replay.enabled and step + 1 < shape.steps else None:
                example(step + 2)
            state.step = step + 1
            state.seconds = spent + time.monotonic() - begin
            state.extra = {str(i): asdict(t) for i, t in tracks.items()}
            rows_of_layers = match(state)
            if rows_of_layers:
                state.loss_last = sum(row["loss"] for row in rows_of_layers) / len(rows_of_layers)
                state.loss_first = state.loss_last if state.loss_first is None else state.loss_first
            if state.step in (DEAD_AFTER, shape.steps):
                _check_moved(members, parameters, before, state.step)
            extra = {}
            if rows_of_layers:
                worst = min(rows_of_layers, key=lambda row: row["explained"])
                extra = {"mean_match": mean_match(state), "worst_match": worst["explained"], "layer": worst["layer"]}
            note(state, shape.name, {"lr": highest_rate(optimizer), **figures_of(seen)})
            tokens = state.step * shape.batch * shape.context
            progress.step(shape.name, state.step, state.loss_last, tokens, extra)
            if run.due() or state.step == shape.steps:
                tensors = pack_state(parameters, optimizer)
                save(run, stage=shape.name, step=state.step, tensors=tensors, state=asdict(state))
            run.stop_if_interrupted()
    if first < shape.steps:  # a resume right after the last step has nothing to tell
        progress.layer_table(match(state))
    return state


def aligned_names(student: Any, align: Align, layers: Collection[int]) -> list[str]:
    """The parameters that alignment trains in these layers: inside the attention modules, by `align.train`."""
    family = lookup(student.config)
    inside = (f"{family.attention}.", *family.projections.values())
    prefixes = tuple(f"{family.layer_path(layer)}.{path}" for layer in layers for path in inside)
    return [n for n in trained_names(student, align.train, layers, key="align.train") if n.startswith(prefixes)]


def match(state: StageState) -> list[dict[str, Any]]:
    """Per layer: loss and normalised error at the start and now, and the share of the teacher's output explained."""
    return [
        {
            "layer": int(index),
            "loss_first": track["first"],
            "loss": track["loss"],
            "nmse_first": track["nmse_first"],
            "nmse": track["nmse"],
            "explained": 1.0 - track["nmse"],
        }
        for index, track in state.extra.items()
        if track["first"] is not None
    ]


def figures_of(seen: dict[int, tuple[float, float] | None]) -> dict[str, float | None]:
    """A step's figures for the history, from loss and normalised error of each layer (None: it ran windowless)."""
    known = [pair[0] for pair in seen.values() if pair is not None]
    values: dict[str, float | None] = {"loss": sum(known) / len(known) if known else None}
    for index, pair in seen.items():
        values[f"loss/{index}"] = None if pair is None else pair[0]
        values[f"match/{index}"] = None if pair is None else 1.0 - pair[1]
    return values


def mean_match(state: StageState) -> float | None:
    """Share of the teacher's attention outputs that is explained (1 - normalised error), mean over the layers."""
    rows = match(state)
    return sum(row["explained"] for row in rows) / len(rows) if rows else None


def _take_in(
    tracks: dict[int, LayerTrack], results: Sequence[MicroResult], norms: Tensor, step: int
) -> dict[int, tuple[float, float] | None]:
    """Update the tracks; stop on a layer that is not finite or has diverged. `norms` [layers]: of their gradients.

    Returns loss and normalised error of each layer in this step, None where it ran without its window throughout.
    """
    taken: dict[int, tuple[float, float] | None] = {}
    table = torch.stack([r.table for r in results]).cpu().tolist()
    finite = norms.isfinite().tolist()
    for place, (index, track) in enumerate(tracks.items()):
        values = [(part[0][place], part[1][place]) for part in table]
        if not finite[place] or not all(math.isfinite(x) for pair in values for x in pair):
            raise VerificationError(
                f"layer {index}: the alignment loss or its gradient is not finite at step {step + 1}",
                "Lower align.lr or align.clip",
            )
        seen = [pair for pair, result in zip(values, results, strict=True) if index not in result.hidden]
        taken[index] = (sum(s[0] for s in seen) / len(seen), sum(s[1] for s in seen) / len(seen)) if seen else None
        if (pair := taken[index]) is None:
            continue
        track.add(*pair)
        if track.first is not None and track.loss > DIVERGED * max(track.first, FLOOR) and track.nmse > 1.0:
            raise VerificationError(
                f"layer {index}: the alignment diverged, its loss is {track.loss:.3g} at step {step + 1} and began at "
                f"{track.first:.3g}",
                "Lower align.lr",
            )
    return taken


def _check_moved(
    members: dict[int, list[str]], parameters: dict[str, nn.Parameter], before: dict[str, Tensor], steps: int
) -> None:
    for index, names in members.items():
        if names and all(torch.equal(parameters[name].detach(), before[name]) for name in names):
            raise VerificationError(
                f"layer {index}: alignment moved none of its parameters in {steps} steps",
                "Check align.train, align.branch and the window against the context",
            )
