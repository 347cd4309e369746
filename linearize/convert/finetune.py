"""Finetuning: the whole student on next tokens, on the teacher's logits, or on both (finetune_loss.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.convert.checkpoint import Checkpoint, Run, pack_state, save
from linearize.convert.finetune_loss import backward_losses
from linearize.convert.lanes import Lanes
from linearize.convert.lora import inject
from linearize.convert.norms import in_one_launch
from linearize.convert.optim import (
    clip,
    derived_seed,
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
from linearize.errors import UsageError, VerificationError
from linearize.masking import IGNORE
from linearize.modeling.family_table import Family, body, lookup
from linearize.progress import Progress
from linearize.recipe import Finetune
from linearize.task import CAUSAL, Task

DROPOUTS = ("attention_dropout", "dropout", "layerdrop", "jitter_noise")
"""Rates that native modules keep as numbers."""
DEAD_AFTER = 10
DIVERGED = 4.0
"""Nats by which the running loss may exceed its lowest value."""
WORSE = 2.0
"""Of the first steps' mean loss, how many times of it the last ones' may be without a word."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What finetuning trains."""

    full: dict[str, nn.Parameter]
    """In full, by name."""
    adapters: dict[str, nn.Parameter]
    """Low-rank, by name."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Both."""
        return self.full | self.adapters


def prepare(student: Any, finetune: Finetune, *, seed: int) -> Trained:
    """Put the adapters in and find what `full` names.

    Raises:
        UsageError: nothing to train, a name the model does not have, or a module that is named for both.
    """
    full_names = trained_names(student, finetune.full, key="finetune.full")
    for wanted, path in ((name, lookup(student.config).projections.get(name, name)) for name in finetune.full):
        if wanted != "mixer" and not trained_names(student, [path]):
            raise UsageError(f"finetune.full: the model has no module {wanted!r}")
    if finetune.lora is not None and (both := sorted(set(finetune.full) & set(finetune.lora.targets))):
        raise UsageError(f"finetune.full: {both[0]} has a LoRA adapter too", "Name it in one of the two")
    adapters = {} if finetune.lora is None else inject(student, finetune.lora, seed=seed)
    named = dict(student.named_parameters())
    trained = Trained(full={name: named[name] for name in full_names}, adapters=adapters)
    if not trained.parameters:
        raise UsageError("finetune: nothing of this model is trained", "Set finetune.lora, or finetune.tokens=0")
    return trained


@contextmanager
def training_mode(student: Any, *, checkpointing: bool) -> Iterator[None]:
    """Training mode for dropout of adapters and recomputation; the teacher's own dropout stays off."""
    dropouts = {
        (module, key): rate
        for module in student.modules()
        for key in DROPOUTS
        if isinstance(rate := getattr(module, key, None), (int, float))
    }
    layers = {
        module: module.p
        for name, module in student.named_modules()
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name
    }
    student.train()
    for module, key in dropouts:
        setattr(module, key, 0.0)
    for module in layers:  # its rate, not its mode: attention modules hand the rate on
        module.p = 0.0
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            student.gradient_checkpointing_disable()
        for (module, key), rate in dropouts.items():
            setattr(module, key, rate)
        for module, rate in layers.items():
            module.p = rate
        student.eval()


def window_hidden(finetune: Finetune, *, seed: int, step: int) -> bool:
    """Whether a step runs without any layer's window: by the chance of `window_dropout`, of seed and step alone."""
    return finetune.window_dropout > 0 and derived_uniform(seed, "no window", step) < finetune.window_dropout


@contextmanager
def branches(student: Any, name: str) -> Iterator[None]:
    """Run every layer with these branches (see `Mixer.branches`).

    All layers at once: without windows the linear branches have to carry the model together, as when audited alone.
    """
    from linearize.modeling.modeling_linearized import set_branches

    set_branches(student, name)
    try:
        yield
    finally:
        set_branches(student, "full")


