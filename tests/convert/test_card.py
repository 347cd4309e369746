"""What the model card says, and what it does not claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from linearize.artifacts.quality import entry, eval_results, with_quality
from linearize.convert.card import model_card
from linearize.recipe import load_recipe


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "recipe": load_recipe("lolcats", ["mixer.window=16", "mixer.sinks=4"]),
        "out": "my out",
        "text": {"kind": "file", "name": "text.jsonl", "sha256": "0123456789abcdef" * 4, "bytes": 12345},
        "terms": [],
        "layers": 2,
        "linear": [0, 1],
        "origin": {"name": "owner/name", "repo": "owner/name", "revision": None},
        "licence": None,
        "auto_class": "AutoModelForCausalLM",
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


def test_metadata() -> None:
    card = ModelCard(model_card(facts()))
    assert card.data.to_dict() == {
        "base_model": "owner/name",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linear-attention", "linearize"],
    }
    text = {"kind": "hub", "name": "them/words:config=en", "sha256": "0" * 64, "bytes": 1}
    licence = {"id": "other", "name": "toy-terms", "link": "LICENSE", "source": "README.md"}
    card = ModelCard(model_card(facts(text=text, licence=licence)))
    assert card.data.datasets == ["them/words"] and card.data.license == "other"
    assert (card.data.license_name, card.data.license_link) == ("toy-terms", "LICENSE")
    card = ModelCard(model_card(facts(auto_class="AutoModelForMaskedLM")))
    assert card.data.pipeline_tag == "fill-mask" and "CausalLM" not in card.text
    assert "linearize eval 'my out' --against owner/name --data FILE\n" in card.text and "audit" not in card.text


def test_a_teacher_that_is_not_from_the_hub_is_no_base_model() -> None:
    """The Hub takes ids of the Hub there, and nothing else."""
    for name in ("teacher", "my: 'odd' \"folder\"", "123"):
        card = ModelCard(model_card(facts(origin={"name": name, "repo": None, "revision": None})))
        assert card.data.base_model is None and f"# {name}, linearized" in card.text
        assert f"`{name}`, not from the Hub" in card.text


def test_the_teacher_is_pinned_where_its_commit_is_known() -> None:
    origin = {"name": "owner/name", "repo": "owner/name", "revision": "c" * 40}
    card = model_card(facts(origin=origin))
    assert f"[owner/name](https://huggingface.co/owner/name) at commit `{'c' * 40}`" in card
    assert f"linearize convert owner/name@{'c' * 40} OUT --recipe recipe.yaml --data text.jsonl" in card
    assert f"--against owner/name@{'c' * 40} --data FILE --save" in card


def test_the_recipe_in_it_is_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("hybrid", ["context=512"])
    (tmp_path / "recipe.yaml").write_text(model_card(facts(recipe=recipe)).split("```yaml\n")[1].split("```")[0])
    assert load_recipe(str(tmp_path / "recipe.yaml")).digest() == recipe.digest()


def test_what_it_was_trained_on_and_with() -> None:
    card = model_card(facts())
    assert "`text.jsonl`, sha256 `0123456789ab...` of the 12,345 bytes" in card
    assert "the last 16 to 32 tokens (blocks of 16), and the first 4 of the sequence" in card
    assert "none, no sinks" in model_card(facts(recipe=load_recipe("gated-deltanet")))
    assert "none: no layer is linear" in model_card(facts(linear=[]))


def test_figures_are_not_rounded_up_to_perfection() -> None:
    card = model_card(facts())
    assert "99.97% of the teacher" in card and "100.0%" not in card
    one = model_card(facts(losses={"align": (0.5, None)}))
    assert "- align: training loss 0.5 in its only step" in one and "at the end" not in one
    assert "running mean of the training loss 0.5 at the start and 0.25 at the end, over different batches" in card


def test_figures_that_no_step_gave_are_said_to_be_missing() -> None:
    """Steps that hide the window give none, by chance or always."""
    hidden = load_recipe("lolcats", ["align.window_dropout=0.5"])
    none = model_card(facts(recipe=hidden, losses={"align": (None, None)}, mean_match=None, unmatched=[0, 1]))
    assert "- align: no training loss was measured: the window was hidden in every step" in none
    assert "None" not in none and "explained" not in none
    some = model_card(facts(recipe=hidden, losses={"align": (0.5, None)}, unmatched=[1]))
    assert "- align: training loss 0.5 in its only step with the window" in some
    assert "are explained, mean of the layers but 1, whose window was hidden in every step" in some
    always = load_recipe("lolcats", ["finetune.window_dropout=1.0"])
    alone = model_card(facts(recipe=always, losses={"finetune": (0.5, None)}))
    assert "- finetune: training loss 0.5 in its only step\n" in alone, "which had no window"


def test_examples_name_the_folder() -> None:
    card = model_card(facts())
    assert card.count('from_pretrained("my out"') == 4 and "linearize audit 'my out' --against" in card


def test_terms() -> None:
    assert "Unknown: neither a card nor a file of terms" in model_card(facts())
    assert "`LICENSE`, `NOTICE`, as they lay" in model_card(facts(terms=["LICENSE", "NOTICE"]))
    licence = {"id": "mit", "name": None, "link": None, "source": "README.md"}
    assert "The teacher's: `mit`, as its `README.md` says." in model_card(facts(licence=licence))


def audit(**changes: Any) -> dict[str, Any]:
    report = {
        "R": 49.44,
        "protocol": "concat@1024",
        "context": 1024,
        "windows": 64,
        "tokens": 65472,
        "dtype": "float32",
        "device": "cpu",
        "ppl_teacher": 13.75,
        "ppl_window": 16.89,
        "ppl_student": 15.26,
        "bits_per_byte": 1.0,
        "branches": {"full": 15.26, "window": 16.9, "linear": 21.02, "none": 900.0},
        "reference": {"window": 64, "sinks": 4, "own": True},
        "notes": ["a note"],
        "data": {"kind": "file", "name": "/home/me/held out.jsonl", "sha256": "ab" * 32, "documents": 3, "bytes": 1000},
    }
    return entry({**report, **changes}, teacher={"name": "owner/name", "repo": "owner/name", "revision": "c" * 40})


def test_figures_of_quality_are_said_twice_and_can_be_checked() -> None:
    before = model_card(facts())
    made = with_quality(before, audit(), name="my out")
    card = ModelCard(made)
    assert "Not measured yet" in before and "Not measured yet" not in made and "/home/me" not in made
    assert "**Recovery R = 49.44 %**" in card.text and "| its linear branch alone | 21.0200 |" in card.text
    assert "window of 64 tokens, the block before and 4 sinks" in card.text and "64 windows, 65,472 scored" in card.text
    command = f"audit 'my out' --against owner/name@{'c' * 40} --data 'held out.jsonl' --context 1024 --dtype float32"
    assert f"linearize {command}\n" in card.text
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("perplexity", 15.26),
        ("bits_per_byte", 1.0),
        ("recovery", 49.44),
    ]
    assert {r.metric_args["protocol"] for r in card.data.eval_results} == {"concat@1024"}
    again = with_quality(made, audit(R=None, bits_per_byte=None, branches={"window": None}), name="my out")
    assert [r.metric_type for r in ModelCard(again).data.eval_results] == ["perplexity"]
    assert "a note" in again and "49.44" not in again and again.count("## Quality") == 1


def test_text_of_the_hub_is_named_as_such() -> None:
    data = {"kind": "hub", "name": "them/words:config=en:revision=v1", "sha256": "ab" * 32, "documents": 3, "bytes": 9}
    result = eval_results(audit(data=data))[0]
    assert (result.dataset_type, result.dataset_config, result.dataset_revision) == ("them/words", "en", "v1")
    local = {**data, "kind": "file", "name": "/home/me/a.jsonl:source=b"}
    assert audit(data=local)["data"]["name"] == "a.jsonl:source=b"
