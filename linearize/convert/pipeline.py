"""The whole conversion: refusals first, then surgery, alignment, finetuning, merge, export and verification.

    teacher (fp32, frozen) --surgery--> student (shares every frozen weight) --align--> --finetune--> merge --> OUT

With `teacher_bits` what is frozen is quantised until the merge; see `exact.py`.

Everything random is derived from the recipe's seed and a step number, so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from linearize.artifacts.atomic import atomic_directory, require_empty
from linearize.artifacts.load import load_model, no_bars, select_device
from linearize.convert import checkpoint, exact, export
from linearize.convert.align import align_layers, aligned_names, match
from linearize.convert.calibrate import calibrate, picked_windows
from linearize.convert.checkpoint import Checkpoint, Run, open_run
from linearize.convert.early import path_of, require_out
from linearize.convert.finetune import Trained, finetune_model, kept_names, prepare
from linearize.convert.finetune_loss import mean_loss
from linearize.convert.history import write_history
from linearize.convert.inputs import Inputs, asked_of, gather, identity_of
from linearize.convert.optim import deterministic, fast_products
from linearize.convert.plan import UNSAVED, Layout
from linearize.convert.preflight import preflight
from linearize.convert.report import card_facts, make_report, provenance
from linearize.convert.restore import restoring, settled
from linearize.convert.select import choose_layers
from linearize.convert.stages import StageState, shown, timed
from linearize.convert.stream_convert import convert_streamed
from linearize.convert.stream_run import give_back
from linearize.convert.surgery import SurgeryReport, linearize_model, trained_names
from linearize.convert.verify import by_definition, expect, verify_export
from linearize.errors import VerificationError
from linearize.progress import NullProgress, Progress
from linearize.recipe import Recipe, load_recipe
from linearize.teacher_bits import require_teacher_bits
from linearize.tracking import NONE, require_tracker, tracked

CALIBRATION_CHECK = 4
"""Windows on which the perplexity before training is taken, with and without calibration."""
PROBE = 256
"""Most tokens of a row of the windows on which merge and reload are compared."""


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe | str,
    data: str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    progress: Progress | None = None,
    report_to: str = NONE,
    stream: bool | None = None,
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Convert `model` into a linear-time model in the folder `out`; `report_to`: see `linearize.tracking`.

    `stream`: a layer at a time (`stream.py`); None: where the ordinary way does not fit into memory, or as it began.
    `teacher_bits`: 8 or 4, of the frozen weights while it trains; None: as they are.

    Returns the report: seconds, tokens and losses of each stage, match of each layer, merge error, verification, sizes.

    Raises:
        UsageError: bad input. RefusedError: refused before any work. VerificationError: the training died, or the
            export is not what was trained. KeyboardInterrupt: interrupted; what was trained is saved for `resume`.
    """
    chosen = recipe if isinstance(recipe, Recipe) and not overrides else load_recipe(recipe, overrides)
    require_tracker(report_to)
    require_teacher_bits(teacher_bits, stream=stream)
    watch = progress or NullProgress()
    target = path_of(out)
    begin = time.monotonic()
    require_out(target, resume=resume)
    device = select_device(chosen.device)
    if stream is None and resume:
        stream = checkpoint.begun_streaming(target)
    inputs = gather(model, target, chosen, data, device, stream=stream, teacher_bits=teacher_bits)
    if inputs.way.said:
        watch.message(inputs.way.said)
    identity = identity_of(inputs)
    with open_run(target) as run, deterministic(), no_bars(), torch.random.fork_rng(devices=_devices(device)):
        require_empty(target)
        run.asked = asked_of(inputs)
        start = checkpoint.find_start(run, identity, resume=resume)
        if resume and start is None:
            watch.message(UNSAVED)
        if start is not None:
            where = f"layer {start.step}" if inputs.way.streamed else f"step {start.step}"
            watch.message(f"going on from {where} of {start.stage}")
        before = {"finetune": inputs.shapes[0].steps}
        config = {"teacher": inputs.name, "recipe": inputs.recipe.as_dict()}
        with tracked(report_to, target, config=config, before=before, tell=watch.message):
            run_it = convert_streamed if inputs.way.streamed else _convert
            report = run_it(inputs, run, start, identity, watch)
    report["seconds"]["total"] = time.monotonic() - begin
    return report


