"""The Python API: every public function says what it takes, gives and raises; a text is named by a str or a Path."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import linearize
from linearize.errors import UsageError

PUBLIC = [name for name in linearize.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_is_documented(name: str) -> None:
    function = inspect.unwrap(getattr(linearize, name))
    words, shape = inspect.getdoc(function) or "", inspect.signature(function)
    for part in ("Args:", "Returns:", "Raises:"):
        assert f"\n{part}\n" in words, part
    told = words.partition("Args:")[2].partition("Returns:")[0]
    for parameter in shape.parameters.values():
        assert parameter.name in told, parameter.name
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    assert shape.return_annotation.startswith(("dict[str, Any]", "tuple["))


@pytest.mark.parametrize("name", ["convert", "evaluate", "select"])
def test_a_text_that_is_not_there_is_refused_however_it_is_named(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"convert": {"out": tmp_path / "out"}, "select": {"keep": 1}}.get(name, {})
    for place in (tmp_path / "none.txt", str(tmp_path / "none.txt")):
        with pytest.raises(UsageError, match=r"none\.txt: no such file"):
            getattr(linearize, name)("demo", data=place, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "behind"),
    [("audit", "linearize.evaluate.recovery.audit"), ("recall", "linearize.evaluate.recall.recall"),
     ("report", "linearize.report.make.report")],
)  # fmt: skip
def test_paths_of_texts_reach_the_work_as_names(name: str, behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(behind, lambda *_, data, **__: seen.append(data) or {})
    getattr(linearize, name)("out", against="demo", data=Path("a/text.txt"))
    assert seen == ["a/text.txt"]


def test_tasks_may_be_one_string() -> None:
    from linearize.evaluate.tasks import _checked

    settings: dict[str, Any] = {"limit": None, "fewshot": None, "batch_size": 8, "context": None}
    assert _checked("piqa, arc_easy", **settings) == _checked(["piqa", "arc_easy"], **settings) == ("piqa", "arc_easy")


def test_type_checkers_see_every_public_function() -> None:
    """They cannot follow the package's `__getattr__`: what they are told must be what it finds."""
    body = ast.parse(Path(linearize.__file__).read_text(encoding="utf-8")).body
    told = next(node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING").body
    found = {alias.name: f"{node.module}" for node in told if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(found) == sorted(PUBLIC)
    for name, module in found.items():
        assert inspect.unwrap(getattr(linearize, name)) is getattr(importlib.import_module(module), name)
