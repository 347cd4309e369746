"""Linear attention on tensors: the definition, the chunked form, one step, and fused ops. Knows nothing of models.

Importing this imports no triton: an op looks for it when it is called.
"""

from .blend import blend
from .decode import decode_step, settle
from .delta import chunk_delta
from .distill import distill_loss
from .gated import gated_linear
from .gated_delta import gated_delta
from .gated_mapped import mapped_gated_linear
from .linear import chunk_linear
from .quadratic import linear_weights, window_weights
from .step import step_delta, step_linear, step_window
from .unrotate import unrotate
from .window import block_window_mask, chunk_window
from .window_attention import window_attention
from .window_linear import window_linear

__all__ = [
    "blend",
    "block_window_mask",
    "chunk_delta",
    "chunk_linear",
    "chunk_window",
    "decode_step",
    "distill_loss",
    "gated_delta",
    "gated_linear",
    "linear_weights",
    "mapped_gated_linear",
    "settle",
    "step_delta",
    "step_linear",
    "step_window",
    "unrotate",
    "window_attention",
    "window_linear",
    "window_weights",
]
