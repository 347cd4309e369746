"""A conversion a layer at a time, from the teacher's files to the export's.

    run folder/calibrate-00003.hidden    what enters layer 3, of the windows that calibration reads
    run folder/align-00003.hidden        the same of those that alignment reads
    run folder/layer-00003/              checkpoints of the layer at work
    run folder/00-align-00000003/        three layers are done: their figures, and the digests of what was written
    run folder/export/                   the export's files, as large as they will be, filled as layers are done

A layer's teacher is read, its student made, calibrated and aligned by the ordinary code, which finds in the bare models
nothing but that layer; then its student is cast and written. So a killed run goes on within the layer it was in.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearize.artifacts.pieces import Stored
from linearize.artifacts.shards import ShardWriter
from linearize.convert import checkpoint
from linearize.convert.align import align_layers, match
from linearize.convert.calibrate import calibrate
from linearize.convert.capture import captured
from linearize.convert.checkpoint import Checkpoint, Run
from linearize.convert.export import cast
from linearize.convert.inputs import Inputs
from linearize.convert.norms import in_one_launch
from linearize.convert.optim import autocast, fast_products
from linearize.convert.preflight import preflight
from linearize.convert.replay import VARIABLE
from linearize.convert.restore import restoring, state_of
from linearize.convert.stages import shown
from linearize.convert.stream_layers import Bare, attention_alone, fill, just
from linearize.convert.stream_progress import OneOfMany, joined, recorded_from
from linearize.convert.stream_states import Stream, embed, window_numbers
from linearize.convert.surgery import LINEAR, fill_student
from linearize.convert.verify import by_definition
from linearize.errors import VerificationError
from linearize.progress import NullProgress, Progress

STAGE = "align"
EXPORT = "export"


@dataclass(kw_only=True)
class Done:
    """What is behind a run, as its checkpoints hold it."""

    layers: int = 0
    states: dict[str, Any] = field(default_factory=dict)
    """StageState of every aligned layer, as plain values."""
    calibration: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 of every tensor that was written."""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Work:
    """A streamed conversion in progress."""

    inputs: Inputs
    run: Run
    stored: Stored
    writer: ShardWriter
    teacher: Bare
    student: Bare
    own: frozenset[str]
    """The teacher's tensors that are trained."""
    calibrate: Stream
    align: Stream
    watch: Progress
    probes: dict[str, Tensor] = field(default_factory=dict)
    """What enters the student's next layer of the row that is checked at the end: in fp32, and as exported."""
    done: Done = field(default_factory=Done)
    micro: int = 1

    @property
    def streams(self) -> list[Stream]:
        """Those that have windows."""
        return [stream for stream in (self.calibrate, self.align) if len(stream.rows)]


def begin(work: Work, identity: Mapping[str, str], embedding: str, probe: np.ndarray) -> None:
    """What lies before the first layer: the micro-batch that fits, and the embeddings of all that is read."""
    _tidy(work.run, keep=None)
    shutil.rmtree(work.writer.folder, ignore_errors=True)
    work.writer.folder.mkdir(parents=True)
    read = {"calibrate": work.inputs.windows, "align": work.inputs.training}
    with timed_into(work.done.seconds, "embed"):
        for stream in work.streams:
            windows = read[stream.name]
            stream.write(0, (embed(work.stored, embedding, windows[part]) for part in stream.parts()))
        row = embed(work.stored, embedding, probe)
        work.probes = {"exact": row.float().clone(), "cast": row.to(work.inputs.dtype)}
    with timed_into(work.done.seconds, "preflight"):
        work.micro = _fitting(work)
    work.align = replace(work.align, batch=work.micro)
    checkpoint.write_record(work.run, dict(identity) | {"stream_micro": work.micro})
    _save(work)


def restore(work: Work, start: Checkpoint) -> None:
    """Put back what `start` holds."""
    with restoring(start):
        state = state_of(start)["extra"]
        work.done = Done(**state)
        tensors = start.tensors()
        work.probes = {name: tensors[name] for name in ("exact", "cast")}
        work.micro = int(checkpoint.record(work.run)["stream_micro"])
        if work.done.layers != start.step or not 1 <= work.micro <= 1 << 20:
            raise ValueError("its layers are not those of its name")
    work.align = replace(work.align, batch=work.micro)
    if work.done.layers <= _last_read(work):
        for stream in work.streams:
            stream.require(work.done.layers)
    _tidy(work.run, keep=work.done.layers)


def run_layers(work: Work) -> None:
    """Convert what is left of the layers, one at a time.

    Raises:
        VerificationError: the alignment of a layer died; it is named. KeyboardInterrupt: after saving.
    """
    align, layout = work.inputs.shapes[0], work.inputs.layout
    whole = replace(align, steps=align.steps * len(layout.linear))
    with shown(work.watch, whole) if align.steps else nullcontext():
        for index in range(work.done.layers, len(layout.mixers)):
            _convert_layer(work, index)
            work.done.layers = index + 1
            work.writer.flush()
            _save(work)
            for stream in work.streams:
                stream.drop(index)
            shutil.rmtree(_room(work, index), ignore_errors=True)
            give_back()
    if align.steps:
        work.watch.layer_table(match(joined(work.done.states)))


