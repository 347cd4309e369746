"""Long texts in stretches, each from the state that the one before left.

A prefill keeps states at the chunks' boundaries and, with wide feature maps, far more numbers a token than the model
has channels. Read at once, a long text would fill memory with them; on a CPU they would leave the cache between any two
operators, and the system would hand out and take back their pages every time.
Shapes as in mixer.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache_linearized import LinearStateLayer
from .mixer_state import MixerState

if TYPE_CHECKING:
    from .mixer import Mixer

CHUNK = 64
"""Tokens a chunk where no window sets it."""
MOST = 2048
"""Tokens of a stretch."""
CPU_BYTES = 4 << 20
"""Size of a stretch's query features on a CPU."""


def in_stretches(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    valid: Tensor | None,
    state: MixerState | None,
) -> Tensor:
    """Mix aligned sequences; arguments as Mixer.stretch, out [N, H, L, D].

    Without a state they are read at once, unless a state that is thrown away is all that smaller stretches need.
    """
    length, tokens = stretch_length(mixer, q), q.shape[2]
    if state is None:
        if length >= tokens or not _may_be_cut(mixer, q, k, v, inputs):
            return mixer.stretch(q, k, v, inputs, rotation, None, None)
        state, valid = MixerState(mixer, LinearStateLayer()), None  # what follows a row's end changes nothing before it
        state.create(q, k)
    pieces = []
    for a in range(0, tokens, length):
        cut = slice(a, a + length)
        turned = None if rotation is None else (rotation[0][:, cut], rotation[1][:, cut])
        real = None if valid is None else valid[:, cut]
        heads = q[:, :, cut], k[:, :, cut], v[:, :, cut]
        pieces.append(mixer.stretch(*heads, inputs[:, cut], turned, real, state))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def stretch_length(mixer: Mixer, q: Tensor) -> int:
    """Tokens of q [N, H, L, D] that are read at once where there is a state."""
    if q.device.type != "cpu" or not mixer.features or torch.compiler.is_compiling():
        return MOST  # a compiler unrolls loops, and fuses operators itself
    # Behind a lag, features of the tokens in the ring are made again for every stretch.
    least = 4 * mixer.spec.window if mixer.spec.lagged else CHUNK
    size = q.shape[0] * mixer.num_heads * mixer.features * 4  # float32
    return min(MOST, max(least, CPU_BYTES // size // CHUNK * CHUNK))


def _may_be_cut(mixer: Mixer, *given: Tensor) -> bool:
    """Whether nothing asks for more than the output of a whole sequence."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *mixer.parameters())):
        return False
    told = mixer.record or mixer.record_weights or mixer.execution != "chunked"
    return mixer.branches == "full" and not told
