"""Records out of places: text files, tables, folders, the demo. A record is (text, source or None).

Files are read as streams, as far as the reader goes on. Tables (parquet, csv) need pyarrow, which the extra `data`
brings; of them only the columns that are wanted are read. The Hub has a module of its own, hub_records.py.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UsageError, did_you_mean
from linearize.progress import tell

Record = tuple[str, str | None]
FORMATS = (".jsonl", ".json", ".txt", ".parquet", ".csv")
TABLES = (".parquet", ".csv")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
FIELD = "text"
LABEL = "source"
CHOOSE = "Add :column=NAME"
INSTALL = "pip install 'datasets>=3'"  # which brings pyarrow
ROWS = 256
"""Rows of a parquet file that are held at once."""
BLOCK = 16 << 20
"""Bytes of a csv file that are held at once: the longest row there may be."""


def format_of(path: Path) -> str | None:
    """`.jsonl` for a.jsonl.gz; None for what is not read here."""
    name = path.name.lower()
    for packed in OPENERS:
        name = name.removesuffix(packed)
    return next((f for f in FORMATS if name.endswith(f)), None)


def files_of(folder: Path, part: str | None) -> list[Path]:
    """The readable files below `folder` in the order of their names; of `part` those whose path names it.

    Raises:
        UsageError: there is none.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"{folder}: cannot be read", "Check whose folder it is.")
    found = (p for p in folder.rglob("*") if p.is_file() and format_of(p))
    files = sorted(p for p in found if not any(name.startswith(".") for name in p.relative_to(folder).parts))
    if not files:
        raise UsageError(f"{folder}: no text file in this folder", hint=f"Readable: {_readable()}")
    if part is None:
        return files
    named = re.compile(rf"(?<![a-z0-9]){re.escape(part.lower())}(?![a-z0-9])")
    chosen = [p for p in files if named.search(p.relative_to(folder).as_posix().lower())]
    if not chosen:
        first = ", ".join(p.relative_to(folder).as_posix() for p in files[:5])
        raise UsageError(
            f"{folder}: no file of the split {part!r}; there is {first}", "A split is part of a file's name"
        )
    return chosen


def require_readable(path: Path) -> None:
    """That a file's format is read here, with what is installed.

    Raises:
        UsageError: it is not.
    """
    kind = format_of(path)
    if kind is None:
        raise UsageError(f"{path}: not a format of text that is read here", hint=f"Readable: {_readable()}")
    if kind in TABLES and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"{path}: reading {kind} needs the package pyarrow, which is not installed", hint=INSTALL)


def file_records(path: Path, column: str | None = None) -> Iterator[Record]:
    """The records of one file; `column` holds the text (None: "text", or the only column of strings there is).

    Raises:
        UsageError: unreadable, not UTF-8, or a record without text; the message names file and line.
    """
    require_readable(path)
    kind = format_of(path)
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            if kind == ".txt":
                yield _decode(file.read(), path, 1), None
            elif kind == ".json":
                yield from _json_records(file.read(), path, column)
            elif kind == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        item = _parse(line.rstrip(b"\r\n"), path, number)
                        yield record_of(item, path, f"line {number}", column)
            else:
                yield from _table_records(file, path, kind, column)
    # A damaged archive raises any of these while it is being read.
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason})", "Check that it is whole, and may be read.") from error


def folder_records(files: Sequence[Path], column: str | None) -> Iterator[Record]:
    """The records of several files, one after the other."""
    for path in files:
        yield from file_records(path, column)


def text_column(columns: Mapping[str, bool], wanted: str | None, place: str) -> str:
    """Which column holds the text; `columns` says of each whether it holds strings.

    Raises:
        UsageError: the wanted one is not there or holds no strings, or several could be meant.
    """
    strings = [name for name, is_string in columns.items() if is_string]
    known = ", ".join(columns) or "none"
    if wanted is not None:
        if wanted not in columns:
            near = did_you_mean(wanted, columns)
            raise UsageError(f"{place}: no column {wanted!r}; there is {known}.{near}")
        if wanted not in strings:
            known = ", ".join(strings) or "none"
            raise UsageError(f"{place}: the column {wanted!r} holds no text; those that do: {known}")
        return wanted
    if FIELD in columns and FIELD not in strings:
        raise UsageError(f"{place}: the field {FIELD!r} is not a string", f"{CHOOSE} to name another one")
    if FIELD in strings:
        return FIELD
    others = [name for name in strings if name != LABEL]
    if len(others) == 1:
        tell(f"taking the text from the column {others[0]!r}", place)
        return others[0]
    raise UsageError(
        f"{place}: the field {FIELD!r} is missing; fields there: {known}",
        "Add :column=NAME to say which holds the text",
    )


