"""The demo's text: the standard library, split by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from linearize.data import load_source
from linearize.demo.text import split_of, stdlib_documents
from linearize.errors import UsageError


def test_split_is_pinned_by_name() -> None:
    # The embedded teacher was trained by this split: it must never move.
    names = ("argparse.py", "ast.py", "json/decoder.py", "asyncio/selector_events.py", "_pydecimal.py", "os.py")
    assert [n for n in names if split_of(n) == "heldout"] == ["asyncio/selector_events.py", "_pydecimal.py"]


def test_parts_are_disjoint_ordered_and_about_one_in_ten() -> None:
    train, held = (stdlib_documents(s) for s in ("train", "heldout"))
    names = [n for n, _ in train + held]
    assert len(set(names)) == len(names)
    assert [n for n, _ in train] == sorted(n for n, _ in train)
    assert 0.05 < len(held) / len(names) < 0.15
    assert "os.py" in names and sum(len(t) for _, t in held) > 300_000
    assert not any(part in n.split("/") for n in names for part in ("site-packages", "test", "__pycache__"))


def test_a_file_is_left_out_for_its_place_or_its_bytes(tmp_path: Path) -> None:
    files = {
        "a.py": b"x = 1\r\ny = 2\r",
        "pkg/b.py": "# coding: latin-1\n# é\n".encode("latin-1"),
        "bad.py": b"# \xff\xfe",
        "unknown.py": b"# coding: no-such-thing\n",
        "empty.py": b" \n",
        "data.txt": b"no",
        "_sysconfigdata_x.py": b"prefix = '/home/me'",
        "site-packages/c.py": b"no",
        "test/d.py": b"no",
        "config-3.11/e.py": b"no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = {n: t for s in ("train", "heldout") for n, t in _documents(s, tmp_path)}
    assert found == {"a.py": "x = 1\ny = 2\n", "pkg/b.py": "# coding: latin-1\n# é\n"}


def _documents(split: str, folder: Path) -> list[tuple[str, str]]:
    try:
        return stdlib_documents(split, folder=folder)
    except UsageError:  # a folder this small may leave a part empty
        return []


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'test' is not a split"):
        stdlib_documents("test")
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.pyc"))
    with pytest.raises(UsageError, match="no standard library source in"):
        stdlib_documents("train")


def test_demo_is_a_data_source() -> None:
    texts, source = load_source("demo", split="heldout")
    assert texts == [t for _, t in stdlib_documents("heldout")]
    assert (source.kind, source.documents) == ("demo", len(texts))
    assert load_source("demo")[0] == [t for _, t in stdlib_documents("train")]
