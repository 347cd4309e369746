"""One point of a benchmark: both models at one context and batch, in turns, within limits of time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize.progress import tell


@dataclass(kw_only=True)
class Side:
    """One of the two models, and what is known of it so far."""

    role: str
    name: str
    folder: Path
    model: Any
    weights: int
    positions: int | None
    """Trained on."""
    beyond: str | None
    """Why it cannot read further than that, or None where it can."""
    done: list[tuple[int, int, float, float]] = field(default_factory=list)
    """Points measured: context, batch, seconds of prefill and of all."""
    given_up: list[tuple[int, int, str]] = field(default_factory=list)
    """Points that took too much: context, batch and the reason."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured at each point, and within which limits."""

    new_tokens: int
    repeats: int
    seconds: float
    max_bytes: int | None
    memory: bool
    seed: int
    vocabulary: int


def measure(sides: Sequence[Side], context: int, batch: int, plan: Plan) -> Iterator[dict[str, Any]]:
    """One row a side."""
    from linearize.evaluate.speed_run import digest, run_once, same_tokens

    ids = same_tokens(plan.vocabulary, batch=batch, context=context, seed=plan.seed)
    rows = {side.role: _empty(side, context, batch, plan, digest(ids)) for side in sides}
    left: dict[str, int] = {}
    for side in sides:
        row = rows[side.role]
        reason = refusal(side, context, plan.new_tokens)
        if reason is not None:
            row |= {"status": "refused", "reason": reason}
            continue
        reason = _too_much(side, context, batch, plan)
        if reason is not None:
            row |= {"status": "skipped", "reason": reason}
            continue
        reason = _weigh(side, row, context, batch, plan)
        if reason is None:
            tell(f"{context:,} tokens x {batch}", side.name)
            left[side.role], reason = _warm_up(side, row, ids, plan)
        if reason is not None:
            side.given_up.append((context, batch, reason))
            row |= {"status": "skipped", "reason": reason}
            left.pop(side.role, None)
    runs: dict[str, list[Any]] = {role: [] for role in left}
    for number in range(max(left.values(), default=0)):
        # In turns, and the first of one turn is the last of the next.
        for side in sides if number % 2 == 0 else reversed(sides):
            if number < left.get(side.role, 0):
                runs[side.role].append(run_once(side.model, ids, new_tokens=plan.new_tokens))
    for side in sides:
        if side.role in runs:
            rows[side.role] |= _figures(runs[side.role], context, batch, plan.new_tokens)
            middle = rows[side.role]["ttft_seconds"]
            side.done.append((context, batch, middle, statistics.median(r.total for r in runs[side.role])))
    yield from rows.values()


def _warm_up(side: Side, row: dict[str, Any], ids: Any, plan: Plan) -> tuple[int, str | None]:
    """One run that is not counted; how many there is time for, and why there is none."""
    import torch

    from linearize.evaluate.speed_memory import GPU_METHOD
    from linearize.evaluate.speed_run import run_once

    device = side.model.device
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        run = run_once(side.model, ids, new_tokens=plan.new_tokens, seconds=plan.seconds / 2)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return 0, "takes more memory than there is"
    if device.type == "cuda":
        growth = torch.cuda.max_memory_allocated(device) - before
        row |= {"growth_bytes": growth, "peak_bytes": side.weights + growth, "memory_method": GPU_METHOD}
    row["cuda_graph"] = getattr(side.model, "decode_graph_reason", "no graphs for this class") is None
    row |= {"state_bytes": run.state_bytes, "kv_bytes": run.kv_bytes}
    room = int((plan.seconds - run.total) / run.total)
    if run.stopped or room < 1:
        return 0, f"two runs take more than {plan.seconds:g} s (the first stopped at {run.total:.1f} s)"
    return min(plan.repeats, room), None


