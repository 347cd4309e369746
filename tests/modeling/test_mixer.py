"""Invariants 1 to 5, 7 and 8, on the mixer itself: every spec, odd lengths, head counts and head sizes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.layout import packed_layout, padded_layout
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import MixerSpec
from tests.specs import all_specs

SPECS = all_specs()
LENGTHS = (1, 2, 63, 64, 65, 127, 129, 200)
HIDDEN = 24


def build(spec: MixerSpec, heads: int = 4, kv_heads: int = 2, width: int = 8) -> Mixer:
    torch.manual_seed(1)
    mixer = Mixer(spec, hidden_size=HIDDEN, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, scaling=width**-0.5)
    for p in mixer.parameters():  # away from the identity and the zeros they start at
        p.data += 0.2 * torch.randn_like(p)
    return mixer


def tokens(length: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 8) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    angle = torch.arange(length)[None, :, None] * (10.0 ** -torch.linspace(0, 3, width // 2)).repeat(2)
    made = {
        "q": torch.randn(batch, heads, length, width, generator=draw),
        "k": torch.randn(batch, kv_heads, length, width, generator=draw),
        "v": torch.randn(batch, kv_heads, length, width, generator=draw),
        "inputs": torch.randn(batch, length, HIDDEN, generator=draw),
    }
    return made | {"cos": angle.cos(), "sin": angle.sin()}


def run(mixer: Mixer, x: dict[str, torch.Tensor], a: int = 0, b: int | None = None, **options: Any) -> torch.Tensor:
    """Tokens a to b of x; rotary tables are per position already."""
    b = x["q"].shape[2] if b is None else b
    return mixer(
        *(x[name][:, :, a:b] for name in "qkv"),
        inputs=x["inputs"][:, a:b],
        rotation=(x["cos"][:, a:b], x["sin"][:, a:b]),
        **options,
    )


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-9)).item()


def assert_same_state(one: LinearStateLayer, other: LinearStateLayer, tolerance: float = 1e-5) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, x in one.tensors.items():
        error = (x.float() - other.tensors[name].float()).norm() / other.tensors[name].float().norm().clamp_min(1e-3)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_chunked_is_the_quadratic_definition(name: str) -> None:
    mixer = build(SPECS[name])
    for length in LENGTHS:
        x = tokens(length)
        mixer.execution = "quadratic"
        want = run(mixer, x)
        mixer.execution = "chunked"
        assert relative(run(mixer, x), want) < 1e-5, length


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_prefill_is_steps_is_any_split(name: str) -> None:
    """Invariant 1, in outputs and in state; and 7: the state is float32 and never grows."""
    mixer, x = build(SPECS[name]), tokens(200)
    want = run(mixer, x)
    whole, steps, chunks = LinearStateLayer(), LinearStateLayer(), LinearStateLayer()
    assert relative(run(mixer, x, cache=whole), want) < 1e-5
    sizes = set()
    out = []
    for t in range(200):
        out.append(run(mixer, x, t, t + 1, cache=steps))
        sizes.add(steps.bytes)
    assert relative(torch.cat(out, 1), want) < 1e-5
    cuts = [0, 1, 3, 64, 65, 128, 130, 131, 193, 200]
    out = [run(mixer, x, a, b, cache=chunks) for a, b in pairwise(cuts)]
    assert relative(torch.cat(out, 1), want) < 1e-5
    assert_same_state(steps, whole)
    assert_same_state(chunks, whole)
    assert sizes == {whole.bytes}
    assert whole.tensors["state"].dtype == torch.float32
    assert whole.seen == steps.seen == chunks.seen == 200


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_every_short_prefill_then_steps(name: str) -> None:
    """A prefill that ends anywhere around a block's edge leaves a state from which decode goes on."""
    mixer, x = build(SPECS[name]), tokens(200)
    want = run(mixer, x)
    for length in LENGTHS[:-1]:
        cache = LinearStateLayer()
        run(mixer, x, 0, length, cache=cache)
        got = torch.cat([run(mixer, x, t, t + 1, cache=cache) for t in range(length, min(length + 3, 200))], 1)
        assert relative(got, want[:, length : length + 3]) < 1e-5, length


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_the_past_does_not_see_the_future(name: str) -> None:
    """Invariant 2: neither later tokens nor the total length."""
    mixer, x = build(SPECS[name]), tokens(200)
    changed = {key: value.clone() for key, value in x.items()}
    for key in ("q", "k", "v"):
        changed[key][:, :, 150:] += 3.0
    changed["inputs"][:, 150:] -= 2.0
    want = run(mixer, x)
    assert relative(run(mixer, changed)[:, :150], want[:, :150]) < 1e-6
    assert relative(run(mixer, changed)[:, 150:], want[:, 150:]) > 1e-3
    for length in LENGTHS:
        assert relative(run(mixer, x, 0, length), want[:, :length]) < 1e-5, length


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    """Invariant 4, on either side, and in the state; the padded tokens are large, so that a leak would show."""
    mixer = build(SPECS[name])
    x = tokens(140)
    lengths, side = (140, 71, 1), ("left", "left", "right")
    padded = {key: 50.0 * torch.ones(3, *value.shape[1:]) for key, value in x.items()}
    mask = torch.zeros(3, 140)
    for row, (length, where) in enumerate(zip(lengths, side)):
        place = slice(140 - length, 140) if where == "left" else slice(0, length)
        mask[row, place] = 1
        for key in ("q", "k", "v"):
            padded[key][row][:, place] = x[key][0][:, :length]
        for key in ("inputs", "cos", "sin"):
            padded[key][row][place] = x[key][0][:length]
    cache = LinearStateLayer()
    got = run(mixer, padded, layout=padded_layout(mask), cache=cache)
    assert torch.equal(got[mask == 0], torch.zeros_like(got[mask == 0]))
    for row, length in enumerate(lengths):
        alone = LinearStateLayer()
        single = {key: value[:1] for key, value in x.items()}
        want = run(mixer, single, 0, length, cache=alone)
        assert relative(got[row][mask[row] == 1], want[0]) < 1e-5
        cut = LinearStateLayer()
        cut.tensors = {key: value[row : row + 1] for key, value in cache.tensors.items()}
        assert_same_state(cut, alone)


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_a_padded_batch_goes_on(name: str) -> None:
    """Rows that have read different numbers of tokens are continued by steps and by chunks."""
    mixer, x = build(SPECS[name]), tokens(200)
    pad = 37
    shifted = {key: value.clone() for key, value in x.items()}
    for key in ("q", "k", "v"):
        shifted[key][1, :, pad:] = x[key][1, :, : 200 - pad]
    shifted["inputs"][1, pad:] = x["inputs"][1, : 200 - pad]
    for key in ("cos", "sin"):
        shifted[key] = torch.stack((x[key][0], torch.cat((x[key][0, :pad], x[key][0, : 200 - pad]))))
    mask = torch.ones(2, 100)
    mask[1, :pad] = 0
    cache, out = LinearStateLayer(), []
    out.append(run(mixer, shifted, 0, 100, layout=padded_layout(mask), cache=cache))
    out += [run(mixer, shifted, t, t + 1, cache=cache) for t in range(100, 170)]
    out.append(run(mixer, shifted, 170, 200, cache=cache))
    got, want = torch.cat(out, 1), run(mixer, x)
    assert relative(got[0], want[0]) < 1e-5
    assert relative(got[1, pad:], want[1, : 200 - pad]) < 1e-5


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_packed_documents_are_apart(name: str) -> None:
    """Invariant 5."""
    mixer, x = build(SPECS[name]), tokens(200)
    bounds = [0, 1, 66, 130, 200]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
    x |= {key: x[key][:, positions[0]] for key in ("cos", "sin")}
    got = run(mixer, x, layout=packed_layout(positions, 2))
    for a, b in pairwise(bounds):
        assert relative(got[:, a:b], run(mixer, x, a, b)) < 1e-5


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("heads,kv_heads,width", [(1, 1, 8), (3, 3, 64), (8, 4, 8), (8, 2, 128), (8, 8, 8)])
@torch.no_grad()
def test_head_shapes(name: str, heads: int, kv_heads: int, width: int) -> None:
    """Invariant 6: query head h reads kv head h // (H/HK), in all three executions."""
    spec = SPECS[name]
    if spec.feature_map == "taylor" and width == 128:
        spec = MixerSpec(**{**spec.as_dict(), "feature_dim": 4})
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width}
    mixer, x = build(spec, **sizes), tokens(70, **sizes)
    want = run(mixer, x)
    mixer.execution = "quadratic"
    assert relative(run(mixer, x), want) < 1e-5
    mixer.execution = "chunked"
    cache = LinearStateLayer()
    out = [run(mixer, x, 0, 66, cache=cache)] + [run(mixer, x, t, t + 1, cache=cache) for t in range(66, 70)]
    assert relative(torch.cat(out, 1), want) < 1e-5
    for head in range(kv_heads):  # a change of one kv head reaches its own query heads and no other
        changed = x | {"v": x["v"].clone()}
        changed["v"][:, head] += 1.0
        moved = (run(mixer, changed) - want).abs().amax(dim=(0, 1, 3)) > 1e-4
        group = heads // kv_heads
        assert moved.nonzero().flatten().tolist() == list(range(head * group, (head + 1) * group))


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_a_long_prefill_is_read_in_stretches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens are read at once changes nothing, nor where a row's padding ends in a stretch."""
    mixer, x = build(SPECS[name]), tokens(200)
    mask = torch.ones(2, 200)
    mask[1, :137] = 0
    whole, parts = LinearStateLayer(), LinearStateLayer()
    want = run(mixer, x, layout=padded_layout(mask), cache=whole)
    monkeypatch.setattr("linearize.modeling.stretches.MOST", 48)
    assert relative(run(mixer, x, layout=padded_layout(mask), cache=parts), want) < 1e-5
    assert_same_state(parts, whole)


