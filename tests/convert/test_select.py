"""Which layers to keep: what a swap is, what it costs, and what is chosen from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf

from linearize.convert import select as select_module
from linearize.convert import swap as swap_module
from linearize.convert.align import align_layers
from linearize.convert.placement import REFERENCE, costliest, cut_of, ranking, require_keep, set_apart
from linearize.convert.select import choose_layers, select
from linearize.convert.swap import measure, swapped, window_attentions
from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.evaluate.truncation import truncated
from linearize.modeling.mixer_spec import MixerSpec
from linearize.progress import NullProgress
from linearize.recipe import Recipe, load_recipe
from linearize.recipe_schema import even_layers

QUICK = ["context=128", "mixer.window=16", "mixer.feature_dim=8", "device=cpu", "align.batch_tokens=512"]


def ids(batch: int = 3, length: int = 50) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def recipe_with(**mixer: Any) -> Recipe:
    return Recipe(name="r", mixer=MixerSpec(**mixer))


# ---------------------------------------------------------------------------------------------------------------- swaps


@pytest.mark.parametrize("sinks", [0, 3])
def test_all_layers_cut_are_the_truncated_teacher(make_teacher: Callable[..., Any], variant: str, sinks: int) -> None:
    # A student sees its sinks for good; a teacher with a sliding window (of 32) that is cut loses them beyond it.
    teacher, tokens = make_teacher(variant), ids(length=32 if sinks and "sliding" in variant else 50)
    whole = logits(teacher, tokens)
    cut = window_attentions(teacher, window=8, sinks=sinks)
    assert list(cut) == [0, 1, 2]
    with truncated(teacher, 8, sinks):
        expected = logits(teacher, tokens)
    with swapped(teacher, cut):
        found = logits(teacher, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (whole - expected).abs().max() > 0.05, "the cut must matter for this to say anything"
    assert torch.equal(logits(teacher, tokens), whole)


def test_one_layer_is_swapped_and_no_other(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    cut = window_attentions(teacher, window=4, sinks=0)
    own = [layer.self_attn for layer in teacher.model.layers]
    for index in cut:
        with swapped(teacher, {index: cut[index]}):
            now = [layer.self_attn for layer in teacher.model.layers]
        assert [a is b for a, b in zip(now, own)] == [i != index for i in range(3)]
        # All of its projections are the teacher's own storage.
        theirs = dict(own[index].named_parameters())
        ours = {n: p for n, p in cut[index].named_parameters() if not n.startswith("mixer.")}
        assert ours.keys() == theirs.keys() and all(p.data_ptr() == theirs[n].data_ptr() for n, p in ours.items())
    with pytest.raises(KeyError), swapped(teacher, cut):
        raise KeyError
    assert all(layer.self_attn is before for layer, before in zip(teacher.model.layers, own))


def test_losses_equal_sums_by_hand(make_teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_module, "PIECE", 17)
    monkeypatch.setitem(swap_module.TOKENS, "cpu", 100)  # two windows at once, then one
    teacher, tokens = make_teacher("qwen3 norms, head_dim 16, yarn"), ids()
    cut = window_attentions(teacher, window=4, sinks=1)
    swaps = [{0: cut[0]}, {1: cut[1], 2: cut[2]}]
    whole, found = measure(teacher, tokens.numpy().astype(np.int32), swaps, stage="s")
    reference = logits(teacher, tokens)[:, :-1].double().log_softmax(-1)
    targets = tokens[:, 1:]
    assert whole.kl == 0.0
    assert whole.nll == pytest.approx(float(nnf.nll_loss(reference.flatten(0, 1), targets.flatten())), rel=1e-5)
    for swap, loss in zip(swaps, found):
        with swapped(teacher, swap):
            other = logits(teacher, tokens)[:, :-1].double().log_softmax(-1)
        kl = (reference.exp() * (reference - other)).sum(-1).mean()
        assert loss.kl == pytest.approx(float(kl), rel=1e-4) and loss.kl > 1e-3
        nll = float(nnf.nll_loss(other.flatten(0, 1), targets.flatten()))
        assert loss.ppl_rise(whole) == pytest.approx(np.exp(nll) - np.exp(whole.nll), rel=1e-3)


def test_a_loss_that_is_not_finite_names_the_layer(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    cut = window_attentions(teacher, window=4, sinks=0)
    cut[1].forward = lambda *args, **kwargs: (torch.full((3, 50, 32), float("nan")), None)  # type: ignore[method-assign]
    with pytest.raises(VerificationError, match="layer 1 swapped: the loss is not finite"):
        measure(teacher, ids().numpy(), [{0: cut[0]}, {1: cut[1]}], stage="s")


# --------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("far", [0, 1, 2])
def test_the_layer_that_reads_far_is_chosen(make_teacher: Callable[..., Any], far: int) -> None:
    teacher = make_teacher("llama")
    with torch.no_grad():
        for index, layer in enumerate(teacher.model.layers):
            if index != far:
                layer.self_attn.o_proj.weight.zero_()
    windows, recipe = ids().numpy(), recipe_with(window=8)
    assert choose_layers(teacher, windows, recipe, keep=1) == (far,)
    assert choose_layers(teacher, windows, recipe, keep=2) == ((0, 1) if far < 2 else (0, 2)), "ties: the earlier one"


def test_a_choice_is_repeatable_and_reads_no_more_than_it_may(
    make_teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, windows = make_teacher("mistral full"), ids(20).numpy()
    read: list[np.ndarray] = []

    def spy(model: Any, taken: np.ndarray, swaps: Sequence[Any], **kwargs: Any) -> Any:
        read.append(taken)
        return measure(model, taken, swaps, **kwargs)

    monkeypatch.setattr(select_module, "measure", spy)
    state = torch.get_rng_state()
    first = choose_layers(teacher, windows, recipe_with(window=8, sinks=2), keep=2, max_windows=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(123)
    assert choose_layers(teacher, windows, recipe_with(window=8, sinks=2), keep=2, max_windows=5) == first
    assert [len(r) for r in read] == [5, 5] and np.array_equal(read[0], windows[::4])


def test_placement_from_scores() -> None:
    scores = {0: 0.1, 1: 0.5, 2: 0.1, 3: 0.9}
    assert ranking(scores) == [3, 1, 0, 2]
    assert [costliest(scores, n) for n in (1, 2, 3)] == [(3,), (1, 3), (0, 1, 3)]


def test_even_layers_are_those_of_every_k() -> None:
    for layers, step in [(8, 4), (8, 2), (8, 8), (32, 4), (12, 3), (5, 1)]:
        every = Recipe(name="r", mixer=MixerSpec(), keep_softmax=f"every {step}").softmax_layers(layers)
        assert even_layers(layers, layers // step) == every
    for layers in range(1, 14):
        for keep in range(1, layers + 1):
            chosen = even_layers(layers, keep)
            assert len(set(chosen)) == keep and chosen == tuple(sorted(chosen)) and chosen[-1] == layers - 1


@pytest.mark.parametrize("keep", [-1, 0, 3, 4])
def test_some_layers_stay_and_some_go(keep: int, make_teacher: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=f"keep {keep}: a model of 3 layers can keep 1 to 2"):
        require_keep(keep, 3)
    with pytest.raises(UsageError, match="can keep 1 to 2"):
        choose_layers(make_teacher("llama"), ids().numpy(), recipe_with(window=8), keep=keep)


def test_the_cut_is_the_recipes_own() -> None:
    assert cut_of(MixerSpec(window=16, sinks=2), 33) == (16, 2)
    alone = MixerSpec(window=0, coverage="all", normaliser="own")
    assert cut_of(alone, 1024) == REFERENCE
    for spec, context in ((MixerSpec(window=16), 32), (alone, 2 * REFERENCE[0])):
        with pytest.raises(UsageError, match=f"context {context} lies within"):
            cut_of(spec, context)


def test_windows_set_apart() -> None:
    windows = np.arange(10)[:, None].repeat(4, axis=1)
    for count in (1, 3, 9, 10, 99):
        chosen, rest = set_apart(windows, count)
        assert len(chosen) == min(count, 10)
        assert sorted([*chosen[:, 0], *rest[:, 0]]) == list(range(10))
    assert set_apart(windows, 3)[0][:, 0].tolist() == [0, 3, 6]


# -------------------------------------------------------------------------------------------------------------- command


class Watch(NullProgress):
    """Keeps the stages."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        self.stages[stage] = total_steps

    def step(self, stage: str, step: int, loss: float, tokens: int, extra: Any) -> None:
        self.done[stage] = step


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    """A tiny Llama of four layers."""
    folder = tmp_path_factory.mktemp("deep") / "deep"
    return build_llama(folder, initializer_range=0.2, max_position_embeddings=256, num_hidden_layers=4)


