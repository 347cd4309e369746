"""Rows and masks of a masked language model: windows of one document with its special tokens, and tokens to hide.

Which tokens are hidden is a function of a seed alone, so a resumed run and a second judge hide the same ones. Needs
neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.errors import RefusedError, UsageError

if TYPE_CHECKING:
    import numpy as np

RATE = 0.15
"""Share of a window's tokens that is hidden (BERT, arXiv 1810.04805, section 3.1)."""
KEPT, SWAPPED = 0.1, 0.1
"""Shares of the hidden tokens that training leaves as they are, or swaps for a random token (there, too)."""
IGNORE = -100
"""Label of a position that no loss is taken at."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The token ids that a masked language model treats apart."""

    mask: int
    pad: int
    special: tuple[int, ...]
    """Never hidden; pad and mask among them."""
    prefix: tuple[int, ...]
    """Before the tokens of a window: [CLS]."""
    suffix: tuple[int, ...]
    """After them: [SEP]."""


def marks_of(tokenizer: Any, config: Any = None) -> Marks:
    """The marks of a tokenizer, with the special tokens that it puts around a text.

    Raises:
        UsageError: it has no mask or padding token, or pads otherwise than the model of `config` takes for granted.
    """
    for kind in ("mask", "pad"):
        if getattr(tokenizer, f"{kind}_token_id", None) is None:
            raise UsageError(
                f"the tokenizer has no {kind} token, which a masked language model needs",
                f"Add {kind}_token to its tokenizer_config.json",
            )
    pad, theirs = tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
    if theirs is not None and theirs != pad:
        raise UsageError(
            f"the tokenizer pads with token {pad}, the model's config says pad_token_id {theirs}",
            "Make both the same",
        )
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    begin = next((n for n in range(len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare), None)
    if begin is None or not bare:
        raise UsageError("the tokenizer changes a text's tokens when it adds special ones, so windows cannot be cut")
    return Marks(
        mask=tokenizer.mask_token_id,
        pad=pad,
        special=tuple(sorted({*tokenizer.all_special_ids, pad, tokenizer.mask_token_id})),
        prefix=tuple(full[:begin]),
        suffix=tuple(full[begin + len(bare) :]),
    )


def document_windows(docs: Sequence[Sequence[int]], context: int, marks: Marks) -> np.ndarray:
    """Cut every document into windows of its own, special tokens around each: int32 [N, context], padded at the end.

    Windows of documents are not mixed. The last window of a document is as long as what is left of it.

    Raises:
        UsageError: a context that only special tokens would fill. RefusedError: no token at all.
    """
    import numpy as np

    room = context - len(marks.prefix) - len(marks.suffix)
    if room < 1:
        raise UsageError(f"context {context} has no room for text between the special tokens", "Use a larger one")
    rows = [
        [*marks.prefix, *doc[begin : begin + room], *marks.suffix] for doc in docs for begin in range(0, len(doc), room)
    ]
    if not rows:
        raise RefusedError("the text holds no token", "Give more text")
    windows = np.full((len(rows), context), marks.pad, dtype=np.int32)
    for number, row in enumerate(rows):
        windows[number, : len(row)] = row
    windows = windows[hideable(windows, marks).any(axis=1)]
    if not len(windows):
        raise RefusedError(
            "the text holds no token that could be hidden: the tokenizer knows none of it", "Give other text"
        )
    return windows


def hideable(windows: np.ndarray, marks: Marks) -> np.ndarray:
    """bool like `windows`: whether a token may be hidden (it is text)."""
    import numpy as np

    return ~np.isin(windows, marks.special)


def hide(
    windows: np.ndarray, marks: Marks, *key: object, vocabulary: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hide RATE of each row's tokens (one at least), drawn from `key` alone.

    Args:
        windows: int [N, T].
        key: what the draw is for, such as (seed, "mask", step).
        vocabulary: size of the vocabulary, for BERT's training: of the hidden tokens KEPT stay and SWAPPED become any
            other token of text. None, for judging: all of them become the mask.

    Returns:
        The rows as a model reads them, and labels: the tokens at hidden places, IGNORE elsewhere. int64 [N, T] both.
    """
    import numpy as np

    draws = np.random.Philox(key=_number(*key))
    # Raw draws, not Generator's methods: only the bit stream is promised to be the same in every numpy.
    order = draws.random_raw(windows.size).reshape(windows.shape)
    may = hideable(windows, marks)
    rank = np.where(may, order, np.uint64(2**64 - 1)).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    count = np.maximum(1, np.rint(RATE * may.sum(axis=1))).astype(np.int64)
    hidden = may & (rank < count[:, None])
    ids = windows.astype(np.int64)
    labels = np.where(hidden, ids, IGNORE)
    masked = hidden
    if vocabulary is not None:
        chance = draws.random_raw(windows.size).reshape(windows.shape) / 2.0**64
        words = np.setdiff1d(np.arange(vocabulary), marks.special)
        anything = words[draws.random_raw(windows.size).reshape(windows.shape) % np.uint64(len(words))]
        swapped = hidden & (chance >= KEPT) & (chance < KEPT + SWAPPED)
        masked = hidden & (chance >= KEPT + SWAPPED)
        ids = np.where(swapped, anything, ids)
    return np.where(masked, marks.mask, ids), labels


def one_at_a_time(windows: np.ndarray, marks: Marks, *key: object, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with one hidden token each, for pseudo-perplexity (arXiv 1910.14659): int64 [P, T] twice, as `hide`.

    Of all tokens of text `most` are taken, drawn from `key`; all of them where there are fewer.
    """
    import numpy as np

    places = np.argwhere(hideable(windows, marks))
    order = np.random.Philox(key=_number(*key)).random_raw(len(places)).argsort(kind="stable")
    chosen = places[np.sort(order[:most])]
    ids = windows[chosen[:, 0]].astype(np.int64)
    labels = np.full_like(ids, IGNORE)
    each = np.arange(len(chosen))
    labels[each, chosen[:, 1]] = ids[each, chosen[:, 1]]
    ids[each, chosen[:, 1]] = marks.mask
    return ids, labels


def _number(*key: object) -> int:
    text = ":".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
