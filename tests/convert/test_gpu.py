"""On a GPU: bf16 autocast, and a resumed run that equals the uninterrupted one bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linearize.convert.pipeline import convert
from tests.interrupter import Interrupter

OPTIONS = [
    "context=128", "mixer.window=16", "mixer.feature_dim=8", "device=cuda", "dtype=bfloat16",
    "align.tokens=8k", "align.batch_tokens=512", "align.window_dropout=0.5", "align.train=[mixer,q_proj]",
    "finetune.tokens=8k", "finetune.batch_tokens=512", "finetune.lora.dropout=0.1", "finetune.kl=1",
    "finetune.lora.targets=[q_proj,o_proj]", "finetune.full=[mixer]", "gradient_checkpointing=true",
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["lolcats", "gated-deltanet"])
def test_resume_on_a_gpu(teacher_folder: Path, text_file: Path, tmp_path: Path, recipe: str) -> None:
    options = [o for o in OPTIONS if recipe == "lolcats" or not o.startswith("mixer.")]
    if recipe != "lolcats":
        options = [o for o in options if "window" not in o and "targets" not in o and "full" not in o]
    common: dict[str, Any] = {"recipe": recipe, "data": str(text_file), "overrides": options}
    whole = convert(teacher_folder, tmp_path / "whole", **common)
    assert all(way["max_abs_difference"] == 0.0 for way in whole["verification"].values())
    for stage, resume in (("align", False), ("finetune", True)):
        with pytest.raises(KeyboardInterrupt):
            convert(teacher_folder, tmp_path / "parts", resume=resume, progress=Interrupter(stage, 5), **common)
    convert(teacher_folder, tmp_path / "parts", resume=True, **common)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
