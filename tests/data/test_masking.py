"""Rows and masks of masked language models: documents apart, drawn from a seed alone, special tokens never hidden."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from linearize.errors import RefusedError, UsageError
from linearize.masking import IGNORE, Marks, document_windows, hide, hideable, marks_of, one_at_a_time

MARKS = Marks(mask=4, pad=0, special=(0, 1, 2, 3, 4), prefix=(2,), suffix=(3,))


class Letters:
    """A tokenizer of letters: a is 5; [CLS] 2, [SEP] 3 around a text."""

    mask_token_id: int | None = 4
    pad_token_id: int | None = 0
    all_special_ids = (1, 2, 3)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [5 + ord(letter) - ord("a") for letter in text]
        return {"input_ids": [2, *ids, 3] if add_special_tokens else ids}


def windows(count: int = 40, context: int = 32) -> np.ndarray:
    docs = [list(range(5, 5 + 3 + (7 * n) % 50)) for n in range(count)]
    return document_windows(docs, context, MARKS)


def test_marks_are_what_the_tokenizer_does() -> None:
    assert marks_of(Letters()) == MARKS
    assert marks_of(Letters(), SimpleNamespace(pad_token_id=0)) == MARKS
    with pytest.raises(UsageError, match=r"pads with token 0.*pad_token_id 1"):
        marks_of(Letters(), SimpleNamespace(pad_token_id=1))
    lacking = Letters()
    lacking.mask_token_id = None
    with pytest.raises(UsageError, match="no mask token"):
        marks_of(lacking)


def test_windows_hold_one_document_each_and_lose_nothing() -> None:
    docs = [[5, 6, 7], [], list(range(10, 31)), [8]]
    rows = document_windows(docs, 10, MARKS)
    assert rows.dtype == np.int32 and rows.shape == (5, 10)
    found = [[int(t) for t in row if t != MARKS.pad] for row in rows]
    assert all(row[0] == 2 and row[-1] == 3 for row in found)
    assert [row[1:-1] for row in found] == [[5, 6, 7], docs[2][:8], docs[2][8:16], docs[2][16:], [8]]
    assert not (rows[:, 1:] == 0)[:, :-1][rows[:, 2:] != 0].any()  # padding lies at the end
    with pytest.raises(UsageError, match="no room"):
        document_windows(docs, 2, MARKS)
    with pytest.raises(RefusedError, match="no token"):
        document_windows([[]], 10, MARKS)
    assert len(document_windows([[1, 1], [5]], 10, MARKS)) == 1  # unknown tokens alone: nothing could be hidden


def test_the_share_that_is_hidden_and_what_becomes_of_it() -> None:
    rows = windows()
    ids, labels = hide(rows, MARKS, 0, "mask", 3)
    hidden = labels != IGNORE
    text = hideable(rows, MARKS).sum(axis=1)
    assert (hidden.sum(axis=1) == np.maximum(1, np.rint(0.15 * text))).all()
    assert (labels[hidden] == rows[hidden]).all() and not np.isin(labels[hidden], MARKS.special).any()
    assert (ids[hidden] == MARKS.mask).all() and (ids[~hidden] == rows[~hidden]).all()

    big = np.tile(np.arange(5, 105, dtype=np.int32), (400, 1))
    ids, labels = hide(big, MARKS, 1, vocabulary=200)
    hidden = labels != IGNORE
    shares = [(x & hidden).sum() / hidden.sum() for x in (ids == MARKS.mask, ids == big)]
    assert shares[0] == pytest.approx(0.8, abs=0.02) and shares[1] == pytest.approx(0.1, abs=0.02)
    swapped = hidden & (ids != MARKS.mask) & (ids != big)
    assert not np.isin(ids[swapped], MARKS.special).any() and ids.max() < 200
    assert (ids[~hidden] == big[~hidden]).all()
    everywhere = hidden.mean(axis=0)  # no place is favoured
    assert everywhere.min() > 0.05 and everywhere.max() < 0.3


def test_masks_are_a_function_of_the_key_and_of_their_own_rows() -> None:
    rows = windows()
    first: Any = hide(rows, MARKS, 0, "mask", 3, vocabulary=60)
    again: Any = hide(rows.copy(), MARKS, 0, "mask", 3, vocabulary=60)
    other: Any = hide(rows, MARKS, 0, "mask", 4, vocabulary=60)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (first[1] == other[1]).all()


def test_one_at_a_time_takes_every_token_once_or_a_sample() -> None:
    rows = windows(6)
    total = int(hideable(rows, MARKS).sum())
    ids, labels = one_at_a_time(rows, MARKS, 0, most=10**6)
    hidden = labels != IGNORE
    assert len(ids) == total and (hidden.sum(axis=1) == 1).all() and (ids[hidden] == MARKS.mask).all()
    assert np.unique(np.where(hidden, labels, ids), axis=0).shape == np.unique(rows, axis=0).shape
    some, _ = one_at_a_time(rows, MARKS, 0, most=7)
    same, _ = one_at_a_time(rows, MARKS, 0, most=7)
    assert len(some) == 7 and (some == same).all()