@pytest.mark.parametrize("name", SPECS)
def test_without_gradients_wide_features_are_made_in_stretches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give what the whole gives, also for packed documents; what is recorded is of the whole."""
    mixer, x = build(SPECS[name]), tokens(300, batch=1)
    layouts = (None, packed_layout(torch.cat([torch.arange(n) for n in (150, 1, 149)])[None], 1))
    want = [run(mixer, x, layout=layout).detach() for layout in layouts]
    monkeypatch.setattr("linearize.modeling.stretches.CPU_BYTES", 0)
    cuts: list[int] = []
    stretch = Mixer.stretch
    monkeypatch.setattr(Mixer, "stretch", lambda self, q, *rest: cuts.append(q.shape[2]) or stretch(self, q, *rest))
    with torch.no_grad():
        for layout, whole in zip(layouts, want, strict=True):
            assert relative(run(mixer, x, layout=layout), whole) < 1e-5
        assert (max(cuts) < 300) == (mixer.features > 0)
        mixer.record = True
        run(mixer, x)
        assert mixer.last_output is not None and cuts[-1] == mixer.last_output.shape[1] == 300
        mixer.record = False
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        run(mixer, x)  # which a compiler would unroll
        assert cuts[-1] == 300


def test_every_pair_counts_once() -> None:
    """Invariant 3: the weights of a shared normaliser are a distribution over all causal pairs, at any length."""
    mixer = build(SPECS["lolcats"])
    mixer.record_weights = True
    for length in LENGTHS:
        run(mixer, tokens(length))
        weights = mixer.last_weights
        assert weights is not None
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, length))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        assert (weights[..., causal] > 0).all() and (weights[..., ~causal] == 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_float64(name: str) -> None:
    """Invariant 8: the chunked path's gradients against autograd of the definition, in float64."""
    mixer = build(SPECS[name]).double()
    x = {key: value.double() for key, value in tokens(129).items()}
    weight = torch.randn(2, 129, 4, 8, generator=torch.Generator().manual_seed(3))

    def gradients(execution: str) -> list[torch.Tensor]:
        mixer.execution = execution
        leaves = {key: x[key].clone().requires_grad_() for key in ("q", "k", "v", "inputs")}
        parameters = list(mixer.parameters())
        out = run(mixer, x | leaves)
        found = torch.autograd.grad((out * weight).sum(), [*leaves.values(), *parameters], allow_unused=True)
        return [torch.zeros(1) if g is None else g for g in found]

    for got, want in zip(gradients("chunked"), gradients("quadratic")):
        assert (got - want).norm() <= 1e-9 * want.norm().clamp_min(1e-6)
        assert got.isfinite().all()


