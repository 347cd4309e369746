"""Low-rank adapters: put in by peft, merged in fp32 and taken out again here.

peft's own merge writes into the base weight, which a student shares with its teacher; this one never does.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linearize.artifacts.quantised import import_bitsandbytes
from linearize.convert.families import module_paths
from linearize.convert.optim import derived_seed
from linearize.errors import UsageError, did_you_mean
from linearize.modeling.family_table import lookup
from linearize.recipe import Lora

ADAPTER = "default"
MLP = ("gate_proj", "up_proj", "down_proj")


def target_modules(student: Any, targets: Collection[str]) -> list[str]:
    """Full names of the linear modules called as one of `targets`.

    Raises:
        UsageError: a target that the model does not have.
    """
    linear = [name for name, module in student.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    family = lookup(student.config)
    for target in targets:
        path = family.projections.get(target, target)
        if not any(ends_in(name, path) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            there = [t for t in targets if any(ends_in(name, family.projections.get(t, t)) for name in linear)]
            near = did_you_mean(target, known) if target not in MLP else ""
            because = f"; {family.note}" if family.note else ""
            instead = f"targets=[{','.join(there)}]" if there else "targets=[...] of these, or finetune.lora=null"
            write = f"; write finetune.lora.{instead}" if family.note else ""
            raise UsageError(
                f"finetune.lora.targets: the model has no module {target!r}{because}.{near}",
                f"It has {', '.join(known)}{write}",
            )
    paths = module_paths(family, targets, key="finetune.lora.targets")
    return [name for name in linear if any(ends_in(name, path) for path in paths)]


def ends_in(name: str, path: str) -> bool:
    """Whether a dotted name ends in these parts."""
    return f".{name}".endswith(f".{path}")


def width_of(module: Any) -> int:
    """Inputs and outputs of a linear module, summed: the parameters of its adapter are as many times the rank."""
    return sum(module.weight.shape)


def inject(student: Any, lora: Lora, *, seed: int) -> dict[str, nn.Parameter]:
    """Give every target an adapter, initialised from `seed` on the CPU; the new parameters by name, fp32."""
    if find_spec("bitsandbytes") is not None:
        import_bitsandbytes()  # peft would
    from peft import LoraConfig, inject_adapter_in_model

    names = target_modules(student, lora.targets)
    turned = any(isinstance(student.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=turned,
        bias="none",
    )
    inject_adapter_in_model(config, student, adapter_name=ADAPTER)
    adapters = {name: p for name, p in student.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.data = parameter.data.float()  # peft makes them of the base's type, or of the one it computes in
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
    update = module.scaling[ADAPTER] * (up @ down).detach()
    return module.base_layer.weight.detach().float() + (update.T if isinstance(module.base_layer, Conv1D) else update)


def extract(student: Any, *, merge: bool) -> None:
    """Take all adapters out again, merged into weights of the student's own, in fp32 (`merge`), or dropped."""
    for name, module in list(student.named_modules()):
        if not (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
            continue
        base = module.base_layer
        if merge:
            base.weight = nn.Parameter(merged_weight(module), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, base)
    student.__dict__.pop("peft_config", None)
