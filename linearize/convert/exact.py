"""The teacher's own weights beside a quantised one: for what is trained, and for all of the export.

    training   teacher (8 or 4 bit, frozen) -- its modules shared --> student: what is trained, and adapters, in float32
    export     the checkpoint, as stored <-- what was trained, adapters merged in float32

So the frozen side is held in 8 or 4 bits while there are gradients and moments beside it, and what is written is the
checkpoint's own weights: with nothing trained, the teacher bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.artifacts.load import load_model
from linearize.artifacts.pieces import Stored, open_stored
from linearize.convert.export import in_float32, logits_of
from linearize.convert.inputs import Inputs
from linearize.convert.lora import inject
from linearize.convert.surgery import linearize_model
from linearize.errors import VerificationError
from linearize.modeling.family_table import lookup

ROOM = 1.5
"""Free memory of a GPU, as a multiple of the export, from which on the export is made and checked there."""


@contextmanager
def stored_exactly(inputs: Inputs) -> Iterator[Callable[[str], Tensor]]:
    """Within the block, a function that reads a teacher's tensor by its name in the model: float32, on the device."""
    with open_stored(inputs.folder) as stored:
        names = _names(stored, inputs.layout.config)

        def exact(name: str) -> Tensor:
            if name not in names:
                raise VerificationError(f"nothing gives {name} a value")
            return stored.read(names[name]).to(device=inputs.device, dtype=torch.float32)

        yield exact


def _names(stored: Stored, config: Any) -> dict[str, str]:
    """Names in the model, and what the files call them."""
    family = lookup(config)
    found = {family.current_name(name): name for name in stored.tensors}
    if not any(name.startswith(f"{family.body}.") for name in found):  # files of a body alone
        found |= {f"{family.body}.{name}": there for name, there in found.items()}
    return found


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a training left in a student whose frozen weights are quantised, on the CPU."""

    values: dict[str, Tensor]
    """Mixers, what was trained of the teacher's, and adapters, by name."""
    logits: Tensor
    """[B, T, V] fp32 of the tokens on which merge and reload are compared."""


@torch.no_grad()
def take(inputs: Inputs, student: Any, owned: Collection[str], ids: Tensor) -> Kept:
    """Keep of a student what the checkpoint does not hold; `owned`: the teacher's tensors that were trained."""
    logits = logits_of(student, ids, inputs.task).cpu()
    mine = {
        name: tensor.detach().cpu()
        for name, tensor in (*student.named_parameters(), *student.named_buffers())
        if ".mixer." in name or ".lora_" in name or name.replace(".base_layer.", ".") in owned
    }
    return Kept(values=mine, logits=logits)


@torch.no_grad()
def put_together(inputs: Inputs, trained: Kept, ids: Tensor) -> tuple[Any, dict[str, float]]:
    """The student of the checkpoint's own weights, in their own dtype, with what was trained in float32 in its place.

    Second, {"max", "mean"} of |its logits in float32 - those of training, whose frozen weights were quantised|. It lies
    on the GPU if there is room for it, else on the CPU.
    """
    recipe = inputs.recipe
    teacher = load_model(inputs.folder, device=_place(inputs), dtype=inputs.teacher_dtype, finite=False)
    student, _ = linearize_model(
        teacher, spec=recipe.mixer, layer_mixers=inputs.layout.mixers, seed=recipe.seed, own=lambda name: False
    )
    del teacher
    student.requires_grad_(False)
    if any(".lora_" in name for name in trained.values):
        assert recipe.finetune.lora is not None
        inject(student, recipe.finetune.lora, seed=recipe.seed)
    for name, value in trained.values.items():
        path, _, leaf = name.rpartition(".")
        module = student.get_submodule(path)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(value.to(student.device), requires_grad=False))
        else:
            module._buffers[leaf] = value.to(student.device)
    student.tie_weights()
    with in_float32(student):
        difference = (logits_of(student, ids.to(student.device), inputs.task).cpu() - trained.logits).abs()
    return student, {"max": float(difference.max()), "mean": float(difference.mean())}


def _place(inputs: Inputs) -> torch.device:
    if inputs.device.type != "cuda":
        return inputs.device
    needed = ROOM * (inputs.sizes["teacher"] + inputs.sizes["new"]) * inputs.teacher_dtype.itemsize
    return inputs.device if torch.cuda.mem_get_info(inputs.device)[0] > needed else torch.device("cpu")
