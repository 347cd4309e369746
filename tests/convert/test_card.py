"""What the model card says, and what it does not claim."""

from __future__ import annotations

from typing import Any

import yaml

from linearize.convert.card import model_card
from linearize.recipe import load_recipe


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "recipe": load_recipe("lolcats", ["mixer.window=16", "mixer.sinks=4"]),
        "out": "my out",
        "text": {"name": "text.jsonl", "sha256": "0123456789abcdef" * 4, "bytes": 12345},
        "terms": [],
        "layers": 2,
        "linear": [0, 1],
        "teacher": "owner/name",
        "family": "linearized_llama",
        "parameters": 1000,
        "state_bytes": 2000,
        "break_even": 300,
        "tokens": {"align": 10, "finetune": 20},
        "mean_match": 0.9997,
        "losses": {"align": (0.5, 0.25)},
        "dtype": "bfloat16",
        "merge_error": 0.01,
        **changes,
    }


def test_front_matter() -> None:
    for teacher in ("owner/name", "my: 'odd' \"folder\"", "123"):
        _, front, _ = model_card(facts(teacher=teacher)).split("---\n", 2)
        assert yaml.safe_load(front) == {
            "base_model": teacher,
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["linear-attention", "linearize"],
        }


def test_what_it_was_trained_on_and_with() -> None:
    card = model_card(facts())
    assert "`text.jsonl`, sha256 `0123456789ab...` of the 12,345 bytes" in card
    assert "the last 16 to 32 tokens (blocks of 16), and the first 4 of the sequence" in card
    assert "none, no sinks" in model_card(facts(recipe=load_recipe("gated-deltanet")))
    assert "none: no layer is linear" in model_card(facts(linear=[]))


def test_figures_are_not_rounded_up_to_perfection() -> None:
    card = model_card(facts())
    assert "99.97% of the teacher" in card and "100.0%" not in card
    assert "running mean of the training loss 0.5 at the start and 0.25 at the end, over different batches" in card


def test_examples_name_the_folder() -> None:
    card = model_card(facts())
    assert card.count('from_pretrained("my out"') == 4 and "linearize audit 'my out' --against" in card


def test_terms() -> None:
    assert "Unknown: no file of terms" in model_card(facts())
    assert "`LICENSE`, `NOTICE`, as they lay" in model_card(facts(terms=["LICENSE", "NOTICE"]))