def test_a_selection(deep_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[np.ndarray] = []
    swaps: list[Sequence[Any]] = []
    trained: list[np.ndarray] = []
    students: list[Any] = []

    def spy_measure(model: Any, taken: np.ndarray, tried: Sequence[Any], **kwargs: Any) -> Any:
        measured.append(taken)
        swaps.append(tried)
        return measure(model, taken, tried, **kwargs)

    def spy_align(student: Any, *args: Any, **kwargs: Any) -> Any:
        students.append(student)
        trained.append(kwargs["windows"])
        return align_layers(student, *args, **kwargs)

    monkeypatch.setattr(select_module, "measure", spy_measure)
    monkeypatch.setattr(select_module, "align_layers", spy_align)
    recipe, watch, random = load_recipe("lolcats", [*QUICK, "keep_softmax=[0]"]), Watch(), torch.get_rng_state()
    common: dict[str, Any] = {"data": str(text_file), "keep": 2, "recipe": recipe, "align_tokens": 2048}
    result = select(deep_folder, max_windows=6, progress=watch, **common)
    assert torch.equal(random, torch.get_rng_state()) and not torch.are_deterministic_algorithms_enabled()

    assert [row["layer"] for row in result["layers"]] == [0, 1, 2, 3], "keep_softmax of the recipe is not looked at"
    assert sorted(row["rank"] for row in result["layers"]) == [1, 2, 3, 4]
    best = sorted(result["layers"], key=lambda row: row["aligned_kl"])[-2:]
    assert result["chosen"] == sorted(row["layer"] for row in best)
    assert {row["rank"] for row in best} == {1, 2}
    assert load_recipe("lolcats", [result["override"]]).softmax_layers(4) == tuple(result["chosen"])
    assert result["uniform"] == [1, 3] and result["method"] == "aligned"
    assert {row["placement"]: row["kept"] for row in result["placements"]} == {
        "none": [],
        "aligned": result["chosen"],
        "window": list(costliest({row["layer"]: row["window_kl"] for row in result["layers"]}, 2)),
        "uniform": [1, 3],
    }
    bare, kept = result["placements"][0], result["placements"][1]
    assert kept["window_kl"] < bare["window_kl"] and kept["aligned_kl"] < bare["aligned_kl"]
    assert watch.stages["align"] == 16 and watch.done == watch.stages, "steps of one window: there are too few tokens"

    rows = {row.tobytes() for taken in measured for row in taken}
    assert len(rows) == len({row.tobytes() for row in measured[0]}) == 6
    assert [list(swap) for swap in swaps[1]] == [[0], [1], [2], [3]]
    assert all(swap[i] is students[0].model.layers[i].self_attn for i, swap in enumerate(swaps[1])), "as aligned"
    assert len(trained) == 1 and len(trained[0]) > 60 and not rows & {row.tobytes() for row in trained[0]}
    again = select(deep_folder, max_windows=6, **common)
    assert again["layers"] == result["layers"] and again["placements"] == result["placements"]


def test_nothing_is_trained_where_there_is_nothing_to_train_or_it_was_not_asked_for(
    deep_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_module, "align_layers", lambda *args, **kwargs: pytest.fail("it was"))
    common: dict[str, Any] = {"data": str(text_file), "keep": 1, "max_windows": 3}
    window = select(deep_folder, recipe=load_recipe("lolcats", QUICK), method="window", **common)
    assert window["method"] == "window" and window["match"] is None and window["align_tokens"] == 0
    assert "aligned_kl" not in window["layers"][0] and "aligned_kl" not in window["placements"][0]
    liger = load_recipe("liger-gla", ["context=128", "mixer.window=16", "device=cpu"])
    assert select(deep_folder, recipe=liger, **common)["layers"] == window["layers"], "the cut is the same"
    with pytest.raises(UsageError, match="liger-gla has nothing that alignment could train"):
        select(deep_folder, recipe=liger, method="aligned", **common)


def test_a_recipe_without_a_window_is_judged_by_the_reference(deep_folder: Path, text_file: Path) -> None:
    recipe = load_recipe("hedgehog", ["context=160", "device=cpu"])
    result = select(deep_folder, data=str(text_file), keep=1, recipe=recipe, method="window", max_windows=3)
    assert (result["window"], result["sinks"]) == REFERENCE
    assert "hedgehog has no window" in result["notes"][0]


def test_a_worse_choice_is_said(deep_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "even_layers", lambda layers, keep: tuple(range(layers - 1)))
    recipe = load_recipe("lolcats", QUICK)
    result = select(deep_folder, data=str(text_file), keep=1, recipe=recipe, method="window", max_windows=3)
    assert any("evenly spaced layers do better here: consider keep_softmax=[0,1,2]" in n for n in result["notes"])


def test_refusals(deep_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "load_model", lambda *args, **kwargs: pytest.fail("before any long work"))
    recipe = load_recipe("lolcats", QUICK)
    short = tmp_path / "short.txt"
    short.write_text("word " * 30)
    common: dict[str, Any] = {"data": str(text_file), "keep": 1, "recipe": recipe}
    for changes, words in (
        ({"keep": 4}, "keep 4: a model of 4 layers can keep 1 to 3"),
        ({"method": "windows"}, "Did you mean 'window'"),
        ({"align_tokens": 0}, "align_tokens 0 is not positive"),
        ({"max_windows": 0}, "max_windows 0 is not positive"),
        ({"recipe": load_recipe("lolcats", [*QUICK, "context=512"])}, "context 512 is beyond the 256 tokens"),
    ):
        with pytest.raises(UsageError, match=words):
            select(deep_folder, **{**common, **changes})
    with pytest.raises(RefusedError, match="text is too short: 1 window of 128 tokens"):
        select(deep_folder, **{**common, "data": str(short)})
