"""A trained student on disk: weights, config, the code that runs it, tokenizer, card, and the manifest last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.artifacts.download import TOKENIZER_FILES
from linearize.artifacts.licence import terms_files
from linearize.artifacts.manifest import write_manifest
from linearize.artifacts.tokenizer_files import carry
from linearize.convert.card import model_card
from linearize.convert.lora import extract
from linearize.errors import VerificationError
from linearize.modeling.family_table import TASKS, lookup
from linearize.task import CAUSAL, Task

SHARD = "5GB"
GENERATION = "generation_config.json"
NARROWER = (torch.bfloat16, torch.float16)
NARROW = "linearize_narrow"
"""Where a module keeps its own weights while it runs with wider ones."""


@torch.no_grad()
def merge(student: Any, ids: Tensor, dtype: torch.dtype, task: Task = CAUSAL) -> dict[str, dict[str, float]]:
    """Merge adapters in fp32, then cast everything once to `dtype`; what each did to the logits of ids [B, T].

    Returns {"merge": .., "cast": ..}, both {"max", "mean"} of |logits - logits before| in fp32.

    Raises:
        VerificationError: in `dtype` the logits are not finite.
    """
    with in_float32(student):
        before = logits_of(student, ids, task)
        extract(student, merge=True)
        merged = logits_of(student, ids, task)
    cast(student, dtype)
    logits = logits_of(student, ids, task)
    require_finite(logits, dtype, student)
    return {"merge": _distance(merged, before), "cast": _distance(logits, before)}


def require_finite(logits: Tensor, dtype: torch.dtype, model: Any) -> None:
    """Refuse a converted model whose numbers its export's `dtype` does not hold, before anything is written.

    Raises:
        VerificationError: the logits are not finite.
    """
    if bool(logits.isfinite().all()):
        return
    kind = str(dtype).removeprefix("torch.")
    bad = next((name for name, p in model.named_parameters() if not p.is_meta and not bool(p.isfinite().all())), None)
    raise VerificationError(
        f"in {kind} the converted model gives logits that are not finite{f', for {bad} is not' if bad else ''}",
        "float16 ends at 65,504: convert with dtype=bfloat16 or dtype=float32" if dtype == torch.float16 else None,
    )


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Within the block every module computes with float32 weights: one stored narrower is widened while it runs."""

    def widen(module: Any, args: Any) -> None:
        module.__dict__[NARROW] = {
            name: (p, p.data) for name, p in module._parameters.items() if p is not None and p.dtype in NARROWER
        }
        for parameter, value in module.__dict__[NARROW].values():
            parameter.data = value.float()

    def narrow(module: Any, args: Any, output: Any) -> None:
        for parameter, value in module.__dict__.pop(NARROW).values():
            parameter.data = value

    handles = []
    for module in model.modules():
        if any(p is not None and p.dtype in NARROWER for p in module._parameters.values()):
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cast(student: Any, dtype: torch.dtype) -> None:
    """Everything that a checkpoint stores in `dtype`. Rotary tables are not stored and stay fp32, as after loading."""
    for module in student.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
    student.config.dtype = dtype


def logits_of(model: Any, ids: Tensor, task: Task) -> Tensor:
    """Of ids [B, T], fp32 [B, T, V]."""
    return model(**task.call(ids)).logits.float()


def _distance(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    difference = (ours - theirs).abs()
    return {"max": float(difference.max()), "mean": float(difference.mean())}


def write_export(folder: Path, student: Any, *, teacher_folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the model into the empty `folder`, all but the manifest; `facts` go into the card."""
    write_model(folder, student, teacher_folder=teacher_folder)
    write_card(folder, student, facts)


def write_card(folder: Path, student: Any, facts: Mapping[str, Any]) -> None:
    """Write the model card, from `facts` and the Auto class that loads `student`."""
    auto_class = next(name for name in auto_map(student) if name.startswith("AutoModel"))
    (folder / "README.md").write_text(model_card({**facts, "auto_class": auto_class}), encoding="utf-8")


def write_model(folder: Path, student: Any, *, teacher_folder: Path) -> None:
    """Write the model into the empty `folder`, all but the card and the manifest.

    Tokenizer, generation config and terms are the teacher's files, byte for byte, but that the tokenizer's may name no
    code and no other file.
    """
    student.save_pretrained(folder, max_shard_size=SHARD)
    write_beside(folder, student, teacher_folder=teacher_folder)


def write_beside(folder: Path, student: Any, *, teacher_folder: Path) -> None:
    """Write what `write_model` writes beside weights and config, which are there; the config is completed."""
    from linearize.modeling import export_files

    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = auto_map(student)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in export_files():
        shutil.copyfile(path, folder / path.name)
    for path in carried_files(teacher_folder):
        carry(path, folder / path.name)


def finish_export(folder: Path, extra: Mapping[str, Any]) -> None:
    """Write the manifest, which marks the export as complete."""
    write_manifest(folder, dict(extra))


def auto_map(student: Any) -> dict[str, str]:
    """Where transformers finds the classes beside the weights: file.Class, local files only."""
    family = lookup(student.config)
    found = {
        "AutoConfig": f"configuration_linearized.{type(student.config).__name__}",
        TASKS[family.task]: f"modeling_linearized.{type(student).__name__}",
    }
    if family.bidirectional:  # an encoder is of use without its head, too
        found["AutoModel"] = f"modeling_linearized.Linearized{family.name}Model"
    return found


def carried_files(teacher_folder: Path) -> list[Path]:
    """The teacher's files that a converted model keeps as they are."""
    names = [teacher_folder / name for name in (*TOKENIZER_FILES, GENERATION)]
    return [path for path in names if path.is_file()] + terms_of(teacher_folder)


def terms_of(teacher_folder: Path) -> list[Path]:
    """The files beside a teacher's weights that hold its licence and terms of use."""
    return [teacher_folder / name for name in terms_files(teacher_folder)]
