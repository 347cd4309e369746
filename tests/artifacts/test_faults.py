"""Invariant 17: a death at any change of the disk leaves the old artifact or the new one. `faults` has them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.artifacts import fault_artifacts, faults
from tests.artifacts.fault_artifacts import Artifact
from tests.artifacts.fault_streams import streams
from tests.artifacts.injector import MODES


def check(artifacts: Iterator[Artifact] | list[Artifact], base: Path, *, every: int) -> faults.Count:
    count = faults.run_all(list(artifacts), base, every=every)
    assert count.failures == []
    assert set(count.by_mode) == set(MODES)
    return count


def test_files(tmp_path: Path) -> None:
    assert check(fault_artifacts.files(), tmp_path, every=2).points >= 30


def test_folders_and_manifests(tmp_path: Path) -> None:
    assert check(fault_artifacts.folders(), tmp_path, every=9).points >= 25


def test_checkpoints_and_the_record_of_a_run(tmp_path: Path) -> None:
    assert check(fault_artifacts.runs(), tmp_path, every=17).points >= 25


@pytest.mark.slow
def test_exports(tmp_path: Path) -> None:
    assert check([fault_artifacts.exports(tmp_path)], tmp_path, every=80).points >= 15


@pytest.mark.slow
def test_streamed_runs(tmp_path: Path) -> None:
    """Hidden states, checkpoints of layers, shards and the index of an export: from the second layer to the end."""
    artifacts = [artifact for artifact in streams(tmp_path) if "second" in artifact.name]
    assert check(artifacts, tmp_path, every=120).points >= 12


def naive(write: Callable[[Path], None]) -> Artifact:
    """A file of JSON, written by `write` instead of by us."""
    return Artifact(
        name="naive",
        prepare=lambda folder: (folder / "x.json").write_text('{"mark": "old"}'),  # type: ignore[func-returns-value]
        write=lambda folder: write(folder / "x.json"),
        state=lambda folder: json.loads((folder / "x.json").read_text())["mark"],
        entries=fault_artifacts.only("x.json"),
    )


def test_a_writer_that_is_not_careful_is_found_out(tmp_path: Path) -> None:
    """The faults find what they are for: a file written in place, and one renamed before it is flushed."""

    def in_place(path: Path) -> None:
        path.write_text('{"mark": "new"}')

    def unflushed(path: Path) -> None:
        path.with_suffix(".tmp").write_text('{"mark": "new"}')
        path.with_suffix(".tmp").replace(path)
        with open(path.parent / "later", "w") as file:
            file.write("x")
        (path.parent / "later").unlink()

    lost = faults.run_all([naive(in_place)], tmp_path).lost
    assert {line.split(", ")[1].split()[0] for line in lost} == set(MODES)
    lost = faults.run_all([naive(unflushed)], tmp_path).lost
    assert lost and all(" power " in line for line in lost)
