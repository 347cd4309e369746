"""Run folders: checkpoints, record and lock that somebody else put there."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.artifacts.damage import Case, edited, flipped, pack, replaced


def runs(rng: random.Random) -> Iterator[Case]:
    """Run folders: the checkpoint that a resume would go on from, and the record beside it. `must` is of find_start."""

    def signed(change: Callable[[Path], None]) -> Callable[[Path, Path], None]:
        """Change the newest checkpoint, and make its manifest fit: as somebody would who wants it to be read."""

        def damage(folder: Path, outside: Path) -> None:
            import hashlib

            for place in folder.glob("[0-9]*-align-*"):
                change(place)
                manifest = json.loads((place / "manifest.json").read_text())
                for name in list(manifest.get("files", {})):
                    if (place / name).is_file():
                        manifest["files"][name] = hashlib.sha256((place / name).read_bytes()).hexdigest()
                (place / "manifest.json").write_text(json.dumps(manifest))

        return damage

    def state(**changes: Any) -> Callable[[Path], None]:
        def change(place: Path) -> None:
            values = json.loads((place / "state.json").read_text())
            (place / "state.json").write_text(json.dumps({**values, **changes}))

        return change

    def manifest(**changes: Any) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            for place in folder.glob("[0-9]*-align-*"):
                values = json.loads((place / "manifest.json").read_text())
                (place / "manifest.json").write_text(json.dumps({**values, **changes}))

        return damage

    def every(name: str, make: Callable[[Path, Path], Any]) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            for place in folder.glob("[0-9]*-align-*"):
                (place / name).unlink(missing_ok=True)
                make(place / name, outside)

        return damage

    kind = "hostile checkpoint"
    for changes in (
        {"step": "1"}, {"step": -1}, {"step": 99}, {"step": None}, {"step": [1]}, {"stage": "evil"},
        {"stage": "finetune"},
        {"stage": None}, {"stage": ["align"]}, {"files": None}, {"files": []}, {"files": {}}, {"files": {"../x": "y"}},
        {"files": {"tensors.safetensors": 7, "state.json": 7}},
    ):  # fmt: skip
        yield Case(name=f"checkpoint manifest {changes}", kind=kind, damage=manifest(**changes), base="run")
    for changes in (
        {"step": 99}, {"step": "x"}, {"step": None}, {"seconds": "x"}, {"extra": []}, {"extra": None},
        {"extra": {"0": 7}},
        {"extra": {"0": {"evil": 1}}}, {"extra": {"0": {"first": "x"}}}, {"extra": {"0": []}}, {"evil": 1},
        {"history": 7},
    ):  # fmt: skip
        yield Case(name=f"checkpoint state {changes}", kind=kind, damage=signed(state(**changes)), base="run")
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        for text in (b"", b"[]", b"{", b"[" * 100_000, b"\xff" * 100, b'{"a": NaN}'):
            yield Case(
                name=f"checkpoint {name}: {text[:9]!r}",
                kind=kind,
                damage=signed(_written(name, text)) if name != "manifest.json" else every(name, _writes(text)),
                base="run",
            )
        yield Case(
            name=f"checkpoint {name} is a pipe",
            kind=kind,
            damage=every(name, lambda path, outside: os.mkfifo(path)),
            base="run",
        )
        yield Case(
            name=f"checkpoint {name} is a link out",
            kind=kind,
            damage=every(name, lambda path, outside: path.symlink_to(outside / "secret.txt")),
            base="run",
        )
        yield Case(
            name=f"checkpoint {name} is /dev/zero",
            kind=kind,
            damage=every(name, lambda path, outside: path.symlink_to("/dev/zero")),
            base="run",
        )
        yield Case(
            name=f"checkpoint {name} is a folder",
            kind=kind,
            damage=every(name, lambda path, outside: path.mkdir()),
            base="run",
        )
    for words, tensors in {
        "nothing": {}, "another shape": {"parameter/w": (3, 3)},
        "an unknown one": {"parameter/w": (4, 2), "optimizer/step/evil": (1,)},
        "a moment of another shape": {"parameter/w": (4, 2), "optimizer/exp_avg/w": (9,)},
        "a path": {"parameter/../../w": (4, 2)}, "no kind": {"w": (4, 2)},
    }.items():  # fmt: skip
        yield Case(name=f"checkpoint tensors hold {words}", kind=kind, damage=signed(_tensors(tensors)), base="run")
    for text in (b"", b"[]", b"{", b'{"recipe": 7}', b"[" * 100_000, b"\xff"):
        yield Case(name=f"run.json: {text[:14]!r}", kind=kind, damage=replaced("run.json", text), base="run")
    for key, values in {
        "micro": (7, "x", [], {}, {"align": -1, "finetune": 1}, {"align": "x", "finetune": 1}),
        "kept": (7, "x", [-1], ["x"], {"a": 1}),
    }.items():
        for value in values:
            yield Case(
                name=f"run.json: {key} {value!r}", kind=kind, damage=edited("run.json", **{key: value}), base="run"
            )
    for _ in range(20):
        share, bit = rng.random(), rng.randrange(8)
        name = rng.choice(["tensors.safetensors", "state.json"])
        yield Case(
            name=f"checkpoint {name}: bit {bit} at {share:.3f}", kind=kind, damage=_both(name, share, bit), base="run"
        )
    yield Case(
        name="lock is a link out",
        kind=kind,
        damage=lambda folder, outside: _relink(folder / "lock", outside / "secret.txt"),
        base="run",
    )
    yield Case(
        name="lock is a pipe",
        kind=kind,
        damage=lambda folder, outside: os.mkfifo(_gone(folder / "lock")),
        base="run",
        must=False,
    )
    yield Case(
        name="lock is a folder", kind=kind, damage=lambda folder, outside: _gone(folder / "lock").mkdir(), base="run"
    )
    yield Case(name="run folder is a link out", kind=kind, damage=_moved, base="run")


def _gone(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def _relink(path: Path, target: Path) -> None:
    _gone(path).symlink_to(target)


def _moved(folder: Path, outside: Path) -> None:
    os.rename(folder, outside / "moved")
    folder.symlink_to(outside / "moved")


def _written(name: str, data: bytes) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / name).write_bytes(data)

    return change


def _writes(data: bytes) -> Callable[[Path, Path], Any]:
    return lambda path, outside: path.write_bytes(data)


def _both(name: str, share: float, bit: int) -> Callable[[Path, Path], None]:
    def damage(folder: Path, outside: Path) -> None:
        for place in folder.glob("[0-9]*-align-*"):
            flipped(name, share, bit)(place, outside)

    return damage


def _tensors(shapes: dict[str, tuple[int, ...]]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        header, position = {}, 0
        for name, shape in shapes.items():
            size = 4
            for side in shape:
                size *= side
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        (place / "tensors.safetensors").write_bytes(pack(header, b"\0" * position))

    return change
