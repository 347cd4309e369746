"""Progress for people, and figures that read well."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linearize.progress import NullProgress, Progress, tell, warn
from linearize_cli import output, results
from linearize_cli import progress as display
from tests.cli.stand_ins import REPORT


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
    for kind in (NullProgress, display.LineProgress, display.BarProgress):
        assert isinstance(kind(), Progress)
    drive(NullProgress())


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    progress = display.make_progress()
    assert isinstance(progress, display.LineProgress)
    drive(progress)
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    lines = err.splitlines()
    assert lines[0] == "align: 4 steps of 1,024 tokens"
    assert lines[1].startswith("align: step 1/4, loss 1, worst layer 3, ") and "tokens/s" in lines[1]
    assert lines[2].startswith("align: step 4/4, loss 0.25"), "steps in between are left out"
    assert any(line.startswith("a note [with brackets] xxx") and line.endswith("xxx") for line in lines), "not wrapped"


def test_a_loss_that_no_step_gave_is_left_out(capsys: pytest.CaptureFixture) -> None:
    progress = display.LineProgress()
    progress.start("align", 1, 1024)
    progress.step("align", 1, None, 1024, {})
    progress.layer_table([])
    stages = {"align": {"tokens": 1024, "steps": 1, "loss_first": None, "loss_last": None, "seconds": 1.0}}
    results.print_conversion(REPORT | {"stages": stages, "mean_match": None}, "Converted", "o")
    told = capsys.readouterr().err
    assert re.search(r"^align: step 1/1, [\d,]+ tokens/s", told, re.MULTILINE)
    assert "How well the layers match was not measured" in told and "None" not in told
    assert "How well each layer is matched" not in told


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
    progress = display.make_progress()
    assert isinstance(progress, display.BarProgress)
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
    assert isinstance(display.make_progress(), display.LineProgress)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("state_bytes", 1023, "1023 bytes"),
        ("bytes", 1024**3, "1.0 GiB"),
        ("tokens", 2_000_000, "2,000,000"),
        ("layer", 12, "12"),
        ("mean_match", 0.46381, "46.4 %"),
        ("seconds", 0.0055, "0.0055 s"),
        ("seconds", 0.0, "0.00 s"),
        ("seconds", 0.078546, "0.08 s"),
        ("seconds", 125.0, "2:05"),
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
    assert output.figure(name, value) == text


def test_errors_have_no_colour_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    output.fail("it is wrong")
    assert capsys.readouterr().err == "error: it is wrong\n"


def test_speed_and_time_left_count_from_the_step_a_resumed_run_starts_at(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    clock = display._Clock(total_steps=100, tokens_per_step=10)
    now[0] += 2.0
    assert clock.update(91) == (5.0, 18.0), "the first step after a resume at 90 took two seconds"
    now[0] += 2.0
    assert clock.update(92) == (5.0, 16.0)


def test_an_evaluation_shows_both_models_side_by_side(capsys: pytest.CaptureFixture) -> None:
    marks = {"bos": "none", "eos": "none", "dtype": "float32", "device": "cpu"}
    counts = {"protocol": "concat@64", "context": 64, "windows": 2, "tokens": 12}
    ours = {"model": "out", **counts, **marks, "token_perplexity": 20.0, "notes": ["too far"]}
    theirs = {**ours, "model": "teacher", "token_perplexity": 10.0, "notes": []}
    results.print_evaluation({**ours, "against": theirs, "ratio": {"token_perplexity": 2.0}})
    err = capsys.readouterr().err
    assert "concat@64: 2 windows, 12 tokens, float32 on cpu" in err and "note: too far" in err
    (line,) = (line for line in err.splitlines() if "token perplexity" in line)
    assert line.split()[-3:] == ["20", "10", "2"]
    results.print_evaluation({**ours, "against": ours, "ratio": {}})
    assert "out (against)" in capsys.readouterr().err
    results.print_evaluation({**ours, "against": None})
    assert "ratio" not in capsys.readouterr().err


def test_a_column_that_repeats_another_is_left_out() -> None:
    rows = [{"layer": 0, "loss": 0.5, "nmse": 0.5, "explained": 0.5}, {"layer": 1, "loss": 0.2, "nmse": 0.2}]
    assert output.without_copies(rows) == [
        {"layer": 0, "loss": 0.5, "explained": 0.5},
        {"layer": 1, "loss": 0.2, "explained": None},
    ]


def test_work_is_told_once_where_there_is_no_terminal(capsys: pytest.CaptureFixture) -> None:
    with output.watching():
        tell("reading 2 windows", "out (full)")
        tell("reading 2 windows", "out (window)")
    tell("nobody listens", "any more")
    assert capsys.readouterr().err == "reading 2 windows\n"


def test_a_warning_is_said_at_once_and_once(capsys: pytest.CaptureFixture) -> None:
    for doings in (True, False):
        with output.watching(doings=doings):
            warn("far beyond")
            warn("far beyond")
            tell("reading 2 windows", "out")
        warn("nobody listens")
        said = capsys.readouterr().err
        assert said == "warning: far beyond\n" + ("reading 2 windows\n" if doings else "")
        assert output.unsaid(["far beyond", "another"]) == ["another"]
    with output.watching():
        assert output.unsaid(["far beyond"]) == ["far beyond"]  # another run, another result


def test_a_warning_stays_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    with output.watching():
        time.sleep(0.2)
        warn("far beyond")
    assert "warning: far beyond\n" in terminal.getvalue()


def test_the_unit_is_said_once(capsys: pytest.CaptureFixture) -> None:
    output.print_report("", {"disk": {"folder": "/x", "free_bytes": 2048}})
    assert capsys.readouterr().err.split() == ["disk", "folder", "/x", "free", "2.0", "KiB"]


def test_work_is_shown_on_a_terminal_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    with output.watching():
        tell("reading 2 windows", "out [full]")
        time.sleep(0.3)  # the screen is drawn from time to time
    shown = terminal.getvalue()
    assert "reading 2 windows: out [full]" in shown and shown.rstrip("\r").endswith("\x1b[2K"), "the line is erased"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_their_headings_on_a_narrow_terminal(width: int, capsys: pytest.CaptureFixture) -> None:
    from rich.console import Console

    narrow = Console(stderr=True, width=width, markup=False)
    row = {"": "perplexity", "teacher": 10.0, "#" * 100: 12.5, "student": 11.0}
    output.print_table([row], to=narrow)
    err = capsys.readouterr().err
    assert err.count("#") == 100 and "…" not in err and max(map(len, err.splitlines())) <= width


def test_a_table_that_does_not_fit_becomes_lines(capsys: pytest.CaptureFixture) -> None:
    from rich.console import Console

    narrow = Console(stderr=True, width=40, markup=False)
    rows = [
        {"name": "gated-deltanet", "R": "-87.8 %", "paper": "arXiv:2412.06464", "summary": "Gated delta rule"},
        {"name": "based", "R": None, "paper": "arXiv:2402.18668", "summary": "A Taylor expansion of many dimensions"},
    ]
    output.print_table(rows, title="Recipes", to=narrow)
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[:3] == ["Recipes", "name gated-deltanet", "  R        -87.8 %"] and "  paper    arXiv:2402.18668" in lines
    )
    assert max(map(len, lines)) <= 40
    assert lines[-2:] == ["  summary  A Taylor expansion of many", "           dimensions"]
    output.print_table(rows, to=Console(stderr=True, width=80, markup=False))
    assert "gated-deltanet   -87.8 %   arXiv:2412.06464" in capsys.readouterr().err


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "> /dev/full"])
def test_output_that_cannot_be_written(redirect: str, source_env: dict[str, str], tmp_path: Path) -> None:
    if "full" in redirect and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    command = f"{sys.executable} -m linearize_cli recipes validate lolcats --json {redirect}"
    done = subprocess.run(
        command, shell=True, env=source_env, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    if "full" in redirect:
        assert done.returncode == 3
        assert done.stderr == "error: cannot write the result: No space left on device. Free some space.\n"
    else:
        assert (done.returncode, done.stderr) == (0, "")
