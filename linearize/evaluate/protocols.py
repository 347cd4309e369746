"""Protocols: which tokens of a text are predicted from which, and what a perplexity is divided by.

Two perplexities compare only under one protocol: the length of the context, the tokens that mark documents and the
count of words each move the number. A protocol turns texts into rows of tokens and says everything that it did.

    concat@N           documents joined, BOS before each (EOS after each where the tokenizer has no BOS), cut into
                       disjoint windows of N tokens; the first token of a window is not predicted
    documents@N        each document alone: its first N tokens, BOS included where the tokenizer has one
    lm-eval/wikitext@N the `wikitext` task of lm-evaluation-harness 0.4.13 on WikiText's raw file: pages, detokenised,
                       in rolling windows of N with one token of context; BOS is given twice, and scored once
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from linearize.data import document_marks, pack
from linearize.errors import RefusedError, UsageError, did_you_mean

CONCAT, DOCUMENTS, WIKITEXT = "concat", "documents", "lm-eval/wikitext"
OPTIONS: dict[str, tuple[str, ...]] = {CONCAT: ("eos", "plain"), DOCUMENTS: (), WIKITEXT: ("single-bos",)}
"""Protocols and their variants: `concat@N+eos` marks documents by EOS after each, `+plain` by nothing;
`lm-eval/wikitext@N+single-bos` gives BOS once, as context alone."""

_NAME = re.compile(r"(?P<name>[^@+]+)(@(?P<context>\d+))?(\+(?P<option>[\w-]+))?")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol with its context; `str()` is the name under which numbers are reported."""

    name: str
    context: int
    option: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.context}" + (f"+{self.option}" if self.option else "")

    @property
    def windows(self) -> str:
        """Its windows, in words."""
        return f"windows of {self.context:,} tokens"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence for the model: the last `scored` of its tokens are predicted, each from all tokens before it."""

    tokens: np.ndarray  # int32 [L]
    scored: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to score and what their sum is divided by."""

    protocol: Protocol
    rows: list[Row]
    words: int | None
    """Of the scored text; None where the tokenizer cannot tell which text its tokens cover. So for `bytes`."""
    bytes: int | None
    bos: str
    """What was done about BOS, in words."""
    eos: str

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(row.scored for row in self.rows)

    @property
    def reads(self) -> int:
        """Tokens that a model reads of the longest row: the last one is predicted, and never read."""
        return max(len(row.tokens) for row in self.rows) - 1


def parse_protocol(text: str | None, *, context: int | None, default_context: int) -> Protocol:
    """`concat@512`, `documents@512`, `lm-eval/wikitext` -> Protocol. None is `concat`; N may come from `context`.

    Raises:
        UsageError: an unknown protocol or variant, a context below 2, or two different contexts.
    """
    match = _NAME.fullmatch(text or CONCAT)
    name = match["name"] if match else str(text)
    if match is None or name not in OPTIONS:
        near = did_you_mean(name, OPTIONS)
        raise UsageError(f"unknown protocol {text!r}.{near}", "Use lm-eval/wikitext, concat@N or documents@N")
    option = match["option"]
    if option is not None and option not in OPTIONS[name]:
        known = ", ".join(OPTIONS[name]) or "none"
        raise UsageError(f"protocol {text!r}: {name} has no variant {option!r}.{did_you_mean(option, OPTIONS[name])}",
                         f"Variants: {known}")  # fmt: skip
    given = int(match["context"]) if match["context"] else None
    if given is not None and context is not None and given != context:
        raise UsageError(f"protocol {text!r} says {given} tokens and context says {context}", "Give one of them")
    length = next(size for size in (given, context, default_context) if size is not None)
    if length < 2:
        raise UsageError(f"context {length}: a window needs at least 2 tokens")
    return Protocol(name=name, context=length, option=option)


def make_task(protocol: Protocol, texts: Sequence[str], tokenizer: Any, *, max_windows: int | None = None) -> Task:
    """The rows of `texts` under `protocol`, the first `max_windows` of them.

    Raises:
        RefusedError: too little text for a single row. UsageError: lm-eval/wikitext on anything but one raw file.
    """
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"max_windows {max_windows} is not positive")
    make = {CONCAT: _concat, DOCUMENTS: _documents, WIKITEXT: _wikitext}[protocol.name]
    return make(protocol, texts, tokenizer, max_windows)


def _concat(protocol: Protocol, texts: Sequence[str], tokenizer: Any, max_windows: int | None) -> Task:
    marks = document_marks(tokenizer)
    if protocol.option == "plain":
        marks = {"bos_id": None, "eos_id": None}
    elif protocol.option == "eos":
        marks = {"bos_id": None, "eos_id": tokenizer.eos_token_id}
    ids, sizes = encode(texts, tokenizer)
    windows = pack(ids, protocol.context, **marks)[:max_windows]
    words, size = None, None
    if sizes is not None:
        # The counts go through the same packing, so that they lie under their tokens; marks count as no text.
        blank = {key: None if value is None else 0 for key, value in marks.items()}
        under = [pack([s[:, k] for s in sizes], protocol.context, **blank)[:max_windows, 1:] for k in (0, 1)]
        words, size = (int(u.sum(dtype=np.int64)) for u in under)
    bos, eos = marks.get("bos_id") is not None, marks["eos_id"] is not None
    return Task(
        protocol=protocol,
        rows=[Row(tokens=w, scored=len(w) - 1) for w in windows],
        words=words,
        bytes=size,
        bos="before each document" if bos else "none",
        eos="after each document" if eos else "none",
    )


