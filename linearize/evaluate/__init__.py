"""What judges a model: perplexity under a named protocol, recovery, and the branch audit. Imports wait for the call."""

from __future__ import annotations

from typing import Any

__all__ = ["audit", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from linearize.evaluate.perplexity import evaluate

        return evaluate
    if name == "audit":
        from linearize.evaluate.recovery import audit

        return audit
    raise AttributeError(f"module 'linearize.evaluate' has no attribute {name!r}")
