"""Convert pretrained softmax-attention language models into linear-attention models.

    import linearize

    report = linearize.convert("demo", "out", recipe="lolcats", data="demo")
    model, tokenizer = linearize.load("out")
    linearize.evaluate("out", data="demo", against="demo")
    linearize.audit("out", against="demo", data="demo")
    linearize.recall("out", against="demo", data="demo")

Importing this package is light (neither torch nor transformers) and lets transformers' Auto classes load converted
models; see `registration`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from linearize._version import __version__
from linearize.registration import register_when_needed

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors; importing it would import torch
    from linearize.api import audit, convert, evaluate, import_lolcats, load, recall, report, select
    from linearize.artifacts.hub import push
    from linearize.artifacts.verify import verify
    from linearize.evaluate.speed import bench
    from linearize.evaluate.tasks import evaluate_tasks

__all__ = [
    "__version__",
    "audit",
    "bench",
    "convert",
    "evaluate",
    "evaluate_tasks",
    "import_lolcats",
    "load",
    "push",
    "recall",
    "report",
    "select",
    "verify",
]

_ROOMS = ("convert", "evaluate", "report")
"""Functions of the API that share their name with the subpackage behind them."""
_ELSEWHERE = {"bench": "linearize.evaluate.speed", "evaluate_tasks": "linearize.evaluate.tasks"}
_ELSEWHERE["verify"] = "linearize.artifacts.verify"
_ELSEWHERE["push"] = "linearize.artifacts.hub"
"""Functions of the API that are defined where they work."""


class _Room(ModuleType):
    """A subpackage that can be called: `linearize.convert(...)` works however the subpackage came to be imported."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    def _function(self) -> Any:
        return getattr(importlib.import_module("linearize.api"), self.__name__.rpartition(".")[2])

    @property
    def __wrapped__(self) -> Any:
        """The function, for `inspect.signature` and `help`."""
        return self._function()


class _Package(ModuleType):
    """This package. The import system binds a subpackage by setting an attribute here: that is where rooms are made."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and type(value) is ModuleType:
            value.__class__ = _Room
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"linearize.{name}")
    if name in ("load", "import_lolcats", "audit", "recall", "select"):
        return getattr(importlib.import_module("linearize.api"), name)
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module 'linearize' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register_when_needed()
