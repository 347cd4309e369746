"""The demo's text: the Python standard library that is already on this machine.

Every Python carries some ten megabytes of source, so the demo needs no download. A file belongs to the held-out part by
the hash of its name alone: the split is the same on every machine and under every Python that has the file, and the
embedded teacher has never seen a held-out file's name in training.
"""

from __future__ import annotations

import hashlib
import io
import os
import tokenize
from pathlib import Path

from linearize.errors import UsageError

SPLITS = ("train", "heldout")

HELDOUT_SHARE = 10
"""One file in this many is held out."""

SKIPPED_FOLDERS = frozenset({
    "site-packages", "dist-packages", "__pycache__",  # not the standard library
    "test", "tests", "idle_test", "__phello__",  # distributions leave these out, so machines would differ
    "encodings",  # tables of characters, not text
})  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")  # written for one machine


def stdlib_folder() -> Path:
    """The folder of the running Python's standard library.

    Raises:
        UsageError: this Python keeps its library in an archive, so there is no text to read.
    """
    folder = Path(os.__file__).parent
    if not (folder / "os.py").is_file():
        raise UsageError(
            f"no standard library source in {folder}", hint="Give a file of text with --data instead of demo"
        )
    return folder


def split_of(name: str) -> str:
    """`train` or `heldout` for a file, by the sha256 of its path relative to the library (with `/` between folders)."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0 else "train"


def stdlib_documents(split: str, *, folder: Path | None = None) -> list[tuple[str, str]]:
    """The files of one part as (relative name, text), sorted by name.

    Files that are empty or do not decode are left out. `folder` stands for the standard library (tests give their own).

    Raises:
        UsageError: an unknown split, or no source on this machine.
    """
    if split not in SPLITS:
        raise UsageError(f"demo text: {split!r} is not a split", hint=f"Use one of {', '.join(SPLITS)}")
    root = stdlib_folder() if folder is None else folder
    documents = []
    for name in _names(root):
        if split_of(name) == split:
            text = _read(root / name)
            if text and not text.isspace():
                documents.append((name, text))
    if not documents:
        raise UsageError(f"no Python source of split {split!r} in {root}", hint="Give a file of text with --data")
    return documents


def _names(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        # Pruned in place so that site-packages, which may hold gigabytes, is never entered.
        subfolders[:] = [
            f for f in subfolders if f not in SKIPPED_FOLDERS and not f.startswith((".", *SKIPPED_PREFIXES))
        ]
        here = Path(folder).relative_to(root)
        names += [(here / f).as_posix() for f in files if f.endswith(".py") and not f.startswith(SKIPPED_PREFIXES)]
    return sorted(names)


def _read(path: Path) -> str | None:
    """The text with newlines as \\n, decoded as the file's own coding line says; None if that fails."""
    try:
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, SyntaxError, UnicodeDecodeError, LookupError):
        return None
