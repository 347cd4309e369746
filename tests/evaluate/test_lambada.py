"""LAMBADA against results computed by hand, and against one token at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linearize.errors import UsageError, VerificationError
from linearize.evaluate.lambada import Passage, lambada, passage, read_rows, score_passages, shorten

VOCABULARY = 259


class Alphabet(torch.nn.Module):
    """Predicts " " after every letter of "xyz", and else the next character of the alphabet: logit 3, all others 0."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(VOCABULARY, VOCABULARY))
        with torch.no_grad():
            for byte in range(VOCABULARY - 1):
                self.table[byte, byte + 1] = 3.0
            self.table[ord(" ")] = 0.0
            self.table[ord(" "), ord("a")] = 3.0
            for byte in b"xyz":
                self.table[byte] = 0.0
                self.table[byte, ord(" ")] = 3.0
        text = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=16)
        self.config = SimpleNamespace(model_type="alphabet", get_text_config=lambda: text)
        self.device = torch.device("cpu")

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.table[ids_of(input_ids)])


def ids_of(ids: torch.Tensor) -> torch.Tensor:
    assert ids.shape[1] <= 16, "no more than the model's context is ever read"
    return ids


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"context": c, "continuation": w}) + "\n" for c, w in rows), encoding="utf-8")
    return path


def codes(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class Bytes:
    """A tokenizer of bytes with BOS 256; `adds` says whether it puts BOS unasked."""

    bos_token_id = 256

    def __init__(self, adds: bool) -> None:
        self.adds = adds

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return [256] * (self.adds and add_special_tokens) + list(text.encode())


def test_by_hand(tmp_path: Path) -> None:
    rows = [
        ("wx", "abc"),  # " abc": all four as predicted
        ("w", "abc"),  # " " is not predicted after w (x is); the other three are
        ("see y", "abd"),  # the last letter is not
        ("z ", "ab"),  # a space that the context ends in is the same space
        ("a long way to y", "ab"),  # 18 tokens: one is cut and one never read, 16 are
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    hit, miss = (math.log(math.exp(3) + VOCABULARY - 1) - logit for logit in (3, 0))
    nats = [4 * hit, 3 * hit + miss, 3 * hit + miss, 3 * hit, 3 * hit]
    for size in (None, 1, 2):
        report = lambada((Alphabet(), Bytes(False)), data=file, batch_size=size)
        assert report["accuracy"] == 3 / 5
        assert report["perplexity"] == pytest.approx(math.exp(sum(nats) / 5), rel=1e-5)
    assert (report["rows"], report["target_tokens"], report["truncated"]) == (5, 4 + 4 + 4 + 3 + 3, 1)
    first = lambada((Alphabet(), Bytes(False)), data=file, limit=1)
    assert first["accuracy"] == 1.0 and first["perplexity"] == pytest.approx(math.exp(nats[0]), rel=1e-5)


def test_bos_is_what_the_tokenizer_does_unless_asked() -> None:
    for adds, bos, marked in ((True, None, True), (False, None, False), (True, False, False), (False, True, True)):
        one = passage("see y", "ab", Bytes(adds), bos=bos)
        assert one == Passage(tokens=[256] * marked + list(b"see y ab"), target=3)


@torch.no_grad()
def test_a_model_one_token_at_a_time(pair: Any) -> None:
    """Batches with padding give what single tokens give, of a model whose tokens see each other."""
    model, _ = pair
    passages = []
    for length, target, spoilt in ((5, 3, None), (40, 1, None), (9, 4, -1), (9, 4, -4), (23, 2, None)):
        ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for _ in range(target):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if spoilt is not None:
            ids[spoilt] = (ids[spoilt] + 1) % 256
        passages.append(Passage(tokens=ids, target=target))
    expected = []
    for one in passages:
        ends = range(len(one.tokens) - one.target, len(one.tokens))
        logs = [model(torch.tensor([one.tokens[:end]])).logits[0, -1].log_softmax(-1) for end in ends]
        expected.append(-sum(float(log[one.tokens[end]]) for log, end in zip(logs, ends, strict=True)))
    nll, right = score_passages(model, passages, batch_size=3)
    assert right == [True, True, False, False, True]
    assert nll == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert not model.training


def test_what_does_not_fit_is_cut_from_the_left() -> None:
    one = Passage(tokens=list(range(10)), target=3)
    assert shorten(one, 9) == one and shorten(one, None) == one
    assert shorten(one, 5) == Passage(tokens=[4, 5, 6, 7, 8, 9], target=3)
    with pytest.raises(UsageError, match="target of 3 tokens does not fit a context of 2"):
        shorten(one, 2)


def test_bad_rows_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for bad in (
        "[]",
        "{",
        '{"context": "a"}',
        '{"context": "a", "continuation": 3}',
        '{"context": " ", "continuation": "b"}',
    ):
        file.write_text('{"context": "a", "continuation": "b"}\n' + bad + "\n")
        with pytest.raises(UsageError, match=r"rows\.jsonl, line 2: is no LAMBADA row"):
            read_rows(file)
        assert read_rows(file, limit=1) == [("a", "b")]
    for name, what in (("none.jsonl", "cannot be read"), ("empty.jsonl", "holds no rows")):
        if name.startswith("empty"):
            (tmp_path / name).write_text("\n")
        with pytest.raises(UsageError, match=what):
            read_rows(tmp_path / name)
    with pytest.raises(UsageError, match="limit 0"):
        read_rows(file, limit=0)


def test_a_broken_model_is_refused(tmp_path: Path) -> None:
    model = Alphabet()
    with torch.no_grad():
        model.table[ord("a")] = float("nan")
    with pytest.raises(VerificationError, match="not finite"):
        lambada((model, Bytes(False)), data=write(tmp_path / "rows.jsonl", [("x", "ab")]))


@pytest.mark.slow
def test_equal_to_the_harness(shared: Path) -> None:
    """stories260k, whose tokenizer puts BOS; in a context of 128, so that most rows are cut."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    from linearize.artifacts.load import load_model, load_tokenizer

    folder = shared / "teachers" / "stories260k"
    model, tokenizer = load_model(folder, device="cpu", dtype="float32"), load_tokenizer(folder)
    rows = read_rows(shared / "data" / "lambada.jsonl", limit=24)
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=128, batch_size=8, device="cpu")
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(context, " " + word), idx=i)
        for i, (context, word) in enumerate(rows)
    ]
    theirs = harness.loglikelihood(requests, disable_tqdm=True)
    passages = [shorten(passage(context, word, tokenizer), 128) for context, word in rows]
    assert sum(len(one.tokens) == 129 for one in passages) > 6
    nll, right = score_passages(model, passages)
    assert right == [bool(greedy) for _, greedy in theirs]
    assert nll == pytest.approx([-value for value, _ in theirs], rel=1e-5)
