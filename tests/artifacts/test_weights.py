"""Damaged and hostile weight files are refused by name, before anything is allocated."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from linearize.artifacts.download import split_revision
from linearize.artifacts.load import check_checkpoint, load_model
from linearize.artifacts.manifest import write_manifest
from linearize.artifacts.weights import (
    HEADER_CAP,
    INDEX,
    SINGLE,
    checkpoint_bytes,
    digest_checkpoint,
    list_shards,
    read_header,
    read_tensors,
    require_finite,
)
from linearize.errors import LinearizeError, RefusedError, UsageError


@pytest.fixture(scope="module")
def single(tmp_path_factory, build_llama) -> Path:
    return build_llama(tmp_path_factory.mktemp("single") / "teacher")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, build_llama) -> Path:
    folder = build_llama(tmp_path_factory.mktemp("sharded") / "teacher", shards=40_000)
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


@pytest.fixture
def copy(tmp_path):
    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copied


def pack(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape=(2,), begin=0, end=8, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_headers_agree_with_safetensors(single, sharded):
    from safetensors import safe_open

    for folder in (single, sharded):
        seen = {}
        for shard in list_shards(folder):
            header = read_header(shard)
            with safe_open(shard, framework="pt") as file:
                assert set(header) == set(file.keys())
                for name, info in header.items():
                    tensor = file.get_tensor(name)
                    assert (info.shape, info.elements) == (tuple(tensor.shape), tensor.numel())
                    seen[name] = tensor.nbytes
        assert set(read_tensors(folder)) == set(seen)
        assert checkpoint_bytes(folder) == sum(seen.values())
        check_checkpoint(folder, finite=True)


BAD_HEADERS = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than file": (100).to_bytes(8, "little") + b"{}",
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": pack(b"{nope"),
    "a list": pack(b"[]"),
    "leading space": pack(b" {}"),
    "not UTF-8": pack(b'{"\xff": 1}'),
    "deep": pack(b'{"a":' * 100_000),
    "duplicate key": pack(b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}'),
    "entry is a number": pack({"a": 1}),
    "extra key": pack({"a": {**entry(), "code": "x"}}, b"\0" * 8),
    "unknown dtype": pack({"a": entry(dtype="PICKLE")}, b"\0" * 8),
    "dtype is a list": pack({"a": entry(dtype=["F32"])}, b"\0" * 8),
    "negative shape": pack({"a": entry(shape=(-2, -1))}, b"\0" * 8),
    "shape of strings": pack({"a": entry(shape=("2",))}, b"\0" * 8),
    "shape of booleans": pack({"a": entry(shape=(True, 2))}, b"\0" * 8),
    "sizes disagree": pack({"a": entry(shape=(3,))}, b"\0" * 8),
    "overflow": pack({"a": entry(shape=(2**62, 2**62))}, b"\0" * 8),
    "reversed": pack({"a": entry(begin=8, end=0)}, b"\0" * 8),
    "hole in front": pack({"a": entry(begin=8, end=16)}, b"\0" * 16),
    "hole between": pack({"a": entry(), "b": entry(begin=16, end=24)}, b"\0" * 24),
    "overlap": pack({"a": entry(), "b": entry(begin=4, end=12)}, b"\0" * 12),
    "same bytes": pack({"a": entry(), "b": entry()}, b"\0" * 8),
    "tail": pack({"a": entry()}, b"\0" * 8 + b"PK\3\4"),
    "truncated": pack({"a": entry()}, b"\0" * 7),
}


@pytest.mark.parametrize("data", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header(tmp_path, data):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"bad\.safetensors") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_header_over_the_cap_is_not_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write((HEADER_CAP + 1).to_bytes(8, "little"))
        file.truncate(HEADER_CAP + 100)  # sparse
    with pytest.raises(UsageError, match="over the limit"):
        read_header(path)


def test_empty_tensors_and_scalars_are_sound(tmp_path):
    path = tmp_path / "x.safetensors"
    header = {"a": entry((), 0, 4), "b": entry((0, 5), 4, 4), "__metadata__": {"format": "pt"}}
    path.write_bytes(pack(header, b"\0" * 4))
    assert {name: info.elements for name, info in read_header(path).items()} == {"a": 1, "b": 0}


def test_truncated_anywhere(single, copy):
    folder = copy(single)
    path = folder / SINGLE
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"model\.safetensors is not a sound"):
            check_checkpoint(folder, finite=False)
        with pytest.raises(UsageError):
            load_model(folder, device="cpu")


def test_flipped_header_bits_never_escape_as_another_error(single, copy):
    folder = copy(single)
    path = folder / SINGLE
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    random.seed(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.randrange(header)] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            check_checkpoint(folder, finite=False)
        except LinearizeError as error:
            assert "\n" not in str(error)


def test_flipped_weight_bit_is_found_through_the_manifest(sharded, copy):
    folder = copy(sharded)
    write_manifest(folder, {})
    check_checkpoint(folder, finite=False)
    victim = list_shards(folder)[1]
    damaged = bytearray(victim.read_bytes())
    damaged[-3] ^= 1
    victim.write_bytes(damaged)
    with pytest.raises(UsageError, match=rf"{victim.name} differs from its sha256"):
        check_checkpoint(folder, finite=False)


def test_truncated_shard_is_named(sharded, copy):
    folder = copy(sharded)
    victim = list_shards(folder)[-1]
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UsageError, match=rf"{victim.name} is not a sound.*truncated"):
        check_checkpoint(folder, finite=False)
    victim.unlink()
    with pytest.raises(UsageError, match=rf"{victim.name} is missing"):
        check_checkpoint(folder, finite=False)


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "a\\b.safetensors",
        "c:x.safetensors",
        "",
        ".hidden.safetensors",
        7,
        None,
        ["x.safetensors"],
        "x\0.safetensors",
    ],
)
@pytest.mark.parametrize("also_single", [False, True])
def test_index_pointing_outside(sharded, single, copy, name, also_single):
    folder = copy(sharded)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][min(index["weight_map"])] = name
    (folder / INDEX).write_text(json.dumps(index))
    if also_single:  # an index that is not even needed is refused all the same
        shutil.copy(single / SINGLE, folder / SINGLE)
    with pytest.raises(UsageError, match=r"index\.json points outside its folder"):
        check_checkpoint(folder, finite=False)


def test_index_that_names_another_kind_of_file_or_lies(sharded, copy):
    folder = copy(sharded)
    good = json.loads((folder / INDEX).read_text())
    first = min(good["weight_map"])
    for change, message in (
        ({first: "model.bin"}, "not a safetensors"),
        ({"ghost.weight": good["weight_map"][first]}, "is not there"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))
        with pytest.raises(UsageError, match=message):
            check_checkpoint(folder, finite=False)
    for text in (
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": NaN}',
        "{" * 5000,
        '{"a":1,"a":2}',
    ):
        (folder / INDEX).write_text(text)
        with pytest.raises(UsageError, match=r"index\.json"):
            check_checkpoint(folder, finite=False)


def test_link_out_of_the_folder(single, copy, tmp_path):
    folder = copy(single)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder / SINGLE, tmp_path / "elsewhere" / SINGLE)
    (folder / SINGLE).symlink_to(tmp_path / "elsewhere" / SINGLE)
    with pytest.raises(UsageError, match="link that leaves its folder"):
        check_checkpoint(folder, finite=False)


def test_links_of_the_hub_cache_are_followed(single, tmp_path):
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(single.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    check_checkpoint(snapshot, finite=True)


def test_tensor_in_two_shards(sharded, copy):
    folder = copy(sharded)
    first, second = list_shards(folder)[:2]
    shutil.copy(first, second)
    with pytest.raises(UsageError, match="is in both"):
        check_checkpoint(folder, finite=False)


def test_pickled_weights_are_refused(single, copy):
    folder = copy(single)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pickled weights \(pytorch_model\.bin\)"):
        check_checkpoint(folder, finite=False)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"holds no weights.*Copy them there"):
        check_checkpoint(folder, finite=False)


def test_a_repository_of_pickled_weights_is_told_where_others_may_be(single, tmp_path):
    snapshot = tmp_path / "models--facebook--opt-125m" / "snapshots" / ("a" * 40)
    shutil.copytree(single, snapshot)
    (snapshot / SINGLE).unlink()
    with pytest.raises(UsageError, match=r"facebook/opt-125m has no safetensors.*Try facebook/opt-125m@refs/pr/1"):
        check_checkpoint(snapshot, finite=False)
    assert split_revision("facebook/opt-125m@refs/pr/1") == ("facebook/opt-125m", "refs/pr/1")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_non_finite_weight_is_named(single, copy, value, dtype, monkeypatch):
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("linearize.artifacts.weights.FINITE_CHUNK", 100)  # many chunks, also in a small tensor
    folder = copy(single)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE)
    require_finite(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][-1, -1] = float(value)
    save_file(tensors, folder / SINGLE)
    check_checkpoint(folder, finite=False)
    word = "NaN" if value == "nan" else "Inf"
    with pytest.raises(RefusedError, match=rf"{name}' in .*model\.safetensors holds {word}"):
        check_checkpoint(folder, finite=True)


def test_digest_follows_contents_not_places(single, copy):
    folder = copy(single)
    assert digest_checkpoint(folder) == digest_checkpoint(single)
    (folder / "README.md").write_text("notes")
    assert digest_checkpoint(folder) == digest_checkpoint(single)
    for name in (SINGLE, "config.json", "tokenizer.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b" ")
        assert digest_checkpoint(folder) != digest_checkpoint(single)
        (folder / name).write_bytes(data)
    assert digest_checkpoint(folder) == digest_checkpoint(single)
