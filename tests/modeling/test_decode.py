"""Decode on the CPU: buffers that stay where they are, frozen softmax layers, and the graph's bookkeeping.

There are no CUDA graphs here. A stand-in replays by running the step again with nonsense in every counter of the host,
as a real replay does not see them; it finds what of a step would be wrong in a graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linearize.modeling import decode_graph
from linearize.modeling.cache_linearized import FixedLayer, LinearizedCache, LinearStateLayer
from linearize.modeling.decode_graph import DecodeGraph
from tests.modeling.families import FAMILIES, teacher
from tests.modeling.test_model import SPECS, convert, ids

PLAN = ["linear", "softmax", "linear"]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Replay(DecodeGraph):
    """A graph that is the model, run with the host's counters upset."""

    made: list[Replay]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.replays = 0
        Replay.made.append(self)

    def warm_up(self) -> None:
        self.step()

    def capture(self) -> bool:
        for layer in self.cache.layers:  # what running the model's Python would count
            layer.read_by_replay()
        self.graph = self
        return True

    def replay(self) -> None:
        known = [layer.counts() for layer in self.cache.layers]
        for layer in self.cache.layers:
            layer.set_counts((10**6, None, False) if isinstance(layer, LinearStateLayer) else (10**6,))
        hidden = FixedLayer.get_max_length
        FixedLayer.get_max_length = lambda self: 10**9  # type: ignore[method-assign]
        try:
            self.step()
        finally:
            FixedLayer.get_max_length = hidden  # type: ignore[method-assign]
        for layer, counts in zip(self.cache.layers, known, strict=True):
            layer.set_counts(counts)
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """Stand-ins for CUDA graphs, as `generate` makes them."""
    from linearize.modeling import modeling_linearized

    Replay.made = []
    monkeypatch.setattr(modeling_linearized, "DecodeGraph", Replay)
    monkeypatch.setattr(decode_graph, "is_graph_device", lambda device: True)
    monkeypatch.setattr(decode_graph, "step_backend", lambda mixer, q: ("triton", None))
    return Replay.made


def padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded rows of other lengths."""
    x, mask = ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : 7 * row] = 0
    return x.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("plan", [["linear"] * 3, PLAN])
@pytest.mark.parametrize("recipe", ["lolcats", "pure", "liger-gla"])
@torch.no_grad()
def test_generate_is_the_same_by_replays(recipe: str, plan: list[str], graphs: list[Replay]) -> None:
    """Greedy over several blocks, left padding, samples, beams, and going on from the cache that came back."""
    student = convert(teacher("llama"), SPECS[recipe], plan)
    x, mask = padded(3, 60)

    def both(**options: Any) -> Any:
        student.decode_graphs = False
        torch.manual_seed(3)
        want = student.generate(x, attention_mask=mask, **options)
        assert "switched off" in student.decode_graph_reason
        student.decode_graphs = True
        torch.manual_seed(3)
        assert torch.equal(student.generate(x, attention_mask=mask, **options), want)
        assert student.decode_graph_reason is None
        return want

    want = both(max_new_tokens=80, **GREEDY)
    assert graphs[-1].replays == 78  # the prefill gives one token, the warm-up another
    both(max_new_tokens=9, do_sample=True, top_k=9, num_return_sequences=2, pad_token_id=0)
    both(max_new_tokens=9, num_beams=3, eos_token_id=None, pad_token_id=0)
    assert graphs[-1].replays >= 7

    first = student.generate(x, attention_mask=mask, max_new_tokens=30, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert cache.graph is None and cache.padding is None and not cache.fixed
    longer = torch.cat((mask, mask.new_ones(3, 30)), 1)
    rest = student.generate(first.sequences, attention_mask=longer, past_key_values=cache, max_new_tokens=50, **GREEDY)
    assert torch.equal(rest, want)


@torch.no_grad()
def test_reasons_to_go_without_a_graph(monkeypatch: pytest.MonkeyPatch, graphs: list[Replay]) -> None:
    x = ids(2, 20)

    def reason(student: Any, **options: Any) -> str:
        made = len(graphs)
        student.generate(x, max_new_tokens=3, **GREEDY, **options)
        assert (len(graphs) > made) == (student.decode_graph_reason is None)
        return student.decode_graph_reason or ""

    student = convert(teacher("llama"), SPECS["lolcats"], PLAN)
    assert reason(student) == ""
    assert "softmax layer with a sliding window" in reason(convert(teacher("mistral"), SPECS["lolcats"], PLAN))
    assert "no linear layer" in reason(convert(teacher("llama"), SPECS["lolcats"], ["softmax"] * 3))
    handle = student.model.layers[1].register_forward_hook(lambda *_: None)
    assert "hooks" in reason(student)
    handle.remove()
    assert "training" in reason(student.train())
    student.eval()
    monkeypatch.setattr(decode_graph, "step_backend", lambda mixer, q: ("torch", "no such kernel"))
    assert "no such kernel" in reason(student)
    monkeypatch.setenv("LINEARIZE_CUDA_GRAPHS", "0")
    assert "LINEARIZE_CUDA_GRAPHS" in reason(student)
    monkeypatch.undo()
    assert "cpu" in reason(student)


@torch.no_grad()
def test_steps_that_ask_for_more_run_as_they_are(graphs: list[Replay]) -> None:
    """Hidden states of every step: a graph holds logits alone."""
    student = convert(teacher("llama"), SPECS["lolcats"], PLAN)
    x = ids(2, 20)
    want = student.generate(x, max_new_tokens=6, **GREEDY)
    full = student.generate(x, max_new_tokens=6, output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(full.sequences, want) and len(full.hidden_states) == 6
    assert graphs[-1].replays == 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_addresses_stay(family: str) -> None:
    """Prefill, steps over a block's edge, padding, and another order of the rows: the same buffers."""
    student = convert(teacher(family), SPECS["gated-deltanet" if family == "qwen3" else "lolcats"])
    cache = LinearizedCache(student.config)
    x, mask = padded(3, 150)
    student(x[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
    places = [{n: t.data_ptr() for n, t in layer.tensors.items()} for layer in cache.linear]
    size = cache.state_bytes
    student(x[:, 100:140], attention_mask=mask[:, :140], past_key_values=cache)
    for t in range(140, 150):
        student(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert [{n: t.data_ptr() for n, t in layer.tensors.items()} for layer in cache.linear] == places
    assert cache.state_bytes == size
    for layer in cache.linear:
        assert layer.tensors["position"].tolist() == [136, 150, 150]
        assert torch.equal(layer.tensors["state"][1], layer.tensors["state"][2])


@torch.no_grad()
def test_frozen_layers_grow_again_where_they_must() -> None:
    """Another length than the frozen cache was made for, or more than one token: the dynamic layers come back."""
    student = convert(teacher("llama"), SPECS["lolcats"], PLAN)
    x = ids(2, 30)
    want = student(x, use_cache=False).logits
    cache = LinearizedCache(student.config)
    out = [student(x[:, :10], past_key_values=cache).logits]
    cache.freeze(12, None)
    assert len(cache.fixed) == 1
    for t in range(10, 14):
        out.append(student(x[:, t : t + 1], past_key_values=cache).logits)
        assert len(cache.fixed) == (t < 12)
    cache.freeze(40, None)
    out.append(student(x[:, 14:], past_key_values=cache).logits)
    assert not cache.fixed
    torch.testing.assert_close(torch.cat(out, 1), want, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_a_prefill_with_a_cache() -> None:
    """In place only where nobody differentiates: autograd may hold the old tensors."""
    student = convert(teacher("llama"), SPECS["pure"]).eval()
    x = ids(1, 70)
    grads = []
    for use_cache in (False, True):
        student.zero_grad()
        student(x, labels=x, use_cache=use_cache).loss.backward()
        grads.append(student.model.layers[0].self_attn.mixer.k_map.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)