def _weigh(side: Side, row: dict[str, Any], context: int, batch: int, plan: Plan) -> str | None:
    """Measure memory where that comes first (on a CPU); why the point must not be tried, or None."""
    from linearize.evaluate.speed_memory import CPU_METHOD, SHARE_OF_FREE, child_growth, expected_bytes, free_bytes

    device, config = side.model.device, side.model.config
    needed = expected_bytes(
        config, batch=batch, tokens=context + plan.new_tokens, dtype_bytes=side.model.dtype.itemsize
    )
    allowed = [int(SHARE_OF_FREE * free)] if (free := free_bytes(device)) else []
    allowed += [plan.max_bytes] if plan.max_bytes is not None else []
    if allowed and needed > min(allowed):
        return f"takes {_gib(needed)} of memory and more, and may take {_gib(min(allowed))}"
    if device.type != "cpu" or not plan.memory:
        return None
    tell(f"memory of {context:,} tokens x {batch}", side.name)
    found = child_growth(
        side.folder,
        dtype=str(side.model.dtype).removeprefix("torch."),
        vocabulary=plan.vocabulary,
        batch=batch,
        context=context,
        seed=plan.seed,
        max_bytes=plan.max_bytes,
        seconds=plan.seconds,
    )
    if found.bytes is None:
        row["memory_method"] = found.reason
        return found.reason if found.fatal else None
    row |= {"growth_bytes": found.bytes, "peak_bytes": side.weights + found.bytes, "memory_method": CPU_METHOD}
    return None


def _figures(runs: Sequence[Any], context: int, batch: int, new_tokens: int) -> dict[str, Any]:
    from linearize.evaluate.speed_run import SETTLED

    values = {
        "ttft_seconds": [run.first for run in runs],
        "prefill_tokens_per_second": [batch * context / run.first for run in runs],
        "decode_tokens_per_second": [batch * (new_tokens - SETTLED) / run.decode for run in runs],
    }
    found: dict[str, Any] = {"status": "ok", "repeats": len(runs)}
    for name, several in values.items():
        found |= {name: statistics.median(several), f"{name}_low": min(several), f"{name}_high": max(several)}
    return found


def refusal(side: Side, context: int, new_tokens: int) -> str | None:
    """Why a side is not asked at all."""
    if side.positions is None or context + new_tokens <= side.positions:
        return None
    end = f"{context:,} tokens and {new_tokens} new ones reach beyond its {side.positions:,} positions"
    if side.role == "teacher":
        return end
    return f"{end}, and {side.beyond}" if side.beyond else None


def _too_much(side: Side, context: int, batch: int, plan: Plan) -> str | None:
    """Why a point is hopeless after what smaller ones took."""
    for other_context, other_batch, reason in side.given_up:
        if context >= other_context and batch >= other_batch:
            return f"{other_context:,} tokens x {other_batch} were too much already: {reason}"
    for other_context, other_batch, prefill, total in side.done:
        if context >= other_context and batch >= other_batch:
            # Prefill grows at least with the tokens; new tokens come no faster. Two runs are the least.
            least = prefill * context * batch / (other_context * other_batch) + (total - prefill)
            if 2 * least > plan.seconds:
                return f"two runs would take some {2 * least:.0f} s, more than {plan.seconds:g} s"
    return None


def _empty(side: Side, context: int, batch: int, plan: Plan, sha256: str) -> dict[str, Any]:
    """A row with nothing measured yet."""
    row: dict[str, Any] = {
        "role": side.role,
        "model": side.name,
        "context": context,
        "batch": batch,
        "new_tokens": plan.new_tokens,
        "status": None,
        "reason": None,
        "repeats": 0,
    }
    for name in ("ttft_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
        row |= {name: None, f"{name}_low": None, f"{name}_high": None}
    return row | {
        "weights_bytes": side.weights,
        "growth_bytes": None,
        "peak_bytes": None,
        "memory_method": None,
        "state_bytes": None,
        "kv_bytes": None,
        "tokens_sha256": sha256,
        "beyond_trained": side.positions is not None and context + plan.new_tokens > side.positions,
        "cuda_graph": None,
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
