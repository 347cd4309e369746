"""Repeats in a conversion: both stages train on them, and what is measured before training is the text itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linearize.convert import pipeline
from linearize.convert.inputs import Inputs, gather, identity_of
from linearize.convert.pipeline import convert
from linearize.recipe import load_recipe
from linearize.repeats import with_repeats

SMALL = ["context=64", "mixer.window=16", "mixer.feature_dim=8", "align.tokens=1k", "finetune.tokens=1k",
         "align.batch_tokens=256", "finetune.batch_tokens=256", "calibrate.tokens=128", "device=cpu"]  # fmt: skip


def gathered(teacher: Path, out: Path, text: Path, *overrides: str, marks: str = "") -> Inputs:
    recipe = load_recipe("pure", [*SMALL, *overrides])
    return gather(teacher, out, recipe, f"{text}{marks}", torch.device("cpu"))


def test_training_reads_repeats_and_nothing_else_does(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    plain, half = (gathered(teacher_folder, tmp_path / "out", text_file, f"repeats={x}") for x in (0, 0.5))
    assert plain.training is plain.windows
    assert np.array_equal(half.windows, plain.windows)
    ids = half.tokenizer.all_special_ids
    assert np.array_equal(half.training, with_repeats(plain.windows, 0.5, seed=half.recipe.seed, marks=ids))
    assert identity_of(half)["data"] != identity_of(plain)["data"]


def test_documents_that_are_kept_apart_repeat_themselves_alone(teacher_folder: Path, tmp_path: Path) -> None:
    """Every document has letters of its own."""
    path = tmp_path / "text.jsonl"
    letters = [f"{chr(97 + n % 26)}{chr(65 + n % 26)}" * (17 + n % 5) for n in range(200)]
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in letters))
    apart = gathered(
        teacher_folder, tmp_path / "out", path, "repeats=1", "calibrate.tokens=0", marks=":documents=apart"
    )
    task: Any = apart.task
    changed = 0
    for row, text, number in zip(apart.training, apart.windows, task.documents(apart.windows), strict=True):
        changed += int((row != text).sum())
        for n in np.unique(number):
            assert set(row[number == n].tolist()) <= set(text[number == n].tolist())
    assert changed > 0


def test_the_stages_are_given_what_training_reads(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, np.ndarray] = {}

    def spy(name: str) -> None:
        original = getattr(pipeline, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[name] = kwargs["windows"]
            return original(*args, **kwargs)

        monkeypatch.setattr(pipeline, name, watched)

    for name in ("calibrate", "align_layers", "finetune_model"):
        spy(name)
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
    convert(teacher_folder, tmp_path / "out", recipe="pure", data=str(text_file), overrides=[*SMALL, "repeats=1"])
    assert np.array_equal(seen["align_layers"], seen["finetune_model"])
    assert (seen["align_layers"] != seen["calibrate"]).any(axis=1).all()
