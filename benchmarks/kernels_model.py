"""Whole models with random weights: prefill and 256 new tokens, softmax beside linear, in Llama-3-8B's shape.

The softmax model is the one to beat: keys and values in a static cache, grouped queries as they are, torch's SDPA, one
CUDA graph a step. Prefill is timed at a batch that fills the card and counted for every sequence; the step is timed at
each batch, the cache as full as after the context; the largest batch is what the memory holds, weights included.
tokens/s of a whole answer: batch x 256 / (batch x prefill of one + 256 steps).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from benchmarks.kernels_rows import Key, Row, failure

NEW = 256
CONTEXTS = (2048, 32768, 131072)
BATCHES = (1, 16, 64)
SPARE = 10 * 2**30
"""Bytes left free for what a step needs beside weights and cache."""
STEPS = 24
SIZES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2 * CONTEXTS[-1],
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
"""Llama-3-8B's shape."""


def llama_config(**changes: Any) -> Any:
    """The shape as a transformers configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, **changes})


def random_model(build: Callable[[], nn.Module], device: str) -> Any:
    """A model made by `build` in bfloat16, with normal weights; mixers keep the start values they were made with."""
    from transformers.initialization import no_init_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights(), torch.device(device):  # on the card at once: the host need not hold it
            model = build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    model.to(device)
    made = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "mixer" in name:
            continue
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=made)
    return model


class StaticSoftmax:
    """Keys and values of a softmax model in buffers of fixed size, and the attention function that uses them."""

    NAME = "linearize_benchmark_static"

    def __init__(self, config: Any, batch: int, length: int, device: str, dtype: torch.dtype) -> None:
        width = config.hidden_size // config.num_attention_heads
        size = (batch, config.num_key_value_heads, length, width)
        self.layers = [
            tuple(torch.zeros(size, device=device, dtype=dtype) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.row = slice(0, batch)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Store k and v, attend: a whole prompt causally, a single token to the whole buffer."""
        keys, values = self.layers[module.layer_idx]
        if q.shape[2] > 1:
            keys[self.row, :, : k.shape[2]], values[self.row, :, : v.shape[2]] = k, v
            out = nnf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            out = nnf.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return out.transpose(1, 2), None

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)


class SoftmaxRunner:
    """Llama with softmax attention."""

    name = "softmax"

    def __init__(self, config: Any, device: str) -> None:
        from transformers import LlamaForCausalLM
        from transformers.modeling_utils import AttentionInterface

        self.config, self.device, self.cache = config, device, StaticSoftmax(config, 0, 0, device, torch.bfloat16)
        AttentionInterface.register(StaticSoftmax.NAME, lambda *given, **kwargs: self.cache.attend(*given, **kwargs))
        config._attn_implementation = StaticSoftmax.NAME
        self.model = random_model(lambda: LlamaForCausalLM(config), device)
        self.no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)

    def sequence_bytes(self, context: int) -> int:
        """Cache of one sequence."""
        heads, width = self.config.num_key_value_heads, self.config.hidden_size // self.config.num_attention_heads
        return int(2 * 2 * heads * width * self.config.num_hidden_layers * (context + NEW))

    def allocate(self, batch: int, context: int) -> None:
        """Room for `batch` sequences of `context` tokens and the new ones."""
        self.cache = StaticSoftmax(self.config, 0, 0, self.device, torch.bfloat16)
        self.cache = StaticSoftmax(self.config, batch, context + NEW, self.device, torch.bfloat16)

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ids [B, T] into the cache; logits of the last tokens [B, 1, vocabulary]."""
        return self._run(ids, torch.arange(ids.shape[1], device=self.device)[None])

    def step_function(self, tokens: Tensor) -> Callable[[], Tensor]:
        """One step for tokens [B, 1] at the cache's end, to be captured: the next tokens [B, 1]."""
        last = self.cache.layers[0][0].shape[2] - NEW
        self.cache.position.fill_(last)

        def step() -> Tensor:
            return self._run(tokens, self.cache.position[None]).argmax(-1)

        return step

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        given = {"attention_mask": self.no_mask, "position_ids": positions, "use_cache": False, "logits_to_keep": 1}
        logits: Tensor = self.model(input_ids=ids, **given).logits
        return logits

    def free(self) -> None:
        """Let go of the cache."""
        self.cache = StaticSoftmax(self.config, 0, 0, self.device, torch.bfloat16)