def _convert(
    inputs: Inputs, run: Run, start: Checkpoint | None, identity: dict[str, str], watch: Progress
) -> dict[str, Any]:
    """Everything from loading the teacher on."""
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        how: dict[str, Any] = {"device": inputs.device, "dtype": torch.float32, "bits": inputs.teacher_bits}
        teacher = load_model(inputs.folder, **how, finite=False)  # it was checked
        teacher.requires_grad_(False)
    stages = [shape.name for shape in inputs.shapes if shape.steps]
    micro, kept = settled(run, stages) if start is not None else (None, None)
    if inputs.recipe.automatic:
        with timed(seconds, "select"):
            inputs = _choose(inputs, teacher, kept, watch)
    with timed(seconds, "surgery"):
        student, surgery = _operate(inputs, teacher)
    for shape in inputs.shapes:
        if shape.skipped:
            watch.message(f"{shape.name} is skipped: {shape.skipped}")
    with timed(seconds, "preflight"):
        if micro is None:
            micro = preflight(inputs, student, teacher)
        checkpoint.write_record(run, identity | {"micro": micro, "kept": inputs.layout.kept})
    with timed(seconds, "calibrate"):
        calibration = _calibrate(inputs, student, teacher, watch)
    try:
        with fast_products():
            aligned, finetuned, trained = _train(inputs, run, start, micro, student, teacher, watch)
    except VerificationError:
        run.discard = True
        raise
    del teacher
    _free(inputs.device)
    seconds |= {"align": aligned.seconds, "finetune": finetuned.seconds}
    task = inputs.task
    ids = task.examples(inputs.windows[:2, :PROBE], inputs.recipe.seed, "probe")[0].to(inputs.device)
    errors, device = {}, inputs.device
    with timed(seconds, "merge"):
        if inputs.teacher_bits is not None:
            left = exact.take(inputs, student, _owned(inputs), ids)
            del student
            give_back()
            student, errors["quantised"] = exact.put_together(inputs, left, ids)
            device = student.device
            ids = ids.to(device)
        with by_definition():  # in float32, for which kernels would be compiled that nothing else runs
            errors |= export.merge(student, ids, inputs.dtype, task)
    report = make_report(inputs, student, surgery, trained, aligned, finetuned, calibration, errors, seconds)
    with atomic_directory(inputs.out) as folder:
        with timed(seconds, "export"):
            export.write_export(folder, student, teacher_folder=inputs.folder, facts=card_facts(inputs, report))
        with timed(seconds, "verify"):
            watch.message("loading the export in fresh processes")
            expected = expect(student, inputs.tokenizer, ids, task)
            student.to("cpu" if inputs.teacher_bits is None else "meta")
            _free(inputs.device)  # the fresh processes need the memory
            report["verification"] = verify_export(folder, expected, device=device, room=run.room)
        write_history(folder, {"align": aligned.history, "finetune": finetuned.history})
        export.finish_export(folder, provenance(inputs, identity, report))
    return report


def _operate(inputs: Inputs, teacher: Any) -> tuple[Any, SurgeryReport]:
    recipe, layout, owned = inputs.recipe, inputs.layout, _owned(inputs)
    with exact.stored_exactly(inputs) as stored:
        return linearize_model(
            teacher,
            spec=recipe.mixer,
            layer_mixers=layout.mixers,
            seed=recipe.seed,
            own=owned.__contains__,
            exact=stored,
        )


