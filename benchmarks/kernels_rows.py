"""Rows of kernel measurements: one JSON line each, never changed, only added; and the table that a reader wants.

A row has a figure (`ms`), or says in `status` and `note` why it has none, and in `seconds` what that took:

    missing     a package that is not installed
    refused     the library declines the shape, the card or this Triton
    wrong       it ran, and is further from float64 than bfloat16 explains
    left out    the benchmark does not try: more memory than a row is worth
    failed      an error, memory that ran out, a process that died
    unfinished  not compiled, tuned or timed within its limit, or within --minutes
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "fla-core", "mlstm-kernels", "transformers")
Row = dict[str, Any]
KEY = ("op", "implementation", "shape", "pass")
"""What names a measurement inside one run."""
Key = tuple[str, ...]
FINAL = ("missing", "refused", "left out")
"""Without a figure, and the same again as long as nothing changes: not tried anew. Time and luck are."""


def key_of(row: Row) -> Key:
    """The measurement that a row is of."""
    return tuple(row[name] for name in KEY)


def without(key: Key, status: str, note: str, seconds: float = 0.0) -> Row:
    """A row that has no figure."""
    return dict(zip(KEY, key, strict=True)) | {
        "ms": None, "status": status, "note": note, "seconds": round(seconds, 1)
    }  # fmt: skip


DECLINES = ("incorrect results", "not supported", "unsupported", "please upgrade", "requires triton", "only supports")


def failure(key: Key, error: BaseException, seconds: float = 0.0) -> Row:
    """The row of a measurement that an error ended: its kind and first line."""
    words = str(error).strip().partition("\n")[0]
    note = f"{type(error).__name__}: {words[:200]}"
    if isinstance(error, ImportError):
        status = "missing"
    elif isinstance(error, NotImplementedError) or any(x in words.lower() for x in DECLINES):
        status, note = "refused", words[:200] or note
    else:
        status = "failed"
    return without(key, status, note, seconds)


@cache
def sources() -> str:
    """Twelve hexadecimal digits of everything that is timed: the kernels' and the model's sources."""
    digest = hashlib.sha256()
    for folder in ("kernels/linearize_kernels", "linearize/modeling"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def environment() -> Row:
    """Machine, driver, versions, commit (-dirty: changed) and digest of the sources; "" where one cannot be told."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if gpu else "CPU",
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "versions": versions,
        "commit": _said("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"),
        "sources": sources(),
    }


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def append(path: Path, row: Row) -> None:
    """Add one row, with the date and the environment, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = row | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")} | environment()
    with path.open("a") as file:
        file.write(json.dumps(whole) + "\n")


def read(path: Path) -> list[Row]:
    """All rows of a file; an interrupted last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def latest(rows: Iterable[Row]) -> dict[Key, Row]:
    """The last row of every measurement on every machine; among those of the same sources, one that has a figure."""
    found: dict[Key, Row] = {}
    for row in rows:
        key = (row["machine"], *key_of(row))
        old = found.get(key)
        same = old is not None and old.get("sources") == row.get("sources")
        if old is None or not same or row.get("ms") is not None or old.get("ms") is None:
            found[key] = row
    return found


def settled(path: Path) -> set[Key]:
    """Measurements that need not be taken again: same machine, sources and versions, with a figure or without hope.

    A package that only one of the two has, such as a peer installed since, does not make a figure old.
    """
    here = environment()

    def known(row: Row) -> bool:
        if any(row.get(name) != here[name] for name in ("machine", "sources")):
            return False
        then, now = row.get("versions", {}), here["versions"]
        if row.get("ms") is not None:
            return all(then[name] == now[name] for name in then.keys() & now.keys())
        return row.get("status") in FINAL and then == now

    return {key_of(row) for row in read(path) if known(row)}


def figure(row: Row) -> str:
    """What a row says, short."""
    if row.get("ms") is None:
        spent = f" after {row['seconds']:.0f} s" if row.get("seconds") else ""
        return f"{row.get('status', 'failed')}{spent}: {row.get('note') or 'no reason known'}"
    parts = [f"{row['ms']:.3f} ms" if row["ms"] >= 0.1 else f"{row['ms'] * 1e3:.1f} us"]
    if "ns_per_token_head" in row:
        parts.append(f"{row['ns_per_token_head']:.2f} ns")
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if row.get("peak_bytes"):
        parts.append(f"{row['peak_bytes'] / 2**30:.2f} GiB")
    return "  ".join(parts)


def ratios(row: Row, mine: Row | None) -> str:
    """How many times a peer takes the time and the memory of ours; "" where one of the two has no figure.

    Where both count tokens, the time is that of a token: each may have answered a batch of its own size.
    """
    if mine is None or row.get("ms") is None:
        return ""
    counted = "tokens_per_s" in row and "tokens_per_s" in mine
    times = mine["tokens_per_s"] / row["tokens_per_s"] if counted else row["ms"] / mine["ms"]
    said = f"  {times:.2f}x"
    if row.get("peak_bytes") and mine.get("peak_bytes"):
        said += f" (memory {row['peak_bytes'] / mine['peak_bytes']:.2f}x)"
    return said


def table(rows: Sequence[Row], ours: str = "linearize") -> str:
    """One line a measurement, peers beside ours at the same op, shape and pass; last what has no figure, by reason."""
    have = [row for row in rows if row.get("ms") is not None]
    base: Mapping[Key, Row] = {
        (row["machine"], row["op"], row["shape"], row["pass"]): row for row in have if row["implementation"] == ours
    }
    lines, heading = [], None
    for row in sorted(have, key=lambda r: (r["machine"], r["op"], r["pass"], r["shape"], r["implementation"] != ours)):
        place = (row["machine"], row["op"], row["shape"], row["pass"])
        if place != heading:
            heading = place
            lines.append(f"{row['op']}, {row['pass']}, {row['shape']}")
        mine = base.get(place) if row["implementation"] != ours else None
        lines.append(f"    {row['implementation']:<28} {figure(row)}{ratios(row, mine)}")
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.get("ms") is None:
            which = " ".join(x for x in (row["shape"], row["pass"]) if x)
            grouped.setdefault((row["op"], row["implementation"], figure(row)), []).append(which)
    if grouped:
        lines.append("without a figure")
    for (op, implementation, said), places in sorted(grouped.items()):
        lines.append(f"    {op}, {implementation} ({'; '.join(places)}): {said}")
    return "\n".join(lines)
