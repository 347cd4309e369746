"""One micro-batch of every stage before hours of them: does it run, and how many windows fit?"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from linearize.convert.align import aligned_names, transfer_micro_batch
from linearize.convert.finetune import prepare, training_mode
from linearize.convert.finetune_loss import backward_losses
from linearize.convert.inputs import Inputs
from linearize.convert.lora import extract
from linearize.convert.optim import trainable
from linearize.convert.stages import StageShape
from linearize.errors import RefusedError
from linearize_kernels.ahead import compiling_ahead

MICRO_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Most tokens of one micro-batch; on a GPU the preflight halves it until it fits."""


def preflight(inputs: Inputs, student: Any, teacher: Any) -> dict[str, int]:
    """Run one micro-batch of both stages forwards and backwards; windows of a micro-batch that fit, by stage.

    Nothing is changed by it.

    Raises:
        RefusedError: not even one window fits.
    """
    return {shape.name: _fitting(inputs, shape, student, teacher) for shape in inputs.shapes if shape.steps}


def _fitting(inputs: Inputs, shape: StageShape, student: Any, teacher: Any) -> int:
    micro = max(1, min(shape.batch, MICRO_TOKENS[inputs.device.type] // shape.context))
    attempt = {"align": _try_align, "finetune": _try_finetune}[shape.name]
    while True:
        rows = inputs.windows[np.arange(micro) % len(inputs.windows)]
        ids, labels = (x.to(inputs.device) for x in inputs.task.examples(rows, "preflight"))
        try:
            with compiling_ahead(inputs.device) as useful:
                if useful:
                    attempt(inputs, student, teacher, ids, labels)
            attempt(inputs, student, teacher, ids, labels)
            return micro
        except torch.cuda.OutOfMemoryError:
            if micro == 1:
                raise RefusedError(
                    f"{shape.name}: one window of {shape.context} tokens does not fit in the memory of {inputs.device}",
                    "Try gradient_checkpointing=true, a smaller context or another device",
                ) from None
        gc.collect()
        torch.cuda.empty_cache()
        micro = (micro + 1) // 2


@contextmanager
def _ballast(parameters: Sequence[nn.Parameter], device: torch.device) -> Iterator[None]:
    """Hold what training will hold besides: two moments and the first value of every trained parameter, fp32."""
    held = torch.empty(3 * sum(p.numel() for p in parameters), device=device)
    yield
    del held


def _try_align(inputs: Inputs, student: Any, teacher: Any, ids: torch.Tensor, labels: torch.Tensor) -> None:
    from linearize.modeling.modeling_linearized import attention_layers

    align = inputs.recipe.align
    named = dict(student.named_parameters())
    parameters = [named[name] for name in aligned_names(student, align, inputs.layout.linear)]
    with trainable(parameters), _ballast(parameters, inputs.device):
        # As in training, less the chance of a hidden window.
        transfer_micro_batch(teacher, dict(attention_layers(student)), ids, align, task=inputs.task)


def _try_finetune(inputs: Inputs, student: Any, teacher: Any, ids: torch.Tensor, labels: torch.Tensor) -> None:
    recipe = inputs.recipe
    trained = prepare(student, recipe.finetune, seed=recipe.seed)
    try:
        mode = training_mode(student, checkpointing=recipe.gradient_checkpointing)
        members = list(trained.parameters.values())
        with trainable(members), mode, _ballast(members, inputs.device):
            ce, kl = recipe.finetune.ce, recipe.finetune.kl
            backward_losses(student, teacher, ids, labels, ce=ce, kl=kl, scale=1e-6, task=inputs.task)
    finally:
        extract(student, merge=False)
