"""Weights that are torn, flipped or lie, and indexes that point elsewhere."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.artifacts.damage import INDEX, WEIGHTS, Case, pack, replaced

DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}


def torn(rng: random.Random) -> Iterator[Case]:
    """Truncated, padded, zeroed and bit-flipped files."""

    def cut(name: str, share: float) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: min(int(len(data) * share), len(data) - 1)])

        return damage

    def flip(name: str, share: float, bit: int, header: bool = False) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            size = 8 + int.from_bytes(data[:8], "little") if header else len(data)
            data[int(size * share)] ^= 1 << bit
            (folder / name).write_bytes(data)

        return damage

    def pad(name: str, data: bytes) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            with open(folder / name, "ab") as file:
                file.write(data)

        return damage

    shares = [0.0, 0.00001, 0.0001, 0.5, 0.99999, *(rng.random() for _ in range(35))]
    for share in shares:
        yield Case(name=f"weights cut at {share:.5f}", kind="truncated", damage=cut(WEIGHTS, share))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        for share in (0.0, *(rng.random() for _ in range(5))):
            yield Case(name=f"{name} cut at {share:.3f}", kind="truncated", damage=cut(name, share))
    for _ in range(10):
        name, share = rng.choice(["model.safetensors", "mixer.py", "config.json"]), rng.random()
        yield Case(name=f"export: {name} cut at {share:.4f}", kind="truncated", damage=cut(name, share), base="export")
    for data in (b"\0", b"PK\3\4" * 9, b"\0" * 4096):
        yield Case(name=f"weights with {len(data)} bytes more", kind="truncated", damage=pad(WEIGHTS, data))
    for _ in range(60):
        share, bit = rng.random(), rng.randrange(8)
        damage = flip(WEIGHTS, share, bit, header=True)
        yield Case(name=f"bit {bit} at {share:.4f} of the header", kind="bit-flipped", damage=damage, must=False)
    for _ in range(25):
        share, bit = rng.random(), rng.randrange(8)
        yield Case(
            name=f"bit {bit} at {share:.5f} of the weights",
            kind="bit-flipped",
            damage=flip(WEIGHTS, share, bit),
            must=False,
        )
    for _ in range(45):
        name = rng.choice(["model.safetensors", "model.safetensors", "config.json", "tokenizer.json", "mixer.py"])
        share, bit = rng.random(), rng.randrange(8)
        damage = flip(name, share, bit)
        yield Case(name=f"export: bit {bit} at {share:.5f} of {name}", kind="bit-flipped", damage=damage, base="export")


def headers(rng: random.Random) -> Iterator[Case]:
    """Headers that lie."""

    def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
        return {
            "dtype": dtype,
            "shape": list(shape) if isinstance(shape, tuple) else shape,
            "data_offsets": [begin, end],
        }

    zeros = b"\0" * 64
    one = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    files: dict[str, bytes] = {
        "empty file": b"",
        "seven bytes": b"\0" * 7,
        "length 2^64-1": b"\xff" * 8 + b"{}",
        "length 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
        "length beyond the file": pack({"a": entry()}, zeros[:8], length=10_000),
        "length too short": pack({"a": entry()}, zeros[:8], length=5),
        "length 0": pack(b"", zeros),
        "header is a list": pack([1, 2]),
        "header is a number": pack(b"7"),
        "header is text": pack(b'"x"'),
        "header is no UTF-8": pack(b'{"\xff":1}'),
        "header is half a surrogate": pack(b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', zeros[:8]),
        "header nested 100000 deep": pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "header of a million lists": pack(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
        "name of a million letters": pack({"x" * 1_000_000: entry("WAT")}, zeros[:8]),
        "name with a path": pack({"../../outside": entry()}, zeros[:8]),
        "name with control characters": pack({"a\u001b[31m\n\r": entry()}, zeros[:8]),
        "a key twice": pack(b'{"a":' + one + b',"a":' + one + b"}", zeros[:8]),
        "offsets twice in an entry": pack(b'{"a":' + one[:-1] + b',"data_offsets":[0,8]}}', zeros[:8]),
        "NaN": pack(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', zeros[:8]),
        "a number of 4000 digits": pack(b'{"a":' + one.replace(b"[2]", b"[" + b"9" * 4000 + b"]") + b"}", zeros[:8]),
        "a number of 9000 digits": pack(b'{"a":' + one.replace(b"[2]", b"[" + b"9" * 9000 + b"]") + b"}", zeros[:8]),
        "metadata is a list": pack({"__metadata__": [1], "a": entry()}, zeros[:8]),
        "metadata holds a number": pack({"__metadata__": {"a": 1}, "a": entry()}, zeros[:8]),
        "an entry too many": pack({"a": entry() | {"code": "os.system"}}, zeros[:8]),
        "an entry too few": pack({"a": {"dtype": "F32", "shape": [2]}}, zeros[:8]),
        "overlap": pack({"a": entry(), "b": entry(begin=4, end=12)}, zeros[:12]),
        "the same bytes twice": pack({"a": entry(), "b": entry()}, zeros[:8]),
        "hole at the start": pack({"a": entry(begin=8, end=16)}, zeros[:16]),
        "hole between": pack({"a": entry(), "b": entry(begin=16, end=24)}, zeros[:24]),
        "tail": pack({"a": entry()}, zeros),
        "offsets backwards": pack({"a": entry(begin=8, end=0)}, zeros[:8]),
        "an empty tensor of 10^18 rows": pack({"a": entry("F32", (0, 10**18), 0, 0)}),
    }  # fmt: skip
    yield Case(name="header: 200000 tensors", kind="hostile safetensors", damage=_many)
    for name, data in files.items():
        yield Case(name=f"header: {name}", kind="hostile safetensors", damage=replaced(WEIGHTS, data))
    odd: list[Any] = [-1, 1.5, "8", None, True, [], {}, 10**30, -(2**63), 2**63, 2**64]
    for field in ("dtype", "shape", "begin", "end", "side"):
        for value in odd:
            where: dict[str, Any] = {"shape": [value]} if field == "side" else {field: value}
            yield Case(
                name=f"header: {field} is {value!r}",
                kind="hostile safetensors",
                damage=replaced(WEIGHTS, pack({"a": entry(**where)}, zeros[:8])),
            )
    for _ in range(40):
        dtype, lie = rng.sample(sorted(DTYPES), 2)
        shape = tuple(rng.randrange(1, 9) for _ in range(rng.randrange(0, 4)))
        size = DTYPES[dtype]
        for side in shape:
            size *= side
        shift = rng.choice([0, 1, -1, size, 2**40])
        yield Case(
            name=f"header: {lie} for {dtype} {shape}, end {shift:+d}",
            kind="hostile safetensors",
            damage=_lie(dtype, lie, shape, size, shift),
        )


def _many(folder: Path, outside: Path) -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}
    (folder / WEIGHTS).write_bytes(pack({f"t{i}": entry for i in range(200_000)}, b"\0" * 64))


def _lie(dtype: str, lie: str, shape: tuple[int, ...], size: int, shift: int) -> Callable[[Path, Path], None]:
    """One weight of the model claims another type, size or place than it has."""

    def damage(folder: Path, outside: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        name = "model.layers.0.self_attn.q_proj.weight"
        begin, end = header[name]["data_offsets"]
        header[name] = {"dtype": lie, "shape": list(shape), "data_offsets": [begin, end + shift]}
        (folder / WEIGHTS).write_bytes(pack(header, whole[8 + length :]))

    return damage


def indexes(rng: random.Random) -> Iterator[Case]:
    """Indexes that point elsewhere."""

    def point(target: Any, *, all_of_them: bool) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            index = json.loads((folder / INDEX).read_text())
            names = sorted(index["weight_map"])
            value = target.replace("{outside}", str(outside)) if isinstance(target, str) else target
            for name in names if all_of_them else [random.Random(str(target)).choice(names)]:
                index["weight_map"][name] = value
            (folder / INDEX).write_text(json.dumps(index))

        return damage

    targets = [
        "../outside/model.safetensors", "../../etc/passwd", "{outside}/model.safetensors", "/etc/passwd", "/dev/zero",
        "/proc/self/mem", "..", ".", "", "./model.safetensors", "a/../model.safetensors", "sub/model.safetensors",
        "..\\outside\\model.safetensors", "C:\\model.safetensors", "c:model.safetensors", "file:///etc/passwd",
        "https://example.invalid/model.safetensors", "model.safetensors\0.txt", ".hidden.safetensors", "model.bin",
        "model.safetensors.index.json", "missing.safetensors", "config.json", "evil.py", "x" * 5000 + ".safetensors",
        "\u202emodel.safetensors", "model-00001-of-00002.safetensors ", "~/model.safetensors",
        "$HOME/model.safetensors",
        7, None, True, [], {}, ["model.safetensors"], {"file": "model.safetensors"}, 1.5,
    ]  # fmt: skip
    for target in targets:
        for whole in (False, True):
            words = "every weight" if whole else "one weight"
            yield Case(
                name=f"index: {words} in {str(target)[:40]!r}",
                kind="hostile index",
                damage=point(target, all_of_them=whole),
                base="sharded",
            )
    texts = [
        "",
        "null",
        "[]",
        "7",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": 1}',
        "{}",
        "[" * 50_000,
    ]
    texts += [
        '{"weight_map": {"a": NaN}}',
        '{"weight_map": {"a": "b", "a": "c"}}',
        '{"weight_map": {"\\ud800": "x.safetensors"}}',
    ]
    for text in texts:
        yield Case(
            name=f"index: {text[:40]}", kind="hostile index", damage=replaced(INDEX, text.encode()), base="sharded"
        )
    for _ in range(6):
        yield Case(
            name="index: two shards exchanged", kind="hostile index", damage=_exchanged(rng.random()), base="sharded"
        )


def _exchanged(share: float) -> Callable[[Path, Path], None]:
    def damage(folder: Path, outside: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
        name = sorted(index["weight_map"])[int(share * len(index["weight_map"]))]
        index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
        (folder / INDEX).write_text(json.dumps(index))

    return damage