def finetune_model(
    student: Any,
    teacher: Any,
    trained: Trained,
    *,
    finetune: Finetune,
    shape: StageShape,
    micro: int,
    seed: int,
    windows: np.ndarray,
    checkpointing: bool,
    keep: dict[str, nn.Parameter],
    carried: dict[str, Any],
    run: Run,
    start: Checkpoint | None,
    progress: Progress,
    task: Task = CAUSAL,
) -> StageState:
    """Train `trained` on `windows` [N, T], `micro` windows at a time.

    `keep` are parameters that an earlier stage trained and this one may not, `carried` plain values of that stage:
    checkpoints hold both as well.

    Raises:
        VerificationError: the loss or a gradient is not finite, the loss diverged, or nothing moved.
        KeyboardInterrupt: after saving, when a signal asked for it.
    """
    parameters = trained.parameters
    groups = rate_groups(trained.full, finetune.full_lr or finetune.lr, finetune.mixer_lr)
    groups.append((trained.adapters, finetune.lr))
    optimizer = make_optimizer(finetune.optimizer, groups, weight_decay=finetune.weight_decay)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    stored = keep | parameters
    state = StageState(extra=dict(carried))
    if start is not None:
        with restoring(start):
            unpack_state(start.tensors(), stored, optimizer)
            state = StageState(**state_of(start))
    device = next(student.parameters()).device
    begin, first, spent = time.monotonic(), state.step, state.seconds

    # Recomputation and dropout depend on random states that a recording would not move on as its steps do.
    plain = not checkpointing and not task.varied and (finetune.lora is None or finetune.lora.dropout == 0)
    recorded = worth_recording(student, device)
    numbers = micro * shape.context * body(student).config.hidden_size
    lanes = Lanes.fitting(device, numbers, recorded=plain and recorded)

    def micro_batch(ids: Tensor, labels: Tensor, scale: Tensor, which: str) -> Tensor:
        with branches(student, which):
            return backward_losses(
                student, teacher, ids, labels, ce=finetune.ce, kl=finetune.kl, scale=scale, task=task, lanes=lanes
            )

    replay = Replay(micro_batch, device, enabled=plain and recorded)
    clipping = Replay(lambda kind: clip(parameters.values(), finetune.clip), device, enabled=recorded)

    @lru_cache(2)
    def example(step: int) -> tuple[Tensor, Tensor]:
        rows = batches(windows, batch_size=shape.batch, seed=seed, step=shape.offset + step)
        return task.examples(rows, seed, "mask", shape.name, step)

    def launched(step: int) -> tuple[list[Tensor], Tensor, bool]:
        """A step's losses by micro-batch, its labelled tokens, and whether it hides all windows; nothing waits."""
        ids, labels = (x.to(device) for x in example(step))
        tokens = (labels != IGNORE).sum()
        sums = []
        hidden = window_hidden(finetune, seed=seed, step=step)
        for number, (part, part_labels) in enumerate(zip(ids.split(micro), labels.split(micro), strict=True)):
            if not replay.enabled:  # what is recorded draws no numbers
                torch.manual_seed(derived_seed(seed, "dropout", step, number))
            sums.append(replay(part, part_labels, 1.0 / tokens, kind="linear" if hidden else "full"))
        return sums, tokens, hidden

    mode, buffers = training_mode(student, checkpointing=checkpointing), gradient_buffers(parameters.values())
    norms = in_one_launch(student, teacher)
    with trainable(parameters.values()), mode, buffers, norms, run.listening():
        ready: tuple[list[Tensor], Tensor, bool] | None = None
        for step in range(first, shape.steps):
            set_learning_rate(optimizer, step, steps=shape.steps, warmup=finetune.warmup, min_lr=finetune.min_lr)
            sums, tokens, hidden = launched(step) if ready is None else ready
            norm = clipping(kind="clip")
            ce_mean, kl_mean, size = [*(torch.stack(sums).sum(0) / tokens).tolist(), float(norm)]
            _take_in(state, ce_mean, kl_mean, finetune, size, parameters, step, hidden=hidden)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            # A recorded step runs by itself: meanwhile the host notes what came of the one before.
            if ready := launched(step + 1) if replay.enabled and step + 1 < shape.steps else None:
                example(step + 2)
            state.step = step + 1
            state.seconds = spent + time.monotonic() - begin
            if state.step in (DEAD_AFTER, shape.steps):
                _check_moved(parameters, before, state.step, family=lookup(student.config))
            extra = {"ce": ce_mean} | ({"kl": kl_mean} if finetune.kl > 0 else {})
            loss = finetune.ce * ce_mean + finetune.kl * kl_mean
            shown = not hidden or finetune.window_dropout == 1  # a step without windows has another loss
            note(state, shape.name, {"lr": highest_rate(optimizer), "loss": loss if shown else None,
                                     **{name: value if shown else None for name, value in extra.items()}})  # fmt: skip
            tokens_done = state.step * shape.batch * shape.context
            progress.step(shape.name, state.step, state.loss_last, tokens_done, extra)
            if run.due() or state.step == shape.steps:
                tensors = pack_state(stored, optimizer)
                save(run, stage=shape.name, step=state.step, tensors=tensors, state=asdict(state))
            run.stop_if_interrupted()
    if (complaint := ended_worse(state)) is not None:
        progress.message(complaint)
    return state