def _owned(inputs: Inputs) -> set[str]:
    """The teacher's tensors that are trained."""
    recipe, layout = inputs.recipe, inputs.layout
    return {
        *aligned_names(layout.student, recipe.align, layout.linear),
        *trained_names(layout.student, recipe.finetune.full),
    }


def _choose(inputs: Inputs, teacher: Any, kept: list[int] | None, watch: Progress) -> Inputs:
    """Settle which layers `keep_softmax: auto` keeps; `kept`: what an interrupted run had settled."""
    recipe = inputs.recipe
    if kept is None:
        keep = recipe.automatic_keep(inputs.layout.config.num_hidden_layers)
        windows = inputs.task.whole(inputs.windows)
        kept = list(choose_layers(teacher, windows, recipe, keep=keep, progress=watch))
    watch.message(f"keeping softmax in layers {', '.join(map(str, kept))}")
    recipe = replace(recipe, keep_softmax=tuple(kept))
    layout = Layout.of(teacher.config, recipe)
    return replace(inputs, recipe=recipe, layout=layout, sizes=layout.sizes())


def _calibrate(inputs: Inputs, student: Any, teacher: Any, watch: Progress) -> dict[str, Any] | None:
    """Set what needs no training; None where the recipe skips it. A resumed run does it again, to the same values."""
    tokens = inputs.recipe.calibrate.tokens
    if not tokens or not inputs.layout.linear:
        return None
    windows = inputs.task.whole(inputs.windows)
    ids = torch.from_numpy(windows[-CALIBRATION_CHECK:]).to(inputs.device).long()
    before = mean_loss(student, ids)
    rows = calibrate(student, teacher, windows=windows, tokens=tokens, seed=inputs.recipe.seed, progress=watch)
    losses = {"ppl_teacher": mean_loss(teacher, ids), "ppl_before": before, "ppl_after": mean_loss(student, ids)}
    found = {name: math.exp(min(loss, 700.0)) for name, loss in losses.items()}
    watch.message(
        "perplexity before training: {ppl_before:.4g}, calibrated {ppl_after:.4g}; the teacher's is {ppl_teacher:.4g} "
        "(the last windows of the text)".format(**found)
    )
    read = picked_windows(windows, tokens=tokens, seed=inputs.recipe.seed).size if rows else 0
    return {"tokens": read, "layers": rows} | found


def _train(
    inputs: Inputs,
    run: Run,
    start: Checkpoint | None,
    micro: dict[str, int],
    student: Any,
    teacher: Any,
    watch: Progress,
) -> tuple[StageState, StageState, Trained]:
    """Both stages, each from where `start` left it."""
    recipe = inputs.recipe
    align, finetune = inputs.shapes
    aligned, finetuned = StageState(), StageState()
    in_finetune = start is not None and start.stage == "finetune"
    common: dict[str, Any] = {"seed": recipe.seed, "windows": inputs.training, "run": run, "progress": watch,
                              "task": inputs.task}  # fmt: skip
    if align.steps and not in_finetune:
        with shown(watch, align):
            aligned = align_layers(
                student, teacher, align=recipe.align, shape=align, micro=micro["align"], start=start, **common
            )
        start = None
    if not finetune.steps:
        return aligned, finetuned, Trained(full={}, adapters={})
    if in_finetune and start is not None:
        with restoring(start):
            aligned = StageState(**start.state["extra"]["align"])
            match(aligned)
    names = aligned_names(student, recipe.align, inputs.layout.linear) if align.steps else []
    trained = prepare(student, recipe.finetune, seed=recipe.seed)
    keep = {n: p for n, p in kept_names(names, student).items() if n not in trained.parameters}
    with shown(watch, finetune):
        finetuned = finetune_model(
            student,
            teacher,
            trained,
            finetune=recipe.finetune,
            shape=finetune,
            micro=micro["finetune"],
            checkpointing=recipe.gradient_checkpointing,
            keep=keep,
            carried={"align": asdict(aligned)},
            start=start,
            **common,
        )
    return aligned, finetuned, trained


def _free(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
