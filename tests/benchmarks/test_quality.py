"""The quality table: which rows it has, what it computes and what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, quality_plots
from benchmarks.quality_rows import (
    ALWAYS,
    Row,
    conversions,
    leaders,
    read_variants,
    references,
    reseeded,
    scale,
)
from benchmarks.quality_table import by_linear, recovered, render
from linearize.errors import UsageError
from linearize.recipe import list_recipes, load_recipe

SETTING = {
    "teacher": "tiny",
    "budget": 1000,
    "data": "train.jsonl",
    "heldout": "held.jsonl",
    "context": 256,
    "windows": 8,
    "overrides": [],
    "lambada": None,
    "lambada_rows": None,
}


def rows_of(*recipes: str, variants: dict[str, Any] | None = None, seed: int = 0) -> list[Row]:
    """Conversions at a budget of 1000 tokens, without those that are always there."""
    made, _ = conversions(recipes=recipes, variants=variants or {}, budget=1000, seed=seed, overrides=[], teacher=None)
    return [row for row in made if row.name in recipes or row.kind == "variant"]


# Which rows


def test_a_budget_keeps_the_proportion_of_the_stages() -> None:
    lolcats = load_recipe("lolcats", ["align.tokens=4M", "finetune.tokens=6M"])
    scaled = scale(lolcats, 3_000_001)
    assert (scaled.align.tokens, scaled.finetune.tokens) == (1_200_000, 1_800_001)
    alone = scale(load_recipe("lolcats", ["align.tokens=0"]), 777)
    assert (alone.align.tokens, alone.finetune.tokens) == (0, 777)
    untrained = load_recipe("lolcats", ["align.tokens=0", "finetune.tokens=0"])
    assert scale(untrained, 777) == untrained


def test_an_alignment_that_would_be_skipped_gives_its_tokens_to_finetuning() -> None:
    """Liger's mixer has no parameter to align, which only a layout of the teacher shows."""
    bare = load_recipe("liger-gla", ["align.tokens=4M", "finetune.tokens=6M"])
    assert scale(bare, 1000).align.tokens == 400
    told = scale(bare, 1000, teacher="demo")
    assert (told.align.tokens, told.finetune.tokens) == (0, 1000)
    assert scale(load_recipe("lolcats"), 1000, teacher="demo").align.tokens == 400


def test_the_table_always_holds_the_baselines_and_the_published_recipes() -> None:
    made, notes = conversions(recipes=[], variants={}, budget=1000, seed=3, overrides=["context=512"], teacher=None)
    there = [name for name in ALWAYS if name in list_recipes()]
    assert {"lolcats", "hedgehog", "liger-gla"} <= set(there)
    assert [row.name for row in made] == there
    assert len(notes) == len(ALWAYS) - len(there)
    for row in made:
        assert row.key == f"{row.name}-s3" and row.built.seed == 3 and row.built.context == 512
        assert row.built.align.tokens + row.built.finetune.tokens == 1000
    assert [row.key for row in references(made)] == ["teacher", "cut-w64-sinks4", "cut-w64-sinks0"]
    narrow = rows_of("lolcats", variants={"n": {"recipe": "lolcats", "set": ["mixer.window=32", "mixer.sinks=2"]}})
    assert {row.key for row in references(narrow)} >= {"cut-w32-sinks2", "cut-w32-sinks0"}
    with pytest.raises(UsageError, match=r"row lolcat: .*Did you mean 'lolcats'"):
        conversions(recipes=["lolcat"], variants={}, budget=1, seed=0, overrides=[], teacher=None)


