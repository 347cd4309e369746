"""What single axes of the mixer promise: projections of its own, shares by mass, wide feature maps, learned scales."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.configuration_linearized import LinearizedFields, linearized_config
from linearize.modeling.feature_maps import CODE_SCALE, FeatureMap, _bases
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import MixerSpec
from tests.modeling.families import teacher
from tests.specs import EXTRA, recipe_specs

HIDDEN, HEADS, KV_HEADS, WIDTH = 24, 4, 2, 8
MASS = EXTRA["hedgehog-mass-own"] | {"window": 8, "sinks": 2, "feature_dim": None}
del MASS["own_qk"]


def build(seed: int = 1, **axes: Any) -> Mixer:
    """A mixer as it starts."""
    torch.manual_seed(seed)
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH, "scaling": WIDTH**-0.5}
    return Mixer(MixerSpec(**axes), hidden_size=HIDDEN, **sizes)


def tokens(length: int, batch: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(length)
    angle = torch.arange(length)[None, :, None] * (10.0 ** -torch.linspace(0, 3, WIDTH // 2)).repeat(2)
    return {
        "q": 2.0 * torch.randn(batch, HEADS, length, WIDTH, generator=draw),
        "k": 2.0 * torch.randn(batch, KV_HEADS, length, WIDTH, generator=draw),
        "v": torch.randn(batch, KV_HEADS, length, WIDTH, generator=draw),
        "inputs": torch.randn(batch, length, HIDDEN, generator=draw),
        "rotation": (angle.cos(), angle.sin()),
    }


def steps(mixer: Mixer, x: dict[str, Any]) -> torch.Tensor:
    """A prefill of all tokens but the last two, which come one by one."""
    cache, out, end = LinearStateLayer(), [], x["q"].shape[2]
    for a, b in ((0, end - 2), (end - 2, end - 1), (end - 1, end)):
        heads = {name: x[name][:, :, a:b] for name in "qkv"}
        rotation = tuple(table[:, a:b] for table in x["rotation"])
        out.append(mixer(**heads, inputs=x["inputs"][:, a:b], rotation=rotation, cache=cache))
    return torch.cat(out, dim=1)


# ---------------------------------------------------------------------------------------------- projections of its own


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("execution", ["chunked", "quadratic", "steps"])
def test_own_projections_start_as_nothing(execution: str, rope: bool) -> None:
    axes = MASS | {"rope": rope}
    plain, own, x = build(**axes), build(**axes, own_qk=True), tokens(50)
    new, same = dict(own.named_parameters()), dict(plain.named_parameters())
    assert {n: p.shape for n, p in new.items() if n not in same} == {
        "q_own.weight": (HEADS * WIDTH, HIDDEN),
        "k_own.weight": (KV_HEADS * WIDTH, HIDDEN),  # one state, so one key, per kv head
    }
    own.load_state_dict(plain.state_dict(), strict=False)
    if execution != "steps":
        plain.execution = own.execution = execution
    run = steps if execution == "steps" else lambda mixer, x: mixer(**x)
    with torch.no_grad():
        want = run(plain, x)
        assert torch.equal(run(own, x), want)
        own.q_own.weight[0, 0] += 1.0  # of head 0
        moved = (run(own, x) - want).abs().amax(dim=(0, 1, 3)) > 1e-6
        assert moved.tolist() == [True, False, False, False]
        own.q_own.weight[0, 0] -= 1.0
        own.k_own.weight[-1, 0] += 1.0  # of the last kv head, which heads 2 and 3 read
        moved = (run(own, x) - want).abs().amax(dim=(0, 1, 3)) > 1e-6
        assert moved.tolist() == [False, False, True, True]


def test_gradients_reach_own_projections_that_are_zero() -> None:
    own, x = build(**MASS, own_qk=True), tokens(50)
    assert not own.q_own.weight.any() and not own.k_own.weight.any()
    own(**x).square().sum().backward()
    for name in ("q_own", "k_own"):
        rows = getattr(own, name).weight.grad.abs().amax(dim=1)
        assert (rows > 0).all(), name


# ------------------------------------------------------------------------------------------------------ shares by mass


def far_attention(mixer: Mixer, x: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The teacher's scores and what no window sees of them: (scores, far), [N, H, L, L], and far's log-sum-exp."""
    k = x["k"].repeat_interleave(HEADS // KV_HEADS, dim=1)
    length = k.shape[2]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    spec = mixer.spec
    seen = (i // spec.window - j // spec.window <= 1) | (j < spec.sinks)
    scores = (x["q"] @ k.transpose(-1, -2) * mixer.scaling).masked_fill(j > i, float("-inf"))
    far = scores.masked_fill(seen, float("-inf"))
    return scores, far, far.logsumexp(-1)


@pytest.mark.parametrize("execution", ["chunked", "quadratic"])
def test_a_true_mass_and_a_true_far_attention_make_softmax(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exact pieces the mix is softmax over all keys: the share is how softmax divides its mass."""
    mixer, x = build(**MASS), tokens(45)
    mixer.execution = execution
    scores, far, mass = far_attention(mixer, x)
    v = x["v"].repeat_interleave(HEADS // KV_HEADS, dim=1)
    weights = far.exp()  # unnormalised; the branch's own denominator divides them

    monkeypatch.setattr(mixer.far_mass, "forward", lambda inputs: mass)
    found = torch.cat((weights @ v, weights.sum(-1, keepdim=True)), dim=-1)
    monkeypatch.setattr(mixer, "linear_branch", lambda *given, **options: (found, None))
    grouped = weights.unflatten(1, (KV_HEADS, -1))
    monkeypatch.setattr("linearize.modeling.mixer.linear_weights", lambda *given, **options: grouped)
    with torch.no_grad():
        got = mixer(**x).transpose(1, 2)
        want = scores.softmax(-1) @ v
        torch.testing.assert_close(got, want)
        alone = far.isneginf().all(-1)  # early tokens, whose window sees all there is
        assert alone.any() and not alone.all()
        mixer.record_weights = True
        mixer(**x)
        torch.testing.assert_close(mixer.last_weights, scores.softmax(-1))
        # And it is the mass that does it: any other one is not softmax.
        mixer.record_weights = False
        monkeypatch.setattr(mixer.far_mass, "forward", lambda inputs: mass + 0.5)
        assert (mixer(**x).transpose(1, 2) - want)[~alone].abs().max() > 1e-2


def test_the_windows_share_follows_from_its_scores() -> None:
    """Larger scores within the window raise its share; a shift that a softmax over all keys would see is seen."""
    mixer = build(**MASS | {"window": 4, "sinks": 0})
    total, largest, gate = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.5]]]]), torch.tensor([[[0.7]]])
    share = mixer._share(total, largest, gate)
    inside, outside = 2.0 * torch.tensor(1.5).exp(), torch.tensor(0.7).exp()
    torch.testing.assert_close(share.squeeze(), inside / (inside + outside))
    assert float(mixer._share(total, largest + 100.0, gate)) == 1.0
    assert float(mixer._share(total, largest - 200.0, gate)) == pytest.approx(0.0, abs=1e-30)


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_the_share_starts_at_window_weight(weight: float) -> None:
    """Where all scores are zero: the window then holds the log of 3/2 W tokens on average."""
    mixer = build(**MASS | {"window": 8, "sinks": 0, "window_weight": weight})
    count = torch.tensor(12.0).reshape(1, 1, 1, 1)
    gate = mixer.gate(torch.zeros(1, 1, HIDDEN))
    assert gate is not None and gate.shape == (1, HEADS, 1)
    torch.testing.assert_close(mixer._share(count, torch.zeros(()), gate), torch.full((1, HEADS, 1, 1), weight))


def test_a_learned_scale_is_a_factor_of_the_linear_branch() -> None:
    axes = EXTRA["delta-mass"] | {"window": 8}
    mixer, x = build(**axes), tokens(50)
    mixer.branches = "linear"
    with torch.no_grad():
        one = mixer(**x)
        mixer.linear_scale.copy_(torch.tensor([1.0, 2.0, -1.0, 0.0]))
        torch.testing.assert_close(mixer(**x), one * mixer.linear_scale[:, None])
        mixer.execution = "quadratic"
        torch.testing.assert_close(mixer(**x), one * mixer.linear_scale[:, None], rtol=1e-4, atol=1e-5)


def test_what_is_recorded_of_the_linear_branch_is_it_alone() -> None:
    x = tokens(50)
    for axes in (MASS, EXTRA["delta-mass"] | {"window": 8}):
        mixer = build(**axes)
        with torch.no_grad():
            mixer.record = True
            mixer(**x)
            recorded = mixer.last_linear
            mixer.branches = "linear"
            torch.testing.assert_close(recorded, mixer(**x))
    lagged = build(window=8)  # reads other tokens alone than in the mix
    lagged.record = True
    lagged(**x)
    assert lagged.last_output is not None and lagged.last_linear is None


# -------------------------------------------------------------------------------------------------------- feature maps


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 1, 3 * WIDTH, 3 * WIDTH + 5])
@pytest.mark.parametrize("name", ["hedgehog_softmax", "hedgehog_exp", "learned_softmax", "relu", "linear", "crelu"])
def test_wide_maps_start_with_distinct_directions(name: str, width: int) -> None:
    start = FeatureMap(name, HEADS, WIDTH, width).initial_values()["weight"]
    assert start.shape == (HEADS, WIDTH, width)
    length = CODE_SCALE if name == "learned_softmax" else 1.0
    start = start / length
    assert torch.equal(start[..., :WIDTH], torch.eye(WIDTH).expand(HEADS, -1, -1))
    columns = start[0].T
    torch.testing.assert_close(columns.norm(dim=-1), torch.ones(width))
    cosines = (columns @ columns.T).fill_diagonal_(0.0).abs()
    assert cosines.max() < 0.999, "no direction twice, nor with its sign turned"
    again = FeatureMap(name, 2, WIDTH, width).initial_values()["weight"] / length
    assert torch.equal(again, start[:2]), "queries and keys start with the same map"


def test_a_narrow_map_starts_as_the_first_channels() -> None:
    start = FeatureMap("hedgehog_exp", HEADS, WIDTH, 3).initial_values()["weight"]
    assert torch.equal(start[0], torch.eye(WIDTH)[:, :3])


def test_directions_are_computed_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a model was laid out on the meta device, where nothing has a value."""
    qr, calls = torch.linalg.qr, []

    def counted(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(matrix.device.type)
        return qr(matrix)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    width = 7 * WIDTH + 3  # of no other test
    with torch.device("meta"):
        FeatureMap("relu", HEADS, WIDTH, width).initial_values()
    for name in ("relu", "learned_softmax", "relu"):
        weight = FeatureMap(name, HEADS, WIDTH, width).initial_values()["weight"]
        weight.fill_(torch.nan)
    assert torch.isfinite(FeatureMap("relu", HEADS, WIDTH, width).initial_values()["weight"]).all()
    assert calls.count("cpu") <= 7


@pytest.mark.parametrize("recipe", sorted(recipe_specs()))
def test_start_values_do_not_depend_on_what_tensors_are_now(recipe: str) -> None:
    """As in from_config(dtype=torch.bfloat16), and under `with torch.device(...)`."""
    mixer = Mixer(
        recipe_specs()[recipe], hidden_size=HIDDEN, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH, scaling=1.0
    )
    torch.manual_seed(0)
    wanted = mixer.initial_values()
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "meta")):
        _bases.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                torch.manual_seed(0)
                found = mixer.initial_values()
        finally:
            torch.set_default_dtype(torch.float32)
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], wanted[name]) and found[name].is_cpu for name in wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_is_made_in_any_dtype(dtype: torch.dtype) -> None:
    _bases.cache_clear()
    config = linearized_config(teacher("llama").config, layer_mixers=["linear"] * 3, spec=recipe_specs()["lolcats"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert {x.dtype for x in model.parameters()} == {dtype}
    assert model(torch.arange(40)[None]).logits.isfinite().all()


def test_the_delta_rule_reads_and_writes_unit_features() -> None:
    x = tokens(20)
    for name in ("linear", "crelu", "identity", "l2norm"):
        mixer = build(feature_map=name, write="delta", normaliser="none", window=0, coverage="all")
        for found in (mixer.map_queries(x["q"]), mixer.map_keys(x["k"].repeat_interleave(2, 1), None)):
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(found.shape[:-1]))


# ------------------------------------------------------------------------------------------------------- configuration


def test_every_axis_is_a_field_with_the_axis_default() -> None:
    ours = {f.name.removeprefix("mixer_"): f.default for f in dataclasses.fields(LinearizedFields)}
    assert {f.name: ours[f.name] for f in dataclasses.fields(MixerSpec)} == {
        f.name: f.default for f in dataclasses.fields(MixerSpec)
    }


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_config_written_before_an_axis_loads_with_its_default(family: str, tmp_path: Path) -> None:
    spec = MixerSpec(**MASS)
    config = linearized_config(teacher(family).config, layer_mixers=["linear"] * 3, spec=spec)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert values.pop("mixer_own_qk") is False
    file.write_text(json.dumps(values))
    assert type(config).from_pretrained(tmp_path).mixer_spec() == spec
    values["mixer_own_qk"] = True
    file.write_text(json.dumps(values))
    assert type(config).from_pretrained(tmp_path).mixer_spec() == dataclasses.replace(spec, own_qk=True)
