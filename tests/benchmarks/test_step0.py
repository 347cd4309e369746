"""The table of perplexities before training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import step0
from linearize.recipe import list_recipes, load_recipe


def test_arguments() -> None:
    args = step0.parse(["t", "--data", "d", "--heldout", "h", "--tokens", "2k", "mixer.window=32"])
    assert (args.tokens, args.recipes, args.overrides) == (2000, list_recipes(), ["mixer.window=32"])


def test_layers() -> None:
    config = SimpleNamespace(num_hidden_layers=8)
    assert step0.plan(load_recipe("pure"), config) == ["linear"] * 8
    assert step0.plan(load_recipe("hybrid"), config) == ["linear"] * 8
    assert step0.plan(load_recipe("pure", ["keep_softmax=[1]"]), config).index("softmax") == 1


def test_cells() -> None:
    cells = step0.row("a", 2, (20.0, 200**0.5), teacher=10.0, cut=20.0)
    assert cells == ["a", "2", "20", "14.142", "0.0", "50.0"]
    assert step0.row("a", 0, (20.0, 10.0), teacher=10.0, cut=10.0)[-2:] == ["-", "-"]


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "demo",
        "--data",
        "demo",
        "--heldout",
        "demo",
        "--recipes",
        "lolcats,pure",
        "--tokens",
        "1k",
        "--windows",
        "2",
    ]
    assert step0.main([*given, "--context", "256", "--device", "cpu", "mixer.feature_dim=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines if line.startswith("| ")}
    plain, calibrated = map(float, found["pure"][2:4])
    assert calibrated < plain and set(found) == {"recipe", "lolcats", "pure"}


def test_an_unknown_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["demo", "--data", "demo", "--heldout", "demo", "--recipes", "purr", "--context", "256", "--windows", "1"]
    assert step0.main(given) != 0
    assert "purr" in capsys.readouterr().err
