"""Links, pipes and devices where a file should be, and manifests that lie."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.artifacts.damage import INDEX, WEIGHTS, Case, flipped, replaced, sparse


def places() -> Iterator[Case]:
    """Links, pipes, devices, sockets and folders where a file should be."""

    def link(name: str, target: str) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            path = folder / name
            if "{same}" in target:  # a copy of the very file, but elsewhere
                (outside / "same").write_bytes(path.read_bytes() if path.exists() else b"{}")
            path.unlink(missing_ok=True)
            path.symlink_to(target.replace("{same}", str(outside / "same")).replace("{outside}", str(outside)))

        return damage

    def other(name: str, make: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            make(folder / name)

        return damage

    def bound(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's name may not be long
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)

    names = (
        "config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "linearize.json",
    )
    names += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", INDEX)
    for name in names:
        for target in ("{same}", "/dev/zero", "/etc/passwd", "{outside}", name, "../outside/same"):
            yield Case(name=f"{name} is a link to {target}", kind="links and pipes", damage=link(name, target))
        for words, make in (("a pipe", os.mkfifo), ("a folder", os.mkdir), ("a socket", bound)):
            # An absent file of these is no fault, and a folder or socket of its name is as good as absent.
            yield Case(name=f"{name} is {words}", kind="links and pipes", damage=other(name, make))
    for name in ("model-00001-of-00099.safetensors", "adapter_config.json"):
        yield Case(name=f"{name} is a pipe", kind="links and pipes", damage=other(name, os.mkfifo))
    for name in ("linearize.json", "mixer.py", "config.json", WEIGHTS):
        for target in ("{same}", "/dev/zero", "{outside}"):
            damage = link(name, target)
            yield Case(
                name=f"export: {name} is a link to {target}", kind="links and pipes", damage=damage, base="export"
            )
        for words, make in (("a pipe", os.mkfifo), ("a folder", os.mkdir)):
            damage = other(name, make)
            yield Case(name=f"export: {name} is {words}", kind="links and pipes", damage=damage, base="export")
    yield Case(name="extra chat templates by link", kind="links and pipes", damage=_templates, must=False)


def _templates(folder: Path, outside: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").symlink_to(outside / "secret.txt")


def manifests(rng: random.Random) -> Iterator[Case]:
    """Manifests of exports."""

    def edit(change: Callable[[dict[str, Any], Path], None]) -> Callable[[Path, Path], None]:
        def damage(folder: Path, outside: Path) -> None:
            manifest = json.loads((folder / "linearize.json").read_text())
            change(manifest, outside)
            (folder / "linearize.json").write_text(json.dumps(manifest))

        return damage

    def name_too(name: str) -> Callable[[dict[str, Any], Path], None]:
        def change(manifest: dict[str, Any], outside: Path) -> None:
            manifest["files"][name.replace("{outside}", str(outside))] = {"sha256": "0" * 64, "size": 1}

        return change

    def put(*path: str, value: Any) -> Callable[[dict[str, Any], Path], None]:
        def change(manifest: dict[str, Any], outside: Path) -> None:
            inner = manifest
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value

        return change

    for name in (
        "../secret",
        "{outside}/secret.txt",
        "/etc/passwd",
        "a/../../b",
        "..",
        "C:\\x",
        "./x",
        "",
        "x\0",
        "a//b",
        "x" * 5000,
    ):
        yield Case(
            name=f"manifest names {name[:30]!r}", kind="hostile manifest", damage=edit(name_too(name)), base="export"
        )
    for value in (
        None,
        1,
        [],
        {},
        {"size": 1},
        {"sha256": 1, "size": "1"},
        {"sha256": "x", "size": -1},
        {"sha256": "0" * 64, "size": 10**30},
    ):
        damage = edit(put("files", "config.json", value=value))
        yield Case(name=f"manifest entry {value!r:.30}", kind="hostile manifest", damage=damage, base="export")
    for key in ("files", "format", "recipe", "recipe_digest"):
        for value in (None, 7, [], "x", {}, -1, [[]]):
            yield Case(
                name=f"manifest {key} {value!r}",
                kind="hostile manifest",
                damage=edit(put(key, value=value)),
                base="export",
            )
    for key in ("teacher", "data", "figures", "versions", "code_digest"):
        for value in (None, 7, [], "x", {"layers": 7, "stages": [1], "verification": 7}):
            damage = edit(put(key, value=value))
            yield Case(
                name=f"manifest {key} {value!r:.20}", kind="hostile manifest", damage=damage, base="export", must=False
            )
    for text in (
        "",
        "[]",
        "null",
        "{",
        "[" * 200_000,
        '{"files": {}, "format": 99}',
        "\xff",
        '{"format":1,"files":{},"files":{}}',
    ):
        yield Case(
            name=f"manifest {text[:24]!r}",
            kind="hostile manifest",
            damage=replaced("linearize.json", text.encode("latin-1")),
            base="export",
        )
    for _ in range(15):
        share, bit = rng.random(), rng.randrange(8)
        yield Case(
            name=f"manifest: bit {bit} at {share:.4f}",
            kind="hostile manifest",
            damage=flipped("linearize.json", share, bit),
            base="export",
            must=False,
        )
    yield Case(
        name="manifest of 8 GB", kind="hostile manifest", damage=sparse("linearize.json", 8 << 30), base="export"
    )
    for name in ("extra.py", "model-2.safetensors", "adapter.safetensors", "special_tokens_map.json"):
        yield Case(name=f"{name} slipped in", kind="hostile manifest", damage=replaced(name, b"{}"), base="export")
