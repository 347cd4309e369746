"""What is timed: every op, by whom, at which shapes.

A job is one implementation of one op. Jobs of one worker run in one process, one after the other; workers apart, so
that a peer that hangs, tunes for minutes or takes the process down costs its own rows and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import kernels_ours as ours
from benchmarks import kernels_peers as peers
from benchmarks.kernels_decode import decode_rows
from benchmarks.kernels_model import model_rows
from benchmarks.kernels_rows import Row
from benchmarks.kernels_shapes import EQUAL, MAIN, SMALL, Build, Shape

OURS = "linearize"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One implementation of one op."""

    op: str
    implementation: str
    worker: str
    build: Build | None = None
    shapes: Sequence[Shape] = ()
    rows: Callable[[set[tuple[str, ...]]], Iterator[Row]] | None = None
    """Jobs that are not a layer at a shape make their rows themselves, given what need not be measured again."""
    early: bool = True
    """Whether it may compile and be checked while others do; a peer that tunes itself must have the card alone."""


GATED = EQUAL[:2]
JOBS: tuple[Job, ...] = (
    Job(op="layer", implementation=OURS, worker="ours", build=ours.layer, shapes=MAIN + SMALL),
    Job(op="window", implementation=OURS, worker="ours", build=ours.window, shapes=MAIN[1:2]),
    Job(op="scalar gate", implementation=OURS, worker="ours", build=ours.gated("scalar"), shapes=GATED + MAIN[1:2]),
    Job(op="channel gate", implementation=OURS, worker="ours", build=ours.gated("channel"), shapes=GATED + MAIN[1:2]),
    Job(op="delta rule", implementation=OURS, worker="ours", build=ours.delta(gate=False), shapes=GATED),
    Job(op="gated delta rule", implementation=OURS, worker="ours", build=ours.delta(gate=True), shapes=GATED),
    Job(op="pure layer", implementation=OURS, worker="ours", build=ours.pure_layer, shapes=MAIN[1:2]),
    Job(op="layer", implementation="SDPA cuDNN", worker="sdpa", build=peers.softmax_sdpa("cuDNN"),
        shapes=MAIN + SMALL),
    Job(op="layer", implementation="SDPA flash", worker="sdpa", build=peers.softmax_sdpa("flash"), shapes=MAIN[:3]),
    Job(op="window", implementation="flex_attention", worker="flex", build=peers.flex_window("block"),
        shapes=MAIN[1:2]),
    Job(op="layer", implementation="composed", worker="composed", build=peers.composed, shapes=MAIN, early=False),
    Job(op="scalar gate", implementation="fla simple_gla", worker="fla scalar", build=peers.fla_gated("simple_gla"),
        shapes=GATED, early=False),
    Job(op="channel gate", implementation="fla gla", worker="fla channel", build=peers.fla_gated("gla"), shapes=GATED,
        early=False),
    Job(op="delta rule", implementation="fla delta_rule", worker="fla delta", build=peers.fla_gated("delta_rule"),
        shapes=GATED, early=False),
    Job(op="gated delta rule", implementation="fla gated_delta_rule", worker="fla gated delta",
        build=peers.fla_gated("gated_delta_rule"), shapes=GATED, early=False),
    Job(op="scalar gate", implementation="TFLA mLSTM", worker="tfla", build=peers.tfla_mlstm, shapes=GATED),
    Job(op="decode", implementation="all", worker="decode", rows=decode_rows),
    Job(op="model", implementation="all", worker="model", rows=model_rows, early=False),
)  # fmt: skip

LIMITS = {"ours": 90.0, "sdpa": 40.0, "flex": 40.0, "decode": 40.0, "model": 150.0}
"""Seconds a worker may take for its rows once it has the card; others have PEER_LIMIT."""
PEER_LIMIT = 120.0
"""Peers that tune themselves at run time spend most of it so."""


def workers(only: Sequence[str] = ()) -> dict[str, list[Job]]:
    """Jobs by worker, those alone whose op, implementation or worker contains one of `only`."""
    chosen: dict[str, list[Job]] = {}
    for job in JOBS:
        if not only or any(word in f"{job.op}/{job.implementation}/{job.worker}" for word in only):
            chosen.setdefault(job.worker, []).append(job)
    return chosen
