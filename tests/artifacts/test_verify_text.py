"""The windows that a conversion trained on are made again by `verify`, however its task cut and changed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.artifacts import verify
from linearize.convert.inputs import gather, identity_of
from linearize.convert.report import _text
from linearize.recipe import load_recipe
from tests import encoders
from tests.conftest import save_byte_tokenizer

STAGES = ["align.tokens=400", "align.batch_tokens=200", "finetune.tokens=0", "calibrate.tokens=0", "device=cpu"]
DECODER = ["context=128", "mixer.window=16", "mixer.feature_dim=8", *STAGES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    """A folder with a decoder, an encoder, and text."""
    base = tmp_path_factory.mktemp("texts")
    save_byte_tokenizer(build_llama(base / "llama", max_position_embeddings=128, vocab_size=260))
    encoders.build(base / "bert", "bert")
    encoders.text_file(base / "text.jsonl")
    return base


def checked(place: Path, model: str, recipe: str, overrides: list[str], data: str, **changes: Any) -> dict[str, str]:
    """The row of `verify`'s text, for a conversion's manifest with `changes` of its recipe."""
    chosen = load_recipe(recipe, overrides)
    inputs = gather(place / model, place / "out", chosen, data, torch.device("cpu"))
    manifest = {
        "data": _text(inputs) | {"windows_digest": identity_of(inputs)["data"]},
        "recipe": chosen.as_dict() | changes,
    }
    found = verify._Findings()
    verify._data(place / model, data, manifest, found)
    (row,) = found.rows
    return row


@pytest.mark.parametrize(
    ("model", "recipe", "overrides", "suffix"),
    [
        ("llama", "lolcats", DECODER, ""),
        ("llama", "pure", DECODER, ""),  # passages come again in all windows
        ("llama", "pure", [*DECODER, "repeats=0.5", "seed=3"], ""),
        ("llama", "pure", DECODER, ":documents=apart"),
        ("bert", "hedgehog-encoder", ["context=48", *STAGES], ""),
    ],
)
def test_the_same_text_gives_the_same_windows(
    place: Path, model: str, recipe: str, overrides: list[str], suffix: str
) -> None:
    data = f"{place / 'text.jsonl'}{suffix}"
    row = checked(place, model, recipe, overrides, data)
    assert row["result"] == "ok", row


def test_another_cut_is_noticed(place: Path) -> None:
    data = str(place / "text.jsonl")
    for changes in ({"seed": 9}, {"repeats": 0.0}, {"context": 64}):
        row = checked(place, "llama", "pure", DECODER, data, **changes)
        assert row["result"] == "differs" and "gives other windows" in row["detail"], changes
    for changes in ({"context": "x"}, {"repeats": None}, {"seed": 0.5}, {"context": 0}):
        assert "does not say how" in checked(place, "llama", "lolcats", DECODER, data, **changes)["detail"], changes
    assert checked(place, "llama", "lolcats", DECODER, data, context=10**9)["result"] == "differs"
