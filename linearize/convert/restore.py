"""Going on from a checkpoint: what an interrupted run had settled, its tensors and its figures, each checked.

The digests of a checkpoint say that its files are whole, not that this code wrote them: whatever does not fit the run
that goes on is refused by the checkpoint's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.convert.checkpoint import RUN, STAGES, STATE, Checkpoint, Run, record
from linearize.convert.optim import AnyOptimizer
from linearize.errors import RefusedError


def settled(run: Run, stages: Sequence[str]) -> tuple[dict[str, int] | None, list[int] | None]:
    """What an interrupted run had settled before training: windows of a micro-batch for each of `stages` (those that
    are not skipped), and the layers it keeps.

    Raises:
        RefusedError: the record says something else.
    """
    noted = record(run)
    micro, kept = noted.get("micro"), noted.get("kept")
    known = isinstance(micro, dict) and set(stages) <= set(micro) <= set(STAGES)
    if micro is not None and not (known and _counts(micro.values(), 1)):
        raise _no_fit(run.path / RUN, "micro")
    if kept is not None and not (isinstance(kept, list) and _counts(kept, 0)):
        raise _no_fit(run.path / RUN, "kept")
    return micro, kept


def state_of(start: Checkpoint) -> dict[str, Any]:
    """The plain values of a checkpoint: those of a stage at its step, all numbers finite.

    Raises:
        ValueError: they are something else.
    """
    state = start.state
    known = state.get("step") == start.step and isinstance(state.get("extra"), dict)
    if not known or not isinstance(state.get("seconds"), (int, float)) or not _finite(state):
        raise ValueError(f"{STATE} is not that of step {start.step}")
    return state


def _counts(values: Iterable[Any], low: int) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and low <= n <= 1 << 20 for n in values)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@contextmanager
def restoring(start: Checkpoint | None) -> Iterator[None]:
    """Whatever goes wrong while `start` is put back is said of it: its files are whole, but not what this run wrote.

    Raises:
        RefusedError: it does not fit.
    """
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"{start.path}: {error.message}" if start else error.message, error.hint) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        if start is None:
            raise
        raise _no_fit(start.path, f"{type(error).__name__}: {error}") from error


def _no_fit(path: Path, why: str) -> RefusedError:
    return RefusedError(
        f"{path}: is no checkpoint of this run ({why})",
        f"To start over, delete {path.parent} and leave out --resume.",
    )


def unpack_state(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: AnyOptimizer | None,
) -> None:
    """Put back what `pack_state` took. Every parameter must be there, in its own shape.

    Raises:
        RefusedError: the checkpoint does not fit the model.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = tensors.get(f"parameter/{name}")
            if value is None or value.shape != parameter.shape or not bool(value.isfinite().all()):
                raise RefusedError(f"the checkpoint does not hold {name} as the model needs it", "Start over")
            parameter.copy_(value)
    if optimizer is None:
        return
    owned = {id(p): bool(group.get("fused")) for group in optimizer.param_groups for p in group["params"]}
    for full_name, value in tensors.items():
        kind, _, rest = full_name.partition("/")
        if kind != "optimizer":
            continue
        key, _, name = rest.partition("/")
        if name not in parameters or value.shape not in (parameters[name].shape, torch.Size([])):
            raise RefusedError(f"the checkpoint holds {full_name}, which this run has no place for", "Start over")
        parameter = parameters[name]
        if id(parameter) in owned:
            # AdamW keeps its moments beside the parameter, its step counts too where it is one kernel, else on the CPU.
            stays = key == "step" and not owned[id(parameter)]
            optimizer.state[parameter][key] = value if stays else value.to(parameter.device)
