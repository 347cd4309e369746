"""What TAB offers: the protocol between the shell and the command line, and bash itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from linearize.recipe import list_recipes, load_recipe
from linearize_cli.app import main


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """offered(line) -> what is offered for the last word of a line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "lolcats-mine.yaml").write_text("name: mine", encoding="utf-8")

    def ask(line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setenv("_LINEARIZE_COMPLETE", "complete_bash")
        with pytest.raises(SystemExit) as stop:
            main([])
        assert not stop.value.code
        return capsys.readouterr().out.split()

    return ask


def test_commands_and_options(offered) -> None:
    assert {"convert", "audit", "recipes", "verify"} <= set(offered("linearize "))
    assert offered("linearize conv") == ["convert"]
    assert set(offered("linearize recipes ")) == {"ls", "show", "cp", "validate"}
    assert offered("linearize convert demo out --da") == ["--data"]


def test_recipes(offered) -> None:
    assert set(offered("linearize recipes show ")) >= set(list_recipes())
    assert offered("linearize convert demo out --recipe ga") == ["gated-deltanet"]
    assert offered("linearize convert demo out -r lolcats") == ["lolcats", "lolcats-hybrid", "lolcats-mine.yaml"]


def test_models_texts_and_files(offered) -> None:
    assert offered("linearize inspect d") == ["demo", "data/"]
    assert offered("linearize convert demo out --data de") == ["demo"]
    assert offered("linearize convert demo out --data ./d") == [], "files are the shell's own"
    assert offered("linearize bench out --out f") == []
    assert offered("linearize recipes cp lolcats lol") == []


def test_recipe_keys_with_their_values(offered) -> None:
    assert offered("linearize convert demo out align.tok") == [f"align.tokens={load_recipe('pure').align.tokens}"]
    assert offered("linearize convert demo out --recipe sliding-window align.tok") == ["align.tokens=0"]
    assert offered("linearize convert demo out --recipe nothing align.tok") == []
    assert "keep_softmax=none" in offered("linearize recipes validate lolcats k")
    assert offered("linearize convert demo out seed=1 see") == [], "a key that was given is not offered again"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("eval out --device c", ["cpu", "cuda"]),
        ("eval out --dtype f", ["float32", "float16"]),
        ("convert demo out --report-to w", ["wandb"]),
        ("select demo --method al", ["aligned"]),
    ],
)
def test_choices(line: str, words: list[str], offered) -> None:
    assert offered(f"linearize {line}") == words


def test_the_choices_are_those_of_the_library() -> None:
    from linearize import tracking
    from linearize_cli import completion

    assert set(completion.TRACKERS) == {*tracking.MODULES, tracking.NONE}
    select = Path(tracking.__file__).parent / "convert" / "select.py"  # read, for it would import torch
    names = ", ".join(f'"{name}"' for name in completion.METHODS)
    assert f"METHODS = ({names})" in select.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(source_env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "linearize"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m linearize_cli "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = """
eval "$(_LINEARIZE_COMPLETE=source_bash linearize)"
complete -p linearize
COMP_WORDS=(linearize convert demo out --recipe lolcats-); COMP_CWORD=5
_linearize_completion linearize
echo "offered: ${COMPREPLY[*]}"
"""
    env = {**source_env, "PATH": f"{program.parent}:{source_env['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "offered: lolcats-hybrid" in done.stdout, done.stderr + done.stdout


def test_completion_imports_nothing_heavy(source_env: dict[str, str], tmp_path: Path) -> None:
    code = """
import os, sys
from linearize_cli.app import main
os.environ |= {"COMP_WORDS": "linearize convert d o --recipe l", "COMP_CWORD": "5"}
os.environ["_LINEARIZE_COMPLETE"] = "complete_bash"
try:
    main([])
except SystemExit:
    pass
assert not {"torch", "transformers", "numpy", "peft"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=source_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "lolcats" in done.stdout, done.stderr


def test_a_shell_that_cannot_be_told_gets_the_way_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    import typer.completion

    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("typer.completion", "typer._completion_shared"):
        monkeypatch.setattr(f"{place}._get_shell_name", lambda: None, raising=False)
    assert typer.completion is not None
    assert main(["--install-completion"]) == 1
    err = capsys.readouterr().err
    assert "_LINEARIZE_COMPLETE=source_bash" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing was written"
