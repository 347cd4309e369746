"""A streamed conversion as something that is written: hidden states, layers' checkpoints, shards, and the export.

Its kinds of files hang together: a checkpoint says which layers lie in the shards, and hidden states go from file to
file. So what is tried is the whole run, from its beginning and from the middle, and what must be found afterwards is
nothing or the export that an undisturbed run makes, byte for byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.artifacts.fault_artifacts import Artifact, only

OPTIONS = (
    "context=24", "mixer.window=4", "mixer.feature_dim=4", "device=cpu", "calibrate.tokens=24",
    "align.tokens=48", "align.batch_tokens=24", "finetune.tokens=0",
)  # fmt: skip


def streams(base: Path) -> Iterator[Artifact]:
    """A run of two layers, from its beginning and from its second layer on."""
    from linearize.artifacts.atomic import sha256
    from linearize.artifacts.manifest import MANIFEST, verify_manifest
    from linearize.convert.early import run_folder

    teacher, text = _inputs(base)
    with _two_shards():
        _convert(teacher, text, base / "whole" / "out")
        _stopped(teacher, text, base / "half" / "out")
    whole = {path.name: sha256(path) for path in (base / "whole" / "out").iterdir() if path.name != MANIFEST}
    begun = run_folder(base / "half" / "out")

    def write(folder: Path) -> None:
        if not (folder / "out").exists():  # else it is there: a convert would be refused
            with _two_shards():
                _convert(teacher, text, folder / "out")

    def state(folder: Path) -> str | None:
        if not (folder / "out").exists():
            return None
        if problems := verify_manifest(folder / "out"):
            return problems[0]
        found = {path.name: sha256(path) for path in (folder / "out").iterdir() if path.name != MANIFEST}
        differing = sorted(name for name in {**whole, **found} if whole.get(name) != found.get(name))
        return "new" if not differing else f"another {differing[0]}"

    def left(folder: Path) -> list[str]:
        # A finished export is never touched again, so a run folder beside it stays until somebody removes it.
        return only("out", run_folder(folder / "out").name)(folder)

    common: dict[str, Any] = {"write": write, "state": state, "entries": left, "allowed": (None, "new")}
    yield Artifact(name="streamed run", prepare=lambda folder: None, **common)
    yield Artifact(
        name="streamed run, from its second layer",
        prepare=lambda folder: shutil.copytree(begun, run_folder(folder / "out")) and None,
        **common,
    )


def _inputs(base: Path) -> tuple[Path, Path]:
    import torch

    from tests.conftest import _build_llama

    torch.set_num_threads(1)  # this process forks
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    teacher = _build_llama(base / "teacher", initializer_range=0.2, **sizes)
    text = base / "text.txt"
    text.write_text("Nothing is lost when a writer dies. " * 100)
    return teacher, text


@contextmanager
def _two_shards() -> Iterator[None]:
    """More than one file of weights and so an index, a checkpoint a step, and no fresh processes: they are tested
    elsewhere."""
    from linearize.convert import checkpoint, stream_convert

    before = stream_convert.SHARD_BYTES, stream_convert.verify_export, checkpoint.Run.due
    stream_convert.SHARD_BYTES = 24_000
    stream_convert.verify_export = lambda folder, expected, **places: {}  # type: ignore[assignment]
    checkpoint.Run.due = lambda self: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        stream_convert.SHARD_BYTES, stream_convert.verify_export, checkpoint.Run.due = before  # type: ignore[method-assign]


def _convert(teacher: Path, text: Path, out: Path) -> None:
    from linearize.convert.early import run_folder
    from linearize.convert.pipeline import convert

    convert(
        teacher, out, recipe="lolcats", data=str(text), overrides=list(OPTIONS), stream=True,
        resume=run_folder(out).exists(),
    )  # fmt: skip


def _stopped(teacher: Path, text: Path, out: Path) -> None:
    """Convert, and stop after the first layer."""
    from linearize.convert import stream_run

    class Stop(Exception):
        """Ends a run with its checkpoints kept."""

    real = stream_run._convert_layer

    def first(work: Any, index: int) -> None:
        if index:
            raise Stop
        real(work, index)

    stream_run._convert_layer = first
    try:
        _convert(teacher, text, out)
    except Stop:
        pass
    finally:
        stream_run._convert_layer = real