def record_of(item: Any, path: Path | str, where: str, column: str | None = None) -> Record:
    """A mapping as a record; its text lies in `column` (None: "text"). Null is an empty text, as an empty cell is.

    Raises:
        UsageError: no mapping, no such field, no string, or a string that is not text.
    """
    field = column or FIELD
    if not isinstance(item, dict):
        raise UsageError(f"{path}, {where}: a record is an object with a field {field!r}, not a {type(item).__name__}")
    text = "" if field in item and item[field] is None else item.get(field)
    if not isinstance(text, str):
        fields = ", ".join(map(str, list(item)[:8])) or "none"
        problem = "is missing" if field not in item else f"holds {type(text).__name__}, not text"
        hint = f"{CHOOSE} to say which holds the text" if column is None and field not in item else None
        raise UsageError(f"{path}, {where}: the field {field!r} {problem}; fields there: {fields}", hint)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{path}, {where}: the text holds half a surrogate pair, which is no character") from error
    label = item.get(LABEL)
    return text, None if label is None or field == LABEL else str(label)


def demo_records(split: str) -> Iterator[Record]:
    """Python's own standard library."""
    from linearize.demo.text import stdlib_documents

    for _, text in stdlib_documents(split):
        yield text, None


def _table_records(file: Any, path: Path, kind: str | None, column: str | None) -> Iterator[Record]:
    import pyarrow as pa

    try:
        batches = _parquet(file, path, column) if kind == ".parquet" else _csv(file, path, column)
        number = 0
        for name, batch in batches:
            for item in batch.to_pylist():
                if item[name] is not None:  # an empty cell is no document, and no mistake
                    yield record_of(item, path, f"row {number}", name)
                number += 1
    except pa.ArrowException as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _parquet(file: Any, path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    name, columns = _wanted(table.schema_arrow, path, column, typed=True)
    for batch in table.iter_batches(batch_size=ROWS, columns=columns):
        yield name, batch


def _csv(file: Any, path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow import csv

    how = {
        "parse_options": csv.ParseOptions(newlines_in_values=True),
        "read_options": csv.ReadOptions(block_size=BLOCK),
    }
    name, columns = _wanted(csv.open_csv(file, **how).schema, path, column, typed=False)
    file.seek(0)
    convert = csv.ConvertOptions(include_columns=columns, column_types={c: pa.string() for c in columns})
    for batch in csv.open_csv(file, convert_options=convert, **how):
        yield name, batch


def _wanted(schema: Any, path: Path, column: str | None, *, typed: bool) -> tuple[str, list[str]]:
    """The column of the text, and all that are read; `typed`: the file itself says what a column holds."""
    from pyarrow import types

    strings = {f.name: _is_text(f.type) for f in schema}
    if not typed:  # guessed from the first rows: what is named is text, and bytes are text in another encoding
        strings |= {f.name: True for f in schema if types.is_binary(f.type) or f.name in (column, FIELD)}
    name = text_column(strings, column, str(path))
    return name, list(dict.fromkeys([name, *([LABEL] if LABEL in strings else [])]))


def _is_text(kind: Any) -> bool:
    """Whether a column of this type holds strings, each by itself or as the number of one in a dictionary."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    names = ("is_string", "is_large_string", "is_string_view")  # the last from pyarrow 16 on
    return any(getattr(types, name)(kind) for name in names if hasattr(types, name))


def _json_records(data: bytes, path: Path, column: str | None) -> Iterator[Record]:
    """A .json file holds one array of records, or, as many name it, one record a line."""
    if data.lstrip()[:1] == b"[":
        for number, item in enumerate(_parse(data, path, 1)):
            yield record_of(item, path, f"item {number}", column)
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield record_of(_parse(line.rstrip(b"\r"), path, number), path, f"line {number}", column)


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


def _readable() -> str:
    return f"{', '.join(FORMATS)}, each also as {', '.join(OPENERS)}"
