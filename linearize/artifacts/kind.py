"""Is a model causal or masked? By its model_type alone, before anything heavy is read or imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from linearize.artifacts.config_reader import CONFIG, CONFIG_CAP
from linearize.artifacts.weights import read_json, require_inside
from linearize.errors import UsageError
from linearize.modeling.family_table import lookup

EVALUATE = "Use: linearize eval OUT --against TEACHER --data DATA"


def is_masked(model: Any) -> bool:
    """Whether a folder, or a model in memory, is a masked language model; False where it is no family of ours."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model) / CONFIG
        if not path.is_file():
            return False
        require_inside(Path(model), path)
        kind = read_json(path, cap=CONFIG_CAP).get("model_type")
    else:
        kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        return isinstance(kind, str) and lookup(kind).bidirectional
    except KeyError:
        return False


def require_causal(model: Any, name: str, hint: str = EVALUATE) -> None:
    """UsageError for a masked language model, which predicts no next token; `hint` says what to use instead."""
    if is_masked(model):
        raise UsageError(f"{name} is a masked language model: it finds hidden tokens and predicts no next one", hint)


def require_masked(model: Any, name: str) -> None:
    """UsageError for a model that is no masked language model."""
    if not is_masked(model):
        raise UsageError(f"{name} is not a masked language model", "Compare models of one kind")
