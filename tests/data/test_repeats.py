"""Passages that come again: where, how many, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from linearize.repeats import SHORTEST, SLOT, with_repeats

LENGTH = 8 * SLOT
MARK = 0


def text(count: int = 40, length: int = LENGTH) -> np.ndarray:
    """Windows in which every token is another one, so that a copy betrays its source: [N, T] int32."""
    return np.arange(1, count * length + 1, dtype=np.int32).reshape(count, length)


def test_the_same_arguments_give_the_same_windows_and_the_given_ones_stay() -> None:
    windows = text()
    kept = windows.copy()
    once, again = (with_repeats(windows, 1.0, seed=3) for _ in range(2))
    assert np.array_equal(once, again) and np.array_equal(windows, kept)
    assert once.dtype == np.int32 and once.shape == windows.shape
    assert not np.array_equal(once, with_repeats(windows, 1.0, seed=4))


def test_a_window_is_drawn_by_its_number_alone() -> None:
    """A run that reads more text repeats the same passages in the windows that it shares with a shorter one."""
    share = 0.4
    short, long = with_repeats(text(20), share, seed=0), with_repeats(text(40), share, seed=0)
    changed = [(a != b).any(axis=1) for a, b in ((short, text(20)), (long, text(40)))]
    assert np.array_equal(changed[0], changed[1][:20])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_windows_is_what_was_asked_for(share: float) -> None:
    windows = text(400, 64)
    changed = (with_repeats(windows, share, seed=1) != windows).any(axis=1).mean()
    assert changed == share if share in (0.0, 1.0) else abs(changed - share) < 0.1


def test_windows_too_short_for_slots_are_handed_back() -> None:
    windows = text(4, 63)
    assert with_repeats(windows, 1.0, seed=0) is windows


def test_without_drawn_tokens_every_change_is_a_copy_of_a_passage_before_it() -> None:
    windows = text()
    found = with_repeats(windows, 1.0, seed=0, drawn=0.0)
    lengths = []
    for row, before in zip(found, windows, strict=True):
        changed = np.flatnonzero(row != before)
        assert changed.min() >= SLOT
        for slot in np.unique(changed // SLOT):
            places = changed[changed // SLOT == slot]
            assert np.array_equal(np.diff(places), np.ones(len(places) - 1))  # one passage a slot
            lengths.append(len(places))
            assert SHORTEST <= len(places) <= SLOT * 15 // 16
            source = np.flatnonzero(row[: slot * SLOT] == row[places[0]])
            assert any(np.array_equal(row[s : s + len(places)], row[places]) for s in source)
    assert len(lengths) == len(windows) * (LENGTH // SLOT - 1)
    assert min(lengths) == SHORTEST and max(lengths) == SLOT * 15 // 16


@pytest.mark.parametrize("length", [64, 100, 511, 1000])
def test_shorter_windows_have_shorter_slots(length: int) -> None:
    windows = text(30, length)
    changed = with_repeats(windows, 1.0, seed=0) != windows
    assert changed.any(axis=1).all() and 0.2 < changed.mean() < 0.8


def test_drawn_passages_are_of_the_windows_own_tokens_and_stand_in_both_places() -> None:
    windows = text()
    found = with_repeats(windows, 1.0, seed=0, drawn=1.0)
    for row, before in zip(found, windows, strict=True):
        assert set(row.tolist()) <= set(before.tolist())
        assert (row[:SLOT] != before[:SLOT]).any()  # what is repeated was itself written over
        last = slice(LENGTH - SLOT, LENGTH)
        changed = row[last][row[last] != before[last]]
        assert set(changed.tolist()) <= set(row[: LENGTH - SLOT].tolist())


def test_marks_stay_where_they_are_and_are_not_copied() -> None:
    windows = text()
    windows[:, ::37] = MARK
    found = with_repeats(windows, 1.0, seed=0, marks=[MARK])
    assert np.array_equal(found == MARK, windows == MARK)
    assert (found != windows).any()


def test_a_passage_stays_within_its_document() -> None:
    windows = text()
    documents = np.broadcast_to(np.arange(LENGTH) // (LENGTH // 2), windows.shape)
    found = with_repeats(windows, 1.0, seed=0, documents=documents, drawn=0.0)
    second = slice(LENGTH // 2, LENGTH)
    for row, before in zip(found, windows, strict=True):
        assert set(row[second].tolist()) <= set(before[second].tolist())
    assert (found[:, second] != windows[:, second]).any()
