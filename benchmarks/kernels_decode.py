"""One token of one layer, in a CUDA graph: ours, torch's SDPA over a full cache, fla's recurrent kernel.

A graph holds many layers, each with a state of its own, as a model has: together they do not fit into the L2 cache, so
that every layer is read from memory. Times are of the graph, divided by its layers.

Ours has a step that costs more: the one that ends a block, when the block before it moves into the state. Every place
in a block is timed for itself, over several blocks: "step" is the median place, "block end" the slowest.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks.kernels_rows import Key, Row, failure, without
from benchmarks.kernels_shapes import drawn, relative_error

HEADS, KV_HEADS, WIDTH, FEATURES = 32, 8, 128, 64
BATCHES = (1, 4, 16, 64)
CONTEXTS = (2048, 32768, 131072)
LAYERS = 32
BUDGET = 24 * 2**30
"""Bytes of all layers' caches; a larger one is timed with fewer layers."""
Steps = tuple[Callable[[], Any], int, Callable[[int], None] | None]
"""A step of all layers, their number, and what makes them have read so many tokens; None: they must be made anew."""


def head_vectors(
    batch: int, device: str, heads: int = HEADS, kv_heads: int = KV_HEADS
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, 1, D] and k, v [B, K, 1, D] of one token, bfloat16."""
    sizes = ((heads, 0), (kv_heads, 1), (kv_heads, 2))
    q, k, v = (drawn(batch, n, 1, WIDTH, device=device, seed=s).bfloat16() for n, s in sizes)
    return q, k, v


def our_layers(
    batch: int,
    context: int,
    device: str,
    *,
    layers: int = LAYERS,
    spec: Any = None,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Mixers and caches that have read `context` tokens, and what one token brings; the state is made up.

    dtype: of the mixers' weights.
    """
    from linearize.modeling.cache_linearized import LinearStateLayer
    from linearize.modeling.mixer import Mixer
    from linearize.modeling.mixer_spec import MixerSpec

    spec = MixerSpec(feature_dim=FEATURES) if spec is None else spec
    hidden = heads * WIDTH
    sizes = {"hidden_size": hidden, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": WIDTH}
    token = head_vectors(batch, device, heads, kv_heads)
    inputs = drawn(batch, 1, hidden, device=device, seed=7).bfloat16()
    angle = drawn(1, 1, WIDTH // 2, device=device, seed=8).repeat(1, 1, 2)
    call = {"inputs": inputs, "rotation": (angle.cos(), angle.sin())}
    made = []
    for n in range(layers):
        mixer = Mixer(spec, **sizes, scaling=WIDTH**-0.5).to(device, dtype).requires_grad_(False)
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


def ours(batch: int, context: int, device: str = "cuda", *, layers: int = LAYERS, recipe: str | None = None) -> Steps:
    """A layer's step, LoLCATs' or of a recipe, and the bookkeeping that ends a model's step.

    A recipe's weights are in bfloat16, as an exported model in bfloat16 holds them.
    """
    from linearize.recipe import load_recipe
    from linearize_kernels.decode import settle

    spec = None if recipe is None else load_recipe(recipe).mixer
    dtype = torch.float32 if spec is None else torch.bfloat16
    made, token, call = our_layers(batch, context, device, layers=layers, spec=spec, dtype=dtype)

    def run() -> None:
        for mixer, cache in made:
            mixer(*token, **call, cache=cache)
        settle([cache.tensors | cache.workspace for _, cache in made])
        for _, cache in made:
            cache.unsettled = False

    def move(context: int) -> None:
        for _, cache in made:
            cache.tensors["position"].fill_(context)

    return run, layers, move


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


def softmax(batch: int, context: int, device: str = "cuda", *, layers: int = LAYERS) -> Steps:
    """SDPA of one query over `context` keys, grouped; writing the new key is not counted."""
    bytes_each = 4 * batch * KV_HEADS * context * WIDTH
    layers = max(1, min(layers, BUDGET // bytes_each))
    q, _, _ = head_vectors(batch, device)
    sizes = (batch, KV_HEADS, context, WIDTH)
    held = [tuple(torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(2)) for _ in range(layers)]

    def run() -> None:
        for k, v in held:
            nnf.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run, layers, None


def recurrent(batch: int, context: int, device: str = "cuda", *, layers: int = LAYERS) -> Steps:
    """fla's fused_recurrent_simple_gla over as many features, without map, window or denominator."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    x = [drawn(batch, 1, HEADS, n, device=device, seed=n).bfloat16() for n in (2 * FEATURES, 2 * FEATURES, WIDTH)]
    states = [torch.zeros(batch, HEADS, 2 * FEATURES, WIDTH, device=device) for _ in range(layers)]

    def run() -> None:
        for state in states:
            fused_recurrent_simple_gla(*x, scale=1.0, initial_state=state, output_final_state=True)

    return run, layers, None


OURS = ("linearize", "linearize pure")
SUBJECTS: dict[str, Callable[..., Steps]] = {
    "linearize": ours,
    "SDPA": softmax,
    "fla fused_recurrent": recurrent,
    "linearize pure": partial(ours, recipe="pure"),
}
READ = {"linearize": CONTEXTS, "SDPA": CONTEXTS}
"""Tokens read before the step, others the fewest. Ours at all, to show that it does not matter."""
BATCH = {"linearize pure": (1, 16)}
BLOCKS = 4
"""Blocks of ours that are timed."""


def keys() -> list[Key]:
    """All measurements, by implementation, batch and tokens read."""
    found: list[Key] = []
    for name in SUBJECTS:
        for batch in BATCH.get(name, BATCHES):
            for context in READ.get(name, CONTEXTS[:1]):
                which = ("step", "block end") if name in OURS else ("step",)
                found += [("decode", name, f"{batch}x{context}", x) for x in which]
    return found


KEYS = keys()


def read_of(key: Key) -> int:
    """Tokens read before the step."""
    return int(key[2].partition("x")[2])


def warm_up(wanted: Collection[Key], device: str = "cuda") -> None:
    """Compile what the steps and their check need, one layer each."""
    if any(key[1] == "linearize" for key in wanted):
        with contextlib.suppress(Exception):  # decode_rows checks, and says what is wrong
            check_ours(batch=1)
            check_ours(batch=16)
    for name, shape in dict.fromkeys((key[1], key[2]) for key in wanted):
        batch, context = map(int, shape.split("x"))
        if name == "SDPA" or (name in OURS and context != CONTEXTS[0]):
            continue
        with contextlib.suppress(Exception), torch.no_grad():  # it fails again where it is timed, and has its row there
            SUBJECTS[name](batch, context, device, layers=1)[0]()


def by_place(step: Callable[[], Any], window: int, blocks: int = BLOCKS) -> dict[str, float]:
    """Milliseconds of the median and of the slowest place in a block, from medians over `blocks` blocks in a row."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(window * blocks)]
    for begin, end in marks:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return typical([begin.elapsed_time(end) for begin, end in marks], window)


def typical(spent: list[float], window: int) -> dict[str, float]:
    """See `by_place`: `spent` of steps in a row."""
    places = sorted(sorted(spent[place::window])[len(spent) // window // 2] for place in range(window))
    return {"step": places[window // 2], "block end": places[-1]}


def step_ms(name: str, batch: int, contexts: list[int], window: int = 64) -> Iterator[tuple[int, dict[str, float]]]:
    """Tokens read, and milliseconds a layer by pass. What can move is made, and captured, once for all contexts."""
    from benchmarks.kernels_model import captured, median_ms

    graph, run, move, layers = None, None, None, 1
    for context in contexts:
        if graph is None or move is None:
            graph, run = None, None  # lets go of the last one's memory first; a graph needs what its run holds
            run, layers, move = SUBJECTS[name](batch, context)
            with torch.no_grad():
                graph = captured(run)
        if move is not None:
            move(context)
        graph.replay()
        found = by_place(graph.replay, window) if name in OURS else {"step": median_ms(graph.replay, 30)}
        yield context, {which: value / layers for which, value in found.items()}


def decode_rows(wanted: Collection[Key]) -> Iterator[Row]:
    """The rows of `wanted`."""
    wrong: str | None = None
    if any(key[1] == "linearize" for key in wanted):
        try:
            wrong = check_ours(batch=1) or check_ours(batch=16)
        except Exception as error:
            wrong = f"the check failed: {type(error).__name__}: {str(error)[:120]}"
    for name, batch in dict.fromkeys((key[1], int(key[2].partition("x")[0])) for key in KEYS if key in wanted):
        here = [key for key in KEYS if key in wanted and key[1] == name and key[2].startswith(f"{batch}x")]
        if name == "linearize" and wrong is not None:
            yield from (without(key, "wrong", wrong) for key in here)
            continue
        large = [key for key in here if name == "SDPA" and 4 * batch * KV_HEADS * read_of(key) * WIDTH > BUDGET]
        yield from (without(key, "left out", "its cache is too large for this benchmark") for key in large)
        here = [key for key in here if key not in large]
        try:
            for context, found in step_ms(name, batch, list(dict.fromkeys(map(read_of, here)))):
                now = [key for key in here if read_of(key) == context]
                here = [key for key in here if key not in now]
                more = {"batch": batch, "context": context}
                yield from (without(key, "ok", "") | {"ms": found[key[3]], **more} for key in now)
        except Exception as error:  # a peer may fail in any way
            yield from (failure(key, error) for key in here)
        gc.collect()
        torch.cuda.empty_cache()
