"""Pages that ask for what was said long before: pairs, a passkey, a quotation.

A page is real text in which records are planted; after D tokens or more the same records come again, and the model is
asked for their values. D is larger than what a window sees, so that only a memory can answer. A record is its cue (not
scored) and its values (scored, each with all true tokens before it, so nothing is generated):

    pairs    8 lines of three words, later again in another order: two words given, the third is asked for. It is chosen
             among the third words of all 8 lines, so it is not enough to know which words were there: multi-query
             associative recall (Arora et al. 2023, arXiv:2312.04927), in words of the text instead of symbols.
    passkey  one line of ten words: two given, eight asked for, each chosen among itself and 15 words of no line (after
             Mohtashami and Jaggi 2023, arXiv:2305.16300, with words instead of digits).
    quote    24 tokens of the same text: eight given, sixteen asked for, each chosen from the whole vocabulary.

A small model that never saw an instruction can do these: words are the most frequent ones that the tokenizer has as one
token, all else is the text that is given, and a choice among few asks less than the one most probable token of all.
Nothing is in any one language.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from linearize.data import tokenize_documents
from linearize.errors import RefusedError, UsageError

HEAD = 16
"""Tokens of text before the first record, so that none lies under a model's sinks."""

SMALLEST_DISTANCE = 32
"""A record has to fit between a value and its query."""

QUERIES_PER_PAGE = 8
"""Of pairs and of a passkey."""

FEWEST_PAGES = 4

WORD = re.compile(r"[^\W\d_]{4,}")
WORDS = 800
FEWEST_WORDS = 64
FEWEST_TOKENS = 32
MOST_TEXT = 4_000_000
"""Characters of text that are read, of more than enough."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """One kind of task: `records` on a page, each of `cue` given and `values` scored tokens."""

    name: str
    records: int
    cue: int
    values: int
    choices: int | None
    """Tokens among which a value is chosen; None: the whole vocabulary."""

    @property
    def made_of_words(self) -> bool:
        """Lines of drawn words; else a passage of the text itself."""
        return self.choices is not None


FORMS = (
    Form(name="pairs", records=8, cue=2, values=1, choices=8),
    Form(name="passkey", records=1, cue=2, values=8, choices=16),
    Form(name="quote", records=1, cue=8, values=16, choices=None),
)


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """R pages of one form at one distance, all of the same length L, with Q scored tokens each."""

    form: Form
    distance: int
    """Tokens from a value to the place where it is asked for: exactly so for one record, else of the nearest pair."""
    tokens: np.ndarray  # int64 [R, L]; the last token of a page is scored
    places: np.ndarray  # int64 [R, Q]; tokens[r, places[r, q]] is to be predicted from all before it
    candidates: np.ndarray | None  # int64 [R, Q, K], the right one among them; None: the whole vocabulary

    @property
    def chance(self) -> float | None:
        """What guessing scores."""
        return None if self.form.choices is None else 1 / self.form.choices


def make_tasks(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    distances: Sequence[int],
    queries: int = 64,
    seed: int = 0,
    context: int | None = None,
) -> list[RecallTask]:
    """Every form at every distance, from the tokenizer and the text alone; the same for the same arguments.

    Args:
        tokenizer: the one of the models that will be judged.
        texts: the documents that pages and words are taken from.
        distances: in tokens, each at least SMALLEST_DISTANCE.
        queries: of pairs and of passkeys, at each distance, rounded up to whole pages of 8; as many quotations as
            pages.
        context: the most tokens that a page may have; None: no limit.

    Returns:
        len(FORMS) * len(distances) tasks, by form, then by distance.

    Raises:
        UsageError: a distance that is too small or whose pages are longer than `context`, or too few queries.
        RefusedError: too little text, or too few different words in it.
    """
    if queries < FEWEST_PAGES * QUERIES_PER_PAGE:
        raise UsageError(
            f"queries {queries}: fewer say too little about how certain a score is",
            f"Give at least {FEWEST_PAGES * QUERIES_PER_PAGE}",
        )
    rows = -(-queries // QUERIES_PER_PAGE)
    texts = _enough(texts)
    stream = np.asarray([i for ids in tokenize_documents(texts, tokenizer) for i in ids], dtype=np.int64)
    words = word_pool(tokenizer, texts, stream)
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    line_end = _line_end(tokenizer)
    tasks = []
    for form in FORMS:
        edge = line_end if form.made_of_words else []
        for distance in distances:
            if distance < SMALLEST_DISTANCE:
                raise UsageError(f"distance {distance} is too small", f"It is at least {SMALLEST_DISTANCE} tokens")
            length = page_length(form, distance, bos=len(bos), edge=len(edge))
            if context is not None and length > context:
                raise UsageError(
                    f"distance {distance}: a page of {form.name} has {length} tokens, more than the context {context}",
                    "Give a smaller distance, or a larger context.",
                )
            pages = [
                _page(form, distance, stream, words, bos, edge, key=f"{seed}:{form.name}:{distance}:{row}")
                for row in range(rows)
            ]
            tokens, places, candidates = (np.stack(part) for part in zip(*pages, strict=True))
            tasks.append(
                RecallTask(
                    form=form,
                    distance=distance,
                    tokens=tokens,
                    places=places,
                    candidates=candidates if form.choices else None,
                )
            )
    return tasks


def page_length(form: Form, distance: int, *, bos: int = 1, edge: int = 1) -> int:
    """Tokens of a page; `edge` are those of a line's end."""
    size = edge + form.cue + form.values
    return bos + HEAD + distance + (2 * form.records - 1) * size


