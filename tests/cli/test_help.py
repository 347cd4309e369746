"""What --help and --version print."""

from __future__ import annotations

import pytest

from linearize_cli.app import main


@pytest.mark.parametrize("argv", [[], ["recipes"]])
def test_no_command_shows_help_on_stderr(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Usage:" in err


COMMANDS = [["inspect"], ["convert"], ["eval"], ["audit"], ["generate"], ["doctor"]]
COMMANDS += [["recipes", name] for name in ("ls", "show", "cp", "validate")]


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_shows_examples(command: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out and " ".join(["linearize", *command]) in out
    assert not command or "--json" in out


def test_version(capsys: pytest.CaptureFixture) -> None:
    import linearize

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"linearize {linearize.__version__}\n"


@pytest.mark.parametrize("group", [[], ["recipes"], ["import"]])
def test_no_summary_is_cut_short(
    group: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of commands on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*group, "--help"]) == 0
    shown = capsys.readouterr().out.partition("Commands:\n")[2]
    assert shown.strip() and "..." not in shown, shown
