"""Make `import linearize` enough for `AutoModelForCausalLM.from_pretrained(export)`, without importing torch for it.

The Auto classes need our config and model classes, and those need torch and transformers. So registration waits until
somebody really uses the Auto classes: an import hook watches for `transformers.models.auto.configuration_auto`, which
every Auto class (and nothing lighter) imports. Registering from inside that import would meet half-imported modules,
of transformers or of our own; the hook therefore counts how deep it is and registers when the outermost watched import
is over. Then it takes itself out.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NEEDED = "transformers.models.auto.configuration_auto"
_WATCHED = ("transformers", "linearize.modeling")


def register_when_needed() -> None:
    """Register now if the Auto classes are already imported, else as soon as they are. Call it as often as you like."""
    if any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        return
    if _NEEDED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())


class _Watcher:
    """A finder that finds nothing itself: it lets the others find and hears when a watched module has been run."""

    def __init__(self) -> None:
        self._here = threading.local()  # depth: watched imports under way; asking: names that we are looking up

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The spec that the other finders give, its loader's `exec_module` counted."""
        asking = self._here.__dict__.setdefault("asking", set())
        if name in asking or not any(name == root or name.startswith(root + ".") for root in _WATCHED):
            return None
        asking.add(name)
        try:
            spec = self._ask_others(name, path, target)
        finally:
            asking.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._count(spec.loader)
        return spec

    def _ask_others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            if find is not None and (spec := find(name, path, target)) is not None:
                return spec  # type: ignore[no-any-return]
        return None

    def _count(self, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._here.depth = getattr(self._here, "depth", 0) + 1
            try:
                run(module)
            finally:
                self._here.depth -= 1
            if self._here.depth == 0 and _NEEDED in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)  # type: ignore[arg-type]
                _register()

        # On the instance, so that the loader keeps its class and everything else that it can do.
        loader.exec_module = exec_module


def _register() -> None:
    try:
        from linearize.modeling import register

        register()
    except ImportError as error:
        # Never break somebody's `import transformers`; say why our model types will be unknown.
        warnings.warn(f"linearize: converted models are not registered with transformers: {error}", stacklevel=2)