def test_branches() -> None:
    """Each branch alone: the window is softmax over its pairs, linear reads all the past, none is zero."""
    mixer, x = build(SPECS["lolcats"]), tokens(200)
    full = run(mixer, x)
    found = {}
    for branches in ("window", "linear", "none"):
        mixer.branches = branches
        found[branches] = run(mixer, x)
    assert found["none"].abs().max() == 0
    mixer.branches = "full"
    changed = x | {"v": x["v"].clone()}
    changed["v"][:, :, :64] += 5.0  # out of the window's sight from token 128 on
    for branches, sees in (("window", False), ("linear", True), ("full", True)):
        mixer.branches = branches
        before = found.get(branches, full)
        assert ((run(mixer, changed) - before)[:, 128:].abs().max() > 1e-3) == sees
    mixer.branches = "linear"
    with pytest.raises(ValueError, match="use_cache must be False"):
        run(mixer, x, cache=LinearStateLayer())


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    mixer, x = build(SPECS["lolcats"]), tokens(200)
    half = {key: value.bfloat16() for key, value in x.items()}
    cache = LinearStateLayer()
    out = run(mixer, half, cache=cache)
    assert out.dtype == torch.bfloat16
    assert cache.tensors["state"].dtype == torch.float32
    rounded = {key: value.float() for key, value in half.items()}
    assert relative(out, run(mixer, rounded)) < 5e-3
