"""Text in, windows of tokens out: files, folders, the Hub and the demo; packing; the order of batches.

Nothing here needs torch or transformers, and `datasets` is imported only to read from the Hub.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import RefusedError, UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

FORMATS = (".jsonl", ".json", ".txt")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
SUFFIX = re.compile(r"^(?P<place>.+):(?P<key>source|config)=(?P<value>[^:]+)$")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
FIELD = "text"


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
    data: str, *, split: str | None = None, source: str | None = None, limit_bytes: int | None = None
) -> tuple[list[str], Source]:
    """Read documents, in a fixed order, and say what was read.

    `data` is a .jsonl, .json or .txt file (also .gz, .xz), a folder of those, `demo`, or a Hub dataset
    `owner/name`. A line of a jsonl file is an object with a string field "text"; a .txt file is one document.
    `PLACE:source=NAME` (or `source`) keeps the records whose field "source" is NAME; `HUB_ID:config=NAME` picks a
    configuration. `split` ("train" or "heldout") chooses the part of `demo` and of a Hub dataset; a file is one part
    and is read whole. Reading stops once `limit_bytes` bytes of text are there.

    Raises:
        UsageError: missing or unreadable file, bytes that are not UTF-8, a record without "text", or no text at all;
            the message names file and line.
    """
    place, options = _split_suffixes(data)
    source = _agree(data, source, options.get("source"))
    if split not in (None, "train", "heldout"):
        raise UsageError(f"data split {split!r} is unknown", hint="Use train or heldout")
    path = Path(place).expanduser()
    kind = _kind(place, path)
    records: Iterable[tuple[str, str | None]]
    if kind == "demo":
        records = _demo_records(split or "train")
    elif kind == "folder":
        records = _folder_records(path)
    elif kind == "file":
        records = _file_records(path)
    else:
        records = _hub_records(place, split or "train", options.get("config"))
    if "config" in options and kind != "hub":
        raise UsageError(
            f"{data}: config= picks a configuration of a Hub dataset", hint=f"{place} is local: leave it out"
        )
    texts = _collect(records, place, source, limit_bytes)
    return texts, Source(kind=kind, name=data, documents=len(texts), bytes=_size(texts), sha256=_digest(texts))


def require_place(data: str) -> None:
    """That `data` is something to read, as far as its name tells; nothing is read.

    Raises:
        UsageError: no such file or folder, and not the form of a Hub id.
    """
    place = _split_suffixes(data)[0]
    _kind(place, Path(place).expanduser())


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


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    import numpy as np

    key = int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:16], "big")
    # Sorting raw draws, not Generator.permutation: only the bit stream is promised to be the same in every numpy.
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def _split_suffixes(data: str) -> tuple[str, dict[str, str]]:
    place, options = data, {}
    while (match := SUFFIX.match(place)) and not Path(place).exists():
        if match["key"] in options:
            raise UsageError(f"{data}: {match['key']}= is given twice")
        place, options[match["key"]] = match["place"], match["value"]
    return place, options


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


def _collect(
    records: Iterable[tuple[str, str | None]], place: str, source: str | None, limit_bytes: int | None
) -> list[str]:
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
        raise UsageError(f"{place}: holds no text")
    return texts


def _folder_records(folder: Path) -> Iterator[tuple[str, str | None]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _format(p) and not p.name.startswith("."))
    if not files:
        raise UsageError(f"{folder}: no text file in this folder", hint=f"Readable: {_readable()}")
    for path in files:
        yield from _file_records(path)


def _file_records(path: Path) -> Iterator[tuple[str, str | None]]:
    kind = _format(path)
    if kind is None:
        raise UsageError(f"{path}: not a format of text that is read here", hint=f"Readable: {_readable()}")
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            if kind == ".txt":
                yield _decode(file.read(), path, 1), None
            elif kind == ".json":
                yield from _json_records(file.read(), path)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _record(_parse(line.rstrip(b"\r\n"), path, number), path, f"line {number}")
    # A damaged archive raises any of these while it is being read.
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error


def _json_records(data: bytes, path: Path) -> Iterator[tuple[str, str | None]]:
    """A .json file holds one array of records, or, as many name it, one record a line."""
    if data.lstrip()[:1] == b"[":
        for number, item in enumerate(_parse(data, path, 1)):
            yield _record(item, path, f"item {number}")
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield _record(_parse(line.rstrip(b"\r"), path, number), path, f"line {number}")


def _parse(data: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(_decode(data, path, number))
    except (ValueError, RecursionError) as error:
        line = number + getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", None) or "nested too deep"
        raise UsageError(f"{path}, line {line}: not JSON ({reason})") from error


def _decode(data: bytes, path: Path, number: int) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise UsageError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})",
            hint="Convert it, for example with iconv",
        ) from error


def _record(item: Any, path: Path, where: str) -> tuple[str, str | None]:
    if not isinstance(item, dict):
        raise UsageError(f"{path}, {where}: a record is an object with a field {FIELD!r}, not a {type(item).__name__}")
    text = item.get(FIELD)
    if not isinstance(text, str):
        fields = ", ".join(map(str, list(item)[:8])) or "none"
        problem = "is missing" if FIELD not in item else f"is not a string but a {type(text).__name__}"
        raise UsageError(f"{path}, {where}: the field {FIELD!r} {problem}; fields there: {fields}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{path}, {where}: the text holds half a surrogate pair, which is no character") from error
    label = item.get("source")
    return text, None if label is None else str(label)


def _demo_records(split: str) -> Iterator[tuple[str, str | None]]:
    from linearize.demo.text import stdlib_documents

    for _, text in stdlib_documents(split):
        yield text, None


def _hub_records(name: str, split: str, config: str | None) -> Iterator[tuple[str, str | None]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{name}: no such file here, and reading a Hub dataset needs the package datasets",
            hint="pip install datasets, or give a file",
        ) from error
    try:
        parts = list(datasets.get_dataset_split_names(name, config))
        wanted = ("train",) if split == "train" else ("validation", "test")
        part = next((p for p in wanted if p in parts), None)
        if part is None:
            raise UsageError(f"{name}: the dataset has no split {' or '.join(wanted)}; it has {', '.join(parts)}")
        rows = datasets.load_dataset(name, config, split=part, streaming=True)
        for number, row in enumerate(rows):
            yield _record(row, Path(name), f"row {number}")
    except UsageError:
        raise
    except Exception as error:  # the Hub's client has many kinds of failure, and each is the user's to act on
        raise UsageError(
            f"{name}: cannot be read from the Hub ({type(error).__name__}: {error})",
            hint="Check the name and the network; HUB_ID:config=NAME picks a configuration",
        ) from error


def _is_hub_id(place: str) -> bool:
    # A path with a typo in it is not to be looked up on the network.
    return bool(HUB_ID.match(place)) and _format(Path(place)) is None and not Path(place).parent.is_dir()


def _format(path: Path) -> str | None:
    name = path.name.lower()
    for packed in OPENERS:
        name = name.removesuffix(packed)
    return next((f for f in FORMATS if name.endswith(f)), None)


def _readable() -> str:
    return f"{', '.join(FORMATS)}, each also as {', '.join(OPENERS)}"


def _missing(path: Path) -> UsageError:
    if not path.parent.is_dir():
        return UsageError(f"{path}: no such file or folder (there is no {path.parent} either)")
    return UsageError(
        f"{path}: no such file or folder.{did_you_mean(path.name, (p.name for p in path.parent.iterdir()))}"
    )


def _size(texts: Iterable[str]) -> int:
    return sum(len(t.encode("utf-8")) for t in texts)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update((b"\0" if number else b"") + text.encode("utf-8"))
    return digest.hexdigest()
