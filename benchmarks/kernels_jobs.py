"""What is timed: every op, by whom, at which shapes, in which passes.

A job is one implementation of one op. Jobs of one worker run in one process, one after the other; workers apart, so
that they compile and tune side by side, and a peer that hangs or takes its process down costs its own rows and no
others. The order is that of timing: what is cut off when the time is over stands last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks import kernels_decode as decode
from benchmarks import kernels_model as model
from benchmarks import kernels_ours as ours
from benchmarks import kernels_peers as peers
from benchmarks.kernels_rows import Key, Row
from benchmarks.kernels_shapes import EQUAL, MAIN, SMALL, Build, Shape

OURS = "linearize"
PASSES = ("forward", "both")
ALIGN = ("forward", "both", "maps")
"""forward without gradients; forward and backward for every input; forward and backward for the maps alone."""
GRAPH = " graph"
"""End of a pass that is timed in a CUDA graph, as finetuning runs it: a small batch otherwise waits for launches."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One implementation of one op: at `shapes` by `build`, or, where it is no layer at a shape, by `rows`."""

    op: str
    implementation: str
    worker: str
    build: Build | None = None
    shapes: Sequence[Shape] = ()
    passes: Sequence[str] = PASSES
    apart: bool = False
    """A process for every shape: it compiles anew for each."""
    rows: Callable[[Collection[Key]], Iterator[Row]] | None = None
    """Makes the rows of the given measurements itself."""
    keys: Sequence[Key] = ()
    warm_up: Callable[[Collection[Key]], None] | None = None

    def measurements(self) -> list[Key]:
        """Keys of all its rows."""
        shaped = [(self.op, self.implementation, s.name, which) for s in self.shapes for which in self.passes]
        return [*shaped, *self.keys]


GATED = EQUAL[:2]
WINDOWED = MAIN[1], MAIN[3]
GRAPHED = MAIN[2:3]
JOBS: tuple[Job, ...] = (
    Job(op="layer", implementation=OURS, worker="ours layer", build=ours.layer, shapes=MAIN, passes=ALIGN),
    Job(op="layer", implementation=OURS, worker="ours layer", build=ours.layer, shapes=GRAPHED,
        passes=tuple(x + GRAPH for x in ALIGN)),
    Job(op="layer", implementation="SDPA cuDNN", worker="sdpa", build=peers.softmax_sdpa("cuDNN"),
        shapes=MAIN + SMALL),
    Job(op="layer", implementation="SDPA flash", worker="sdpa", build=peers.softmax_sdpa("flash"), shapes=MAIN),
    Job(op="layer", implementation="SDPA cuDNN", worker="sdpa", build=peers.softmax_sdpa("cuDNN"), shapes=GRAPHED,
        passes=tuple(x + GRAPH for x in PASSES)),
    Job(op="pure layer", implementation="SDPA cuDNN", worker="sdpa", build=peers.softmax_sdpa("cuDNN"),
        shapes=WINDOWED),
    Job(op="layer", implementation="composed", worker="composed", build=peers.composed, shapes=MAIN, passes=ALIGN,
        apart=True),
    Job(op="scalar gate", implementation=OURS, worker="ours scalar", build=ours.gated("scalar"),
        shapes=GATED + MAIN[1:2]),
    Job(op="scalar gate", implementation="fla simple_gla", worker="fla scalar", build=peers.fla_gated("simple_gla"),
        shapes=GATED),
    Job(op="scalar gate", implementation="TFLA mLSTM", worker="tfla", build=peers.tfla_mlstm, shapes=GATED),
    Job(op="channel gate", implementation=OURS, worker="ours channel", build=ours.gated("channel"),
        shapes=GATED + MAIN[1:2]),
    Job(op="channel gate", implementation="fla gla", worker="fla channel", build=peers.fla_gated("gla"), shapes=GATED),
    Job(op="delta rule", implementation=OURS, worker="ours delta", build=ours.delta(gate=False), shapes=GATED),
    Job(op="delta rule", implementation="fla delta_rule", worker="fla delta", build=peers.fla_gated("delta_rule"),
        shapes=GATED),
    Job(op="gated delta rule", implementation=OURS, worker="ours gated delta", build=ours.delta(gate=True),
        shapes=GATED),
    Job(op="gated delta rule", implementation="fla gated_delta_rule", worker="fla gated delta",
        build=peers.fla_gated("gated_delta_rule"), shapes=GATED),
    Job(op="decode", implementation="all", worker="decode", rows=decode.decode_rows, keys=decode.KEYS,
        warm_up=decode.warm_up),
    Job(op="pure layer", implementation=OURS, worker="ours pure", build=ours.pure_layer, shapes=WINDOWED, passes=ALIGN),
    Job(op="window", implementation=OURS, worker="ours window", build=ours.window, shapes=WINDOWED),
    Job(op="window", implementation="flex_attention", worker="flex", build=peers.flex_window("block"),
        shapes=WINDOWED),
    Job(op="layer", implementation=OURS, worker="ours small", build=ours.layer, shapes=SMALL, passes=ALIGN),
    Job(op="model", implementation="all", worker="model", rows=model.model_rows, keys=model.KEYS),
)  # fmt: skip

LIMITS = {"decode": 40.0, "model": 150.0}
"""Seconds a worker may take for its rows once it has the card."""
LIMIT = 25.0
"""The same for all others: what is warm takes a few."""
LAST = ("model",)
"""Workers that start when all others have ended: they fill the card's memory."""


def workers(only: Sequence[str] = ()) -> dict[str, list[Job]]:
    """Jobs by worker, those alone whose op, implementation or worker contains one of `only`."""
    chosen: dict[str, list[Job]] = {}
    for job in JOBS:
        if only and not any(word in f"{job.op}/{job.implementation}/{job.worker}" for word in only):
            continue
        if job.apart:
            for shape in job.shapes:
                chosen[f"{job.worker} {shape.name}"] = [replace(job, shapes=(shape,))]
        else:
            chosen.setdefault(job.worker, []).append(job)
    return chosen


def wanted(jobs: Sequence[Job], known: Collection[Key]) -> list[Key]:
    """Measurements of `jobs` that are not known."""
    return [key for job in jobs for key in job.measurements() if key not in known]
