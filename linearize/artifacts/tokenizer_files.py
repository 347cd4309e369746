"""A tokenizer's files, before a library reads them: real files of a sane size that name no code and no other file.

transformers opens whatever path a tokenizer's JSON puts under a name such as `tokenizer_file`, and an `auto_map` there
runs code once the folder is loaded with trust_remote_code. Neither is needed: such keys are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.artifacts.weights import read_json, require_inside, require_regular
from linearize.errors import UsageError

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
CAPS = {"tokenizer.json": 256 << 20, "tokenizer.model": 64 << 20, "vocab.json": 64 << 20, "merges.txt": 64 << 20}
"""Bytes. The largest vocabularies in use take a quarter of these."""
CAP = 16 << 20
_OBJECTS = (CONFIG, SPECIAL, "added_tokens.json")
_NEVER = ("auto_map", "trust_remote_code", "init_inputs", "gguf_file", "subfolder", "cache_dir")
_NAMES_FILES = ("_file", "_files", "_implementation")
_EXTRA = ("additional_chat_templates", "tekken.json", "tiktoken.model")
"""What transformers would read besides, and we neither check nor carry over."""


def check_tokenizer_files(folder: Path, names: Sequence[str]) -> None:
    """UsageError, by name, for a tokenizer file that is a link out of the folder, no file, too large or no JSON."""
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        require_inside(folder, path)
        require_regular(path)
        cap = CAPS.get(name, CAP)
        if path.is_file() and path.stat().st_size > cap:
            raise UsageError(f"{path} is larger than {cap >> 20} MiB, so it is no tokenizer's")
        if name in _OBJECTS:
            read_json(path, cap=cap)


def cleaned(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values` of the tokenizer file `name` without the keys that could choose code or another file."""
    kept = {key: value for key, value in values.items() if _harmless(key)}
    if name == SPECIAL:  # every key of this file is handed on as an argument
        kept = {key: value for key, value in kept.items() if key.endswith(("_token", "_tokens"))}
    return kept


@contextmanager
def readable(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder from which a library may read the tokenizer: `folder`, or links to its `names` with cleaned JSON.

    Raises:
        UsageError: see `check_tokenizer_files`.
    """
    check_tokenizer_files(folder, names)
    new = {name: values for name in (CONFIG, SPECIAL) if (values := _changed(folder / name)) is not None}
    if not new and not any(os.path.lexists(folder / name) for name in _EXTRA):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="linearize-tokenizer-") as made:
        for name in (*names, "config.json"):
            if name in new:
                Path(made, name).write_text(json.dumps(new[name]), encoding="utf-8")
            elif (folder / name).is_file():
                os.symlink(os.path.realpath(folder / name), Path(made, name))
        yield Path(made)


def carry(source: Path, target: Path) -> None:
    """Copy a tokenizer file byte for byte; one that names code or other files without those keys.

    Raises:
        UsageError: `source` is no JSON where it should be.
    """
    values = _changed(source) if source.name in (CONFIG, SPECIAL) else None
    if values is None:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _changed(path: Path) -> dict[str, Any] | None:
    """The cleaned values of a file, or None where there is nothing to clean."""
    if not path.is_file():
        return None
    values = read_json(path, cap=CAP)
    kept = cleaned(path.name, values)
    return None if kept.keys() == values.keys() else kept


def _harmless(key: str) -> bool:
    return not (key in _NEVER or key.startswith("_") or key.endswith(_NAMES_FILES))
