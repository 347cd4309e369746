"""One token of one layer, in a CUDA graph: ours, torch's SDPA over a full cache, fla's recurrent kernel.

A graph holds many layers, each with a state of its own, as a model has: together they do not fit into the L2 cache, so
that every layer is read from memory. Times are of the graph, divided by its layers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks.kernels_rows import KEY, Row
from benchmarks.kernels_shapes import drawn, relative_error

HEADS, KV_HEADS, WIDTH, FEATURES, HIDDEN = 32, 8, 128, 64, 4096
BATCHES = (1, 4, 16, 64)
CONTEXTS = (2048, 32768, 131072)
LAYERS = 32
BUDGET = 24 * 2**30
"""Bytes of all layers' caches; a larger one is timed with fewer layers."""
Steps = tuple[Callable[[], Any], int]


def head_vectors(batch: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, 1, D] and k, v [B, K, 1, D] of one token, bfloat16."""
    sizes = ((HEADS, seed), (KV_HEADS, seed + 1), (KV_HEADS, seed + 2))
    q, k, v = (drawn(batch, n, 1, WIDTH, device=device, seed=s).bfloat16() for n, s in sizes)
    return q, k, v


def our_layers(batch: int, context: int, device: str, *, layers: int = LAYERS, spec: Any = None) -> Any:
    """Mixers and caches that have read `context` tokens, and what one token brings; the state is made up."""
    from linearize.modeling.cache_linearized import LinearStateLayer
    from linearize.modeling.mixer import Mixer
    from linearize.modeling.mixer_spec import MixerSpec

    spec = MixerSpec(feature_dim=FEATURES) if spec is None else spec
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH}
    token = head_vectors(batch, device)
    inputs = drawn(batch, 1, HIDDEN, device=device, seed=7).bfloat16()
    angle = drawn(1, 1, WIDTH // 2, device=device, seed=8).repeat(1, 1, 2)
    call = {"inputs": inputs, "rotation": (angle.cos(), angle.sin())}
    made = []
    for n in range(layers):
        mixer = Mixer(spec, **sizes, scaling=WIDTH**-0.5).to(device).requires_grad_(False)
        mixer.backend = "triton"
        cache = LinearStateLayer()
        cache.shared = True
        mixer(*token, **call, cache=cache)  # makes the buffers
        for seed, (_, x) in enumerate(sorted(cache.tensors.items())):
            if x.is_floating_point():
                x.copy_(drawn(*x.shape, device=device, seed=100 * n + seed).abs())
        cache.tensors["position"].fill_(context)
        cache.uniform = context
        made.append((mixer, cache))
    return made, token, call


def ours(batch: int, context: int, device: str = "cuda") -> Steps:
    """A LoLCATs layer's step, and the bookkeeping that ends a model's step."""
    from linearize_kernels.decode import settle

    layers, token, call = our_layers(batch, context, device)

    def run() -> None:
        for mixer, cache in layers:
            mixer(*token, **call, cache=cache)
        settle([cache.tensors | cache.workspace for _, cache in layers])
        for _, cache in layers:
            cache.unsettled = False

    return run, len(layers)


def check_ours(batch: int = 2, context: int = 200, device: str = "cuda") -> str | None:
    """Whether a step of the kernel is the torch step, output and state, in bfloat16; None or what is wrong."""
    found = []
    for backend in ("torch", "triton"):
        ((mixer, cache),), token, call = our_layers(batch, context, device, layers=1)
        mixer.backend = backend
        out = mixer(*token, **call, cache=cache)
        cache.settle()
        found.append([out, *(cache.tensors[name] for name in sorted(cache.tensors))])
    errors = [relative_error(b, a) for a, b in zip(*found, strict=True)]
    return None if max(errors) < 1e-2 else f"wrong: a step is off by {max(errors):.1e}"


def softmax(batch: int, context: int, device: str = "cuda") -> Steps:
    """SDPA of one query over `context` keys, grouped; writing the new key is not counted."""
    bytes_each = 4 * batch * KV_HEADS * context * WIDTH
    layers = max(1, min(LAYERS, BUDGET // bytes_each))
    q, _, _ = head_vectors(batch, device)
    sizes = (batch, KV_HEADS, context, WIDTH)
    held = [tuple(torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(2)) for _ in range(layers)]

    def run() -> None:
        for k, v in held:
            nnf.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run, layers


def recurrent(batch: int, context: int, device: str = "cuda") -> Steps:
    """fla's fused_recurrent_simple_gla over as many features, without map, window or denominator."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    x = [drawn(batch, 1, HEADS, n, device=device, seed=n).bfloat16() for n in (2 * FEATURES, 2 * FEATURES, WIDTH)]
    states = [torch.zeros(batch, HEADS, 2 * FEATURES, WIDTH, device=device) for _ in range(LAYERS)]

    def run() -> None:
        for state in states:
            fused_recurrent_simple_gla(*x, scale=1.0, initial_state=state, output_final_state=True)

    return run, LAYERS


SUBJECTS = {"linearize": ours, "SDPA": softmax, "fla fused_recurrent": recurrent}
READ = {"linearize": (CONTEXTS[0], CONTEXTS[-1]), "SDPA": CONTEXTS, "fla fused_recurrent": CONTEXTS[:1]}
"""Tokens read before the step. Ours at both ends, to show that it does not matter; fla's kernel cannot know."""


def decode_rows(known: set[tuple[str, ...]]) -> Iterator[Row]:
    """Every implementation at every batch and context."""
    wrong = check_ours()
    for name, build in SUBJECTS.items():
        for batch in BATCHES:
            for context in READ[name]:
                key = ("decode", name, f"{batch}x{context}", "step")
                row: Row = dict(zip(KEY, key, strict=True)) | {"ms": None}
                if key in known:
                    continue
                if name == "linearize" and wrong is not None:
                    yield row | {"note": wrong}
                    continue
                if name == "SDPA" and 4 * batch * KV_HEADS * context * WIDTH > BUDGET:
                    yield row | {"note": "left out: its cache is too large for this benchmark"}
                    continue
                try:
                    yield row | {"ms": step_ms(*build(batch, context)), "batch": batch, "context": context}
                except Exception as error:  # a peer may fail in any way
                    yield row | {"note": f"{type(error).__name__}: {str(error)[:120]}"}
                finally:
                    gc.collect()
                    torch.cuda.empty_cache()


def step_ms(run: Callable[[], Any], layers: int) -> float:
    """Milliseconds a layer."""
    from benchmarks.kernels_model import captured, median_ms

    with torch.no_grad():
        graph = captured(run)
    graph.replay()
    return median_ms(graph.replay, 30) / layers
