"""Tables, parts of folders, shuffled orders: the same documents, no more than are wanted, in an order that stays."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from linearize import data, records
from linearize.data import load_source, load_texts, require_place
from linearize.errors import UsageError
from linearize.hub_records import hub_records

DOCS = ["one\ntwo", 'with "quotes", and commas', "über 東京", "3"]


@pytest.fixture
def pq() -> Any:
    pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra `data`")
    import pyarrow as pa
    import pyarrow.parquet

    def write(path: Path, *, rows: int | None = None, **columns: list[Any]) -> Path:
        pa.parquet.write_table(pa.table(columns), path, row_group_size=rows)
        return path

    return write


def test_parquet_and_csv_give_the_same_documents(tmp_path: Path, pq: Any) -> None:
    quoted = "".join(f'"{text}",{i}\n' for i, text in enumerate(d.replace('"', '""') for d in DOCS))
    (tmp_path / "a.csv").write_text("text,id\n" + quoted, encoding="utf-8")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    pq(tmp_path / "a.parquet", id=list(range(4)), text=DOCS)
    pq(tmp_path / "only.parquet", id=list(range(4)), body=DOCS)  # no "text", and one column of strings
    pq(tmp_path / "named.parquet", title=["x"] * 4, body=DOCS)
    digests = set()
    for name in ("a.csv", "a.csv.gz", "a.parquet", "only.parquet", "named.parquet:column=body"):
        texts, source = load_source(str(tmp_path / name))
        assert texts == DOCS, name
        digests.add(source.sha256)
    assert len(digests) == 1


def test_only_what_is_wanted_is_read(tmp_path: Path, pq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pq(
        tmp_path / "a.parquet", rows=10, text=[f"{i:04}" for i in range(1000)], big=["x"] * 1000, source=["s"] * 1000
    )
    monkeypatch.setattr(records, "ROWS", 10)
    import pyarrow.parquet as parquet

    read: list[Any] = []
    real = parquet.ParquetFile.iter_batches

    def watch(self: Any, **how: Any) -> Any:
        for batch in real(self, **how):
            read.append(batch.schema.names)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", watch)
    assert load_texts(str(path), limit_bytes=60) == [f"{i:04}" for i in range(15)]
    assert read == [["text", "source"]] * 2, "two batches of ten, and no column that nobody asked for"


def test_empty_cells_sources_and_faults(tmp_path: Path, pq: Any) -> None:
    path = pq(tmp_path / "a.parquet", text=["a", None, "", "b"], source=["x", "x", "x", "y"], n=[1, 2, 3, 4])
    assert load_texts(str(path)) == ["a", "b"]
    assert load_texts(f"{path}:source=y") == ["b"]
    with pytest.raises(UsageError, match=r"no column 'txt'; there is text, source, n\. Did you mean 'text'"):
        load_texts(f"{path}:column=txt")
    with pytest.raises(UsageError, match="the column 'n' holds no text; those that do: text, source"):
        load_texts(f"{path}:column=n")
    two = pq(tmp_path / "two.parquet", title=["a"], body=["b"])
    with pytest.raises(UsageError, match=r"'text' is missing; fields there: title, body\. Add :column=NAME"):
        load_texts(str(two))
    for name, content in (("bad.parquet", b"PAR1"), ("bad.csv", b"text\na\xff\n"), ("ragged.csv", b"text,b\na\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name}: cannot be read") as caught:
            load_texts(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_columns_of_strings_in_every_form_are_text(tmp_path: Path, pq: Any) -> None:
    """As a dictionary, as pandas writes categories, with long offsets, and as views."""
    import pyarrow as pa

    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]
    kinds += [pa.string_view()] if hasattr(pa, "string_view") else []
    for number, kind in enumerate(kinds):
        path = pq(tmp_path / f"{number}.parquet", text=pa.array(DOCS).cast(kind), n=[1, 2, 3, 4])
        assert load_texts(str(path)) == DOCS, kind
    path = pq(tmp_path / "numbers.parquet", text=pa.array([1, 2]).dictionary_encode())
    with pytest.raises(UsageError, match="the field 'text' is not a string"):
        load_texts(str(path))


def test_null_is_no_document_whatever_the_format(tmp_path: Path, pq: Any) -> None:
    texts = ["a", None, "b"]
    pq(tmp_path / "a.parquet", text=texts)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    for name in ("a.parquet", "a.jsonl", "a.json"):
        assert load_texts(str(tmp_path / name)) == ["a", "b"], name
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"other": null}\n')
    with pytest.raises(UsageError, match=r"line 2: the field 'text' is missing"):
        load_texts(str(tmp_path / "b.jsonl"))


def test_a_folder_of_tables_and_its_splits(tmp_path: Path, pq: Any) -> None:
    (tmp_path / "sub").mkdir()
    pq(tmp_path / "train-00001-of-00002.parquet", text=["second"])
    pq(tmp_path / "train-00000-of-00002.parquet", text=["first"])
    pq(tmp_path / "sub" / "test.parquet", text=["held"])
    (tmp_path / "trainer.jsonl").write_text('{"text": "not of the split"}\n')
    assert load_texts(f"{tmp_path}:split=train") == ["first", "second"]
    assert load_texts(f"{tmp_path}:split=test") == ["held"]
    assert len(load_texts(str(tmp_path))) == 4
    with pytest.raises(UsageError, match=r"no file of the split 'validation'; there is sub/test\.parquet, train-0"):
        load_texts(f"{tmp_path}:split=validation")


def test_without_pyarrow_it_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    for place in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(UsageError, match=r"needs the package pyarrow.*pip install 'datasets"):
            require_place(str(place))


def test_column_of_json_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x", "source": "s"}\n{"body": "y", "source": "t"}\n')
    assert load_texts(f"{path}:column=body") == ["x", "y"]
    assert load_texts(f"{path}:column=body:source=t") == ["y"]
    assert load_texts(f"{path}:column=source") == ["s", "t"]
    with pytest.raises(UsageError, match=r"line 1: the field 'text' is missing; fields there: body, source"):
        load_texts(str(path))


def test_shuffled_orders_stay_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(3):
        lines = [f'{{"text": "{part}-{i:02}"}}\n' for i in range(40)]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    monkeypatch.setattr(data, "BUFFER", 16)
    plain, one = load_texts(str(tmp_path)), load_texts(f"{tmp_path}:shuffle=1")
    assert sorted(one) == plain and one != plain
    assert one == load_texts(f"{tmp_path}:shuffle=1") != load_texts(f"{tmp_path}:shuffle=2")
    # A larger limit only adds documents, so that a longer run begins with the texts of a shorter one.
    some = load_texts(f"{tmp_path}:shuffle=1", limit_bytes=100)
    assert some == one[: len(some)] and len(some) == 25
    # Pinned: what a checkpoint was trained on must be found again elsewhere.
    assert one[:4] == ["1-15", "1-16", "1-02", "1-18"]


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    for option, message in {
        "colum=x": "unknown option 'colum'. Did you mean 'column'",
        "split=train": "split= picks a part of a Hub dataset or a folder or demo",
        "revision=x": "revision= picks a part of a Hub dataset",
        "shuffle=yes": "shuffle= takes a seed",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_texts(f"{path}:{option}")
        with pytest.raises(UsageError, match=message):
            require_place(f"{path}:{option}")
    with pytest.raises(UsageError, match="demo has no split 'test'"):
        load_texts("demo:split=test")
    assert load_texts("demo:split=heldout", limit_bytes=1) == load_texts("demo", split="heldout", limit_bytes=1)
    odd = tmp_path / "b:column=x.jsonl"  # a file of that name is that file
    odd.write_text('{"text": "odd"}\n')
    assert load_texts(str(odd)) == ["odd"]


def test_no_network_and_no_library_for_local_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert load_texts(f"{tmp_path}:shuffle=0") == ["x"]


def test_the_library_streams_what_we_expect(tmp_path: Path, pq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself, over a local folder, for the Hub is out of reach: splits, columns, shuffling."""
    pytest.importorskip("datasets", reason="needs datasets, of the extra `data`")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    texts: list[str | None] = [None, *(f"d{i:02}" for i in range(30))]
    pq(folder / "train-00000.parquet", n=list(range(31)), body=texts)
    pq(folder / "test-00000.parquet", n=[0], body=["held"])

    def read(**how: Any) -> list[str]:
        return [text for text, _ in hub_records(str(folder), **how)]

    assert read(role="train") == texts[1:]
    assert read(role="heldout") == read(role="train", split="test") == ["held"]
    mixed = read(role="train", shuffle=(1, 8))
    assert mixed == read(role="train", shuffle=(1, 8)) != texts[1:] and sorted(mixed) == texts[1:]
    with pytest.raises(UsageError, match="has no split valid; it has"):
        read(role="train", split="valid")
    with pytest.raises(UsageError, match="column 'n' holds no text; those that do: body"):
        read(role="train", column="n")
