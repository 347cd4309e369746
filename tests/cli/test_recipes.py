"""`linearize recipes`: what is listed, shown, copied and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linearize.recipe import list_recipes, load_recipe, recipe_path
from linearize_cli.app import main


def test_recipes_ls(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes", "ls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert [row["name"] for row in rows] == list_recipes() and all(row["paper"] for row in rows)
    assert main(["recipes", "ls"]) == 0
    err = capsys.readouterr().err
    assert all(name in err for name in list_recipes())


def test_recipes_ls_shows_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made := tmp_path / "recipes").mkdir()
    text = recipe_path("lolcats").read_text(encoding="utf-8")
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("# Measured"))
    (made / "lolcats.yaml").write_text(text, encoding="utf-8")
    where = "# Measured: R 12.5 %; state 7.75 MB; tokens 3M; on a GPU, torch 9\n"
    (made / "known.yaml").write_text(where + text.replace("name: lolcats", "name: known"), encoding="utf-8")
    monkeypatch.setattr("linearize.recipe._folder", lambda: made)
    assert main(["recipes", "ls", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["recipes"]}
    assert rows["lolcats"]["measured"] == {}
    assert rows["known"]["measured"] == {"R": "12.5 %", "state": "7.75 MB", "tokens": "3M", "on": "a GPU, torch 9"}
    assert set(rows["known"]) == {"name", "paper", "summary", "measured"}
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().err.splitlines()
    (head,) = (line.split() for line in lines if "summary" in line)
    assert head == ["name", "R", "state", "paper", "summary"]
    (known,) = (line for line in lines if line.split()[:1] == ["known"])
    (lolcats,) = (line for line in lines if line.split()[:1] == ["lolcats"])
    assert known.split()[1:5] == ["12.5", "%", "7.75", "MB"] and lolcats.split()[1:3] == ["-", "-"]


def test_recipes_show(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes", "show", "based"]) == 0
    assert capsys.readouterr().out == recipe_path("based").read_text(encoding="utf-8")
    assert main(["recipes", "show", "based", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"] == load_recipe("based").as_dict() and shown["digest"] == load_recipe("based").digest()


def test_recipes_cp_then_validate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "own.yaml"
    assert main(["recipes", "cp", "mamba2", str(file)]) == 0
    assert file.read_bytes() == recipe_path("mamba2").read_bytes()
    assert main(["recipes", "cp", "mamba2", str(file)]) == 3, "an existing file is refused"
    assert main(["recipes", "cp", "mamba2", str(tmp_path)]) == 0 and (tmp_path / "mamba2.yaml").exists()
    assert main(["recipes", "cp", "mamba2", str(tmp_path / "no" / "x.yaml")]) == 2
    capsys.readouterr()
    assert main(["recipes", "validate", str(file), "align.tokens=1M", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 7_000_000
    file.write_text(file.read_text(encoding="utf-8") + "\nsed: 1\n", encoding="utf-8")
    assert main(["recipes", "validate", str(file)]) == 2
    assert "own.yaml" in capsys.readouterr().err
