"""Is what was written what was made? Load a copy of the export in fresh processes, both ways, and compare."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from linearize.errors import VerificationError
from linearize.task import CAUSAL, NEW_TOKENS, Task

MODES = {"import": "import linearize", "remote": "trust_remote_code=True"}
RELATIVE = 1e-5
"""Allowed difference of a logit, relative to the largest one; the same code on the same device should give none."""
CHILD_SECONDS = 1800
SMALL = 2_000_000_000
"""Bytes of an export that two processes may load at the same time."""


DEFINITION = {"LINEARIZE_KERNELS": "torch"}
"""Environment in which all mix by the definition: fused kernels round otherwise, and an export alone has none."""


@contextmanager
def by_definition() -> Iterator[None]:
    """Within the block mixers that choose for themselves run on torch."""
    before = {name: os.environ.get(name) for name in DEFINITION}
    os.environ.update(DEFINITION)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the model in memory says."""

    ids: Tensor
    """[B, T] tokens."""
    logits: Tensor
    """[B, T, V] fp32, on the CPU."""
    tokens: list[int] | None
    """What it makes of the first row; see `Task.answer`. None, and any text, where the model was never whole: then the
    two ways of loading must agree."""
    text: str
    task: Task = CAUSAL


@torch.no_grad()
def expect(model: Any, tokenizer: Any, ids: Tensor, task: Task = CAUSAL) -> Expected:
    """Logits of ids [B, T], and what the model makes of the first row: a continuation, or its hidden tokens."""
    ids = ids.to(model.device)
    with by_definition():
        logits = model(**task.call(ids)).logits.float().cpu()
        answer = task.answer(model, ids)
    return Expected(ids=ids.cpu(), logits=logits, tokens=answer, text=tokenizer.decode(answer), task=task)


def verify_export(folder: Path, expected: Expected, *, device: torch.device, room: Path) -> dict[str, Any]:
    """Load a copy of `folder` with `import linearize` and with trust_remote_code; {way: figures}.

    `room` is made for it and removed; on the disk of `folder` the copy is free (hard links).

    Raises:
        VerificationError: it does not load, or its logits or greedy text are not those of the model in memory.
    """
    figures = {}
    copy = room / "copied"
    try:
        shutil.copytree(folder, copy, copy_function=_link)
        for (mode, name), (logits, answer) in zip(MODES.items(), _answers(copy, room, expected, device), strict=True):
            if expected.tokens is None:
                expected = replace(expected, tokens=answer["tokens"], text=answer["text"])
            figures[mode] = _compare(name, logits, answer, expected)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return figures


def _answers(
    folder: Path, room: Path, expected: Expected, device: torch.device
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """What the processes say, in the order of MODES; at once where a GPU has room for both and little else is done."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type != "cuda" or size > SMALL:
        yield from (_ask(mode, folder, room, expected, device) for mode in MODES)
        return
    with ThreadPoolExecutor(len(MODES)) as pool:
        yield from list(pool.map(lambda mode: _ask(mode, folder, room, expected, device), MODES))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _ask(
    mode: str, folder: Path, room: Path, expected: Expected, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    call = expected.task.call(expected.ids)
    request = {
        "mode": mode,
        "folder": str(folder),
        "roots": _roots(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "auto": expected.task.auto,
        "call": {name: x.tolist() if isinstance(x, Tensor) else x for name, x in call.items()},
        "prompt": expected.task.prompt(expected.ids),
        "mask": expected.task.mask,
        "new_tokens": NEW_TOKENS,
        "logits": str(room / f"{mode}.safetensors"),
        "text": str(room / f"{mode}.json"),
    }
    path = room / f"{mode}-request.json"
    path.write_text(json.dumps(request))
    environment = (
        os.environ
        | DEFINITION
        | {
            "HF_MODULES_CACHE": str(room / f"{mode}-modules"),
            "HF_HUB_OFFLINE": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
    )
    child = Path(__file__).with_name("reload_child.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(child), str(path)],
            cwd=room,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"the export did not load in {CHILD_SECONDS} s with {MODES[mode]}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise VerificationError(f"the export does not load in a fresh process with {MODES[mode]}: {reason}")
    return load_file(request["logits"])["logits"], json.loads(Path(str(request["text"])).read_text())


def _roots() -> list[str]:
    """Folders that make `import linearize` work, installed or not."""
    import linearize
    import linearize_kernels

    return sorted({str(Path(str(m.__file__)).resolve().parent.parent) for m in (linearize, linearize_kernels)})


def _compare(way: str, logits: Tensor, answer: dict[str, Any], expected: Expected) -> dict[str, Any]:
    if logits.shape != expected.logits.shape or not bool(logits.isfinite().all()):
        raise VerificationError(f"the export, loaded with {way}, gives logits that are not finite or of another shape")
    difference = float((logits - expected.logits).abs().max())
    largest = float(expected.logits.abs().max())
    if difference > RELATIVE * max(largest, 1.0):
        raise VerificationError(
            f"the export, loaded with {way}, differs from the model that was trained: a logit by {difference:.3g} "
            f"(largest {largest:.3g})"
        )
    if answer["tokens"] != expected.tokens or answer["text"] != expected.text:
        raise VerificationError(
            f"the export, loaded with {way}, continues a text otherwise than the model that was trained"
        )
    return {"way": way, "max_abs_difference": difference, "same_text": True}
