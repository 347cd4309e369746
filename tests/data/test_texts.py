"""Reading text: every format gives the same documents, and every fault is one line that names file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest

from linearize.data import load_source, load_texts, require_place
from linearize.errors import RefusedError, UsageError

DOCS = ["one\ntwo", "über 東京", "three"]


def jsonl(texts: list[str], **extra: str) -> bytes:
    return "".join(json.dumps({"text": t, **extra}, ensure_ascii=False) + "\n" for t in texts).encode()


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    lines = jsonl(DOCS)
    files = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.xz": lzma.compress(lines),
        "lines.json": b"\n" + lines,
        "array.json": json.dumps([{"text": t} for t in DOCS], indent=1).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "blank.jsonl": lines.replace(b"\n", b"\r\n\r\n"),
    }
    digests = set()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        texts, source = load_source(str(tmp_path / name))
        assert texts == DOCS, name
        digests.add(source.sha256)
        assert (source.kind, source.documents, source.bytes) == ("file", 3, sum(len(t.encode()) for t in DOCS))
    assert len(digests) == 1


def test_a_txt_file_is_one_document_and_keeps_its_bytes(tmp_path: Path) -> None:
    content = b" \r\n line\r\n\r\n"
    (tmp_path / "a.txt").write_bytes(content)
    texts, source = load_source(str(tmp_path / "a.txt"))
    assert [t.encode() for t in texts] == [content]
    assert source.sha256 == hashlib.sha256(content).hexdigest()


def test_folder_reads_its_files_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (
        ("b.txt", "second"),
        ("sub/c.txt", "third"),
        ("a.txt", "first"),
        ("notes.md", "no"),
        (".x.txt", "no"),
    ):
        (tmp_path / name).write_text(text)
    texts, source = load_source(str(tmp_path))
    assert texts == ["first", "second", "third"]
    assert source.kind == "folder"


def test_source_filter_by_suffix_and_by_argument(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["x"], source="tech") + jsonl(["y"], source="prose") + jsonl(["z"]))
    assert load_texts(f"{path}:source=tech") == load_texts(str(path), source="tech") == ["x"]
    assert load_texts(str(path)) == ["x", "y", "z"]
    with pytest.raises(UsageError, match=r"no record of source 'tehc'; there is prose, tech.*Did you mean 'tech'"):
        load_texts(f"{path}:source=tehc")
    with pytest.raises(UsageError, match="given twice"):
        load_texts(f"{path}:source=tech:source=tech")
    with pytest.raises(UsageError, match="Give it once"):
        load_texts(f"{path}:source=tech", source="prose")
    with pytest.raises(UsageError, match="config= picks"):
        load_texts(f"{path}:config=x")


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["abcd"] * 5) + b"this line is never read")
    assert load_texts(str(path), limit_bytes=9) == ["abcd"] * 3


FAULTS = {
    "missing field": ("a.jsonl", jsonl(["x"]) + b'{"txt": 1}', r"a\.jsonl, line 2: the field 'text' is missing;.* txt"),
    "field is a number": ("a.jsonl", b'{"text": 3}', "line 1: the field 'text' holds int, not text"),
    "not an object": ("a.jsonl", b'["x"]', "line 1: a record is an object"),
    "not JSON": ("a.jsonl", jsonl(["x", "y"]) + b"{oops}\n", "line 3: not JSON"),
    "not JSON to the end of the line": (
        "a.jsonl", jsonl(["x"]) + b'{"text": "y"\n' + jsonl(["z"]), "line 2: not JSON",
    ),
    "not JSON to the end of a CRLF line": ("a.jsonl", b'{"text": "y"\r\n{"text": "z"}', "line 1: not JSON"),
    "not JSON to the end, .json": ("a.json", b'{"text": "y"\r\n{"text": "z"}', "line 1: not JSON"),
    "not JSON, array": ("a.json", b'[\n{"text": "x"},\n{oops}]', "line 3: not JSON"),
    "array item": ("a.json", b'[{"text": "x"}, 5]', "item 1: a record is an object"),
    "nested": ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    "latin-1": ("a.jsonl", jsonl(["x"]) + '{"text": "é"}'.encode("latin-1"), "line 2: not UTF-8 .byte 0xe9"),
    "latin-1 txt": ("a.txt", b"fine\nfine\nna\xefve", "line 3: not UTF-8"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}', "line 1: the text holds half a surrogate pair"),
    "empty": ("a.jsonl", b"", "holds no text"),
    "blank": ("a.txt", b" \n ", "holds no text"),
    "gz that is not": ("a.txt.gz", b"plain", r"a\.txt\.gz: cannot be read"),
    "cut gz": ("a.txt.gz", gzip.compress(b"text " * 99)[:-9], r"a\.txt\.gz: cannot be read"),
    "cut xz": ("a.jsonl.xz", lzma.compress(jsonl(["x"] * 99))[:-20], r"a\.jsonl\.xz: cannot be read"),
    "format": ("a.docx", b"PK", "not a format of text that is read here.*Readable: .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_that_names_the_place(tmp_path: Path, fault: str) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_texts(str(tmp_path / name))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_missing_places(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(["x"]))
    with pytest.raises(UsageError, match=r"no such file or folder. Did you mean 'train.jsonl'"):
        load_texts(str(tmp_path / "tran.jsonl"))
    with pytest.raises(UsageError, match="either"):
        load_texts(str(tmp_path / "no" / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no text file in this folder"):
        load_texts(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="split 'test' is unknown"):
        load_texts("demo", split="test")


class Rows(list):
    """What `datasets` streams, as far as it is used: rows, and shuffled ones."""

    def shuffle(self, *, seed: int, buffer_size: int) -> Rows:
        return Rows(random.Random(seed).sample(self, len(self)))


def fake_datasets(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, list[dict[str, object]]]
) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []
    module = types.ModuleType("datasets")

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool, **at: str) -> Rows:
        calls.append((name, config, split, streaming, *at.items()))
        return Rows(parts[split])

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.get_dataset_split_names = lambda name, config, **at: list(parts)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_streams_the_split_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]})
    assert load_texts("owner/name:config=raw", limit_bytes=1) == ["a"]
    texts, source = load_source("owner/name", split="heldout")
    assert (texts, source.kind) == (["c"], "hub")
    assert calls == [("owner/name", "raw", "train", True), ("owner/name", None, "test", True)]


def test_hub_options(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, object]] = [{"id": i, "body": None if i == 1 else f"d{i}"} for i in range(50)]
    calls = fake_datasets(monkeypatch, {"train": [{"text": "no"}], "extra": rows})
    whole = [f"d{i}" for i in range(50) if i != 1]
    assert load_texts("owner/name:split=extra:revision=abc") == whole, (
        "the only column of strings; empty cells are none"
    )
    assert calls == [("owner/name", None, "extra", True, ("revision", "abc"))]
    assert load_texts("owner/name@abc:split=extra") == whole and calls[1] == calls[0]
    for name in ("owner/name@v1:revision=v2", "owner/name@"):
        with pytest.raises(UsageError, match="names a revision, and :revision= another"):
            require_place(name)
    # A split that is named is that split, whatever part a command would take by itself.
    assert load_texts("owner/name:split=extra", split="heldout") == whole
    mixed = load_texts("owner/name:split=extra:shuffle=3")
    assert sorted(mixed) == sorted(whole) and mixed != whole
    assert mixed == load_texts("owner/name:split=extra:shuffle=3") != load_texts("owner/name:split=extra:shuffle=4")


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    fake_datasets(monkeypatch, {"train": []})

    def unreachable(*names: object, **at: str) -> None:
        raise ConnectionError("no way")

    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_split_names", unreachable)
    for offline, kind, words in (
        (True, RefusedError, "HF_HUB_OFFLINE is set, and the Hub dataset owner/name is not in the cache. Unset it"),
        (False, UsageError, r"owner/name: cannot be read from the Hub \(ConnectionError: no way\). Check the name"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(kind, match=words):
            load_texts("owner/name")


def test_hidden_folders_are_not_read(tmp_path: Path) -> None:
    for name in ("a.txt", ".b.txt", ".out.linearize-run/c.txt", "d/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert load_texts(str(tmp_path)) == ["a.txt", "d/e.txt"]
    for empty in ("", " "):
        with pytest.raises(UsageError, match=r"the data is empty\. Give a text file"):
            require_place(empty)


def test_hub_faults_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, {"train": [{"title": "a", "body": "b"}]})
    missing = "owner/name, row 0: the field 'text' is missing; fields there: title, body. Add :column=NAME"
    with pytest.raises(UsageError, match=missing):
        load_texts("owner/name")
    with pytest.raises(UsageError, match=r"no column 'bodi'; there is title, body\. Did you mean 'body'"):
        load_texts("owner/name:column=bodi")
    with pytest.raises(UsageError, match=r"no split trian; it has train\. Did you mean 'train'"):
        load_texts("owner/name:split=trian")
    with pytest.raises(UsageError, match="no split validation or test; it has train"):
        load_texts("owner/name", split="heldout")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package datasets"):
        load_texts("owner/name")
    # A mistyped path never goes to the network.
    with pytest.raises(UsageError, match="no such file or folder"):
        load_texts("data/train.jsonl")


def test_importing_needs_neither_torch_nor_transformers(source_env: dict[str, str]) -> None:
    code = (
        "import sys, linearize.data, linearize.demo.text, linearize.evaluate;"
        "sys.exit(', '.join(m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=source_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
