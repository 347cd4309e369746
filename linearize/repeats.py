"""Training windows in which passages come again: text that asks for what was said long before.

Ordinary text seldom can be predicted from what lies beyond a window alone, so a linear branch that is matched on it
learns little of looking things up. Here short passages of a window are written again further on in it, over what stood
there. A teacher that copies (induction heads, Olsson et al. 2022, arXiv:2209.11895) then predicts them from their first
tokens on, and its student is matched to that. Nothing but the window's own tokens is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np

SLOT = 64
"""Tokens of a window among which one passage comes again; an eighth of a window that is shorter than eight of them."""
SHORTEST = 4
"""Tokens of a passage; the longest takes fifteen sixteenths of its slot."""


def with_repeats(
    windows: np.ndarray,
    share: float,
    *,
    seed: int,
    marks: Collection[int] = (),
    documents: np.ndarray | None = None,
    drawn: float = 0.5,
) -> np.ndarray:
    """Write passages again in a share of the windows.

    In each slot of SLOT tokens but the first, a passage that lies anywhere before it in the window is written over the
    slot's own tokens. Its length and both places are drawn evenly. Half of the passages (`drawn`) are first replaced,
    where they are, by tokens drawn from the window: of these, nothing but memory tells what comes.

    Args:
        windows: [N, T] token ids.
        share: of the windows, which are drawn by `seed` and their number alone.
        marks: tokens that begin or end documents; no passage holds one, from or to.
        documents: [N, T], which document each token is of; a passage stays within one. None: they may be mixed.
        drawn: share of the passages that are of drawn tokens.

    Returns:
        [N, T] of the same dtype; the given array itself where nothing is to be done, as in windows of less than 64
        tokens.
    """
    count, length = windows.shape
    chosen = np.flatnonzero(_uniform(count, seed, "windows") < share)
    span = min(SLOT, length // 8)
    if not len(chosen) or span < 8:
        return windows
    longest = span * 15 // 16
    found = windows.copy()
    rows = windows[chosen].copy()
    begins = np.zeros(rows.shape, dtype=np.int64) if documents is None else _begins(documents[chosen])
    every = np.arange(len(rows))[:, None]
    for slot in range(1, length // span):
        size = SHORTEST + _draw(longest - SHORTEST + 1, len(rows), seed, "size", slot)
        place = slot * span + _draw(span - size + 1, len(rows), seed, "place", slot)
        begin = begins[every[:, 0], place]
        room = slot * span - size + 1 - begin
        source = begin + _draw(np.maximum(room, 0), len(rows), seed, "source", slot)
        steps = np.arange(longest)
        inside = steps < size[:, None]
        # Past a passage's end its last token again, so that all passages are of one shape.
        steps = np.minimum(steps, size[:, None] - 1)
        here, there = source[:, None] + steps, place[:, None] + steps
        whole = ~np.isin(np.concatenate([rows[every, here], rows[every, there]], axis=1), list(marks)).any(axis=1)
        whole &= (room > 0) & (begins[every[:, 0], there[:, -1]] == begin)
        reach = np.maximum(slot * span - begin, 1)[:, None]
        other = rows[every, begin[:, None] + _draw(reach, (len(rows), longest), seed, "tokens", slot)]
        fresh = (_uniform(len(rows), seed, "drawn", slot) < drawn) & ~np.isin(other, list(marks)).any(axis=1)
        passage = np.where(fresh[:, None], other, rows[every, here])
        row, step = np.nonzero(inside & whole[:, None])
        rows[row, here[row, step]] = passage[row, step]
        rows[row, there[row, step]] = passage[row, step]
    found[chosen] = rows
    return found


def _begins(documents: np.ndarray) -> np.ndarray:
    """Where the document of every token begins in its window: int64 [N, T]."""
    steps = np.arange(documents.shape[1])
    new = np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
    return np.maximum.accumulate(np.where(new, steps, 0), axis=1)


def _draw(below: int | np.ndarray, shape: int | tuple[int, int], *key: object) -> np.ndarray:
    """Whole numbers from 0 on, each less than `below`: int64 of `shape`."""
    return np.floor(_uniform(shape, *key) * below).astype(np.int64)


def _uniform(shape: int | tuple[int, int], *key: object) -> np.ndarray:
    """Numbers in [0, 1) of `shape`, of `key` alone."""
    digest = hashlib.sha256(":".join(map(str, ("repeats", *key))).encode()).digest()
    # Raw draws, not numpy's Generator: only the bit stream is promised to be the same in every numpy.
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)
