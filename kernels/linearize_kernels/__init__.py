"""Linear attention on tensors: the definition, the chunked form, and one step. Knows nothing of models."""

from .delta import chunk_delta
from .linear import chunk_linear
from .quadratic import linear_weights, window_weights
from .step import step_delta, step_linear, step_window
from .window import block_window_mask, chunk_window

__all__ = [
    "block_window_mask",
    "chunk_delta",
    "chunk_linear",
    "chunk_window",
    "linear_weights",
    "step_delta",
    "step_linear",
    "step_window",
    "window_weights",
]
