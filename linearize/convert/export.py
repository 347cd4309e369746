"""A trained student on disk: weights, config, the code that runs it, tokenizer, card, and the manifest last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.artifacts.load import TOKENIZER_FILES
from linearize.artifacts.manifest import write_manifest
from linearize.convert.card import model_card
from linearize.convert.lora import extract

SHARD = "5GB"
GENERATION = "generation_config.json"
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""The teacher's terms go where its weights go."""


@torch.no_grad()
def merge(student: Any, ids: Tensor, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Merge adapters in fp32, then cast everything once to `dtype`; what each did to the logits of ids [B, T].

    Returns {"merge": .., "cast": ..}, both {"max", "mean"} of |logits - logits before| in fp32.
    """
    before = _logits(student, ids)
    extract(student, merge=True)
    merged = _logits(student, ids)
    cast(student, dtype)
    return {"merge": _distance(merged, before), "cast": _distance(_logits(student, ids), before)}


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


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _distance(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    difference = (ours - theirs).abs()
    return {"max": float(difference.max()), "mean": float(difference.mean())}


def write_export(folder: Path, student: Any, *, teacher_folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the model into the empty `folder`, all but the manifest.

    Tokenizer, generation config and terms are the teacher's files, byte for byte; `facts` go into the card.
    """
    from linearize.modeling import export_files

    student.save_pretrained(folder, max_shard_size=SHARD)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = auto_map(student)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in export_files():
        shutil.copyfile(path, folder / path.name)
    for path in carried_files(teacher_folder):
        shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(model_card(facts))


def finish_export(folder: Path, extra: Mapping[str, Any]) -> None:
    """Write the manifest, which marks the export as complete."""
    write_manifest(folder, dict(extra))


def auto_map(student: Any) -> dict[str, str]:
    """Where transformers finds the classes beside the weights: file.Class, local files only."""
    return {
        "AutoConfig": f"configuration_linearized.{type(student.config).__name__}",
        "AutoModelForCausalLM": f"modeling_linearized.{type(student).__name__}",
    }


def carried_files(teacher_folder: Path) -> list[Path]:
    """The teacher's files that a converted model keeps as they are."""
    names = [teacher_folder / name for name in (*TOKENIZER_FILES, GENERATION)]
    return [path for path in names if path.is_file()] + terms_of(teacher_folder)


def terms_of(teacher_folder: Path) -> list[Path]:
    """The files beside a teacher's weights that hold its licence and terms of use."""
    found = [path for pattern in TERMS for path in sorted(teacher_folder.glob(pattern))]
    return [path for path in found if path.is_file()]