def longest_page(tokenizer: Any, distance: int) -> int:
    """Tokens of the longest page of any form at `distance`."""
    bos, edge = int(tokenizer.bos_token_id is not None), len(_line_end(tokenizer))
    return max(page_length(form, distance, bos=bos, edge=edge if form.made_of_words else 0) for form in FORMS)


def word_pool(tokenizer: Any, texts: Sequence[str], stream: np.ndarray) -> np.ndarray:
    """int64 [N <= WORDS]: tokens that are whole words of at least four letters, those of the most frequent words first.

    A tokenizer without such words (of bytes, or for a script without spaces) gives the text's most frequent tokens.

    Raises:
        RefusedError: fewer than FEWEST_TOKENS different tokens in the text.
    """
    special = set(tokenizer.all_special_ids)
    counts = Counter(word for text in texts for word in WORD.findall(text))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: 8 * WORDS]
    found: list[int] = []
    for start in (" ", ""):  # what stands for the space before a word differs between tokenizers
        spelled = tokenize_documents([start + word for word in frequent], tokenizer)
        singles = dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1 and ids[0] not in special)
        found = max(found, list(islice(singles, WORDS)), key=len)
    if len(found) < FEWEST_WORDS:
        seen = Counter(stream.tolist())
        found = [i for i in sorted(seen, key=lambda i: (-seen[i], i)) if i not in special][:WORDS]
    if len(found) < FEWEST_TOKENS:
        raise RefusedError(
            f"text has only {len(found)} different words or tokens to ask for, and {FEWEST_TOKENS} are needed",
            "Give more text",
        )
    return np.asarray(found, dtype=np.int64)


def _page(
    form: Form, distance: int, stream: np.ndarray, words: np.ndarray, bos: list[int], edge: list[int], *, key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [L], places [Q], candidates [Q, K]) of one page."""
    count, size = form.records, len(edge) + form.cue + form.values
    # From the first record to the first query: the last record, asked for first, is `distance` away.
    stretch = distance + (count - 1) * size
    gap = stretch - count * size - len(edge)
    filler, rest = _cut(stream, HEAD + gap, form.cue + form.values, key=key)
    drawn = words[_order(len(words), key, "words")] if form.made_of_words else rest
    records = drawn[: count * (form.cue + form.values)].reshape(count, -1)
    order = _order(count, key, "order")
    lines = [np.concatenate([edge, record]) for record in records]
    tokens = np.concatenate([bos, filler[:HEAD], *lines, edge, filler[HEAD:], *(lines[i] for i in order)])
    first = len(bos) + HEAD + stretch + len(edge) + form.cue
    places = (first + size * np.arange(count)[:, None] + np.arange(form.values)).reshape(-1)
    tokens, places = tokens.astype(np.int64), places.astype(np.int64)
    if form.choices is None:
        return tokens, places, np.zeros((len(places), 0), dtype=np.int64)
    if count > 1:  # among what the other records hold
        candidates = np.tile(records[:, form.cue :].reshape(-1), (len(places), 1))
    else:  # among words that are in no line of the page
        absent = drawn[records.size :]
        others = [absent[_order(len(absent), key, q)][: form.choices - 1] for q in range(len(places))]
        candidates = np.concatenate([tokens[places][:, None], others], axis=1)
    return tokens, places, candidates


def _cut(stream: np.ndarray, length: int, passage: int, *, key: str) -> tuple[np.ndarray, np.ndarray]:
    """A stretch of the text and a passage that does not overlap it."""
    if len(stream) < length + 2 * passage:
        raise RefusedError(
            f"text is too short: it has {len(stream)} tokens, and a page needs {length + 2 * passage}", "Give more text"
        )
    begin = _pick(len(stream) - length + 1, key, "filler")
    before = max(0, begin - passage + 1)  # places for the passage that end before the stretch
    after = max(0, len(stream) - passage - (begin + length) + 1)
    place = _pick(before + after, key, "passage")
    place = place if place < before else begin + length + place - before
    return stream[begin : begin + length], stream[place : place + passage]


def _line_end(tokenizer: Any) -> list[int]:
    """Tokens of a line's end; none where the tokenizer has none or spells it out."""
    ids = [int(i) for i in tokenize_documents(["\n"], tokenizer)[0]]
    return ids if len(ids) <= 2 and tokenizer.unk_token_id not in ids else []


def _enough(texts: Sequence[str]) -> list[str]:
    kept, size = [], 0
    for text in texts:
        kept.append(text)
        size += len(text)
        if size >= MOST_TEXT:
            break
    return kept


def _raw(count: int, *key: object) -> np.ndarray:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    # Raw draws, not numpy's Generator: only the bit stream is promised to be the same in every numpy.
    return np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(count)


def _order(count: int, *key: object) -> np.ndarray:
    return np.argsort(_raw(count, *key), kind="stable")


def _pick(count: int, *key: object) -> int:
    return int(_raw(1, *key)[0] % np.uint64(count))
