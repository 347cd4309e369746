"""Checkpoints loaded in 8 or 4 bits, by bitsandbytes through transformers' own interface.

    8: LLM.int8 (Dettmers et al., arXiv 2208.07339): rows of int8, columns of large inputs apart in 16 bit
    4: nf4 with double quantisation (QLoRA, arXiv 2305.14314): blocks of 64 weights share a scale, which is 8 bit itself

Embeddings, head, norms and biases stay in float32. Both kinds are for what is only read: products run forwards and give
gradients of their inputs, and the weights are never trained or exported.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import nn

WEIGHT_BYTES = {8: 1.0, 4: 0.516}
"""Memory of a weight: with a float32 scale a row, which is next to nothing; with 8.125 bits a block of 64."""


def import_bitsandbytes() -> Any:
    """The package, imported without what it says to developers, and without code from the Hub.

    On some processors it fetches a kernel from the Hub and runs it, where the package `kernels` is installed. What runs
    here is what was installed.
    """
    held = sys.modules.get("kernels")
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        # That its kernel is missing, and that inputs are cast: once a call, in words of its code.
        logger = logging.getLogger(name)
        if _grave not in logger.filters:
            logger.addFilter(_grave)
    if "bitsandbytes" not in sys.modules:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes

        return bitsandbytes
    finally:
        if held is not None:
            sys.modules["kernels"] = held
        elif sys.modules.get("kernels", ...) is None:
            del sys.modules["kernels"]


def quantised_loading(bits: int, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told to load weights in `bits` onto `device`, a tensor at a time.

    Products are computed in bfloat16 on a GPU, as the rest of a conversion is, and in float32 on a CPU.
    """
    from transformers import BitsAndBytesConfig

    import_bitsandbytes()
    kinds: dict[int, dict[str, Any]] = {
        8: {"load_in_8bit": True},
        4: {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16 if device.type == "cuda" else torch.float32,
        },
    }
    place: Any = device
    if device.type == "cuda" and device.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return {"quantization_config": BitsAndBytesConfig(**kinds[bits]), "device_map": {"": place}}


def quantised_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of a model whose weights are quantised, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    }


def make_trainable_through(model: nn.Module) -> None:
    """Let the quantised modules behave as ordinary frozen ones do in training.

    They know nothing of autocast by themselves. And on processors with bfloat16 they would repack their weights on the
    first call that needs no gradient, for a product that gives none to later calls either.
    """
    for module in quantised_modules(model).values():
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        module.register_forward_pre_hook(_as_autocast)


def _as_autocast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = args[0].device.type
    if not torch.is_autocast_enabled(kind):
        return args
    return (args[0].to(torch.get_autocast_dtype(kind)), *args[1:])


def _grave(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
