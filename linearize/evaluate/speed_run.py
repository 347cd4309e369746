"""One measured `generate`: the clock, the tokens that every model reads, and what its cache holds afterwards."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from linearize.errors import VerificationError

SETTLED = 4
"""New tokens after which the decode clock starts: kernels are compiled, a CUDA graph is recorded."""
LEAST_NEW = 2 * SETTLED
"""Fewest new tokens that a speed of decode can be taken from."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one `generate` took."""

    first: float
    """Seconds to the first new token: prefill and one choice."""
    decode: float | None
    """Seconds from the SETTLED-th new token to the last; None for a run that was stopped before."""
    total: float
    stopped: bool
    """Whether the time limit ended it early."""
    state_bytes: int
    """Held by linear layers at the end, of fixed size, for the whole batch."""
    kv_bytes: int
    """Keys and values held by softmax layers at the end, for the whole batch."""


def same_tokens(vocabulary: int, *, batch: int, context: int, seed: int) -> torch.Tensor:
    """Tokens [batch, context] int64 on the CPU, drawn evenly: how fast a model reads does not depend on the text."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, context), generator=made)


def digest(ids: torch.Tensor) -> str:
    """sha256 of token ids [B, T]: their shape in words, then the ids as little-endian int64."""
    shape = " x ".join(map(str, ids.shape)).encode()
    return hashlib.sha256(shape + ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


@torch.no_grad()
def run_once(model: Any, ids: torch.Tensor, *, new_tokens: int, seconds: float | None = None) -> Run:
    """Greedy `generate` of exactly `new_tokens` (LEAST_NEW or more) after ids [B, T]; EOS ends nothing.

    `seconds` stops it between two new tokens; prefill itself cannot be stopped.

    Raises:
        VerificationError: it gave another number of tokens.
    """
    ids = ids.to(model.device)
    _wait(model.device)
    clock = _Clock(model.device, batch=len(ids), last=new_tokens, seconds=seconds)
    with _plain(model, new_tokens):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([clock]),
            return_dict_in_generate=True,
            use_cache=True,
        )
    _wait(model.device)
    total = time.perf_counter() - clock.began
    made = out.sequences.shape[1] - ids.shape[1]
    if not clock.stopped and made != new_tokens:
        raise VerificationError(f"generate gave {made} new tokens instead of {new_tokens}")
    marks = clock.marks
    decode = marks[new_tokens] - marks[SETTLED] if new_tokens in marks else None
    state, keys = cache_bytes(out.past_key_values)
    return Run(
        first=marks[1] - clock.began,
        decode=decode,
        total=total,
        stopped=clock.stopped,
        state_bytes=state,
        kv_bytes=keys,
    )


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of fixed size (linear layers' state) and bytes of keys and values, by the caches' own tensors."""
    state = keys = 0
    for layer in getattr(cache, "layers", ()):
        tensors = getattr(layer, "tensors", None)
        if tensors is not None:
            state += layer.bytes
            continue
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                keys += tensor.numel() * tensor.element_size()
    return state, keys


def weights_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


class _Clock(StoppingCriteria):
    """Asked by `generate` after every new token; looks at the device only where a time is taken."""

    def __init__(self, device: torch.device, *, batch: int, last: int, seconds: float | None) -> None:
        self.device, self.seconds, self.stopped, self.count = device, seconds, False, 0
        self.places = (1, SETTLED, last)
        self.marks: dict[int, float] = {}
        self.go_on = torch.zeros(batch, dtype=torch.bool, device=device)
        _wait(device)
        self.began = time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Whether each row is done, [B]."""
        self.count += 1
        if self.count in self.places:
            _wait(self.device)
            self.marks[self.count] = time.perf_counter()
        if self.seconds is not None and time.perf_counter() - self.began > self.seconds:
            self.stopped = self.count < self.places[-1]
            return ~self.go_on
        return self.go_on


@contextmanager
def _plain(model: Any, new_tokens: int) -> Iterator[None]:
    """Greedy and without an end: a checkpoint's own generation settings would sample, penalise or stop."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
    )
    try:
        yield
    finally:
        model.generation_config = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
