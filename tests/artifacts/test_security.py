"""SECURITY.md: a test stands behind every promise, and the sources keep those that are about sources."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from linearize.artifacts.load import load_model
from linearize.errors import UsageError

PACKAGES = ("linearize", "cli", "kernels")
LOADS = ("from_pretrained", "from_config")
CODE = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
CALLS = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load"), ("numpy", "save"), ("np", "save")}
# Loaded as a stranger would, in a process of its own, from files that we have just written.
STRANGER = "reload_child.py"


def promises(text: str) -> list[str]:
    """The bold beginnings of the lines under `What is promised`."""
    section = text.partition("## What is promised")[2].partition("\n## ")[0]
    return [line.rstrip(".") for line in re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)]


def table(text: str) -> dict[str, list[str]]:
    """{promise: the tests named for it}."""
    rows = re.findall(r"^\| ([^|`]+?) \| (`tests/.+?) \|$", text, re.MULTILINE)
    return {promise: re.findall(r"`([^`]+)`", tests) for promise, tests in rows}


def test_every_promise_has_tests_and_every_named_test_exists(root: Path) -> None:
    text = (root / "SECURITY.md").read_text(encoding="utf-8")
    named = table(text)
    assert sorted(named) == sorted(promises(text)) and len(named) >= 12
    for tests in named.values():
        for test in tests:
            file, _, name = test.partition("::")
            functions = {
                node.name
                for node in ast.walk(ast.parse((root / file).read_text()))
                if isinstance(node, ast.FunctionDef)
            }
            assert name.startswith("test_") and name in functions, test


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_every_load_says_that_no_remote_code_runs(root: Path) -> None:
    seen = 0
    for path, tree in sources(root):
        for node in ast.walk(tree):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in LOADS
            ):
                continue
            if path.name == STRANGER or not _auto(node.func.value):
                continue
            seen += 1
            said = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
            assert isinstance(said, ast.Constant) and said.value is False, f"{path}:{node.lineno}"
    assert seen >= 3


def _auto(owner: ast.expr) -> bool:
    """Whether this is one of transformers' Auto classes, by name or by a function that gives one."""
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and "auto" in owner.func.id.lower()
    return isinstance(owner, ast.Name) and owner.id.startswith("Auto")


def test_nothing_pickles(root: Path) -> None:
    """No module of pickles, no torch.load or torch.save, no eval or exec of text. `pickletools` only parses."""
    for path, tree in sources(root):
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & set(CODE), where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in CODE, where
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                assert not (isinstance(owner, ast.Name) and (owner.id, node.func.attr) in CALLS), where
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), where


def test_a_model_larger_than_its_weights_is_refused(tmp_path: Path, build_llama: Callable[..., Path]) -> None:
    """What a file does not hold would be made: terabytes of it, here."""
    folder = build_llama(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    huge = {"hidden_size": 131_072, "num_hidden_layers": 1, "intermediate_size": 1_048_576}
    heads = {"num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 128}
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    for layers, words in (
        (1, r"a model of [0-9,]+ numbers, and the weights hold 2$"),
        (1000, "1000 layers, .* 1 tensors"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **huge, **heads, "num_hidden_layers": layers}))
        with pytest.raises(UsageError) as caught:
            load_model(folder, device="cpu")
        assert re.search(words, caught.value.message), caught.value
