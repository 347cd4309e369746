"""What a case of hostile files is, and the ways to damage a file that several kinds share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to damage a folder."""

    name: str
    kind: str
    damage: Callable[[Path, Path], None]
    """(the folder, the folder with the canaries)."""
    must: bool = True
    base: str = "teacher"
    """teacher | sharded | export | run"""


def pack(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def replaced(name: str, data: bytes) -> Callable[[Path, Path], None]:
    def damage(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return damage


def edited(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    """Set keys of a JSON file; `{outside}` in a text is the canaries' folder."""

    def damage(folder: Path, outside: Path) -> None:
        def placed(value: Any) -> Any:
            if isinstance(value, str):
                return value.replace("{outside}", str(outside))
            if isinstance(value, list):
                return [placed(item) for item in value]
            return {key: placed(item) for key, item in value.items()} if isinstance(value, dict) else value

        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, **placed(changes)}))

    return damage


def flipped(name: str, share: float, bit: int) -> Callable[[Path, Path], None]:
    def damage(folder: Path, outside: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(len(data) * share)] ^= 1 << bit
        (folder / name).write_bytes(data)

    return damage


def sparse(name: str, size: int) -> Callable[[Path, Path], None]:
    def damage(folder: Path, outside: Path) -> None:
        with open(folder / name, "wb") as file:
            file.truncate(size)

    return damage
