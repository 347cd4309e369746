"""The library behind the commands, replaced: what its functions give, what they were called with, a run of each."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

LAYER = {
    "from": "softmax",
    "to": "linear",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "feature_dim": 32,
    "state_bytes": 2048,
    "new_parameters": 24_582,
}
KEPT = {**LAYER, "to": "softmax", "feature_dim": None, "state_bytes": 0, "new_parameters": 0}
INSPECTION = {
    "model": "m",
    "family": "llama [bold]",
    "parameters": 1_000_000,
    "dtype": "float32",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "context": 256,
    "kv_bytes": {"2048": 3072, "32768": 5 * 1024**3},
    "layers": [{"index": 0, **LAYER}, {"index": 1, **LAYER}],
    "new_parameters": 49_164,
    "state_bytes": 2048,
    "softmax_kv_bytes": {"2048": 0, "32768": 0},
    "break_even_context": 525,
    "notes": ["a note"],
}
PLAN = {
    "family": "llama [bold]",
    "layers": [{"index": 0, **LAYER}, {"index": 1, **LAYER}, {"index": 2, **KEPT}, {"index": 3, **LAYER}],
    "parameters": 1_073_746,
    "new_parameters": 73_746,
    "trained": {"align": 73_746, "finetune": 0},
    "context": 256,
    "tokens": {"align": 256, "finetune": 0},
    "steps": {"align": 1, "finetune": 0},
    "skipped": {"finetune": "finetune.tokens is 0"},
    "notes": [],
    "dropped": [],
    "export_dtype": "float32",
    "state_bytes": 6144,
    "kv_bytes_at_context": 256 * 4 * 1024,
    "memory_bytes": 1024**2,
    "disk_bytes": 1024**3,
}
REPORT = {
    "out": "o",
    "dtype": "bfloat16",
    "stages": {
        "align": {"tokens": 8192, "steps": 4, "loss_first": 0.5, "loss_last": 0.25, "seconds": 0.078546},
        "finetune": {"skipped": "finetune.tokens is 0", "tokens": 0, "steps": 0},
    },
    "layers": [{"layer": 0, "loss": 0.123, "nmse": 0.123}],
    "keys": {"mapped": 12_345},
    "mean_match": 0.46381,
    "merge_error": {"merge": {"max": 2e-5, "mean": 1e-6}, "cast": {"max": 0.159, "mean": 0.01}},
    "verification": {"import": {"way": "import linearize", "max_abs_difference": 0.0, "same_text": True}},
    "notes": [],
    "seconds": {"total": 76.331},
}
FIGURES = {
    "model": "o",
    "protocol": "concat@64",
    "context": 64,
    "windows": 1,
    "tokens": 12,
    "bos": "none",
    "eos": "none",
    "dtype": "float32",
    "device": "cpu",
    "token_perplexity": 12.0,
    "tokenizer_sha256": "abcdef",
    "data": {"name": "/a/path"},
}
AUDIT = {
    **FIGURES,
    "against": "m",
    "R": 25.0,
    "ppl_teacher": 10.0,
    "ppl_window": 14.0,
    "ppl_student": 13.0,
    "branches": {"full": 13.0, "window": None, "linear": 15.5, "none": 99.5},
    "reference": {"window": 64, "sinks": 0, "own": True},
    "by_position": [{"from": 0, "to": 64, "tokens": 12, "teacher": 10.5, "window": 14.5, "student": 13.5}],
    "notes": ["a note"],
}

CALLS: list[tuple[str, tuple, dict]] = []


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the heavy modules. Set an entry to an exception to have it raised, else it is the result."""
    results: dict[str, Any] = {
        "inspect": INSPECTION,
        "plan": PLAN,
        "convert": REPORT,
        "evaluate": FIGURES,
        "audit": AUDIT,
    }
    CALLS.clear()

    def stand_in(name: str):
        def call(*args: Any, **kwargs: Any) -> Any:
            CALLS.append((name, args, kwargs))
            print("chatter of a library")
            result = results.get(name, {"ok": True})
            if isinstance(result, BaseException):
                raise result
            return result

        return call

    for module, functions in {
        "linearize.convert.plan": {"make_plan": "plan", "inspect": "inspect"},
        "linearize.convert.pipeline": {"convert": "convert"},
        "linearize.evaluate.perplexity": {"evaluate": "evaluate"},
        "linearize.evaluate.recovery": {"audit": "audit"},
    }.items():
        fake = types.ModuleType(module)
        for function, name in functions.items():
            setattr(fake, function, stand_in(name))
        monkeypatch.setitem(sys.modules, module, fake)
    import linearize.api
    import linearize.artifacts.kind
    import linearize.artifacts.load
    import linearize.convert.early

    # There is no model `m` to look at: it counts as a causal one.
    monkeypatch.setattr(linearize.artifacts.load, "resolve", lambda model: Path(model))
    monkeypatch.setattr(linearize.artifacts.kind, "is_masked", lambda model: False)
    monkeypatch.setattr(linearize.convert.early, "refuse_early", lambda *args, **kwargs: None)
    monkeypatch.setattr(linearize.api, "generate", stand_in("generate"))
    results["generate"] = {
        "text": "a b",
        "new_tokens": 1,
        "tokens_per_second": 2.0,
        "device": "cpu",
        "dtype": "float32",
    }
    return results


RUNS = {
    "inspect": ["inspect", "m"],
    "plan": ["convert", "m", "o", "--plan"],
    "convert": ["convert", "m", "o", "--data", "d"],
    "evaluate": ["eval", "m", "--data", "d"],
    "audit": ["audit", "o", "--against", "m", "--data", "d"],
    "generate": ["generate", "m", "--prompt", "a"],
}
