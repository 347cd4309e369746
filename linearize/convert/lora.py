"""Low-rank adapters: put in by peft, merged in fp32 and taken out again here.

peft's own merge writes into the base weight, which a student shares with its teacher; this one never does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from linearize.convert.optim import derived_seed
from linearize.errors import UsageError, did_you_mean
from linearize.recipe import Lora

ADAPTER = "default"


def target_modules(student: Any, targets: Collection[str]) -> list[str]:
    """Full names of the linear modules called as one of `targets`.

    Raises:
        UsageError: a target that the model does not have.
    """
    linear = {n: n.rpartition(".")[2] for n, module in student.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in linear.values():
            known = sorted(set(linear.values()))
            raise UsageError(
                f"finetune.lora.targets: the model has no module {target!r}.{did_you_mean(target, known)}",
                f"It has {', '.join(known)}",
            )
    return [name for name, leaf in linear.items() if leaf in targets]


def inject(student: Any, lora: Lora, *, seed: int) -> dict[str, nn.Parameter]:
    """Give every target an adapter, initialised from `seed` on the CPU; the new parameters by name, fp32."""
    from peft import LoraConfig, inject_adapter_in_model

    names = target_modules(student, lora.targets)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none")
    inject_adapter_in_model(config, student, adapter_name=ADAPTER)
    adapters = {name: p for name, p in student.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in adapters.items():
            if ".lora_B." in name:
                parameter.zero_()
                continue
            # As peft: uniform with variance 1 / (3 fan_in). Drawn per name, so no order of creation matters.
            generator = torch.Generator().manual_seed(derived_seed(seed, "lora", name))
            bound = parameter.shape[1] ** -0.5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return adapters


def merged_weight(module: Any) -> Tensor:
    """W + (alpha / r) B A of one adapted linear module, in fp32; a new tensor."""
    down, up = module.lora_A[ADAPTER].weight.float(), module.lora_B[ADAPTER].weight.float()
    return module.base_layer.weight.detach().float() + module.scaling[ADAPTER] * (up @ down).detach()


def extract(student: Any, *, merge: bool) -> None:
    """Take all adapters out again, merged into weights of the student's own (`merge`) or dropped."""
    for name, module in list(student.named_modules()):
        if not (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
            continue
        base = module.base_layer
        if merge:
            base.weight = nn.Parameter(merged_weight(module).to(base.weight.dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, base)
    student.__dict__.pop("peft_config", None)
