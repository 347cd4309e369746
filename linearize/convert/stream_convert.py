"""The whole of a streamed conversion: from checked inputs to a verified export, never holding more than a layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from linearize.artifacts.atomic import atomic_directory, full_disk_named
from linearize.artifacts.config_reader import build_config
from linearize.artifacts.pieces import Stored, open_stored
from linearize.artifacts.shards import Layout, ShardWriter, lay_out, link_or_copy
from linearize.convert import export
from linearize.convert.align import aligned_names
from linearize.convert.checkpoint import Checkpoint, Run
from linearize.convert.finetune import Trained
from linearize.convert.history import write_history
from linearize.convert.inputs import Inputs
from linearize.convert.report import card_facts, make_report, provenance
from linearize.convert.stages import StageState
from linearize.convert.stream import PROBE, SHARD_BYTES
from linearize.convert.stream_layers import strip
from linearize.convert.stream_progress import joined
from linearize.convert.stream_run import (
    EXPORT,
    Work,
    begin,
    give_back,
    peak_memory,
    restore,
    run_layers,
    timed_into,
)
from linearize.convert.stream_states import Stream, aligned_windows, calibration_windows
from linearize.convert.stream_verify import differences, embedding_name, last_logits, verify_streamed
from linearize.convert.surgery import SurgeryReport, empty_student
from linearize.convert.verify import Expected, by_definition, verify_export
from linearize.modeling.family_table import auto_class, lookup
from linearize.progress import Progress


def convert_streamed(
    inputs: Inputs, run: Run, start: Checkpoint | None, identity: Mapping[str, str], watch: Progress
) -> dict[str, Any]:
    """Convert a layer at a time; the report of an ordinary conversion, with `streamed` {memory, hidden states}.

    `inputs.way` says what it may take: an export that fits into as much memory is loaded whole by fresh processes, too.

    Raises:
        As `pipeline.convert`.
    """
    with full_disk_named(run.path):
        return _convert(inputs, run, start, identity, watch)


def _convert(
    inputs: Inputs, run: Run, start: Checkpoint | None, identity: Mapping[str, str], watch: Progress
) -> dict[str, Any]:
    probe, on_gpu = inputs.windows[:1, :PROBE], inputs.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(inputs.device)
    layout, config = tensors_of(inputs), inputs.layout.config
    with (
        open_stored(inputs.folder) as stored,
        ShardWriter(run.path / EXPORT, lay_out(layout, SHARD_BYTES)) as writer,
    ):
        work = _prepare(inputs, run, stored, writer, watch)
        for shape in inputs.shapes:
            if shape.skipped:
                watch.message(f"{shape.name} is skipped: {shape.skipped}")
        if start is None:
            begin(work, identity, embedding_name(work.teacher, stored), probe)
        else:
            restore(work, start)
        run_layers(work)
        with timed_into(work.done.seconds, "export"):
            _write_rest(work, layout)
            files = writer.finish()
        whole = sum(path.stat().st_size for path in files) <= inputs.way.memory_bytes
        with torch.no_grad(), by_definition():
            head = {"elements": config.vocab_size * config.hidden_size} if whole else {}  # as the whole model would
            exact, logits = (
                last_logits(work.student, stored, work.probes[name].to(inputs.device), dtype=dtype, **head)
                for name, dtype in (("exact", torch.float32), ("cast", inputs.dtype))
            )
        export.require_finite(logits, inputs.dtype, work.student.model)
        errors = {"merge": {"max": 0.0, "mean": 0.0}, "cast": dict(differences(logits, exact))}
        del exact
        aligned, seconds = joined(work.done.states), work.done.seconds
        seconds["align"] = aligned.seconds
        report = make_report(
            inputs,
            work.student.model,
            _accounted(inputs),
            Trained(full={}, adapters={}),
            aligned,
            StageState(),
            _calibration(work),
            errors,
            seconds,
        )
        digests = work.done.digests
        del work
        give_back()
    with atomic_directory(inputs.out) as folder:
        with timed_into(seconds, "export"):
            for path in files:
                link_or_copy(path, folder / path.name)
            _write_config(folder, inputs)
            export.write_beside(folder, inputs.layout.student, teacher_folder=inputs.folder)
            export.write_card(folder, inputs.layout.student, card_facts(inputs, report))
        with timed_into(seconds, "verify"):
            watch.message("reading the export back, layer by layer")
            ids = torch.from_numpy(probe.astype("int64"))
            read_back = verify_streamed(folder, ids, logits, layout=layout, digests=digests, device=inputs.device)
            report["verification"] = {"streamed": read_back}
            if whole:
                watch.message("loading the export in fresh processes")
                expected = Expected(ids=ids, logits=logits, tokens=None, text="")
                report["verification"] |= verify_export(folder, expected, device=inputs.device, room=run.room)
        report["streamed"] = {
            "hidden_bytes": inputs.way.hidden_bytes,
            "peak_memory_bytes": peak_memory(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(inputs.device) if on_gpu else None,
            "loaded_whole": whole,
        }
        write_history(folder, {"align": aligned.history})
        export.finish_export(folder, provenance(inputs, dict(identity), report))
    return report


def tensors_of(inputs: Inputs) -> Layout:
    """Type and shape of every tensor of the export, in the order of the model; a tied head is the embedding."""
    student, config = inputs.layout.student, inputs.layout.config
    family = lookup(config)
    tied = f"{family.head}.weight" if config.tie_word_embeddings else None
    return {
        name: (inputs.dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in student.state_dict().items()
        if name != tied
    }


def _prepare(inputs: Inputs, run: Run, stored: Stored, writer: ShardWriter, watch: Progress) -> Work:
    recipe, layout, device = inputs.recipe, inputs.layout, inputs.device
    config = build_config(inputs.folder)
    with torch.device("meta"):
        teacher = auto_class(config).from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    student = empty_student(layout.config)
    student.config._attn_implementation = "sdpa"
    linear, seed = layout.linear, recipe.seed
    tokens = recipe.calibrate.tokens if linear else 0
    windows = inputs.windows
    common: dict[str, Any] = {
        "context": windows.shape[1],
        "hidden": config.hidden_size,
        "dtype": inputs.teacher_dtype,
        "folder": run.path,
    }
    picked = calibration_windows(windows, tokens=tokens, seed=seed)
    read = aligned_windows(len(windows), inputs.shapes[0], seed)
    return Work(
        inputs=inputs,
        run=run,
        stored=stored,
        writer=writer,
        teacher=strip(teacher, device),
        student=strip(student, device),
        own=frozenset(aligned_names(layout.student, recipe.align, linear)),
        calibrate=Stream(name="calibrate", rows=picked, batch=1, **common),
        align=Stream(name="align", rows=read, batch=1, **common),
        watch=watch,
    )


def _write_rest(work: Work, layout: Layout) -> None:
    """Embedding, last norm and head: the teacher's, a piece at a time."""
    family, dtype = work.teacher.family, work.inputs.dtype
    for name in layout:
        if family.layer_index(name) is None and name not in work.done.digests:
            source = name if name in work.stored.tensors else embedding_name(work.teacher, work.stored)
            pieces = (p.to(dtype) if p.is_floating_point() else p for p in work.stored.pieces(source))
            work.done.digests[name] = work.writer.write(name, pieces)


def _write_config(folder: Path, inputs: Inputs) -> None:
    """config.json and generation_config.json as transformers would save them with the model."""
    student = inputs.layout.student
    config = inputs.layout.config
    config.dtype, config.architectures = inputs.dtype, [type(student).__name__]
    config.save_pretrained(folder)
    if student.can_generate():
        student.generation_config.save_pretrained(folder)


def _accounted(inputs: Inputs) -> SurgeryReport:
    """What became of every key: fills have checked it layer by layer."""
    student = inputs.layout.student
    names = [name for name, _ in (*student.named_parameters(), *student.named_buffers())]
    new = tuple(sorted(name for name in names if ".mixer." in name))
    return SurgeryReport(mapped=tuple(sorted(set(names) - set(new))), dropped={}, new=new)


def _calibration(work: Work) -> dict[str, Any] | None:
    rows, inputs = work.done.calibration, work.inputs
    read = len(work.calibrate.rows) * inputs.recipe.context
    return {"tokens": read, "layers": rows} if rows else None
