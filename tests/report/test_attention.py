"""The maps are the models' own weights, and the two properties are what their names say."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from linearize.artifacts.load import load_model, load_tokenizer
from linearize.report.attention import (
    LEVELS,
    Chosen,
    collect,
    entropy,
    monotonicity,
    pack_map,
    packed,
    spread,
    texts_of,
    tokens_for,
    unpack_map,
)


@pytest.fixture(scope="module")
def models(places: Any) -> tuple[Any, Any]:
    return tuple(load_model(places[name], device="cpu", dtype="float32") for name in ("run", "teacher"))  # type: ignore


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (1, 70), generator=torch.Generator().manual_seed(1))


def test_maps_are_the_models_own_weights(models: tuple[Any, Any], ids: torch.Tensor) -> None:
    student, teacher = models
    logits = student(input_ids=ids, use_cache=False).logits
    maps = collect(student, teacher, ids, Chosen(layers=[0, 1, 2], heads=[0, 3]))
    assert torch.equal(logits, student(input_ids=ids, use_cache=False).logits)  # nothing was left switched
    assert [layer.kind for layer in maps.values()] == ["linear", "softmax", "linear"]

    teacher.set_attn_implementation("eager")
    eager = teacher(input_ids=ids, use_cache=False, output_attentions=True).attentions
    teacher.set_attn_implementation("sdpa")
    for index, layer in maps.items():
        assert layer.teacher is not None and layer.student is not None
        np.testing.assert_allclose(layer.teacher, eager[index][0, [0, 3]].detach(), atol=1e-5)
        for weights in (layer.teacher, layer.student, layer.linear):
            if weights is not None:
                np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-4)
                assert (np.triu(weights, 1) == 0).all() and (weights >= 0).all()
    assert maps[1].linear is None and maps[1].scores is None
    first = maps[0]
    assert first.student is not None and first.linear is not None
    # Both read the embeddings. Within the window the student's first layer attends as the teacher does, but for LoRA.
    assert np.abs(first.student[:, :32] - first.teacher[:, :32]).max() < 0.1
    assert np.abs(first.student[:, :32] - first.linear[:, :32]).max() > 0.1


def test_the_students_map_gives_the_students_output(models: tuple[Any, Any], ids: torch.Tensor) -> None:
    from linearize.modeling.modeling_linearized import attention_layers

    student, teacher = models
    mixer = dict(attention_layers(student))[0].mixer
    taken: dict[str, torch.Tensor] = {}

    def hook(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        taken["values"], taken["output"] = args[2], output

    handle = mixer.register_forward_hook(hook, with_kwargs=True)
    maps = collect(student, teacher, ids, Chosen(layers=[0], heads=[0, 1, 2, 3]))
    handle.remove()
    values = taken["values"].repeat_interleave(2, dim=1)[0]
    assert maps[0].student is not None
    made = torch.from_numpy(maps[0].student) @ values
    torch.testing.assert_close(made.transpose(0, 1), taken["output"][0].detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "missing"), [("sliding-window", {"linear"}), ("gated-deltanet", {"student", "linear"}), ("pure", set())]
)
def test_mixers_without_weights_of_pairs_say_so(
    models: tuple[Any, Any], ids: torch.Tensor, recipe: str, missing: set[str]
) -> None:
    from linearize.convert.surgery import linearize_model
    from linearize.recipe import load_recipe

    spec = load_recipe(recipe).mixer
    student, _ = linearize_model(models[1], spec=spec, layer_mixers=["linear", "softmax", "softmax"], seed=0)
    maps = collect(student, models[1], ids, Chosen(layers=[0], heads=[0]))
    found = {"student": maps[0].student, "linear": maps[0].linear}
    assert {name for name, weights in found.items() if weights is None} == missing
    rows, _ = packed(maps, [0])
    assert all((rows[0][name] is None) == (name in missing) for name in found)


def test_entropy() -> None:
    even = np.tril(np.ones((2, 6, 6), dtype=np.float32))
    even[1] /= even[1].sum(-1, keepdims=True)  # rows need not sum to one
    expected = np.log(np.arange(2, 7)).mean()
    np.testing.assert_allclose(entropy(even), expected, rtol=1e-6)
    np.testing.assert_allclose(entropy(-even), expected, rtol=1e-6)  # signed weights count by their size
    np.testing.assert_allclose(entropy(np.eye(6, dtype=np.float32)[None]), 0, atol=1e-6)


def test_monotonicity() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 20, 20))
    exponential = np.exp(scores)
    weights = np.stack([exponential[0], -exponential[1], np.ones((20, 20))])
    np.testing.assert_allclose(monotonicity(weights, scores), [1, -1, 0], atol=1e-12)
    shuffled = np.random.default_rng(1).normal(size=(1, 200, 200))
    assert abs(monotonicity(shuffled, np.random.default_rng(2).normal(size=(1, 200, 200)))[0]) < 0.1


def test_ties_share_their_rank() -> None:
    """Spearman with mean ranks: 1, 1.5, 1.5, 3 against 0..3 has a correlation of 0.9487."""
    weights, scores = np.zeros((1, 8, 8)), np.zeros((1, 8, 8))
    weights[0, 7, :] = [0, 1, 1, 2, 3, 4, 5, 6]
    scores[0, 7, :] = range(8)
    a = np.array([0, 1.5, 1.5, 3, 4, 5, 6, 7]) - 3.5
    b = np.arange(8) - 3.5
    assert monotonicity(weights, scores)[0] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_a_map_comes_back_from_eight_bits() -> None:
    weights = np.random.default_rng(3).dirichlet(np.full(40, 0.1), size=40) * np.tril(np.ones((40, 40)))
    weights[5, 2] *= -1
    weights[6, 3] = 1.7  # cut to 1
    data = pack_map(weights)
    assert len(data) == 40 * 41 // 2
    back = unpack_map(data, 40)
    assert back[6, 3] == 1 and back[5, 2] <= 0 and (np.triu(back, 1) == 0).all()
    root = np.sqrt(np.abs(weights.clip(-1, 1)))
    assert np.abs(np.sqrt(np.abs(back)) - root).max() <= 0.5 / LEVELS + 1e-9


def test_packed_maps_lie_where_their_rows_say(models: tuple[Any, Any], ids: torch.Tensor) -> None:
    maps = collect(*models, ids, Chosen(layers=[0, 1], heads=[1, 2]))
    rows, blob = packed(maps, [1, 2])
    data = zlib.decompress(base64.b64decode(blob))
    size = 70 * 71 // 2
    places = [row[name]["at"] for row in rows for name in ("teacher", "student", "linear") if row[name]]
    assert sorted(places) == list(range(len(data) // size)) and len(places) == 10
    row = rows[1]
    assert (row["layer"], row["head"], row["kind"]) == (0, 2, "linear")
    assert maps[0].linear is not None
    back = unpack_map(data[row["linear"]["at"] * size :][:size], 70)
    assert np.abs(back - maps[0].linear[1]).max() < 0.01
    assert row["teacher"]["monotonicity"] == 1.0 and row["student"]["monotonicity"] < 1.0
    assert rows[2]["student"]["monotonicity"] == 1.0 and rows[2]["linear"] is None


def test_token_texts_keep_their_spaces(places: Any) -> None:
    tokenizer = load_tokenizer(places["run"])
    text = "A  bé\n<x>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = texts_of(tokenizer, ids)
    assert len(texts) == len(ids) and texts[:3] == ["A", " ", " "] and texts[-4:] == ["\n", "<", "x", ">"]


@pytest.mark.parametrize(
    ("window", "context", "tokens"), [(0, 4096, 128), (64, 4096, 192), (128, 4096, 256), (64, 100, 100)]
)
def test_maps_reach_beyond_the_window(window: int, context: int, tokens: int) -> None:
    assert tokens_for(window, context) == tokens


def test_chosen_layers_are_spread_and_hold_the_wanted_one() -> None:
    assert spread(8, 12, None) == list(range(8))
    chosen = spread(80, 12, 40)
    assert len(chosen) == 12 and {0, 40, 79} <= set(chosen) and chosen == sorted(chosen)
    assert len(spread(80, 12, 79)) == 12
