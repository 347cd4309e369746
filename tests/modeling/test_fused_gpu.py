"""On a GPU, in the model's dtype: the mixer takes the fused ops by itself, and errs no more than torch does twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linearize.modeling import mixer as mixer_module
from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import LEARNED_MAPS, MixerSpec
from tests.specs import recipe_specs

RECIPES = {name: spec for name, spec in recipe_specs().items() if name != "based"}
HEADS, KV_HEADS, WIDTH, HIDDEN, LENGTH = 8, 2, 64, 256, 700
ROUNDING = 2.0**-8
"""One rounding to bfloat16, relative."""
pytestmark = pytest.mark.gpu


def build(spec: MixerSpec, dtype: torch.dtype, backend: str, steep: float = 1.0, softcap: float | None = None) -> Mixer:
    torch.manual_seed(1)
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH}
    mixer = Mixer(spec, **sizes, scaling=WIDTH**-0.5)
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    if spec.feature_map in LEARNED_MAPS:
        mixer.q_map.weight.data *= steep
        mixer.k_map.weight.data *= steep
    mixer.backend, mixer.softcap = backend, softcap
    return mixer.cuda().to(dtype)


def tokens(dtype: torch.dtype, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """The same numbers, rounded to bfloat16, in any dtype."""
    draw = torch.Generator().manual_seed(length)
    angle = torch.arange(length)[None, :, None] * (10.0 ** -torch.linspace(0, 3, WIDTH // 2)).repeat(2)
    made = {
        name: torch.randn(2, length, heads, WIDTH, generator=draw).transpose(1, 2)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    made |= {"inputs": torch.randn(2, length, HIDDEN, generator=draw), "cos": angle.cos(), "sin": angle.sin()}
    return {name: x.bfloat16().to(dtype).cuda() for name, x in made.items()}


def run(mixer: Mixer, x: dict[str, torch.Tensor], a: int = 0, b: int | None = None, **options: Any) -> torch.Tensor:
    heads = (x[name][:, :, a:b] for name in "qkv")
    return mixer(*heads, inputs=x["inputs"][:, a:b], rotation=(x["cos"][:, a:b], x["sin"][:, a:b]), **options)


def everything(mixer: Mixer, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output and every gradient, by name."""
    given = {name: value.detach().clone() for name, value in x.items()}
    leaves = dict(mixer.named_parameters()) | {n: given[n].requires_grad_() for n in ("q", "k", "v", "inputs")}
    out = run(mixer, given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return {"out": out.detach()} | {n: g for n, g in zip(leaves, found, strict=True) if g is not None}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm().clamp_min(1e-12))


@pytest.mark.parametrize(
    ("name", "steep", "softcap"),
    [
        *((name, 1.0, None) for name in RECIPES),
        ("pure", 6.0, None),
        ("lolcats", 6.0, None),
        *((name, 1.0, 1.5) for name in ("lolcats", "pure", "gated-deltanet")),
    ],
)
def test_no_more_than_twice_the_error_of_torch(
    name: str, steep: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 inputs and weights, against float64, beside the torch path kept in bfloat16 all the way.

    Steep maps, as training makes them, leave most features at their floor. Scores of the window may be bounded.
    """
    served: list[bool] = []
    mix = mixer_module.fused_mix

    def watched(*given: Any, **options: Any) -> Any:
        out = mix(*given, **options)
        served.append(out is not None)
        return out

    monkeypatch.setattr(mixer_module, "fused_mix", watched)
    exact = everything(build(RECIPES[name], torch.bfloat16, "torch", steep, softcap).double(), tokens(torch.float64))
    ours = everything(build(RECIPES[name], torch.bfloat16, "auto", steep, softcap), tokens(torch.bfloat16))
    assert served == [False, True]
    plain = None
    if RECIPES[name].write != "delta":  # torch solves no triangular systems in bfloat16
        monkeypatch.setattr(mixer_module, "_precise", lambda *tensors: tensors)
        plain = everything(build(RECIPES[name], torch.bfloat16, "torch", steep, softcap), tokens(torch.bfloat16))
    for key, value in exact.items():
        bar = ROUNDING if plain is None else max(error(plain[key], value), ROUNDING / 2)
        assert error(ours[key], value) <= 2 * bar, f"{key}: {error(ours[key], value):.1e}, bar {2 * bar:.1e}"


@pytest.mark.parametrize(
    ("name", "softcap"), [*((name, None) for name in RECIPES), ("lolcats", 1.5), ("pure", 1.5), ("sliding-window", 1.5)]
)
@torch.no_grad()
def test_prefill_then_steps(name: str, softcap: float | None) -> None:
    """A prefill by the ops, then decode by its kernel, is the torch path's output for the whole text."""
    x = tokens(torch.bfloat16, 330)
    want = run(build(RECIPES[name], torch.float32, "torch", softcap=softcap), {n: v.float() for n, v in x.items()})
    mixer = build(RECIPES[name], torch.float32, "triton", softcap=softcap).to(torch.bfloat16)
    cache = LinearStateLayer()
    got = [run(mixer, x, 0, 320, cache=cache)]
    got += [run(mixer, x, t, t + 1, cache=cache) for t in range(320, 330)]
    assert error(torch.cat(got, 1), want.double()) < 2e-2


@torch.no_grad()
def test_autocast_reads_in_its_dtype() -> None:
    mixer, x = build(RECIPES["lolcats"], torch.float32, "triton"), tokens(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = run(mixer, x)
    assert out.dtype == torch.bfloat16
    assert error(out, run(mixer, x).double()) < 1e-2


def test_the_graph_stays_whole() -> None:
    mixer, x = build(RECIPES["lolcats"], torch.bfloat16, "triton"), tokens(torch.bfloat16)
    compiled = torch.compile(lambda: run(mixer, x), fullgraph=True)
    assert error(compiled(), run(mixer, x).double()) < 1e-2
