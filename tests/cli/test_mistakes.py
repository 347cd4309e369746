"""Everyday mistakes: each ends, before any work, in one line that says what is wrong and what to do."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from linearize_cli.app import main

NEXT_STEP = re.compile(
    r"Did you mean|See linearize|linearize recipes|Give |Use |Choose |Name |Write |Try |Add |Take |Leave |Check |Copy |"
    r"Remove |Unset |Free |Example:|Readable:|such as |linearize convert|lists them|is a folder with"
)
"""What a next step begins with, in our messages."""

MISTAKES: list[tuple[str, int, str]] = [
    # the command line
    ("frob", 2, "'frob'"),
    ("convret demo out", 2, "'convert'"),
    ("recipe ls", 2, "'recipes'"),
    ("recipes lss", 2, "'ls'"),
    ("import lolcat BASE out", 2, "'lolcats'"),
    ("convert demo", 2, "'OUT'"),
    ("convert demo out --dta demo", 2, "'--data'"),
    ("convert demo out --data", 2, "--data"),
    ("convert demo out --data demo --seed 0", 2, "without dashes: seed=VALUE. See"),
    ("convert demo out --data demo --batch-tokens=9", 2, "align.batch_tokens=VALUE or finetune.batch_tokens=VALUE"),
    ("audit out --against demo --data demo --seed 0", 2, "'--save'"),
    ("doctor --jsn", 2, "'--json'"),
    ("doctor now", 2, "now"),
    ("audit out --data demo", 2, "--against"),
    ("generate demo", 2, "--prompt"),
    # models
    ("inspect nothere", 2, "'nothere'"),
    ("convert ./nothere out --data demo", 2, "./nothere"),
    ("inspect owner/na/me", 2, "owner/na/me"),
    ("inspect empty", 2, "config.json"),
    ("inspect text.txt", 2, "text.txt is a file"),
    ("bench nothere", 2, "'nothere'"),
    ("report demo", 2, "linearize.json"),
    ("verify nothere", 2, "'nothere'"),
    ("verify demo", 2, "demo is an ordinary checkpoint"),
    ("verify empty", 2, "empty is no model"),
    ("audit demo --against demo --data demo", 2, "both demo"),
    ("push empty me/it --dry-run", 2, "linearize.json"),
    ("push empty it --dry-run", 2, "'it'"),
    ("import lolcats demo out --distilled no.pt", 2, "no.pt"),
    # recipes
    ("convert demo out --data demo --recipe lolcat", 2, "'lolcats'"),
    ("convert demo out --data demo --recipe no.yaml", 2, "no.yaml"),
    ("recipes validate broken.yaml", 2, "line 1"),
    ("convert demo out --data demo align.tokns=1", 2, "'tokens'"),
    ("convert demo out --data demo align.tokens", 2, "key=value"),
    ("convert demo out --data demo context=many", 2, "'many'"),
    ("convert demo out --data demo dtype=float8", 2, "'float8'"),
    ("recipes cp lolcats nofolder/mine.yaml", 2, "nofolder"),
    ("recipes cp lolcats text.txt", 3, "text.txt"),
    # texts
    ("convert demo out", 2, "--data"),
    ("convert demo out --data txt.txt", 2, "'text.txt'"),
    ("eval demo --data nothere", 2, "nothere"),
    ("convert demo out --data empty", 2, "empty"),
    # OUT
    ("convert demo full --data demo", 3, "full is not empty"),
    ("convert demo text.txt --data demo", 3, "is a file"),
    ("convert demo text.txt/out --data demo", 3, "text.txt is not a folder"),
    ("convert demo closed/out --data demo", 3, "closed cannot be written to"),
    (f"convert demo {'o' * 241} --data demo", 2, "OUT is longer than 240 bytes"),
    (f"convert demo {'o' * 300} --plan", 2, "OUT is longer than 240 bytes"),
    (f"inspect {'m' * 300}", 2, "too long"),
    (f"convert demo out --data {'t' * 300}", 2, "too long"),
    ("convert demo --data demo seed=1", 2, "OUT is missing"),
    ("convert demo '' --data demo", 2, "OUT is empty"),
    ("convert demo out --data ''", 2, "the data is empty"),
    ("convert demo out --data demo --resume", 2, "out has no unfinished run to resume"),
    ("convert demo out --resume --plan", 2, "out has no unfinished run to resume"),
    ("convert demo full --plan", 3, "full is not empty"),
    ("convert demo text.txt/out --plan", 3, "text.txt is not a folder"),
    ("convert demo closed/out --plan", 3, "closed cannot be written to"),
    ("convert demo out --data nothere --plan", 2, "nothere"),
    ("convert demo out --data demo --recipe ./empty", 2, "is a folder"),
    # numbers and choices
    ("eval demo --data demo --context 1", 2, "--context"),
    ("eval demo --data demo --context many", 2, "--context"),
    ("eval demo --data demo --limit 5", 2, "--limit"),
    ("eval demo --data demo --max-windows 0", 2, "--max-windows"),
    ("eval demo --tasks piqa --max-windows 5", 2, "--max-windows"),
    ("audit demo --against demo --data demo --max-windows 5 --save", 2, "--max-windows"),
    ("eval demo --data demo --tasks piqa", 2, "--tasks"),
    ("eval demo --data demo --device gpu", 2, "'gpu'"),
    ("select demo --data demo --keep 0", 2, "--keep"),
    ("select demo --data demo --keep 1 --align-tokens lots", 2, "'lots'"),
    ("bench demo --contexts lots", 2, "'lots'"),
    ("bench demo --max-memory plenty", 2, "'plenty'"),
    ("convert demo out --data demo --report-to wnadb", 2, "'wandb'"),
    ("generate demo --prompt x --max-new-tokens 0", 2, "--max-new-tokens"),
    ("generate demo --prompt caf\udce9", 2, "--prompt: not UTF-8, from its character 4 on"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full", "closed"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "text.txt").write_text("Words.", encoding="utf-8")
    (tmp_path / "broken.yaml").write_text("name: [", encoding="utf-8")
    (tmp_path / "closed").chmod(0o500)
    yield tmp_path
    (tmp_path / "closed").chmod(0o700)


@pytest.mark.parametrize(
    ("line", "code", "says"), MISTAKES, ids=lambda value: value if isinstance(value, str) else None
)
@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_a_mistake_is_one_line_with_a_next_step(
    line: str,
    code: int,
    says: str,
    as_json: bool,
    place: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "closed" in line and os.access(place / "closed", os.W_OK):
        # Root may write anywhere: ask as somebody else would be answered.
        plain = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and plain(path, mode))
    before = sorted(place.rglob("*"))
    takes_json = len(line.split()) > 1 and not line.endswith("--data")
    argv = shlex.split(line) + (["--json"] if as_json and takes_json else [])
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == "", "errors leave stdout to results"
    (told,) = err.splitlines()
    assert told.startswith("error: ") and says in told, told
    assert NEXT_STEP.search(told), f"no next step: {told}"
    assert "Traceback" not in told and "\x1b" not in told and len(told) < 500
    assert sorted(place.rglob("*")) == before, "nothing was made"


@pytest.mark.parametrize("line", ["recipes ls", "inspect demo --recipe lolcats"])
def test_no_colour_where_it_is_not_wanted(
    line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal there are colours; NO_COLOR and a dumb terminal each by itself take them away."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def coloured() -> bool:
        assert main(line.split()) == 0
        assert main(["frob"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return re.search(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]", err) is not None

    assert coloured()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not coloured(), name
