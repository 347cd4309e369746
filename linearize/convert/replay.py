"""A training step's forwards and backwards as a CUDA graph: recorded once, then replayed.

Small models on a GPU spend their steps on launching kernels, thousands a step, not on computing. A graph launches them
all at once, and the arithmetic is the same. Gradients therefore live in buffers that stay (see `gradient_buffers`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.progress import tell

VARIABLE = "LINEARIZE_CUDA_GRAPHS"
"""Environment variable; 0 runs every step kernel by kernel."""
LARGEST = 1_500_000_000
"""Parameters of a model beyond which launching kernels is no longer what takes the time."""
WARMUP = 2
"""Steps of each kind that run kernel by kernel first: libraries set themselves up in them."""


@contextmanager
def gradient_buffers(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Give every parameter a gradient of zeros that is kept and added to; none after the block.

    A parameter that a step does not reach has then a gradient of zeros, not none at all.
    """
    members = list(parameters)
    for parameter in members:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in members:
            parameter.grad = None


@dataclass(frozen=True)
class _Recording:
    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class Replay:
    """`function(*tensors) -> tensor`, replayed from a CUDA graph wherever it has been seen with the same shapes.

    Called with tensors and one constant more: `function(*tensors, kind)`. It may add to gradients that stay in place;
    besides that it depends on its arguments and on parameters alone. Where a graph cannot be recorded, it goes on
    kernel by kernel, and says so once.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, *, enabled: bool) -> None:
        self.function, self.device, self.enabled = function, device, enabled
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *inputs: Tensor, kind: Hashable) -> Tensor:
        """The function's output for these inputs; it stays valid."""
        if not self.enabled:
            return self.function(*inputs, kind)
        with torch.cuda.device(self.device):  # streams and graphs belong to the current one
            return self._replayed(inputs, kind)

    def _replayed(self, inputs: tuple[Tensor, ...], kind: Hashable) -> Tensor:
        key = (kind, *((tuple(x.shape), x.dtype) for x in inputs))
        if key not in self._recordings:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARMUP:
                return self._aside(inputs, kind)
            try:
                self._recordings[key] = self._record(inputs, kind)
            except RuntimeError as error:
                self.enabled = False
                tell(
                    f"running kernel by kernel, no CUDA graph could be recorded ({str(error).splitlines()[0]})",
                    "training",
                )
                return self.function(*inputs, kind)
        recording = self._recordings[key]
        for held, given in zip(recording.inputs, inputs, strict=True):
            held.copy_(given)
        recording.graph.replay()
        return recording.output.clone()

    def _aside(self, inputs: tuple[Tensor, ...], kind: Hashable) -> Tensor:
        """On a stream of its own, as recording does: what autograd keeps of a stream is then not the main one's."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.function(*inputs, kind)
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def _record(self, inputs: tuple[Tensor, ...], kind: Hashable) -> _Recording:
        held = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        with one_sequence_a_row(), torch.cuda.graph(graph):
            output = self.function(*held, kind)
        return _Recording(graph, held, output)


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Masks as they are made outside a recording, for windows that are one sequence a row.

    Transformers asks the data whether documents are packed and whether a mask is needed at all. While a graph is
    recorded it may not ask and takes both for certain: every layer would get a mask of T x T and another kernel.
    """
    from transformers import masking_utils

    known = {"find_packed_sequence_indices": lambda position_ids: None, "is_tracing": lambda tensor=None: False}
    before = {name: getattr(masking_utils, name) for name in known if hasattr(masking_utils, name)}
    for name in before:
        setattr(masking_utils, name, known[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(masking_utils, name, value)


def worth_recording(model: nn.Module, device: torch.device) -> bool:
    """Whether steps of this model on this device shall be recorded."""
    if device.type != "cuda" or os.environ.get(VARIABLE) == "0":
        return False
    if not all(p.is_floating_point() for p in model.parameters()):  # quantised: their products ask the host
        return False
    return sum(p.numel() for p in model.parameters()) <= LARGEST
