"""Decode in a CUDA graph: `generate` runs the model's one-token step as one replay, where the step can be captured.

A step of a small batch is hundreds of short kernels, and launching them takes longer than running them. The state of a
linear layer has a fixed size and address, so one graph serves every step. Kept softmax layers get buffers as long as
`generate` can need (LinearizedCache.freeze), and their ordinary form back afterwards.

`model.decode_graphs = False`, or LINEARIZE_CUDA_GRAPHS=0 in the environment, switches graphs off;
`model.decode_graph_reason` says why the last `generate` went without one, or None.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .family_table import lookup
from .mixer import Mixer
from .mixer_decode import step_backend

VARIABLE = "LINEARIZE_CUDA_GRAPHS"
PLAIN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
"""Arguments of a step that a graph knows; another one that is set makes the step run as it is."""
ROPE_FROM_LENGTH = ("dynamic", "longrope")
"""Kinds of RoPE whose tables depend on the longest position, which is looked up from the host."""


def why_not(model: Any, cache: Any) -> str | None:
    """Why a step of `model` that continues `cache` cannot be captured, or None where it can."""
    if not model.decode_graphs or os.environ.get(VARIABLE) == "0":
        return f"graphs are switched off (model.decode_graphs, {VARIABLE})"
    if not is_graph_device(model.device):
        return f"the model is on {model.device.type}, graphs are for CUDA"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model lies on several devices"
    if torch.is_grad_enabled():
        return "gradients are on"
    if model.training:
        return "the model is in training mode"
    if not cache.linear:
        return "there is no linear layer"
    for layer in cache.linear:
        if not layer.is_initialized:
            return "the cache has read nothing"
    if any(not is_own_hook(hook) for module in model.modules() for hook in hooks(module)):
        return "forward hooks are registered, which a replay would not call"
    for mixer in (m for m in model.modules() if isinstance(m, Mixer)):
        probe = torch.empty(0, dtype=model.dtype, device=model.device)
        backend, reason = step_backend(mixer, probe)
        if backend != "triton":
            return f"the torch step asks the host: {reason}"
    if len(cache.linear) < len(cache.layers) and model.config._attn_implementation not in ("sdpa", "eager"):
        return f"softmax layers with {model.config._attn_implementation!r} take no mask of a fixed size"
    family = lookup(model.config)
    for rope in (family.rope_of(model.config, layer) for layer in range(model.config.num_hidden_layers)):
        if rope.get("rope_type") in ROPE_FROM_LENGTH:
            return f"{rope['rope_type']!r} RoPE asks the host for the longest position"
    return None


def hooks(module: torch.nn.Module) -> list[Any]:
    """Everything registered to run at the module's forward."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def is_own_hook(hook: Any) -> bool:
    """Whether a hook is one that transformers puts in to collect outputs: nobody asks for those in a replay."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


_threads = threading.local()
_one_capture = threading.Lock()
"""Held by the thread that captures: torch's generators and allocator know of one capture a device."""


def capture_stream(device: torch.device) -> Any:
    """The stream that this thread captures on: one for all graphs, for libraries keep a workspace for every stream."""
    known = _threads.__dict__.setdefault("streams", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    return known[device]


def is_graph_device(device: torch.device) -> bool:
    """Whether CUDA graphs exist there."""
    return device.type == "cuda"


class DecodeGraph:
    """One token of a whole model: run as it is at first, then captured, then replayed.

    The first step warms up (kernels are compiled, libraries make their workspaces); the second is captured and
    replayed, and so is every later one. A capture that fails leaves the model to run as it is, and says so.
    """

    def __init__(self, model: Any, cache: Any, most: int) -> None:
        self.model, self.cache, self.most = model, cache, most
        self.graph: Any = None
        self.stream: Any = None
        self.ids: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self.moves, self.steps, self.broken = cache.moves, 0, False

    def serves(self, given: dict[str, Any]) -> bool:
        """Whether this call is a step of the kind that the graph holds: one token a row, no outputs but logits."""
        ids, positions = given.get("input_ids"), given.get("position_ids")
        if ids is None or ids.shape[1] != 1 or positions is None or positions.shape[-1] != 1:
            return False
        if any(value is not None and value is not False for key, value in given.items() if key not in PLAIN):
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type) or self.model.training:
            return False
        if self.broken or self.cache.moves != self.moves or self.cache.get_seq_length() >= self.most:
            return False
        known = self.ids is None or (ids.shape == self.ids.shape and positions.shape == self.positions.shape)  # type: ignore[union-attr]
        return known and len(ids) == len(self.cache.linear[0].tensors["position"])

    def run(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> CausalLMOutputWithPast:
        """One step: ids and positions [B, 1] (positions may be [1, 1]); logits [B, 1, vocabulary], soon overwritten."""
        if self.ids is None or self.positions is None:
            self.ids, self.positions = input_ids.clone(), position_ids.clone()
        self.ids.copy_(input_ids)
        self.positions.copy_(position_ids)
        self.steps += 1
        if self.steps == 1:
            self.warm_up()
        elif self.graph is not None:
            for layer in self.cache.layers:
                layer.read_by_replay()
            self.replay()
        elif self.capture():
            self.replay()
        else:
            self.step()
        return CausalLMOutputWithPast(logits=self.logits, past_key_values=self.cache)  # type: ignore[arg-type]

    def step(self) -> None:
        """The model on the buffers."""
        self.logits = self.model.plain_step(self.ids, self.positions, self.cache).logits

    def warm_up(self) -> None:
        """A real step, on the stream that captures: what libraries allocate for a stream is then there."""
        self.stream = capture_stream(self.model.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream(self.model.device).wait_stream(self.stream)

    def capture(self) -> bool:
        """Record a step without running it; whether that worked. The host counts once, for the replay that follows."""
        counts = [layer.counts() for layer in self.cache.layers]
        graph = torch.cuda.CUDAGraph()
        try:
            # Not torch.cuda.graph: it empties the allocator's cache, which costs more than the steps of a short text,
            # and waits for the device, which no thread may while another one captures. The stream is enough.
            with _one_capture, torch.cuda.stream(self.stream):
                self.stream.synchronize()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.broken = True
            self.model.decode_graph_reason = f"the step could not be captured: {error}"
            for layer, known in zip(self.cache.layers, counts, strict=True):
                layer.set_counts(known)
            return False
        self.graph = graph
        return True

    def replay(self) -> None:
        """Run what was recorded."""
        self.graph.replay()