def peak_memory() -> int:
    """Bytes of memory that this process has held at once, at most, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Return free memory to the system: left alone, what a layer took stays with the process, in pieces that the next
    layer does not fit into."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def timed_into(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block takes to those of a name."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start


def _convert_layer(work: Work, index: int) -> None:
    inputs, seconds = work.inputs, work.done.seconds
    linear = inputs.layout.mixers[index] == LINEAR
    with _loaded(work, index, seconds) as (teacher, student):
        if linear:
            with attention_alone(work.teacher.family.layers_of(teacher)[index]):
                with timed_into(seconds, "calibrate"):
                    _calibrate(work, index, teacher, student)
                if inputs.shapes[0].steps:
                    _align(work, index, teacher, student)
        if index < _last_read(work):
            with timed_into(seconds, "forward"):
                _advance(work, index, teacher)
        with timed_into(seconds, "export"), torch.no_grad(), by_definition():
            numbers = torch.zeros(work.probes["exact"].shape[:2], dtype=torch.long, device=inputs.device)
            for name in ("exact", "cast"):
                if name == "cast":
                    cast(student, inputs.dtype)
                entering = work.probes[name].to(inputs.device)
                work.probes[name] = work.student.run(numbers, just(entering))
            for key, tensor in student.state_dict().items():
                work.done.digests[key] = work.writer.write(key, [tensor])


@contextmanager
def _loaded(work: Work, index: int, seconds: dict[str, float]) -> Iterator[tuple[Any, Any]]:
    """Teacher and student with their layer `index`, the student fresh from surgery."""
    inputs, path = work.inputs, work.teacher.family.layer_path(index)
    with timed_into(seconds, "load"):
        layer = fill(work.teacher.layers[index], work.stored, path, dtype=torch.float32, device=inputs.device)
    with (
        work.teacher.holding(index, layer) as teacher,
        work.student.holding(index, work.student.layers[index]) as student,
    ):
        linear = [index] if inputs.layout.mixers[index] == LINEAR else []
        fill_student(student, teacher, linear, seed=inputs.recipe.seed, own=work.own.__contains__)
        student.eval().requires_grad_(False)
        yield teacher, student


def _calibrate(work: Work, index: int, teacher: Any, student: Any) -> None:
    """As in the ordinary way; done again after a resume, to the same values."""
    if not len(work.calibrate.rows):
        return
    recipe = work.inputs.recipe
    with work.teacher.fed(partial(work.calibrate.read, index)):
        rows = calibrate(
            student,
            teacher,
            windows=window_numbers(work.inputs.windows),
            tokens=recipe.calibrate.tokens,
            seed=recipe.seed,
            progress=NullProgress(),
        )
    work.done.calibration += rows


def _align(work: Work, index: int, teacher: Any, student: Any) -> None:
    inputs = work.inputs
    before = len(work.done.states) * inputs.shapes[0].steps
    with (
        _at(work.run, _room(work, index)),
        _kernel_by_kernel(),
        recorded_from(before),
        work.teacher.fed(partial(work.align.read, index)),
        fast_products(),
    ):
        state = align_layers(
            student,
            teacher,
            align=inputs.recipe.align,
            shape=inputs.shapes[0],
            micro=work.micro,
            seed=inputs.recipe.seed,
            windows=window_numbers(inputs.windows),
            run=work.run,
            start=checkpoint.latest(work.run),
            progress=OneOfMany(work.watch, before),
        )
    work.done.states[str(index)] = asdict(state)


def _advance(work: Work, index: int, teacher: Any) -> None:
    """Pass all windows through the layer, in the precision and by the kernels of the stage that reads them there."""
    for stream in work.streams:
        mixed = stream is work.align
        with (
            torch.no_grad(),
            autocast(work.inputs.device) if mixed else nullcontext(),
            fast_products() if mixed else nullcontext(),
            in_one_launch(teacher) if mixed else nullcontext(),
            captured(teacher, [], lambda layer: None),
        ):
            read = partial(stream.read, index)
            parts = (work.teacher.run(stream.numbers(p, work.inputs.device), read) for p in stream.parts())
            stream.write(index + 1, parts)


def _fitting(work: Work) -> int:
    """Windows of a micro-batch that fit, tried on the first layer that is aligned."""
    inputs = work.inputs
    if not len(work.align.rows):
        return 1
    index = inputs.layout.linear[0]
    shapes = (inputs.shapes[0], replace(inputs.shapes[1], steps=0))
    numbers = np.repeat(work.align.rows[:, None], inputs.recipe.context, axis=1).astype(np.int32)
    with _loaded(work, index, {}) as (teacher, student), work.teacher.fed(partial(work.align.read, 0)):
        return preflight(replace(inputs, shapes=shapes, windows=numbers), student, teacher)[STAGE]


def _last_read(work: Work) -> int:
    """The last layer whose input is read: nothing behind the last linear layer is."""
    return max(work.inputs.layout.linear, default=0)


def _tidy(run: Run, *, keep: int | None) -> None:
    """Remove what a killed run left of layers other than `keep`."""
    for path in (*run.path.glob("*.hidden"), *run.path.glob("layer-*")):
        if keep is not None and path.stem.endswith(f"-{keep:05d}"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _room(work: Work, index: int) -> Any:
    return work.run.path / f"layer-{index:05d}"


def _save(work: Work) -> None:
    state = {"step": work.done.layers, "seconds": sum(work.done.seconds.values()), "extra": asdict(work.done)}
    checkpoint.save(work.run, stage=STAGE, step=work.done.layers, tensors=work.probes, state=state)


@contextmanager
def _at(run: Run, path: Any) -> Iterator[None]:
    """Checkpoints of the run go to another folder within the block."""
    before, run.path = run.path, path
    try:
        path.mkdir(exist_ok=True)
        yield
    except VerificationError:
        run.discard = True
        raise
    finally:
        run.path = before


@contextmanager
def _kernel_by_kernel() -> Iterator[None]:
    """No step is recorded as a CUDA graph, which could not read from a file."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
