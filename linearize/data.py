"""Text in, windows of tokens out: files, folders, the Hub and the demo; packing; the order of batches.

Nothing here needs torch or transformers; `datasets` is imported only to read from the Hub, pyarrow for tables.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import RefusedError, UsageError, did_you_mean
from linearize.records import (
    Record,
    demo_records,
    file_records,
    files_of,
    folder_records,
    format_of,
    require_readable,
)

if TYPE_CHECKING:
    import numpy as np

SUFFIX = re.compile(r"^(?P<place>.+):(?P<key>[a-z_]+)=(?P<value>[^:]+)$")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
OPTIONS: dict[str, tuple[str, ...]] = {
    "source": ("file", "folder", "hub"),
    "column": ("file", "folder", "hub"),
    "split": ("hub", "folder", "demo"),
    "config": ("hub",),
    "revision": ("hub",),
    "shuffle": ("file", "folder", "hub", "demo"),
    "documents": ("file", "folder", "hub", "demo"),
}
"""What may stand after a place, and the kinds of places it has a meaning for."""
_PLACES = "Give a text file, a folder of them, a Hub data set (owner/name) or demo."
BUFFER = 10_000
"""Documents that are read ahead to shuffle them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where texts came from and exactly which they were."""

    kind: str
    """file | folder | hub | demo"""
    name: str
    documents: int
    bytes: int
    """UTF-8 bytes of all documents."""
    sha256: str
    """Of the documents in UTF-8, one NUL byte between two: for one .txt file this is the file's own sha256."""

    def describe(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def load_texts(
    data: str, *, split: str | None = None, source: str | None = None, limit_bytes: int | None = None
) -> list[str]:
    """The documents of `data`; see `load_source`."""
    return load_source(data, split=split, source=source, limit_bytes=limit_bytes)[0]


def load_source(
    data: str,
    *,
    split: str | None = None,
    source: str | None = None,
    limit_bytes: int | None = None,
    packed: bool = False,
) -> tuple[list[str], Source]:
    """Read documents, in a fixed order, and say what was read.

    `data` is a .jsonl, .json, .txt, .parquet or .csv file (also .gz, .xz), a folder of those, `demo`, or a Hub dataset
    `owner/name`. A .txt file is one document, elsewhere a record is one: its text lies in the field "text", and in
    tables and on the Hub in the only column of strings, where there is one and no "text". After the place may stand

        :column=NAME     the field of the text
        :source=NAME     only records whose field "source" is NAME (or the argument `source`)
        :split=NAME      of a Hub dataset, that split; of a folder, the files whose path names it; demo: train | heldout
        :config=NAME     of a Hub dataset, that configuration
        :revision=NAME   of a Hub dataset, that branch, tag or commit; also `owner/name@NAME`
        :shuffle=SEED    documents in an order drawn from SEED: files, then within 10,000 documents read ahead
        :documents=apart for a conversion (`packed`), which has to ask `documents_apart`: see there

    `split` (the argument: "train" or "heldout") is the role of the text, and chooses the part of `demo` and of a Hub
    dataset where `:split=` does not; a file is one part and is read whole. Reading stops once `limit_bytes` bytes of
    text are there, so a larger limit only adds documents: a run that is resumed reads the same ones again.

    Raises:
        UsageError: missing or unreadable file, bytes that are not UTF-8, a record without text, or no text at all;
            the message names file and line.
    """
    place, options = _split_suffixes(data)
    source = _agree(data, source, options.get("source"))
    if split not in (None, "train", "heldout"):
        raise UsageError(f"data split {split!r} is unknown", hint="Use train or heldout")
    path = Path(place).expanduser()
    kind = _kind(place, path)
    _require_meaning(data, place, kind, options)
    if "documents" in options and not packed:
        raise UsageError(f"{data}: documents= says how a conversion packs its windows", "Leave it out here")
    column, part = options.get("column"), options.get("split")
    seed = None if "shuffle" not in options else int(options["shuffle"])
    if kind == "hub":
        from linearize.hub_records import hub_records

        records = hub_records(
            place,
            role=split or "train",
            split=part,
            config=options.get("config"),
            column=column,
            revision=options.get("revision"),
            shuffle=None if seed is None else (seed, BUFFER),
        )
    else:
        if kind == "demo":
            records = demo_records(part or split or "train")
        elif kind == "folder":
            files = files_of(path, part)
            if seed is not None:
                files = [files[i] for i in _order(len(files), seed, 0)]
            records = folder_records(files, column)
        else:
            records = file_records(path, column)
        records = records if seed is None else _shuffled(records, seed)
    texts = _collect(records, place, source, limit_bytes)
    return texts, Source(kind=kind, name=data, documents=len(texts), bytes=_size(texts), sha256=_digest(texts))


def require_place(data: str) -> None:
    """That `data` is something to read, as far as its name and what is installed tell; nothing is read.

    Raises:
        UsageError: no such file or folder, and not the form of a Hub id; an option that is unknown or has no meaning
            there; a package that its format needs is absent.
    """
    place, options = _split_suffixes(data)
    path = Path(place).expanduser()
    kind = _kind(place, path)
    _require_meaning(data, place, kind, options)
    if kind == "file":
        require_readable(path)
    elif kind == "folder":
        for file in files_of(path, options.get("split")):
            require_readable(file)


def documents_apart(data: str) -> bool:
    """Whether `data` ends in `:documents=apart`: windows of training then keep their documents apart.

    For teachers that were pretrained so. `:documents=joined`, and nothing, is what most were pretrained with: documents
    run on, one after the other.
    """
    return _split_suffixes(data)[1].get("documents") == "apart"


def tokenize_documents(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of every text, without special tokens."""
    if not texts:
        return []
    # verbose=False: a document longer than the model's context is no mistake here.
    return list(
        tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    )


def document_marks(tokenizer: Any) -> dict[str, int | None]:
    """How documents are told apart in a stream, as arguments of `pack`: BOS before each, or EOS after each without BOS.

    That is how models that have a BOS were pretrained; an EOS that a teacher has never read costs it whole nats.
    """
    bos = tokenizer.bos_token_id
    return {"bos_id": bos, "eos_id": tokenizer.eos_token_id if bos is None else None}


def pack(
    docs: Iterable[Sequence[int] | np.ndarray], context: int, *, eos_id: int | None, bos_id: int | None = None
) -> np.ndarray:
    """Join documents, each between `bos_id` and `eos_id` (None: no such token), and cut: int32 [N, context].

    The tail that fills no window is dropped.

    Raises:
        RefusedError: fewer tokens than one window.
    """
    import numpy as np

    if context < 1:
        raise UsageError(f"context {context} is not positive")
    start = [] if bos_id is None else [bos_id]
    end = [] if eos_id is None else [eos_id]
    parts = [np.asarray([*start, *doc, *end], dtype=np.int32) for doc in docs]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    count = len(stream) // context
    if count < 1:
        raise RefusedError(
            f"text is shorter than one context: {len(stream)} tokens, needs {context}",
            hint="Give more text or a smaller context",
        )
    return stream[: count * context].reshape(count, context)


def batches(windows: np.ndarray, *, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of step `step` (from 0): [batch_size, context].

    Every epoch visits all windows once, in an order drawn from (seed, epoch) alone, so a resumed run needs no state of
    the order. A batch may reach over the end of an epoch into the next.
    """
    import numpy as np

    count = len(windows)
    drawn = range(step * batch_size, (step + 1) * batch_size)
    epochs = {e: _order(count, seed, e) for e in range(drawn[0] // count, drawn[-1] // count + 1)}
    return windows[np.asarray([epochs[i // count][i % count] for i in drawn])]


@lru_cache(4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    import numpy as np

    key = int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:16], "big")
    # Sorting raw draws, not Generator.permutation: only the bit stream is promised to be the same in every numpy.
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def _shuffled(records: Iterable[Record], seed: int) -> Iterator[Record]:
    """Records in an order drawn from `seed` within a buffer that moves through them."""
    import numpy as np

    bits = np.random.Philox(key=seed)
    buffer: list[Record] = []
    for record in records:
        if len(buffer) < BUFFER:
            buffer.append(record)
            continue
        place = int(bits.random_raw()) % BUFFER
        yield buffer[place]
        buffer[place] = record
    yield from (buffer[i] for i in np.argsort(bits.random_raw(len(buffer)), kind="stable"))


def _split_suffixes(data: str) -> tuple[str, dict[str, str]]:
    if not data.strip():
        raise UsageError("the data is empty", _PLACES)
    place, options = data, {}
    while (match := SUFFIX.match(place)) and not Path(place).exists():
        key = match["key"]
        if key not in OPTIONS:
            raise UsageError(
                f"{data}: unknown option {key!r}.{did_you_mean(key, OPTIONS)}", f"Options: {_known(OPTIONS)}"
            )
        if key in options:
            raise UsageError(f"{data}: {key}= is given twice")
        place, options[key] = match["place"], match["value"]
    name, at, revision = place.partition("@")
    if at and HUB_ID.match(name) and not Path(place).exists():  # as models of the Hub are named, too
        if options.setdefault("revision", revision) != revision or not revision:
            raise UsageError(f"{data}: names a revision, and :revision= another", "Give one of them")
        place = name
    return place, options


def _require_meaning(data: str, place: str, kind: str, options: Mapping[str, str]) -> None:
    """Every option must mean something where it is given."""
    for key in options:
        if kind not in OPTIONS[key]:
            where = {"hub": "a Hub dataset", "folder": "a folder", "file": "a file", "demo": "demo"}
            meant = " or ".join(where[k] for k in OPTIONS[key])
            raise UsageError(f"{data}: {key}= picks a part of {meant}", hint=f"{place} is {where[kind]}: leave it out")
    if kind == "demo" and options.get("split", "train") not in ("train", "heldout"):
        raise UsageError(f"{data}: demo has no split {options['split']!r}", hint="Use train or heldout")
    if options.get("documents", "apart") not in ("joined", "apart"):
        raise UsageError(f"{data}: documents={options['documents']} is unknown", hint="Use joined or apart")
    if "shuffle" in options and not (options["shuffle"].isdecimal() and int(options["shuffle"]) < 2**63):
        raise UsageError(f"{data}: shuffle= takes a seed, a whole number", hint="For example :shuffle=0")


def _known(names: Iterable[str]) -> str:
    return ", ".join(f":{name}=" for name in names)


def _kind(place: str, path: Path) -> str:
    if place == "demo":
        return "demo"
    if path.is_dir():
        return "folder"
    if path.exists():
        return "file"
    if _is_hub_id(place):
        return "hub"
    raise _missing(path)


def _agree(data: str, argument: str | None, suffix: str | None) -> str | None:
    if argument is not None and suffix is not None and argument != suffix:
        raise UsageError(f"{data}: the source is also given as {argument!r}", hint="Give it once")
    return suffix if argument is None else argument


def _collect(records: Iterable[Record], place: str, source: str | None, limit_bytes: int | None) -> list[str]:
    texts: list[str] = []
    seen: set[str] = set()
    size = 0
    for text, label in records:
        if source is not None and label != source:
            seen.add(str(label))
            continue
        if text and not text.isspace():
            texts.append(text)
            size += len(text.encode("utf-8"))
            if limit_bytes is not None and size >= limit_bytes:
                break
    if not texts and source is not None and seen:
        known = ", ".join(sorted(seen - {"None"})[:8]) or "none at all"
        raise UsageError(f"{place}: no record of source {source!r}; there is {known}.{did_you_mean(source, seen)}")
    if not texts:
        raise UsageError(f"{place}: holds no text", _PLACES)
    return texts


def _is_hub_id(place: str) -> bool:
    # A path with a typo in it is not to be looked up on the network.
    return bool(HUB_ID.match(place)) and format_of(Path(place)) is None and not Path(place).parent.is_dir()


def _missing(path: Path) -> UsageError:
    if not path.parent.is_dir():
        return UsageError(f"{path}: no such file or folder (there is no {path.parent} either)", _PLACES)
    near = did_you_mean(path.name, (p.name for p in path.parent.iterdir()))
    return UsageError(f"{path}: no such file or folder.{near}", _PLACES)


def _size(texts: Iterable[str]) -> int:
    return sum(len(t.encode("utf-8")) for t in texts)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update((b"\0" if number else b"") + text.encode("utf-8"))
    return digest.hexdigest()
