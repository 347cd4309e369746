"""The product in the middle of a gated MLP (SwiGLU, GeGLU; Shazeer, arXiv 2002.05202) in one pass over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf

from .backend import pick, placed

ACTIVATIONS = ("silu", "gelu_tanh")


def activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of that name in torch; gelu_tanh is GELU by its approximation with tanh."""
    return nnf.silu(x) if activation == "silu" else nnf.gelu(x, approximate="tanh")


@placed
def gated_unit(gate: torch.Tensor, up: torch.Tensor, activation: str, *, backend: str = "auto") -> torch.Tensor:
    """activation(gate) up, rounded after the activation and again at the end.

    Args:
        gate, up: [..., F], one shape and dtype: float32, float16 or bfloat16. Halves of one tensor are read in place.
        activation: silu or gelu_tanh.
        backend: auto, torch or triton.

    Returns:
        [..., F], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not belong together, an unknown name, or a backend that cannot serve.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} do not belong together"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if pick(backend, gate, up) == "triton":
        from .gated_unit_triton import gated_unit_call

        return gated_unit_call(gate, up, activation)
    return (activated(gate, activation) * up).contiguous()
