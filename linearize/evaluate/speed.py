"""Speed and memory of a converted model beside its teacher, against context and batch.

Both models read the same tokens and write as many new ones, through transformers' own `generate`, greedily and with no
end token. At each point they take turns, so that whatever the machine does besides falls on both. A point that would
take too long or too much memory is skipped and says so; so is a teacher beyond the positions it was trained on, where
its figures would be of a model that nobody uses.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from linearize.errors import RefusedError, UsageError
from linearize.evaluate.speed_points import Plan, Side, measure, refusal
from linearize.progress import tell

CONTEXTS = (512, 2048, 8192)
BATCHES = (1, 4, 16)
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of RoPE whose tables do not depend on how long a sequence is."""
PACKAGES = ("linearize", "torch", "transformers", "triton")
INSTALL_PLOTS = "pip install matplotlib"


def bench(
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    new_tokens: int = 64,
    device: str = "auto",
    dtype: str = "auto",
    repeats: int = 3,
    max_seconds: float = 120.0,
    max_bytes: int | None = None,
    memory: bool = True,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    plots: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measure how fast `out`, and `against` beside it, reads and writes, and what it holds in memory.

    Args:
        out: the converted model: a folder, a Hub id, or `demo`.
        against: its teacher, likewise.
        contexts: tokens of the prompt; None: 512, 2048 and 8192 as far as the models were trained, or parts of that.
        batches: sequences at once.
        new_tokens: to write after the prompt, at least 8.
        device: auto | cpu | cuda | cuda:N.
        dtype: of the weights; auto: as stored on a GPU, float32 on a CPU.
        repeats: measured runs of each model at each point, after one that warms up.
        max_seconds: for one model at one point, warm-up included.
        max_bytes: of memory above the weights at one point; None: 80 % of what is free when it begins.
        memory: on a CPU, also start a fresh process a model and point to measure memory. On a GPU it costs nothing.
        seed: of the tokens, which are drawn evenly from the vocabulary that both models have.
        file: where each row is added as a line of JSON as soon as it is there.
        plots: a folder for SVG plots, which need matplotlib.

    Returns:
        rows, plots (paths), file, notes. A row has role (student | teacher), model, context, batch, new_tokens, status
        (ok | skipped | refused) and reason; medians ttft_seconds, prefill_tokens_per_second and
        decode_tokens_per_second (each also with _low and _high, the extremes of `repeats` runs); weights_bytes,
        growth_bytes (peak above the weights), peak_bytes (both together), memory_method, state_bytes (of fixed size),
        kv_bytes (keys and values); tokens_sha256, beyond_trained, cuda_graph, device, dtype, machine, versions, date.
        tokens/s count the whole batch. What was not measured is None.

    Raises:
        UsageError: bad input. RefusedError: no point is left to measure. VerificationError: generate misbehaved.
    """
    _check(contexts=contexts, batches=batches, new_tokens=new_tokens, repeats=repeats, max_seconds=max_seconds,
           max_bytes=max_bytes)  # fmt: skip
    notes: list[str] = []
    if plots is not None and importlib.util.find_spec("matplotlib") is None:
        notes.append(f"no plots: they need the package matplotlib, which is not installed ({INSTALL_PLOTS})")
        plots = None
    if plots is not None and Path(plots).exists() and not Path(plots).is_dir():
        raise UsageError(f"plots {plots}: is a file", "Name a folder.")
    lines = None if file is None else _new_lines(Path(file))
    from linearize.artifacts.load import resolve, select_device

    where = select_device(device)
    named = [("student", out), *([("teacher", against)] if against is not None else [])]
    folders = [(role, os.fspath(name), resolve(os.fspath(name))) for role, name in named]
    sides = [_load(role, name, folder, where, dtype) for role, name, folder in folders]
    vocabulary = min(side.model.config.get_text_config().vocab_size for side in sides)
    points = _points(contexts, batches, sides, new_tokens)
    plan = Plan(new_tokens=new_tokens, repeats=repeats, seconds=max_seconds, max_bytes=max_bytes, memory=memory,
                 seed=seed, vocabulary=vocabulary)  # fmt: skip
    about = _about(where, dtype, sides)
    rows: list[dict[str, Any]] = []
    for context, batch in points:
        for row in measure(sides, context, batch, plan):
            rows.append(row | about)
            if lines is not None:
                _add_line(lines, rows[-1])
    drawn: list[Path] = []
    if plots is not None:
        from linearize.evaluate.speed_plots import draw

        drawn = draw(rows, Path(plots))
    return {
        "rows": rows,
        "plots": [str(path) for path in drawn],
        "file": None if lines is None else str(lines),
        "notes": notes,
    }


def _load(role: str, name: str, folder: Path, device: Any, dtype: str) -> Side:
    from linearize.artifacts.load import load_model
    from linearize.evaluate.speed_run import weights_bytes

    tell("loading", name)
    kind = "float32" if dtype == "auto" and device.type == "cpu" else dtype
    model = load_model(folder, device=device, dtype=kind, finite=False)
    if not hasattr(model, "generate") or not model.can_generate():
        raise UsageError(
            f"{name} does not generate text (its type is {model.config.model_type})",
            "Give a model that predicts the next token.",
        )
    config = model.config.get_text_config()
    return Side(
        role=role,
        name=name,
        folder=folder,
        model=model,
        weights=weights_bytes(model),
        positions=getattr(config, "max_position_embeddings", None),
        beyond=_why_not_beyond(config),
    )


def _why_not_beyond(config: Any) -> str | None:
    """Why a model cannot read beyond the positions it was trained on; None where its RoPE goes on."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return "it has no rotary positions"
    several = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    kinds = {part.get("rope_type", "default") for part in several}
    odd = sorted(str(kind) for kind in kinds - set(FIXED_ROPE))
    return f"its {', '.join(odd)} RoPE depends on the length" if odd else None


def _points(
    contexts: Sequence[int] | None, batches: Sequence[int], sides: Sequence[Side], new_tokens: int
) -> list[tuple[int, int]]:
    """(context, batch), small ones first."""
    longest = min((side.positions for side in sides if side.positions is not None), default=None)
    chosen = sorted(set(contexts)) if contexts else list(CONTEXTS)
    if not contexts and longest is not None:
        chosen = [context for context in CONTEXTS if context + new_tokens <= longest]
        if len(chosen) < 2:
            parts = {longest // 4, longest // 2, longest - new_tokens}
            chosen = sorted(part for part in parts if 0 < part <= longest - new_tokens)
        if not chosen:
            raise RefusedError(f"{new_tokens} new tokens leave no room in {longest} positions", "Ask for fewer")
    points = list(product(chosen, sorted(set(batches))))
    reasons = [refusal(side, context, new_tokens) for context in chosen for side in sides]
    if all(reasons):
        raise RefusedError(f"no context is left to measure: {sides[0].name}: {reasons[0]}", "Give shorter contexts")
    return points


def _about(device: Any, dtype: str, sides: Sequence[Side]) -> dict[str, Any]:
    """What every row says about where it was measured."""
    from linearize.evaluate.tasks import installed_versions

    return {
        "device": str(device),
        "dtype": str(sides[0].model.dtype).removeprefix("torch."),
        "machine": _machine(device),
        "versions": installed_versions(PACKAGES),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _machine(device: Any) -> dict[str, Any]:
    import torch

    from linearize.evaluate.speed_memory import field_bytes

    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": field_bytes("/proc/meminfo", "MemTotal") or None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _new_lines(path: Path) -> Path:
    """A file that rows can be added to, tried now rather than after the first point."""
    try:
        with path.open("a", encoding="utf-8"):
            return path
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})", "Name a file, such as bench.jsonl.") from None


def _add_line(path: Path, row: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RefusedError(f"{path}: cannot be written ({error.strerror})", "Free some space.") from error


def _check(
    *,
    contexts: Sequence[int] | None,
    batches: Sequence[int],
    new_tokens: int,
    repeats: int,
    max_seconds: float,
    max_bytes: int | None,
) -> None:
    least = {"contexts": min(contexts, default=0) if contexts is not None else 1, "batches": min(batches, default=0),
             "repeats": repeats}  # fmt: skip
    for name, value in least.items():
        if value < 1:
            raise UsageError(f"{name}: needs whole numbers of at least 1")
    if new_tokens < 8:
        raise UsageError(f"new_tokens {new_tokens}: a speed of decode needs at least 8")
    if not max_seconds > 0 or (max_bytes is not None and max_bytes < 1):
        raise UsageError("max_seconds and max_bytes must be positive")