def ended_worse(state: StageState) -> str | None:
    """What to say of a stage whose last steps lost far more than its first, or None."""
    first, last = state.loss_first, state.loss_last
    if first is None or last is None or last <= WORSE * first:
        return None
    return (
        f"warning: finetuning ended worse than it began, its loss is {last:.3g} and was {first:.3g}; "
        "lower finetune.mixer_lr, finetune.full_lr and finetune.lr, or take fewer finetune.tokens"
    )


def _take_in(
    state: StageState,
    ce_mean: float,
    kl_mean: float,
    finetune: Finetune,
    norm: float,
    parameters: dict[str, nn.Parameter],
    step: int,
    *,
    hidden: bool,
) -> None:
    """Update the running figures; stop where the training has died. Steps without windows are not among the figures."""
    loss = finetune.ce * ce_mean + finetune.kl * kl_mean
    if not math.isfinite(loss) or not math.isfinite(norm):
        bad = next((n for n, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())), None)
        where = "" if bad is None else f", first in {bad}"
        raise VerificationError(
            f"finetuning: the loss or its gradient is not finite at step {step + 1}{where}", "Lower finetune.lr"
        )
    if hidden and finetune.window_dropout < 1:
        return
    taken = state.extra.get("taken", 0)
    state.extra["taken"] = taken + 1
    if taken < RECENT:
        state.loss_first = ((state.loss_first or 0.0) * taken + loss) / (taken + 1)
    recent = [*state.extra.get("recent", []), [loss, ce_mean, kl_mean]][-RECENT:]
    state.loss_last, ce_last, kl_last = (sum(values) / len(recent) for values in zip(*recent, strict=True))
    state.extra |= {"recent": recent, "ce_last": ce_last} | ({"kl_last": kl_last} if finetune.kl > 0 else {})
    lowest = min(state.extra.get("loss_lowest", math.inf), state.loss_last)
    if state.loss_last > lowest + DIVERGED * max(finetune.ce, finetune.kl):
        raise VerificationError(
            f"finetuning diverged: its loss is {state.loss_last:.3g} at step {step + 1} and was {lowest:.3g}",
            "Lower finetune.lr",
        )
    state.extra["loss_lowest"] = lowest


def _check_moved(parameters: dict[str, nn.Parameter], before: dict[str, Tensor], steps: int, *, family: Family) -> None:
    """Every layer with trained parameters must have moved. Not each parameter: one half of an adapter starts at zero,
    and its other half has no gradient in the first step."""
    groups: dict[str, list[str]] = {}
    for name in parameters:
        layer = family.layer_index(name)
        groups.setdefault(name.partition(".lora_")[0] if layer is None else f"layer {layer}", []).append(name)
    for group, names in groups.items():
        if all(torch.equal(parameters[name].detach(), before[name]) for name in names):
            raise VerificationError(f"{group}: finetuning moved none of its parameters in {steps} steps")


def kept_names(names: Sequence[str], student: Any) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before adapters wrapped their modules, under the names they have now."""
    named = dict(student.named_parameters())
    found = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        now = name if name in named else f"{parent}.base_layer.{leaf}"
        found[now] = named[now]
    return found
