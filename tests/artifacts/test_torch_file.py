"""Reading what torch.save wrote, and refusing everything else, without unpickling."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.artifacts.torch_file import read_torch_file
from linearize.errors import UsageError

INSIDE = "model_state_dict"


class Call:
    """What pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Storage:
    """What pickles as a storage that claims to hold `elements` in data/`key`."""

    def __init__(self, elements: Any = 8, key: str = "0", kind: Any = torch.FloatStorage) -> None:
        self.claim = ("storage", kind, key, "cpu", elements)


class Pickler(pickle._Pickler):  # type: ignore[name-defined]
    def persistent_id(self, value: Any) -> Any:
        return value.claim if isinstance(value, Storage) else None


def tensor(storage: Storage | None = None, offset: Any = 0, shape: Any = (8,), stride: Any = (1,)) -> Call:
    arguments = (storage or Storage(), offset, shape, stride, False, OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


def write(path: Path, value: Any, *, protocol: int = 2, **entries: bytes) -> Path:
    """A file of torch's format whose data.pkl holds `value` and whose data/0 holds eight floats."""
    program = io.BytesIO()
    Pickler(program, protocol).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", torch.arange(8.0).numpy().tobytes())
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_what_torch_saved_is_read(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(
        plain=base,
        turned=base.t(),
        slice=base[1:3, ::2],
        half=base.bfloat16(),
        parameter=torch.nn.Parameter(base.half()),
        whole=torch.arange(5),
        empty=torch.empty(0, 3),
        scalar=torch.tensor(2.5),
    )
    torch.save({INSIDE: state, "step": 3, "eval/loss": 0.5, "names": ["a", ("b", None, True)]}, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pt")
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "c.pt")  # an OrderedDict with attributes
    for name in ("a.pt", "b.pt"):
        found = read_torch_file(tmp_path / name, inside=INSIDE)
        assert list(found) == list(state)
        for key, value in found.items():
            assert value.dtype == state[key].dtype and torch.equal(value, state[key].detach()), key
        assert found["plain"].data_ptr() == found["turned"].data_ptr()
    assert set(read_torch_file(tmp_path / "c.pt", inside=INSIDE)) == {"weight", "bias"}


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "os.system": (lambda: {"a": Call(__import__("os").system, "touch pwned")}, r"posix\.system|os\.system|nt\.system"),
    "eval": (lambda: {"a": Call(eval, "1")}, r"eval"),
    "subclass of the state dict": (lambda: Call(__import__("collections").Counter, {"a": 1}), r"collections\.Counter"),
    "a tensor made by its size": (lambda: {"a": Call(torch.Tensor, 10**12)}, r"torch.*Tensor"),
    "a bytearray of any size": (lambda: {"a": Call(bytearray, 10**12)}, r"bytearray"),
    "OrderedDict of something": (lambda: {"a": Call(OrderedDict, [("b", 1)])}, "damaged"),
    "more elements than the storage": (lambda: {"a": tensor(shape=(9,))}, r"shape \[9\], beyond its storage"),
    "an expanded tensor": (lambda: {"a": tensor(shape=(10**12,), stride=(0,))}, "beyond its storage"),
    "an offset beyond the storage": (lambda: {"a": tensor(offset=1)}, "beyond its storage"),
    "a stride beyond the storage": (lambda: {"a": tensor(shape=(2, 2), stride=(7, 2))}, "beyond its storage"),
    "a huge claim of the storage": (lambda: {"a": tensor(Storage(10**12))}, "claims 1000000000000 elements"),
    "a negative size": (lambda: {"a": tensor(shape=(-1,))}, "damaged"),
    "a size that is no number": (lambda: {"a": tensor(shape=("8",))}, "damaged"),
    "a storage that is not there": (lambda: {"a": tensor(Storage(key="7"))}, "'data/7', which is not there"),
    "a storage elsewhere": (lambda: {"a": tensor(Storage(key="../../x"))}, "which is not there"),
    "a storage of another kind": (lambda: {"a": tensor(Storage(kind=torch.UntypedStorage))}, "UntypedStorage"),
    "no tensors": (lambda: {"a": 1}, "'a' is not a tensor"),
    "a list": (lambda: [tensor()], "holds no dict of tensors"),
    "nothing": (lambda: {}, "holds no dict of tensors"),
    "a name that is a number": (lambda: {1: tensor()}, "entry 1 is not a tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = HOSTILE[name]
    path = write(tmp_path / "bad.pt", {INSIDE: make()} if name != "a list" else make())
    with pytest.raises(UsageError, match=words) as caught:
        read_torch_file(path, inside=INSIDE)
    assert "bad.pt" in str(caught.value) and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("protocol", [0, 3, 4, 5])
def test_other_pickle_protocols_are_refused(protocol: int, tmp_path: Path) -> None:
    """Newer ones name globals from the stack, which a reader could mistake for text."""
    path = write(tmp_path / "bad.pt", {INSIDE: {"a": Call(__import__("os").system, "touch pwned")}}, protocol=protocol)
    with pytest.raises(UsageError, match=r"is not read"):
        read_torch_file(path, inside=INSIDE)


def test_a_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state[INSIDE] = state
    with pytest.raises(UsageError, match="is not a tensor"):
        read_torch_file(write(tmp_path / "bad.pt", state), inside=INSIDE)


@pytest.mark.parametrize(
    "entry",
    [
        "archive/../../escape",
        "/etc/passwd",
        "archive/data/../x",
        "archive/constants.pkl",
        "archive/code/a.py",
        "data.pkl",
        "other/data/1",
        "archive\\..\\x/data/1",
        "archive/data/x",
    ],
)
def test_strange_entries_are_refused(entry: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.pt", {INSIDE: {"a": tensor()}}, **{entry: b"x"})
    with pytest.raises(UsageError, match=r"does not write|another folder"):
        read_torch_file(path, inside=INSIDE)


def test_compressed_doubled_and_foreign_endian_entries_are_refused(tmp_path: Path) -> None:
    bomb = write(tmp_path / "bomb.pt", {INSIDE: {"a": tensor()}})
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", b"\0" * (1 << 20))
    double = write(tmp_path / "double.pt", {INSIDE: {"a": tensor()}})
    with zipfile.ZipFile(double, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/data/0", b"\0" * 32)
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/byteorder", "big")
    for path, words in ((bomb, "compressed"), (double, "twice"), (tmp_path / "big.pt", "little-endian")):
        with pytest.raises(UsageError, match=words):
            read_torch_file(path, inside=INSIDE)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with a bit turned: read as it was, where the bit means nothing, or refused; no traceback."""
    good = tmp_path / "good.pt"
    torch.save({INSIDE: {"a": torch.arange(6.0), "b": torch.ones(2)}}, good)
    data = good.read_bytes()
    bad = tmp_path / "bad.pt"
    for length in range(0, len(data), 61):
        bad.write_bytes(data[:length])
        with pytest.raises(UsageError):
            read_torch_file(bad, inside=INSIDE)
    generator = torch.Generator().manual_seed(0)
    wanted, refused = read_torch_file(good, inside=INSIDE), 0
    for place in torch.randint(len(data), (400,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        bad.write_bytes(flipped)
        try:
            found = read_torch_file(bad, inside=INSIDE)
        except UsageError:
            refused += 1
        else:
            assert [found[key].tolist() for key in found] == [wanted[key].tolist() for key in wanted], place
    assert refused > 100


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.pt"
    torch.save({INSIDE: {"a": torch.ones(2)}}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match="older pickled format"):
        read_torch_file(old, inside=INSIDE)
    with pytest.raises(UsageError, match="there is no file"):
        read_torch_file(tmp_path / "none.pt", inside=INSIDE)
