"""Checkpoints read and written a piece at a time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linearize.artifacts.pieces import TYPES, open_stored
from linearize.artifacts.shards import ShardWriter, lay_out
from linearize.artifacts.weights import INDEX, SINGLE, read_tensors
from linearize.errors import UsageError

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.ones(6, dtype=torch.float16),
    "e": torch.zeros(0, 4),
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def write(folder: Path, limit: int, names: list[str]) -> list[Path]:
    with ShardWriter(folder, lay_out(LAYOUT, limit)) as writer:
        for name in names:
            pieces = TENSORS[name].split(1) if TENSORS[name].ndim and len(TENSORS[name]) else [TENSORS[name]]
            digest = writer.write(name, pieces)
            data = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert digest == hashlib.sha256(data).hexdigest()
        return writer.finish()


@pytest.mark.parametrize("limit", [1, 70, 10**9])
def test_what_is_written_is_read_by_safetensors(tmp_path: Path, limit: int) -> None:
    paths = write(tmp_path, limit, list(reversed(TENSORS)))
    found = {name: t for path in paths if path.suffix == ".safetensors" for name, t in load_file(path).items()}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert read_tensors(tmp_path).keys() == TENSORS.keys()  # headers are sound, the index agrees
    if limit == 10**9:
        assert [path.name for path in paths] == [SINGLE]
        return
    data = [path for path in paths if path.suffix == ".safetensors"]
    sizes = {p: sum(end - begin for _, begin, end in places(p)) for p in data}
    assert all(size <= limit or len(load_file(path)) == 1 for path, size in sizes.items())
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == sum(sizes.values())


def places(path: Path) -> list[tuple[str, int, int]]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [(name, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"]


def test_a_second_writer_goes_on(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, lay_out(LAYOUT, 70)) as writer:
        writer.write("a", [TENSORS["a"]])
        writer.write("b", [torch.full((5, 2, 3), 9.0).bfloat16()])  # what died in the middle
    write(tmp_path, 70, ["b", "c", "d", "e"])
    with open_stored(tmp_path) as stored:
        assert all(torch.equal(stored.read(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("shape", [(4, 4), (2, 4)])
def test_another_size_than_was_said(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with (
        ShardWriter(tmp_path, lay_out(LAYOUT, 70)) as writer,
        pytest.raises(ValueError, match=r"a is (larger|smaller) than was said"),
    ):
        writer.write("a", [torch.zeros(shape)])


def test_pieces_are_the_tensor(tmp_path: Path) -> None:
    values = {f"x{i}": torch.randn(7, 3).to(dtype) for i, dtype in enumerate(TYPES.values())}
    save_file(values, tmp_path / SINGLE)
    with open_stored(tmp_path) as stored, safe_open(tmp_path / SINGLE, framework="pt") as theirs:
        for name in values:
            want = theirs.get_tensor(name).view(torch.uint8)
            for elements in (1, 6, 7, 10**6):
                assert torch.equal(torch.cat(list(stored.pieces(name, elements))).view(torch.uint8), want)
            assert torch.equal(stored.rows(name, 2, 5).view(torch.uint8), want[2:5])


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1000)}, tmp_path / SINGLE)
    with open_stored(tmp_path) as stored:
        (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:2000])
        with pytest.raises(UsageError, match="became shorter while it was read"):
            stored.read("x")
