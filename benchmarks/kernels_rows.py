"""Rows of kernel measurements: one JSON line each, never changed, only added; and the table that a reader wants."""

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
    """Machine, driver, versions, commit and digest of the sources; "" where one cannot be told."""
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
        "commit": _said("git", "rev-parse", "--short=12", "HEAD"),
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


def latest(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """The last row of every measurement on every machine; one that has a figure before one that has none."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row["machine"], *(row[name] for name in KEY))
        if row.get("ms") is not None or found.get(key, {}).get("ms") is None:
            found[key] = row
    return found


def measured(path: Path) -> set[tuple[str, ...]]:
    """Measurements that need not be taken again: same machine, same sources, a figure."""
    here = environment()
    return {
        tuple(row[name] for name in KEY)
        for row in read(path)
        if row.get("ms") is not None and row["machine"] == here["machine"] and row["sources"] == here["sources"]
    }


def figure(row: Row) -> str:
    """What a row says, short."""
    if row.get("ms") is None:
        return row.get("note") or "nothing"
    parts = [f"{row['ms']:.3f} ms" if row["ms"] >= 0.1 else f"{row['ms'] * 1e3:.1f} us"]
    if "ns_per_token_head" in row:
        parts.append(f"{row['ns_per_token_head']:.2f} ns")
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if row.get("peak_bytes"):
        parts.append(f"{row['peak_bytes'] / 2**30:.2f} GiB")
    return "  ".join(parts)


def table(rows: Sequence[Row], ours: str = "linearize") -> str:
    """One line a measurement; peers with how many times longer they take than ours at the same op, shape and pass."""
    base: Mapping[tuple[str, str, str], float] = {
        (row["op"], row["shape"], row["pass"]): row["ms"]
        for row in rows
        if row["implementation"] == ours and row.get("ms") is not None
    }
    lines, heading = [], None
    for row in sorted(rows, key=lambda r: (r["op"], r["pass"], r["shape"], r["implementation"] != ours)):
        group = (row["op"], row["pass"], row["shape"])
        if group != heading:
            heading = group
            lines.append(f"{row['op']}, {row['pass']}, {row['shape']}")
        mine = base.get((row.get("against", row["op"]), row["shape"], row["pass"]))
        ratio = f"  {row['ms'] / mine:.2f}x" if mine and row.get("ms") and row["implementation"] != ours else ""
        lines.append(f"    {row['implementation']:<28} {figure(row)}{ratio}")
    return "\n".join(lines)
