"""What is kept of a run over time: every figure, in few points, the same however often the run was interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from linearize.convert import pipeline
from linearize.convert.history import HISTORY, POINTS, add, finished, new_track, require_track, write_history
from linearize.convert.pipeline import convert
from linearize.convert.stages import StageState, ends
from linearize.report.facts import of_layers, read_history
from tests.interrupter import Interrupter

OPTIONS = [
    "context=64", "mixer.window=16", "mixer.feature_dim=8", "device=cpu", "align.tokens=1536", "align.batch_tokens=256",
    "align.window_dropout=0.5", "finetune.tokens=1024", "finetune.batch_tokens=256", "finetune.kl=1",
]  # fmt: skip


def kept(values: list[float | None], *, name: str = "loss") -> dict[str, Any]:
    track = new_track()
    for step, value in enumerate(values, 1):
        add(track, step, {name: value})
    return track


def test_a_short_run_is_kept_step_by_step() -> None:
    track = kept([3.0, 2.5, None, 2.0])
    assert finished(track) == {"steps": [1, 2, 3, 4], "series": {"loss": [3.0, 2.5, None, 2.0]}}


@pytest.mark.parametrize("steps", [POINTS - 1, POINTS, POINTS + 1, 2 * POINTS + 1, 10_007])
def test_a_long_run_is_kept_in_few_points_that_keep_its_mean(steps: int) -> None:
    values = [math.sin(i / 50) + i for i in range(steps)]
    track = kept(values)
    found = finished(track)
    points, places = found["series"]["loss"], found["steps"]
    assert POINTS // 2 <= len(points) <= POINTS and places[-1] == steps and places == sorted(places)
    sizes = [b - a for a, b in zip([0, *places], places, strict=False)]
    assert set(sizes[:-1]) == {track["stride"]} and 0 < sizes[-1] <= track["stride"]
    total = sum(size * point for size, point in zip(sizes, points, strict=True))
    assert total == pytest.approx(sum(values), rel=1e-4)
    inside = [sum(values[end - size : end]) / size for size, end in zip(sizes, places, strict=True)]
    assert points == pytest.approx(inside, rel=1e-4, abs=1e-4)


def test_a_figure_that_comes_late_or_not_at_all() -> None:
    track = new_track()
    add(track, 1, {"loss": 1.0})
    add(track, 2, {"loss": 2.0, "kl": 0.5})
    add(track, 3, {"kl": None})
    assert finished(track)["series"] == {"loss": [1.0, 2.0, None], "kl": [None, 0.5, None]}


@pytest.mark.parametrize(
    ("losses", "first", "expected"),
    [
        ([5.0], 10, (5.0, None)),  # one step began and never ended
        ([5.0, 3.0], 10, (5.0, 3.0)),
        ([5.0, 4.0, 3.0], 10, (5.0, 3.0)),
        ([5.0, None, 4.0, 2.0, 1.0], 10, (4.5, 1.5)),  # a step without the figure is none
        ([float(20 - i) for i in range(19)], 10, (16.0, 6.0)),  # nine at either end
        ([5.0], 1, (5.0, None)),
        ([5.0, 4.0, 3.0, 2.0], 1, (5.0, 2.5)),
        ([float(20 - i) for i in range(20)], 10, (70.0, 80.0)),  # long enough: what the stage itself says
        ([], 10, (70.0, 80.0)),
    ],
)
def test_where_a_short_stage_began_and_ended_are_other_steps(
    losses: list[float | None], first: int, expected: tuple[float, float | None]
) -> None:
    state = StageState(loss_first=70.0, loss_last=80.0, history=kept(losses))
    assert ends(state, first=first) == expected


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_the_figures_of_a_stage_agree_however_short_it_is(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
    options = [*OPTIONS, "align.tokens=0", "calibrate.tokens=0", f"finetune.tokens={256 * steps}", "finetune.ce=0.5"]
    report = convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=options)
    found = report["stages"]["finetune"]
    assert found["steps"] == steps
    if steps == 1:
        assert found["loss_last"] is found["ce_last"] is found["kl_last"] is None
        assert found["loss_lowest"] == pytest.approx(found["loss_first"], rel=1e-5)
        return
    assert found["loss_last"] == pytest.approx(0.5 * found["ce_last"] + found["kl_last"], rel=1e-5)
    assert found["loss_lowest"] <= min(found["loss_first"], found["loss_last"])


def test_a_break_at_any_step_changes_nothing() -> None:
    """A checkpoint is JSON: what comes back from it goes on to the same points."""
    steps = 2 * POINTS + 77
    values = [1 / (1 + i) for i in range(steps)]
    whole = finished(kept(values))
    for stop in (1, POINTS - 1, POINTS, POINTS + 3, steps - 1):
        track = json.loads(json.dumps(kept(values[:stop])))
        require_track(track)
        for step in range(stop, steps):
            add(track, step + 1, {"loss": values[step]})
        assert finished(track) == whole


@pytest.mark.parametrize(
    "damage",
    [
        {"stride": 0}, {"steps": "x"}, {"steps": [1.5]}, {"series": []}, {"series": {"loss": [1.0]}}, {"open": None},
        {"open": {}},
        {"open": {"steps": 0, "last": -1, "sums": {}}}, {"open": {"steps": 0, "last": 0, "sums": {"a": 1}}},
    ],
)  # fmt: skip
def test_what_a_stage_did_not_write_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="history"):
        StageState(history=new_track() | damage)


def test_the_file_is_strict_and_only_of_stages_that_ran(tmp_path: Path) -> None:
    write_history(tmp_path, {"align": new_track(), "finetune": new_track()})
    assert not (tmp_path / HISTORY).exists()
    write_history(tmp_path, {"align": new_track(), "finetune": kept([1.0, 0.5])})
    assert json.loads((tmp_path / HISTORY).read_text()) == {
        "format": 1, "stages": {"finetune": {"steps": [1, 2], "series": {"loss": [1.0, 0.5]}}},
    }  # fmt: skip
    assert read_history(tmp_path) == {"finetune": {"loss": [(1.0, 1.0), (2.0, 0.5)]}}


def test_a_resumed_run_writes_the_same_history(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
    given: dict[str, Any] = {"recipe": "lolcats", "data": str(text_file), "overrides": OPTIONS}
    report = convert(teacher_folder, tmp_path / "whole", **given)
    for stage, at in (("align", 3), ("finetune", 2)):
        with pytest.raises(KeyboardInterrupt):
            convert(teacher_folder, tmp_path / "out", progress=Interrupter(stage, at), resume=stage != "align", **given)
    convert(teacher_folder, tmp_path / "out", resume=True, **given)
    assert (tmp_path / "out" / HISTORY).read_bytes() == (tmp_path / "whole" / HISTORY).read_bytes()

    found = read_history(tmp_path / "whole")
    assert [step for step, _ in found["align"]["lr"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["finetune"]["loss"]] == [1, 2, 3, 4]
    assert set(of_layers(found["align"], "match")) == {0, 1} == set(of_layers(found["align"], "loss"))
    assert len(found["align"]["match/0"]) < 6  # steps in which the layer ran without its window say nothing of it
    assert {"loss", "ce", "kl", "lr"} == set(found["finetune"])
    losses = [value for _, value in found["finetune"]["loss"]]
    assert report["stages"]["finetune"]["loss_first"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)
    assert report["stages"]["finetune"]["loss_last"] == pytest.approx(sum(losses[2:]) / 2, rel=1e-5)
    rate = dict(found["align"]["lr"])
    assert max(rate.values()) == pytest.approx(1e-2) and rate[6] < rate[2]
    listed = json.loads((tmp_path / "whole" / "linearize.json").read_text())["files"]
    assert HISTORY in listed
