"""Packing and the order of batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from linearize.data import batches, document_marks, pack, tokenize_documents
from linearize.errors import RefusedError, UsageError


def test_pack_by_hand() -> None:
    docs = [[1, 2, 3], [], [4, 5]]
    assert pack(docs, 3, eos_id=9).tolist() == [[1, 2, 3], [9, 9, 4]]
    assert pack(docs, 2, eos_id=None).tolist() == [[1, 2], [3, 4]]
    assert pack(docs, 4, eos_id=None, bos_id=8).tolist() == [[8, 1, 2, 3], [8, 8, 4, 5]]
    assert pack(docs, 11, eos_id=9, bos_id=8).tolist() == [[8, 1, 2, 3, 9, 8, 9, 8, 4, 5, 9]]
    assert pack(docs, 3, eos_id=9).dtype == np.int32


def test_pack_refuses_less_than_one_window() -> None:
    with pytest.raises(RefusedError, match="text is shorter than one context: 4 tokens, needs 5") as caught:
        pack([[1, 2, 3]], 5, eos_id=0)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    with pytest.raises(RefusedError, match="0 tokens"):
        pack([], 5, eos_id=0)
    with pytest.raises(UsageError, match="not positive"):
        pack([[1]], 0, eos_id=0)


def test_marks_follow_the_tokenizer() -> None:
    assert document_marks(SimpleNamespace(bos_token_id=0, eos_token_id=1)) == {"bos_id": 0, "eos_id": None}
    assert document_marks(SimpleNamespace(bos_token_id=None, eos_token_id=1)) == {"bos_id": None, "eos_id": 1}
    assert document_marks(SimpleNamespace(bos_token_id=None, eos_token_id=None)) == {"bos_id": None, "eos_id": None}


@pytest.mark.parametrize("count, size", [(10, 4), (10, 3), (3, 7), (1, 1), (8, 8)])
def test_every_epoch_visits_every_window_once(count: int, size: int) -> None:
    windows = np.arange(count * 2, dtype=np.int32).reshape(count, 2)
    steps = [batches(windows, batch_size=size, seed=3, step=s) for s in range(5 * count)]
    assert all(b.shape == (size, 2) for b in steps)
    drawn = np.concatenate(steps)[:, 0] // 2
    for epoch in range(len(drawn) // count):
        assert Counter(drawn[epoch * count : (epoch + 1) * count]) == Counter(range(count))


def test_batches_are_seekable_and_differ_by_seed_and_epoch() -> None:
    windows = np.arange(64, dtype=np.int32)[:, None]
    late = batches(windows, batch_size=16, seed=5, step=6)
    for step in range(6):
        batches(windows, batch_size=16, seed=5, step=step)
    np.random.seed(0)  # the global state has no say
    assert np.array_equal(late, batches(windows, batch_size=16, seed=5, step=6))
    epoch = [np.concatenate([batches(windows, batch_size=16, seed=s, step=e * 4 + i) for i in range(4)])[:, 0]
             for s, e in ((5, 0), (5, 1), (6, 0))]  # fmt: skip
    assert not any(np.array_equal(epoch[a], epoch[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert not np.array_equal(epoch[0], np.arange(64))


def test_the_order_is_the_same_on_every_machine() -> None:
    # Pinned: a checkpoint written elsewhere must meet the same batches here.
    windows = np.arange(10, dtype=np.int32)[:, None]
    assert batches(windows, batch_size=10, seed=0, step=0)[:, 0].tolist() == [4, 5, 8, 6, 2, 3, 7, 0, 1, 9]


def test_tokenize_documents_adds_no_special_tokens(tmp_path: Path, build_llama: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build_llama(tmp_path / "m"))
    docs = tokenize_documents(["abc", "x" * 500], tokenizer)
    assert [len(d) for d in docs] == [3, 500]
    assert [tokenizer.decode(d) for d in docs] == ["abc", "x" * 500]
    assert tokenize_documents([], tokenizer) == []
