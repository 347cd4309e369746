"""Progress for people, and figures that read well."""

from __future__ import annotations

import io
import re
import sys

import pytest

from linearize.progress import NullProgress, Progress
from linearize_cli import output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(progress: Progress) -> None:
    progress.start("align", 4, 1024)
    for step in range(1, 5):
        progress.step("align", step, 1.0 / step, 1024 * step, {"worst_layer": 3})
    progress.layer_table([{"layer": 0, "loss": 0.5, "r2": 0.99}, {"layer": 1, "loss": None, "r2": float("nan")}])
    progress.message("a note [with brackets] " + "x" * 300)
    progress.finish("align")


def test_all_three_are_progress() -> None:
    for kind in (NullProgress, output.LineProgress, output.BarProgress):
        assert isinstance(kind(), Progress)
    drive(NullProgress())


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    progress = output.make_progress()
    assert isinstance(progress, output.LineProgress)
    drive(progress)
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    lines = err.splitlines()
    assert lines[0] == "align: 4 steps of 1,024 tokens"
    assert lines[1].startswith("align: step 1/4, loss 1, worst layer 3, ") and "tokens/s" in lines[1]
    assert lines[2].startswith("align: step 4/4, loss 0.25"), "steps in between are left out"
    assert any(line.startswith("a note [with brackets] xxx") and line.endswith("xxx") for line in lines), "not wrapped"


@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_on_a_terminal(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    progress = output.make_progress()
    assert isinstance(progress, output.BarProgress)
    drive(progress)
    progress.close()
    shown = terminal.getvalue()
    for part in ("align", "4/4", "loss 0.25", "tokens/s", "left", "a note [with brackets]", "r2"):
        assert part in shown, part
    coloured = re.search(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]", shown) is not None
    assert coloured != no_color, "colours only where they are wanted"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(output.make_progress(), output.LineProgress)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("state_bytes", 1023, "1023 bytes"),
        ("bytes", 1024**3, "1.0 GiB"),
        ("tokens", 2_000_000, "2,000,000"),
        ("layer", 12, "12"),
        ("loss", 0.000123456, "0.00012346"),
        ("ppl", 914382.7699, "914,382.77"),
        ("r", None, "-"),
        ("ok", True, "yes"),
        ("layers", [3, 7], "3, 7"),
        ("layers", [], "none"),
        ("dropped", {}, "none"),
        ("name", "two\nlines\x1b[2J", "two lines [2J"),
    ],
)
def test_figures(name: str, value: object, text: str) -> None:
    assert output._figure(name, value) == text


def test_errors_have_no_colour_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    output.fail("it is wrong")
    assert capsys.readouterr().err == "error: it is wrong\n"


def test_speed_and_time_left_count_from_the_step_a_resumed_run_starts_at(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    clock = output._Clock(total_steps=100, tokens_per_step=10)
    now[0] += 2.0
    assert clock.update(91) == (5.0, 18.0), "the first step after a resume at 90 took two seconds"
    now[0] += 2.0
    assert clock.update(92) == (5.0, 16.0)


def test_an_evaluation_shows_both_models_side_by_side(capsys: pytest.CaptureFixture) -> None:
    ours = {"model": "out", "protocol": "concat@64", "context": 64, "tokens": 12, "token_perplexity": 20.0}
    theirs = {**ours, "model": "teacher", "token_perplexity": 10.0}
    output.print_evaluation({**ours, "against": theirs, "ratio": {"token_perplexity": 2.0}})
    err = capsys.readouterr().err
    assert "protocol concat@64: context 64" in err
    (line,) = (line for line in err.splitlines() if "token perplexity" in line)
    assert line.split()[-3:] == ["20", "10", "2"]
    output.print_evaluation({**ours, "against": ours, "ratio": {}})
    assert "out (against)" in capsys.readouterr().err
    output.print_evaluation({**ours, "against": None})
    assert "ratio" not in capsys.readouterr().err


def test_an_audit_begins_with_the_recovery(capsys: pytest.CaptureFixture) -> None:
    figures = {"model": "out", "ppl_teacher": 10.0, "branches": {"full": 12.0, "none": 99.0}, "notes": ["a note"]}
    output.print_audit({**figures, "R": 16.34})
    err = capsys.readouterr().err
    assert err.startswith("Recovery R: 16.3 %") and "99" in err and "a note" in err
    output.print_audit({**figures, "R": None})
    assert capsys.readouterr().err.startswith("Recovery R: not defined")