def test_variants_change_a_recipe_after_the_overrides_of_the_command(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    file.write_text("kl: {recipe: lolcats, set: [finetune.ce=0, finetune.kl=2, align.tokens=0]}\n")
    made, _ = conversions(
        recipes=[], variants=read_variants(file), budget=1000, seed=0, overrides=["finetune.kl=1"], teacher=None
    )
    (variant,) = [row for row in made if row.kind == "variant"]
    assert variant.name == "kl" and variant.built.finetune.kl == 2.0 and variant.built.finetune.tokens == 1000
    for text, what in (
        ("lolcats: {recipe: lolcats}", "'lolcats' is the name of a recipe"),
        ("a/b: {recipe: lolcats}", "or no name"),
        ("a: {set: []}", "a names no recipe"),
        ("a: {recipe: lolcats, sets: []}", r"a\.sets is unknown\. Did you mean 'set'"),
        ("[]", "holds no rows"),
    ):
        file.write_text(text + "\n")
        with pytest.raises(UsageError, match=what):
            read_variants(file)


def test_the_shipped_ablations_are_rows(root: Path) -> None:
    made = rows_of(variants=read_variants(root / "benchmarks" / "ablations.yaml"))
    assert len({row.digest for row in made}) == len({row.key for row in made}) == len(made) > 3
    assert {"pure-window-dropout-finetune-0.05", "pure-window-dropout-finetune-0.1"} <= {row.name for row in made}


def test_leaders_are_the_best_of_the_pure_and_of_the_hybrid() -> None:
    rows = rows_of("lolcats", "hedgehog", "liger-gla", "lolcats-hybrid")
    rows += rows_of(variants={"v": {"recipe": "lolcats", "set": ["finetune.kl=1"]}})
    scores = {"lolcats-s0": 16.0, "hedgehog-s0": None, "liger-gla-s0": -61.0, "lolcats-hybrid-s0": 28.0, "v-s0": 99.0}
    assert [row.name for row in leaders(rows, scores, "1")] == ["lolcats", "lolcats-hybrid"]
    assert [row.name for row in leaders(rows, scores, "2")] == ["lolcats", "liger-gla", "lolcats-hybrid"]
    assert leaders(rows, scores, "0") == []
    assert [row.name for row in leaders(rows, scores, "v,hedgehog")] == ["v", "hedgehog"]
    with pytest.raises(UsageError, match="no row 'lolcat'"):
        leaders(rows, scores, "lolcat")
    again = reseeded(rows[0], 1)
    assert again.key == "lolcats-s1" and again.built.seed == 1 and again.digest != rows[0].digest


# What the table says


def measured(row: Row, ppl: float, **branches: float | None) -> dict[str, Any]:
    """A row as a job writes it, with the perplexities that a test chooses."""
    nll = math.log(ppl)
    out = {
        **row.as_dict(),
        "nll": nll,
        "token_perplexity": ppl,
        "by_position": [{"from": 0, "to": 64, "tokens": 10, "nll": nll, "perplexity": ppl}],
        "cache_bytes": 2048,
        "machine": "a machine",
        "date": "2026-01-02",
        "code": "0123456789ab",
        "shared": 1,
    }
    if row.recipe is None:
        return out
    mixer = row.built.mixer
    report = {
        "stages": {"align": {"tokens": 400}, "finetune": {"tokens": 600}},
        "parameters": {"trained": {"align": 1234, "finetune": 56}},
        "state_bytes": 10_240,
        "notes": [],
    }
    scores = {b: None if p is None else {"nll": math.log(p), "perplexity": p} for b, p in branches.items()}
    return out | {
        "window": mixer.window,
        "sinks": mixer.sinks,
        "softmax_layers": [],
        "branches": {"full": {"nll": nll, "perplexity": ppl}, **scores},
        "convert": report,
        "seconds": 81.4,
        "slices": 1,
    }


def state_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    held = {row["key"]: row for row in rows}
    return {"setting": SETTING, "plan": list(held), "notes": [], "rows": held, "left": []}


def line(text: str, name: str) -> list[str]:
    """The cells of a row of the first table in Markdown that has it."""
    return next([c.strip() for c in row.split("|")[1:-1]] for row in text.split("\n") if row.startswith(f"| {name} "))


def test_recovery_against_both_floors_and_by_branch() -> None:
    """exp(1), exp(2), exp(3): the student lies half way to the plain cut; against the cut with sinks a quarter less."""
    first = rows_of("hedgehog", variants={"sinks": {"recipe": "lolcats", "set": ["mixer.sinks=4"]}})
    teacher, four, none = references(first)
    windowless, sinks = first
    rows = [
        measured(teacher, math.exp(1)),
        measured(four, math.exp(5 / 3)),
        measured(none, math.exp(3)),
        measured(sinks, math.exp(1.5), window=math.exp(2.7), linear=math.exp(4), none=math.exp(9)),
        measured(windowless, math.exp(2), window=None, linear=math.exp(2), none=math.exp(9)),
    ]
    held = {row["key"]: row for row in rows}
    assert recovered(held["sinks-s0"], held) == pytest.approx(75)
    assert recovered(held["sinks-s0"], held, sinks=True) == pytest.approx(25)
    assert recovered(held["sinks-s0"], held, branch="window") == pytest.approx(15)
    assert by_linear(held["sinks-s0"], held) == pytest.approx(80)
    # Without a window of its own: the plain cut of 64 for both, and nothing to take away.
    assert recovered(held["hedgehog-s0"], held) == recovered(held["hedgehog-s0"], held, sinks=True) == pytest.approx(50)
    assert by_linear(held["hedgehog-s0"], held) is None
    assert recovered(held["teacher"], held) == pytest.approx(100)
    assert recovered(held["cut-w64-sinks0"], held) == pytest.approx(0)
    assert recovered(held["cut-w64-sinks4"], held, sinks=True) == pytest.approx(0)
    assert recovered(held["sinks-s0"], {"sinks-s0": held["sinks-s0"]}) is None

    text = render(state_of(rows))
    head = line(text, "row")
    cells = dict(zip(head, line(text, "sinks (seed 0)"), strict=True))
    assert cells["R %"] == "75.0" and cells["R sinks %"] == "25.0" and cells["by linear %"] == "80.0"
    assert cells["PPL"] == "4.48" and cells["none"] == "8103" and cells["step 0"] == "-" and cells["LAMBADA %"] == "-"
    assert cells["trained"] == "1,234 + 56" and cells["tokens"] == "1k" and cells["seconds"] == "81"
    assert cells["state KB"] == "10 + cache 2"
    assert dict(zip(head, line(text, "teacher"), strict=True))["state KB"] == "cache 2"
    names = [row.split("|")[1].strip() for row in text.split("\n") if row.startswith("| ")][1:6]
    assert names == ["teacher", "teacher cut to W=64, 4 sinks", "teacher cut to W=64, 0 sinks", "hedgehog (seed 0)",
                     "sinks (seed 0)"]  # fmt: skip


def test_what_the_cells_cannot_say_is_a_note() -> None:
    first = rows_of("lolcats", "lolcats-hybrid", "hedgehog")
    rows = [measured(row, 20.0) for row in references(first)]
    lolcats, hedgehog, hybrid = first
    shared = measured(lolcats, 19.0, window=19.5, linear=100.0, none=900.0)
    shared |= {"shared": 3, "slices": 2, "lambada": {"accuracy": 0.125}}
    shared["convert"]["calibration"] = {"ppl_before": 1023.4, "ppl_after": 18.25}
    kept = measured(hybrid, 18.0, window=19.5, linear=100.0, none=900.0) | {"softmax_layers": [3, 7]}
    failed = hedgehog.as_dict() | {"error": {"kind": "VerificationError", "message": "layer 2 died"}}
    text = render(state_of([*rows, shared, kept, failed]))
    cells = dict(zip(line(text, "row"), line(text, "lolcats (seed 0)"), strict=True))
    assert cells["seconds"] == "81 (3 at once, 2 slices)"
    assert cells["step 0"] == "1023 -> 18.25" and cells["LAMBADA %"] == "12.5" and cells["R %"] == "-"
    assert line(text, "hedgehog (seed 0)")[:3] == ["hedgehog (seed 0)", "failed", "-"]
    assert "- hedgehog (seed 0) failed: VerificationError: layer 2 died" in text
    assert "- lolcats-hybrid (seed 0) keeps softmax in layers 3, 7" in text
    assert "shared the device" in text and "stopped and resumed" in text and "R is not defined here" in text


def test_recall_is_a_share_of_the_teacher_beyond_the_cut_with_the_same_sinks() -> None:
    """The teacher answers 7 of 8, the cut with 4 sinks 3 of 8, the student 5 of 8: half of what lies between."""

    def asked(right: int) -> dict[str, Any]:
        page = [1.0] * right + [0.0] * (8 - right)
        return {"tasks": [{"task": "pairs", "distance": 160, "right": [page, page[::-1], page]}]}

    first = rows_of(variants={"sinks": {"recipe": "lolcats", "set": ["mixer.sinks=4"]}})
    rows = [
        measured(row, 10.0) | {"recall": asked(right)} for row, right in zip(references(first), (7, 3, 0), strict=True)
    ]
    rows.append(measured(first[0], 9.0, window=9.5, linear=100.0, none=900.0) | {"recall": asked(5)})
    text = render(state_of(rows))
    assert dict(zip(line(text, "row"), line(text, "sinks (seed 0)"), strict=True))["recall %"].startswith("50 ±")
    below = text[text.index("## Recall") :]
    assert line(below, "row") == ["row", "share %", "pairs %", "pairs 160"]
    assert line(below, "sinks (seed 0)")[2:] == ["50", "62.5"]
    assert line(below, "teacher")[2:] == ["100", "87.5"]
    assert line(below, "teacher cut to W=64, 4 sinks")[2:] == ["0", "37.5"]
    rows[0]["recall"] = {"refused": "too short"}
    assert "- recall is not asked for: too short" in render(state_of(rows))


def test_plots_are_drawn_from_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = rows_of("lolcats", "hedgehog")
    teacher, four, none = references(first)
    rows = [measured(teacher, 10.0), measured(four, 12.0), measured(none, 13.0)]
    rows.append(measured(first[0], 11.0, window=12.5, linear=5000.0, none=9000.0))
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(state_of(rows)))
    assert quality_plots.main([str(path), "--to", str(tmp_path / "a")]) == 0
    for name in ("recovery.svg", "positions.svg"):
        text = (tmp_path / "a" / name).read_text()
        assert text.lstrip().startswith("<?xml") and len(text) > 5000
    quality_plots.main([str(path), "--to", str(tmp_path / "b")])
    assert (tmp_path / "b" / "recovery.svg").read_bytes() == (tmp_path / "a" / "recovery.svg").read_bytes()
    path.write_text(json.dumps(state_of(rows[:3])))
    with pytest.raises(SystemExit, match="no row has a recovery"):
        quality_plots.main([str(path), "--to", str(tmp_path / "c")])


def test_bad_input_is_one_line(capsys: Any, tmp_path: Path) -> None:
    common = ["demo", "--data", "demo", "--heldout", "demo", "--out", str(tmp_path / "t")]
    for more, what in (
        (["--budget", "x"], "--budget"),
        (["--budget", "1k", "--seeds", "a"], "--seeds"),
        (["--budget", "1k", "context=128"], "--context 128 does not reach beyond the window"),
        (["--budget", "1k", "--recipes", "nope"], "nope"),
        (["--budget", "1k", "--lambada", str(tmp_path / "no")], "--lambada: there is no file"),
        (["--budget", "1k", "align.tokns=3"], "align.tokns"),
    ):
        assert quality.main([*common, *more]) == 2
        error = capsys.readouterr().err
        assert what in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "t").exists()