def _documents(protocol: Protocol, texts: Sequence[str], tokenizer: Any, max_windows: int | None) -> Task:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = texts[:max_windows]
    ids, sizes = encode(texts, tokenizer)
    room = protocol.context - len(bos)
    rows = [Row(tokens=np.asarray([*bos, *d[:room]], dtype=np.int32), scored=len(d[:room]) - 1 + len(bos)) for d in ids]
    words = size = None
    if sizes is not None:
        first = 1 - len(bos)  # without BOS the first token of a document is predicted from nothing: not scored
        words, size = (sum(int(s[first:room, k].sum()) for s in sizes) for k in (0, 1))
    rows = [row for row in rows if row.scored > 0]
    if not rows:
        raise RefusedError("text is too short: no document has two tokens", hint="Give more text")
    return Task(
        protocol=protocol,
        rows=rows,
        words=words,
        bytes=size,
        bos="before each document" if bos else "none",
        eos="none",
    )


def _wikitext(protocol: Protocol, texts: Sequence[str], tokenizer: Any, max_windows: int | None) -> Task:
    if len(texts) != 1:
        raise UsageError(
            f"lm-eval/wikitext reads WikiText's raw file, one .txt; this data holds {len(texts)} documents"
        )
    if max_windows is not None:
        raise UsageError("lm-eval/wikitext is defined on the whole file: max_windows has no meaning there")
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise UsageError(
            "lm-eval/wikitext needs a BOS or EOS token to predict the first token from; the tokenizer has none"
        )
    single = protocol.option == "single-bos"
    pages = split_pages(texts[0])
    rows: list[Row] = []
    doubled = False
    for page in pages:
        ids = tokenizer.encode(detokenize(page), verbose=False, **({"add_special_tokens": False} if single else {}))
        doubled = doubled or ids[:1] == [prefix]
        rows += rolling_rows(ids, prefix, protocol.context)
    return Task(
        protocol=protocol,
        rows=rows,
        words=sum(len(re.split(r"\s+", page)) for page in pages),
        bytes=sum(len(page.encode("utf-8")) for page in pages),
        bos="double" if doubled else "single",
        eos="none" if tokenizer.bos_token_id is not None else "in place of BOS",
    )


def rolling_rows(ids: Sequence[int], prefix: int, context: int) -> list[Row]:
    """Rows that predict every token of `ids` once: windows of at most `context` inputs, disjoint but for one token.

    The first window starts from `prefix`, later ones from the last token of the window before; the last reaches further
    back, so that it is as long as the others.
    """
    stream = np.asarray([prefix, *ids], dtype=np.int32)
    rows = []
    for start in range(0, len(ids), context):
        end = min(start + context, len(ids))
        begin = max(0, end - context)
        rows.append(Row(tokens=stream[begin : end + 1], scored=end - start))
    return rows


def split_pages(raw: str) -> list[str]:
    """The pages of a raw WikiText file. A page starts at its title, a line ` = Title = ` (more signs: a section)."""
    pages: list[list[str]] = [[]]
    for line in raw.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    # What comes before the first title belongs to no page, unless it is all there is.
    return ["\n".join(lines) for lines in (pages[1:] or pages)]


_REPLACED_FIRST = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
                   (" ! ", "! "), (" ? ", "? "), (" , ", ", "))  # fmt: skip
_TIGHTENED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REPLACED_LAST = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"),
                  ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))  # fmt: skip


def detokenize(page: str) -> str:
    """WikiText's spaced-out text as ordinary text, by the harness's rules in the harness's order."""
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", page.replace("s '", "s'"))
    for old, new in _REPLACED_FIRST:
        text = text.replace(old, new)
    for pattern, new in _TIGHTENED:
        text = re.sub(pattern, new, text)
    for old, new in _REPLACED_LAST:
        text = text.replace(old, new)
    return text


def encode(texts: Sequence[str], tokenizer: Any) -> tuple[list[list[int]], list[np.ndarray] | None]:
    """Token ids of every text, without special tokens, and int32 [L, 2]: words that start and bytes that lie in each.

    The counts of a text add up to its words and bytes. They are None for a tokenizer that reports no offsets.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    ids: list[list[int]] = []
    sizes: list[np.ndarray] = []
    for text in texts:
        out = tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast, verbose=False
        )
        ids.append(list(out["input_ids"]))
        if fast:
            sizes.append(_sizes(text, out["offset_mapping"]))
    return ids, sizes if fast else None


def _sizes(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    if not offsets:
        return np.zeros((0, 2), dtype=np.int32)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    space = np.fromiter((c.isspace() for c in text), dtype=bool, count=len(text))
    starts = ~space & np.concatenate([[True], space[:-1]])
    # Spans may leave out spaces or share a character; a token owns what lies between the furthest ends so far.
    ends = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    sums = [np.concatenate([[0], np.cumsum(values)])[ends] for values in (starts, widths)]
    return np.stack([np.diff(s, prepend=0) for s in sums], axis=1).astype(np.int32)
