"""Recall: what its pages hold, that only memory answers them, and what scores come to."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import linearize
from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.evaluate import recall_tasks
from linearize.evaluate.recall import choose_distances, compare, recall, recall_scores, reference_window
from linearize.evaluate.recall_tasks import FORMS, RecallTask, longest_page, make_tasks, page_length, word_pool
from linearize.modeling.configuration_linearized import linearized_config
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import MODELS, set_branches

WINDOW = 16
DISTANCES = (40, 96)
PAIRS, PASSKEY, QUOTE = FORMS
WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=5)) for i in range(150)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Whole words and nothing else: no space, no line's end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<s>", "<unk>", "the", "of", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices([*WORDS, "the", "of", "of"], k=400)) for _ in range(4)]


@pytest.fixture(scope="module")
def tasks(tokenizer: Any, texts: list[str]) -> list[RecallTask]:
    return make_tasks(tokenizer, texts, distances=DISTANCES, queries=32, seed=1)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Text for the tokenizer of bytes."""
    draw = random.Random(0)
    text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP ", k=3000))
    path = tmp_path / "letters.txt"
    path.write_text(text, encoding="utf-8")
    return path


class Stub:
    """Logits by a rule: rule(tokens before, vocabulary) -> [V]."""

    device, training = torch.device("cpu"), False

    def __init__(self, rule: Callable[[np.ndarray, int], np.ndarray], size: int = 160) -> None:
        self.rule, self.size = rule, size
        config = SimpleNamespace(model_type="stub", vocab_size=size)
        self.config = SimpleNamespace(model_type="stub", get_text_config=lambda: config)

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        rows = input_ids.numpy()
        logits = np.stack([[self.rule(row[: i + 1], self.size) for i in range(len(row))] for row in rows])
        return SimpleNamespace(logits=torch.from_numpy(logits))

    def get_output_embeddings(self) -> None:
        return None

    def eval(self) -> Stub:
        return self

    def train(self, mode: bool) -> Stub:
        return self


