"""The curve of recovery against kept layers: which points it has, its table, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import linearize.api
from benchmarks import keep_curve
from benchmarks.keep_curve import Point, arguments_of, cells, kept_counts, main, points, series, shares
from linearize.recipe_schema import even_layers

ARGV = ["t", "--data", "d", "--heldout", "h"]


def test_shares_and_counts() -> None:
    assert shares("1/2, 0,0.25,1/4") == [0, Fraction(1, 4), Fraction(1, 2)]
    default = arguments_of(ARGV).shares
    assert default == [0, Fraction(1, 8), Fraction(1, 4), Fraction(1, 2)]
    assert [kept_counts(default, n) for n in (8, 5, 2, 1, 32)] == [
        [0, 1, 2, 4], [0, 1, 3], [0, 1], [0], [0, 4, 8, 16]
    ]  # fmt: skip


@pytest.mark.parametrize("bad", ["1", "-1/8", "x", "1/0", "", "1/4,,1/2"])
def test_bad_shares(bad: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments_of([*ARGV, f"--shares={bad}"])
    assert stop.value.code == 2 and "--shares" in capsys.readouterr().err


def test_arguments(capsys: pytest.CaptureFixture) -> None:
    found = arguments_of([*ARGV, "align.tokens=2M", "--recipe", "based", "seed=1"])
    assert (found.overrides, found.recipe, found.method) == (["align.tokens=2M", "seed=1"], "based", "window")
    with pytest.raises(SystemExit):
        arguments_of([*ARGV, "keep_softmax=[1]"])
    assert "keep_softmax is what the curve varies" in capsys.readouterr().err


def test_points() -> None:
    assert points([7, 3, 0, 1, 2, 4, 5, 6], [0, 1, 2, 4], even_layers) == [
        Point(placement="auto, uniform", layers=()),
        Point(placement="auto, uniform", layers=(7,)),
        Point(placement="auto, uniform", layers=(3, 7)),
        Point(placement="auto", layers=(0, 1, 3, 7)),
        Point(placement="uniform", layers=(1, 3, 5, 7)),
    ]
    assert [Point(placement="auto", layers=layers).name for layers in ((), (0, 12))] == ["keep-none", "keep-0-12"]


def row(placement: str, layers: list[int], recovered: float | None) -> dict[str, Any]:
    audit = {"R": recovered, "ppl_student": 12.346, "ppl_teacher": 10.0, "ppl_window": 14.0, "protocol": "concat@64"}
    return {"placement": placement, "layers": layers, "tokens": 2_500_000, "state_bytes": 2048, "audit": audit}


def test_the_table_and_the_lines() -> None:
    assert cells(row("auto", [0, 3], 45.67), 4) == ("auto", "2/4", "0,3", "2.5M", "2", "12.35", "45.7")
    assert cells(row("uniform", [], None), 4) == ("uniform", "0/4", "none", "2.5M", "2", "12.35", "-")
    rows = [row("auto", [0, 3], 90.0), row("auto, uniform", [], 20.0), row("uniform", [1, 3], 70.0)]
    rows.append(row("auto, uniform", [3], None))
    assert series(rows, 4) == {"auto": [(0.0, 20.0), (0.5, 90.0)], "uniform": [(0.0, 20.0), (0.5, 70.0)]}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Conversions that take no time: R grows with the kept layers. `die` names an override that fails."""
    state: dict[str, Any] = {"calls": [], "die": None}

    def select(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state["calls"].append("select")
        return {"ranking": [2, 0, 1, 3]}

    def convert(teacher: str, out: Path, *, overrides: list[str], **kwargs: Any) -> dict[str, Any]:
        state["calls"].append(overrides[-1])
        if overrides[-1] == state["die"]:
            raise RuntimeError("layer 3 died")
        out.mkdir()
        (out / "kept").write_text(overrides[-1])
        return {"stages": {"align": {"tokens": 1000}}, "seconds": {"align": 2.0, "total": 3.0}, "state_bytes": 4096}

    def audit(out: Path, **kwargs: Any) -> dict[str, Any]:
        kept = json.loads((out / "kept").read_text().partition("=")[2])
        return row("", [], 10.0 * len(kept) + sum(kept))["audit"]

    for function in (select, convert, audit):
        monkeypatch.setattr(linearize.api, function.__name__, function)
    monkeypatch.setattr(keep_curve, "machine", lambda: "a machine")
    return state


def test_a_curve_goes_on_where_it_stopped(
    library: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [*ARGV, "--out", str(tmp_path / "out"), "--shares", "0,1/4,1/2", "seed=1"]
    library["die"] = "keep_softmax=[0,2]"
    main(argv)
    out, err = capsys.readouterr()
    assert library["calls"] == ["select", *(f"keep_softmax=[{kept}]" for kept in ("", "2", "3", "0,2", "1,3"))]
    assert "keep-0-2: RuntimeError: layer 3 died" in err and "not done: keep-0-2 (run" in out
    library |= {"die": None, "calls": []}
    main(argv)
    out = capsys.readouterr().out
    assert library["calls"] == ["keep_softmax=[0,2]"] and "not done" not in out
    lines = [line.split() for line in out.splitlines()]
    head = next(n for n, line in enumerate(lines) if line[:2] == ["placement", "kept"])
    lines = lines[head : head + 6]  # a line about matplotlib may follow, where there is none
    assert [(line[-7], line[-1]) for line in lines[1:]] == [
        ("uniform", "0.0"), ("auto", "12.0"), ("uniform", "13.0"), ("auto", "22.0"), ("uniform", "24.0")
    ]  # fmt: skip
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [point["layers"] for point in curve["points"]] == [[], [2], [3], [0, 2], [1, 3]]
    assert curve["points"][0]["seconds"] == 2.0 and curve["ranking"] == [2, 0, 1, 3]
    assert not (tmp_path / "out" / "keep-2").exists(), "the weights are not kept"
    with pytest.raises(SystemExit, match="holds another curve"):
        main([*argv[:-1], "seed=2"])


def test_a_report_that_was_never_written_is_made_again(library: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "keep-none").mkdir()
    main([*ARGV, "--out", str(tmp_path), "--shares", "0"])
    assert library["calls"] == ["select", "keep_softmax=[]"]
    assert json.loads((tmp_path / "keep-none.json").read_text())["audit"]["R"] == 0.0


def test_no_point_starts_after_the_time(library: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main([*ARGV, "--out", str(tmp_path), "--minutes", "-1"])
    assert library["calls"] == ["select"] and "not done: keep-none, keep-2" in capsys.readouterr().out


def test_a_plot_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("auto, uniform", [], 20.0), row("auto", [0], 90.0), row("uniform", [1], 70.0)]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not keep_curve.plot(rows, 2, "a recipe", tmp_path / "curve.png") and not list(tmp_path.iterdir())
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert keep_curve.plot(rows, 2, "a recipe", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