class LinearRunner:
    """The same model with a LoLCATs mixer in every layer."""

    name = "linearize"

    def __init__(self, config: Any, device: str) -> None:
        from linearize.modeling.configuration_linearized import linearized_config
        from linearize.modeling.mixer import Mixer
        from linearize.modeling.mixer_spec import MixerSpec
        from linearize.modeling.modeling_linearized import MODELS

        plan = ["linear"] * config.num_hidden_layers
        width = config.hidden_size // config.num_attention_heads
        self.config = linearized_config(config, layer_mixers=plan, spec=MixerSpec(feature_dim=min(64, width)))
        self.device = device
        self.model = random_model(lambda: MODELS["llama"](self.config), device)
        for module in self.model.modules():
            if isinstance(module, Mixer):
                module.backend = "triton"
        self.cache: Any = None

    def sequence_bytes(self, context: int) -> int:
        """Cache of one sequence; `context` does not matter."""
        self.allocate(1, context)
        kept = sum(x.numel() * x.element_size() for layer in self.cache.linear for x in layer.workspace.values())
        found = int(self.cache.state_bytes + kept)
        self.free()
        return found

    def allocate(self, batch: int, context: int) -> None:
        """A cache of `batch` sequences that have read one token, and say that they have read `context`."""
        from linearize.modeling.cache_linearized import LinearizedCache

        self.cache = LinearizedCache(self.config)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        for layer in self.cache.linear:
            layer.tensors["position"].fill_(context)
            layer.uniform = layer.seen = context

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ids [B, T] into a fresh cache; logits of the last tokens [B, 1, vocabulary]."""
        from linearize.modeling.cache_linearized import LinearizedCache

        self.cache = LinearizedCache(self.config)
        given = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        logits: Tensor = self.model(input_ids=ids, **given).logits
        return logits

    def step_function(self, tokens: Tensor) -> Callable[[], Tensor]:
        """One step for tokens [B, 1], to be captured: the next tokens [B, 1]."""
        positions = torch.full((1, 1), self.cache.linear[0].seen, dtype=torch.long, device=self.device)

        def step() -> Tensor:
            logits: Tensor = self.model.plain_step(tokens, positions, self.cache).logits
            return logits.argmax(-1)

        return step

    def free(self) -> None:
        """Let go of the cache."""
        self.cache = None


def median_ms(run: Callable[[], Any], repeat: int) -> float:
    """Median time of a run, in milliseconds, by the device's own clock."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    spent = sorted(begin.elapsed_time(end) for begin, end in marks)
    return spent[len(spent) // 2]


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph, after two runs outside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def answer_of(name: str, context: int) -> Key:
    """The measurement that stands for all of a model at a context."""
    return ("model", name, f"{context} + {NEW}", "answer")


KEYS = tuple(answer_of(name, context) for name in ("linearize", "softmax") for context in CONTEXTS)


def measure_runner(runner: Any, wanted: Collection[Key], contexts: tuple[int, ...] = CONTEXTS) -> Iterator[Row]:
    """Rows of one model: prefill, step at each batch, and the whole answer at the largest batch."""
    weights = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    for context in contexts:
        if answer_of(runner.name, context) not in wanted:
            continue
        base = {"op": "model", "implementation": runner.name, "context": context, "status": "ok", "note": ""}
        rows = max(1, 16384 // context)
        ids = torch.randint(0, runner.config.vocab_size, (rows, context), device=runner.device)
        try:
            runner.allocate(rows, context)
            if context == contexts[0]:
                runner.prefill(ids)  # compiles
            torch.cuda.reset_peak_memory_stats()
            prefill = median_ms(lambda: runner.prefill(ids), 3 if context <= 32768 else 1) / rows  # noqa: B023
            peak = torch.cuda.max_memory_allocated()
            room = total - weights - SPARE
            own = runner.sequence_bytes(context)
            largest = max(1, int(room // own))
            sizes = {"sequence_bytes": own, "largest_batch": largest, "weight_bytes": weights}
            yield base | sizes | {
                "shape": f"{rows}x{context}", "pass": "prefill", "batch": rows, "ms": prefill * rows,
                "tokens_per_s": 1e3 * context / prefill, "peak_bytes": peak,
            }  # fmt: skip
            runner.free()
            for batch in sorted({*(b for b in BATCHES if b <= largest), largest}):
                name = {"shape": f"{batch}x{context}", "batch": batch}
                step = decode_ms(runner, batch, context)
                yield base | sizes | name | {
                    "pass": "decode", "ms": step, "tokens_per_s": 1e3 * batch / step,
                    "peak_bytes": torch.cuda.max_memory_allocated(),
                }  # fmt: skip
            whole = largest * prefill + NEW * step
            yield base | sizes | {
                "shape": f"{context} + {NEW}", "pass": "answer", "batch": largest, "ms": whole,
                "tokens_per_s": 1e3 * largest * NEW / whole, "note": "from prefill of one and the step",
            }  # fmt: skip
        except Exception as error:  # the next context is to be measured all the same
            yield failure(answer_of(runner.name, context), error)
        finally:
            runner.free()
            gc.collect()
            torch.cuda.empty_cache()


def decode_ms(runner: Any, batch: int, context: int) -> float:
    """Milliseconds of one step of `batch` sequences after `context` tokens, in a CUDA graph."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    runner.allocate(batch, context)
    tokens = torch.randint(0, runner.config.vocab_size, (batch, 1), device=runner.device)
    graph = captured(runner.step_function(tokens))
    graph.replay()
    found = median_ms(graph.replay, STEPS)
    del graph
    return found


@torch.no_grad()
def model_rows(wanted: Collection[Key]) -> Iterator[Row]:
    """Rows of both models, one after the other on the same card."""
    for build in (LinearRunner, SoftmaxRunner):
        if not any(key[1] == build.name for key in wanted):
            continue
        runner: Any = build(llama_config(), "cuda")
        yield from measure_runner(runner, wanted)
        del runner
        gc.collect()
        torch.cuda.empty_cache()