def copier(reach: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Continues the longest repetition within the last `reach` tokens: what induction does."""

    def rule(seen: np.ndarray, size: int) -> np.ndarray:
        logits, near = np.zeros(size), seen[-reach:]
        best = 1
        for place in range(1, len(near)):
            length = 0
            while length < place and near[place - 1 - length] == near[len(near) - 1 - length] and length < 10:
                length += 1
            if length > best:
                logits[:], best = 0, length
                logits[near[place]] = 1
        return logits

    return rule


def by_form(tasks: list[RecallTask], scores: list[np.ndarray]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for task, score in zip(tasks, scores, strict=True):
        found.setdefault(task.form.name, []).append(float(score.mean()))
    return found


def test_every_value_was_said_at_its_distance_after_the_same_cue(tasks: list[RecallTask]) -> None:
    assert [(t.form.name, t.distance) for t in tasks] == [(f.name, d) for f in FORMS for d in DISTANCES]
    for task in tasks:
        form, size = task.form, task.form.cue + task.form.values
        assert task.tokens.shape == (4, page_length(form, task.distance, edge=0))
        assert task.places.shape == (4, form.records * form.values) and task.places.max() == task.tokens.shape[1] - 1
        assert (task.tokens[:, 0] == 0).all(), "BOS"
        start = 1 + recall_tasks.HEAD  # of the records; after them comes more text
        for page, places in zip(task.tokens, task.places, strict=True):
            planted = [tuple(page[start + i * size :][:size]) for i in range(form.records)]
            asked = places.reshape(form.records, form.values)
            where = []
            for first in asked[:, 0]:
                again = tuple(page[first - form.cue : first + form.values])
                where.append(first - (start + planted.index(again) * size + form.cue))
            assert min(where) >= task.distance and len(set(planted)) == form.records
            if form.records == 1:
                assert where == [task.distance]
    pairs = tasks[0]
    assert any(list(p[q]) != list(p[18 + 3 * np.arange(8) + 1]) for p, q in zip(pairs.tokens, pairs.places)), "shuffled"


def test_the_right_one_is_among_candidates_that_are_fair(tasks: list[RecallTask]) -> None:
    for task in tasks:
        if task.candidates is None:
            assert task.form is QUOTE and task.chance is None
            continue
        values = np.take_along_axis(task.tokens, task.places, axis=1)
        assert task.candidates.shape == (*values.shape, task.form.choices) and task.chance == 1 / task.form.choices
        assert ((task.candidates == values[..., None]).sum(axis=-1) == 1).all()
        for page, wanted in zip(task.tokens, task.candidates, strict=True):
            assert all(len(set(row)) == task.form.choices for row in wanted)
            if task.form is PAIRS:
                assert (wanted == wanted[0]).all(), "a page's queries share them, as centring needs"
            else:
                lines = set(page[17 : 17 + PASSKEY.cue + PASSKEY.values])
                assert all(len(lines & set(row)) == 1 for row in wanted), "no other word of the line"


def test_only_what_reaches_that_far_answers(tasks: list[RecallTask]) -> None:
    far = by_form(tasks, recall_scores(Stub(copier(10_000)), tasks))
    assert far == {"pairs": [1.0, 1.0], "passkey": [1.0, 1.0], "quote": [1.0, 1.0]}
    near = by_form(tasks, recall_scores(Stub(copier(DISTANCES[0])), tasks))
    assert max(near["passkey"]) < 0.1 and max(near["quote"]) < 0.1 and max(near["pairs"]) < 0.2
    middle = by_form(tasks, recall_scores(Stub(copier(DISTANCES[1])), tasks))
    assert middle["passkey"][0] == middle["quote"][0] == 1.0 and middle["passkey"][1] < 0.1


def test_pairs_ask_for_the_bond_and_not_for_the_word(tokenizer: Any) -> None:
    tasks = make_tasks(tokenizer, [" ".join(WORDS), "the of " * 2000], distances=DISTANCES, queries=32)

    def bag(seen: np.ndarray, size: int) -> np.ndarray:
        return np.minimum(np.bincount(seen, minlength=size), 1).astype(float)

    found = by_form(tasks, recall_scores(Stub(bag), tasks))
    assert min(found["passkey"]) > 0.9, "a passkey asks whether it was kept at all"
    assert found["pairs"] == [0.125, 0.125]


def test_a_frequent_word_is_not_the_answer_to_all(tasks: list[RecallTask]) -> None:
    prior = np.random.default_rng(0).normal(scale=50, size=160)
    copy = copier(10_000)
    found = by_form(tasks, recall_scores(Stub(lambda seen, size: copy(seen, size) + prior), tasks))
    assert found["pairs"] == [1.0, 1.0]


def test_knowing_nothing_scores_chance(tasks: list[RecallTask]) -> None:
    found = by_form(tasks, recall_scores(Stub(lambda seen, size: np.zeros(size)), tasks))
    assert found["pairs"] == [1 / 8] * 2 and found["passkey"] == [1 / 16] * 2
    assert found["quote"] == pytest.approx([1 / 160] * 2)


def test_a_model_that_overflows_is_an_error(tasks: list[RecallTask]) -> None:
    with pytest.raises(VerificationError, match=r"broken: a logit is not finite"):
        recall_scores(Stub(lambda seen, size: np.full(size, np.inf)), tasks, name="broken")


def test_pages_follow_the_seed_alone(tokenizer: Any, texts: list[str], tasks: list[RecallTask]) -> None:
    again = make_tasks(tokenizer, texts, distances=DISTANCES, queries=32, seed=1)
    more = make_tasks(tokenizer, texts, distances=DISTANCES, queries=40, seed=1)
    other = make_tasks(tokenizer, texts, distances=DISTANCES, queries=32, seed=2)
    for a, b, c, d in zip(tasks, again, more, other, strict=True):
        assert (a.tokens == b.tokens).all() and (a.places == b.places).all()
        assert (a.candidates is None) == (b.candidates is None)
        assert a.candidates is None or (a.candidates == b.candidates).all()
        assert len(c.tokens) == 5 and (c.tokens[:4] == a.tokens).all(), "more pages, and the same ones first"
        assert (d.tokens != a.tokens).any()
        assert len({page.tobytes() for page in a.tokens}) == 4


def test_a_quotation_is_not_in_the_text_around_it() -> None:
    stream = np.arange(100)
    starts = set()
    for i in range(300):
        text, passage = recall_tasks._cut(stream, 40, 10, key=str(i))
        assert len(text) == 40 and len(passage) == 10 and not set(text) & set(passage)
        assert (np.diff(text) == 1).all() and (np.diff(passage) == 1).all()
        starts.add(int(passage[0]))
    assert {0, 90} <= starts, "both before and after"


def test_words_are_whole_frequent_tokens(tokenizer: Any, texts: list[str], pair: Any, letters: Path) -> None:
    pool = word_pool(tokenizer, texts, np.zeros(0, dtype=np.int64))
    names = tokenizer.convert_ids_to_tokens(pool.tolist())
    assert sorted(names) == sorted(WORDS), "all of four letters or more, and no special token"
    counts = [sum(text.split().count(name) for text in texts) for name in names]
    assert counts == sorted(counts, reverse=True)
    # Bytes make no words: the text's own tokens then.
    text = letters.read_text()
    ids = pair[1].encode(text)
    found = word_pool(pair[1], [text], np.asarray(ids))
    assert set(found.tolist()) == set(ids)
    with pytest.raises(RefusedError, match="only 2 different words or tokens"):
        word_pool(pair[1], ["ab" * 100], np.asarray(pair[1].encode("ab" * 100)))


def test_words_of_real_tokenizers(shared: Path) -> None:
    from linearize.artifacts.load import load_tokenizer
    from linearize.data import load_texts

    texts = load_texts(str(shared / "data" / "heldout.jsonl"), source="tech")
    real = load_tokenizer(str(shared / "teachers" / "llama-25m"))
    pool = word_pool(real, texts, np.zeros(0, dtype=np.int64))
    words = [real.decode([i]) for i in pool.tolist()]
    assert len(words) == recall_tasks.WORDS
    assert all(word[0] == " " and len(word) > 4 and word[1:].isalpha() for word in words)
    # A vocabulary of 512 tokens has few words: the text's own tokens then.
    small = load_tokenizer(str(shared / "teachers" / "stories260k"))
    assert len(word_pool(small, texts, np.asarray(small.encode(texts[0])))) >= recall_tasks.FEWEST_TOKENS


def test_shares_by_hand(tasks: list[RecallTask]) -> None:
    def scores(**rates: list[float]) -> list[np.ndarray]:
        return [np.tile(np.asarray(rates[t.form.name])[:, None], (1, 8)) for t in tasks]

    ones, nothing = [1.0, 0.9, 1.0, 0.9], [0.0, 0.1, 0.0, 0.1]
    half = [0.5, 0.4, 0.6, 0.5]
    result = compare(
        tasks,
        teacher=scores(pairs=ones, passkey=ones, quote=[0.3, 0.1, 0.2, 0.3]),
        floor=scores(pairs=nothing, passkey=nothing, quote=[0.1, 0.2, 0.2, 0.2]),
        student=scores(pairs=half, passkey=ones, quote=ones),
    )
    assert result["tasks"]["pairs"]["share"] == pytest.approx(100 * 0.45 / 0.9)
    assert result["tasks"]["passkey"] == {"share": pytest.approx(100), "share_se": pytest.approx(0)}
    assert result["tasks"]["quote"] == {"share": None, "share_se": None}
    assert result["share"] == pytest.approx(75), "quotations are left out, because the teacher cannot do them"
    (note,) = result["notes"]
    assert note.startswith("quote at 40, 96 tokens: no share, because the teacher itself is not clearly better")
    cell = result["cells"][0]
    assert (cell["task"], cell["distance"], cell["pages"], cell["queries"], cell["chance"]) == (
        "pairs",
        40,
        4,
        32,
        0.125,
    )
    assert (cell["teacher"], cell["floor"], cell["student"]) == pytest.approx((0.95, 0.05, 0.5))
    # won: .5 .3 .6 .4, gap: 1 .8 1 .8; about half of the gap they leave 0 -.1 .1 0.
    assert cell["share_se"] == pytest.approx(100 * np.std([0, -0.1, 0.1, 0], ddof=1) / 2 / 0.9)
    assert result["tasks"]["pairs"]["share_se"] == pytest.approx(cell["share_se"] / np.sqrt(2))
    assert all(c[f"{who}_se"] > 0.02 for c in result["cells"] for who in ("teacher", "floor", "student"))
    json.dumps(result, allow_nan=False)


def test_pages_and_not_queries_are_independent(tasks: list[RecallTask]) -> None:
    task = tasks[0]
    pages = np.tile(np.asarray([1.0, 1.0, 0.0, 0.0])[:, None], (1, 8))
    same = np.tile(np.asarray([1.0, 0.0] * 4), (4, 1))
    cells = [compare([task], student=[s], teacher=[s], floor=[s * 0])["cells"][0] for s in (pages, same)]
    assert cells[0]["student_se"] == pytest.approx(np.sqrt(1 / 3) / 2)
    assert cells[1]["student_se"] == pytest.approx(np.sqrt(0.25 / 34)), "no less than that of 32 independent ones"


def untrained(pair: Any, spec: MixerSpec, layers: list[str] | None = None) -> Any:
    """The teacher's weights under linear layers."""
    config = linearized_config(pair[0].config, layer_mixers=layers or ["linear"] * 2, spec=spec)
    torch.manual_seed(0)
    model = MODELS["llama"](config)
    model.load_state_dict(pair[0].state_dict(), strict=False)
    return model.eval()


def test_a_student_that_is_its_window_alone_is_the_floor(pair: Any, letters: Path) -> None:
    """Two separate codes: the branch of the student and the cut of the teacher."""
    student = untrained(pair, MixerSpec(window=8, sinks=2))
    set_branches(student, "window")
    report = recall((student, pair[1]), against=pair, data=str(letters), queries=32, context=128)
    assert report["reference"] == {"window": 8, "sinks": 2, "own": True}
    assert report["distances"] == [32, 40] and report["context"] == 128
    assert len(report["cells"]) == 6 and all(cell["student"] == cell["floor"] for cell in report["cells"])
    assert any(cell["teacher"] != cell["floor"] for cell in report["cells"])
    assert pair[0].config._attn_implementation == "sdpa", "put back"
    json.dumps(report, allow_nan=False)


def test_a_teacher_against_itself(pair: Any, letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.evaluate.recall.REFERENCE_WINDOW", 8)
    report = recall(pair, against=pair, data=str(letters), queries=32)
    assert all(cell["student"] == cell["teacher"] for cell in report["cells"])
    assert report["reference"] == {"window": 8, "sinks": 0, "own": False}
    assert any("a reference window of 8" in note for note in report["notes"])
    assert report["share"] in (None, 100.0)


def test_the_window_of_the_floor(pair: Any) -> None:
    own = MixerSpec(window=8, sinks=2)
    assert reference_window(untrained(pair, own, ["linear", "softmax"]).config) == (8, 2, True)
    assert reference_window(untrained(pair, own, ["softmax", "softmax"]).config) == (64, 0, False)
    bare = MixerSpec(window=0, coverage="all", normaliser="own", mix="sum")
    assert reference_window(untrained(pair, bare).config) == (64, 0, False)


def test_distances_lie_beyond_the_window_and_within_the_context(tokenizer: Any) -> None:
    assert choose_distances(tokenizer, window=64, context=1024) == [160, 320, 640]
    assert choose_distances(tokenizer, window=64, context=512) == [160, 320]
    room = longest_page(tokenizer, 320)
    assert room == 1 + 16 + 320 + 15 * 3
    assert choose_distances(tokenizer, window=64, context=room) == [160, 320]
    assert choose_distances(tokenizer, window=64, context=room - 1) == [160]
    with pytest.raises(RefusedError, match=r"context 200 is too short .* It takes at least 222 tokens"):
        choose_distances(tokenizer, window=64, context=200)
    assert choose_distances(tokenizer, window=16, context=512, distances=[90, 33, 90]) == [33, 90]
    with pytest.raises(UsageError, match=r"distance 32: not beyond the window .two blocks of 16."):
        choose_distances(tokenizer, window=16, context=512, distances=[33, 32])


def test_bad_input_is_refused(pair: Any, tokenizer: Any, texts: list[str], letters: Path) -> None:
    with pytest.raises(UsageError, match=r"queries 31: .* at least 32"):
        make_tasks(tokenizer, texts, distances=[40], queries=31)
    with pytest.raises(UsageError, match="distance 31 is too small"):
        make_tasks(tokenizer, texts, distances=[31])
    with pytest.raises(UsageError, match=r"distance 500: a page of pairs has 562 tokens, more than the context 512"):
        make_tasks(tokenizer, texts, distances=[500], context=512)
    with pytest.raises(RefusedError, match=r"text is too short: it has 1600 tokens"):
        make_tasks(tokenizer, texts, distances=[1600])
    with pytest.raises(UsageError, match="different tokenizers"):
        recall(pair, against=(pair[0], tokenizer), data=str(letters))
    with pytest.raises(RefusedError, match="context 128 is too short"):
        recall(pair, against=pair, data=str(letters))


def test_the_embedded_teacher_can_do_it() -> None:
    report = linearize.recall("demo", against="demo", data="demo", queries=32, distances=[160], device="cpu")
    assert report["share"] == 100.0 and report["model"] == "demo" and report["data"]["kind"] == "demo"
    for cell in report["cells"]:
        assert cell["teacher"] > cell["floor"] + 0.2, cell


def test_a_real_teacher_can_do_it(shared: Path) -> None:
    teacher = shared / "teachers" / "llama-25m"
    report = linearize.recall(
        teacher, against=teacher, data=f"{shared / 'data' / 'heldout.jsonl'}:source=tech", queries=32, distances=[160]
    )
    assert report["tasks"]["pairs"]["share"] == report["tasks"]["passkey"]["share"] == 100.0
    for cell in report["cells"]:
        assert cell["teacher"] > cell["floor"] + 0.1, cell
