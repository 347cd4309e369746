"""The fused ops in place of the torch path: same outputs, gradients and cache, for every shipped mixer.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py sets it), in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.fused import unable
from linearize.modeling.fused_tokens import Tokens
from linearize.modeling.layout import packed_layout, padded_layout
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import LEARNED_MAPS, MixerSpec
from linearize_kernels.backend import HAS_TRITON, POISON, interpreting
from tests.specs import EXTRA, recipe_specs

pytestmark = pytest.mark.skipif(not HAS_TRITON or not interpreting(), reason="needs Triton's interpreter")

WIDTH, HIDDEN, LENGTH = 16, 24, 54
FEW, MORE = (2, 1), (4, 2)
"""Heads and kv heads: of tests with gradients, which take long in the interpreter, and of the others."""
LIMIT = 2e-5
"""Relative error in float32: both sides round, in another order."""


def small(spec: MixerSpec) -> MixerSpec:
    """The same mixer with blocks of 16 and maps of 16, so that a short text has blocks outside the window."""
    sizes: dict[str, Any] = {"window": 16} if spec.window else {}
    if spec.feature_map in LEARNED_MAPS:
        sizes["feature_dim"] = 16
    return replace(spec, **sizes)


RECIPES = {name: small(spec) for name, spec in recipe_specs().items()}
UNSERVED = {"based"}
"""Recipes without a fused op, each with its reason in test_what_cannot_be_served_is_said."""
SERVED = list({spec: name for name, spec in sorted(RECIPES.items(), reverse=True) if name not in UNSERVED}.values())[
    ::-1
]
"""One recipe of each mixer: lolcats-hybrid has that of lolcats, hybrid that of pure."""
OTHERS = {
    **{name: small(MixerSpec(**EXTRA[name])) for name in ("gated-delta-lagged", "delta-mass", "window-alone")},
    "delta-lagged-fixed": small(MixerSpec(**EXTRA["gated-delta-lagged"] | {"decay": "fixed", "state_heads": "query"})),
    "softmax-lagged": MixerSpec(feature_map="softmax", window=16, sinks=3),
    "softmax-beside": MixerSpec(feature_map="softmax", normaliser="own", window=16, mix="mass", coverage="all"),
    "softmax-alone": MixerSpec(feature_map="softmax", normaliser="own", window=0, coverage="all"),
    "identity-alone": MixerSpec(feature_map="identity", normaliser="none", window=0, mix="sum", coverage="all"),
    "exp-alone": MixerSpec(
        feature_map="hedgehog_exp", feature_dim=16, normaliser="own", window=0, coverage="all", own_qk=True
    ),
}
"""Mixers of no recipe that ops are given in another way."""
EVERY = RECIPES | OTHERS


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POISON, "1")


def build(spec: MixerSpec, backend: str = "torch", heads: tuple[int, int] = FEW) -> Mixer:
    torch.manual_seed(1)
    sizes = {"hidden_size": HIDDEN, "num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": WIDTH}
    mixer = Mixer(spec, **sizes, scaling=WIDTH**-0.5)
    for p in mixer.parameters():  # away from the identity and the zeros they start at
        p.data += 0.2 * torch.randn_like(p)
    mixer.backend = backend
    return mixer


def tokens(length: int = LENGTH, batch: int = 1, heads: tuple[int, int] = FEW) -> dict[str, torch.Tensor]:
    """Heads as a model gives them: transposed views of [B, T, H, D]."""
    draw = torch.Generator().manual_seed(length)
    angle = torch.arange(length)[None, :, None] * (10.0 ** -torch.linspace(0, 3, WIDTH // 2)).repeat(2)
    made = {
        name: torch.randn(batch, length, count, WIDTH, generator=draw).transpose(1, 2)
        for name, count in (("q", heads[0]), ("k", heads[1]), ("v", heads[1]))
    }
    made["inputs"] = torch.randn(batch, length, HIDDEN, generator=draw)
    return made | {"cos": angle.cos(), "sin": angle.sin()}


def run(mixer: Mixer, x: dict[str, torch.Tensor], a: int = 0, b: int | None = None, **options: Any) -> torch.Tensor:
    heads = (x[name][:, :, a:b] for name in "qkv")
    return mixer(*heads, inputs=x["inputs"][:, a:b], rotation=(x["cos"][:, a:b], x["sin"][:, a:b]), **options)


def gradients(
    mixer: Mixer, x: dict[str, torch.Tensor], *, frozen: bool = False, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The output, and the gradient of every parameter and, unless `frozen`, of every input."""
    given = {name: value.detach().clone() for name, value in x.items()}
    leaves = dict(mixer.named_parameters())
    if not frozen:
        leaves |= {name: given[name].requires_grad_() for name in ("q", "k", "v", "inputs")}
    out = run(mixer, given, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    return out.detach(), dict(zip(leaves, found, strict=True))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp_min(1e-6)).item()


def assert_same_gradients(mixer: Mixer, twin: Mixer, x: dict[str, torch.Tensor], **options: Any) -> None:
    want, theirs = gradients(mixer, x, **options)
    got, ours = gradients(twin, x, **options)
    assert relative(got, want) < LIMIT
    for name, expected in theirs.items():
        found = ours[name]
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            assert relative(found, expected) < 5 * LIMIT, name


@pytest.mark.parametrize("name", SERVED)
def test_outputs_and_gradients(name: str) -> None:
    assert_same_gradients(build(RECIPES[name]), build(RECIPES[name], "triton"), tokens())


@pytest.mark.parametrize("name", ["lolcats", "hedgehog", "pure", "gated-deltanet"])
def test_gradients_of_the_mixer_alone(name: str) -> None:
    """Alignment: nothing outside the mixer is trained."""
    assert_same_gradients(build(RECIPES[name]), build(RECIPES[name], "triton"), tokens(), frozen=True)


@pytest.mark.parametrize("steep", [6.0, 12.0])
@pytest.mark.parametrize("name", [name for name in SERVED if RECIPES[name].feature_map in LEARNED_MAPS])
def test_maps_as_steep_as_training_makes_them(name: str, steep: float) -> None:
    """Then most features lie at a floor or a limit, and so do some denominators."""
    one, other = build(RECIPES[name]), build(RECIPES[name], "triton")
    for mixer in (one, other):
        mixer.q_map.weight.data *= steep
        mixer.k_map.weight.data *= steep
    assert_same_gradients(one, other, tokens())


@pytest.mark.parametrize("name", ["mamba2", "gated-deltanet", "pure"])
def test_gates_as_far_apart_as_training_moves_them(name: str) -> None:
    """A head that forgets e^20 a token beside one that forgets nothing; branches that have all of the mix, or nothing.

    The last chunk is not full: rows beyond the sequence must not count.
    """
    one, other = build(RECIPES[name], heads=(2, 2)), build(RECIPES[name], "triton", (2, 2))
    for mixer in (one, other):
        mixer.decay.a_log.data = torch.linspace(-8.0, 2.0, 2)
        mixer.decay.dt_bias.data.fill_(3.0)
        for gate, reach in (("far_mass", 50.0), ("beta", 15.0)):
            if hasattr(mixer, gate):
                getattr(mixer, gate).bias.data = torch.linspace(reach, -reach, 2)
    assert_same_gradients(one, other, tokens(41, heads=(2, 2)))


@pytest.mark.parametrize("branches", ["window", "linear"])
@pytest.mark.parametrize("name", ["lolcats", "pure", "softmax-lagged"])
def test_one_branch_alone(name: str, branches: str) -> None:
    one, other = build(EVERY[name]), build(EVERY[name], "triton")
    one.branches = other.branches = branches
    assert_same_gradients(one, other, tokens())


@pytest.mark.parametrize("name", [*SERVED, *OTHERS])
@torch.no_grad()
def test_prefill_leaves_the_same_cache(name: str) -> None:
    """And both go on from it alike."""
    x = tokens(heads=MORE)
    for length in (33, 48):
        caches = [LinearStateLayer(), LinearStateLayer()]
        one, other = build(EVERY[name], heads=MORE), build(EVERY[name], "triton", MORE)
        want, got = (run(m, x, 0, length, cache=cache) for m, cache in zip((one, other), caches, strict=True))
        assert relative(got, want) < LIMIT
        assert_same_cache(caches[1], caches[0])
        for t in range(length, length + 2):
            want, got = (run(one, x, t, t + 1, cache=cache) for cache in caches)
            assert relative(got, want) < LIMIT, t


def assert_same_cache(got: LinearStateLayer, want: LinearStateLayer) -> None:
    assert got.tensors.keys() == want.tensors.keys()
    assert (got.seen, got.uniform) == (want.seen, want.uniform)
    for key, value in want.tensors.items():
        found = got.tensors[key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape), key
        error = (found.float() - value.float()).norm() / value.float().norm().clamp_min(1e-3)
        assert error < LIMIT, f"{key}: {error:.1e}"


@pytest.mark.parametrize(
    "name", ["lolcats", "hedgehog", "liger-gla", "mamba2", "gated-deltanet", "softmax-alone", "softmax-beside"]
)
@torch.no_grad()
def test_tokens_that_go_on_from_a_cache(name: str) -> None:
    """A second prefill, from inside a block: what is held of the last blocks is part of the window."""
    x, caches = tokens(heads=MORE), [LinearStateLayer(), LinearStateLayer()]
    one, other = build(EVERY[name], heads=MORE), build(EVERY[name], "triton", MORE)
    for a, b in ((0, 21), (21, 54)):
        want, got = (run(m, x, a, b, cache=cache) for m, cache in zip((one, other), caches, strict=True))
        assert relative(got, want) < LIMIT
    assert_same_cache(caches[1], caches[0])


@torch.no_grad()
def test_a_delta_rule_behind_the_window_goes_on_in_torch() -> None:
    x, mixer, cache = tokens(), build(OTHERS["gated-delta-lagged"], "triton"), LinearStateLayer()
    want = run(mixer, x)
    first = run(mixer, x, 0, 21, cache=cache)
    with pytest.raises(ValueError, match="goes on from a cache"):
        run(mixer, x, 21, cache=cache)
    mixer.backend = "auto"
    assert relative(torch.cat((first, run(mixer, x, 21, cache=cache)), dim=1), want) < LIMIT


@pytest.mark.parametrize("name", [*SERVED, *OTHERS])
@torch.no_grad()
def test_padded_rows_and_their_cache(name: str) -> None:
    one, other = build(EVERY[name], heads=MORE), build(EVERY[name], "triton", MORE)
    x = tokens(40, batch=3, heads=MORE)
    mask = torch.ones(3, 40)
    mask[1, :7] = 0
    mask[2, 5:] = 0
    layout = padded_layout(mask)
    caches = [LinearStateLayer(), LinearStateLayer()]
    want, got = (run(m, x, layout=layout, cache=c) for m, c in zip((one, other), caches, strict=True))
    assert relative(got, want) < LIMIT
    assert bool((got[1, :7] == 0).all())
    assert_same_cache(caches[1], caches[0])


@pytest.mark.parametrize("name", ["lolcats", "mamba2", "gated-deltanet"])
def test_packed_documents(name: str) -> None:
    positions = torch.cat([torch.arange(n) for n in (34, 1, 19)])[None]
    layout = packed_layout(positions, 1)
    assert_same_gradients(build(RECIPES[name]), build(RECIPES[name], "triton"), tokens(), layout=layout)


@pytest.mark.parametrize(
    "change", [{}, {"state_heads": "query", "own_qk": False}, {"feature_map": "crelu", "normaliser": "norm"}]
)
def test_maps_under_a_decay_stay_inside_the_op(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are not written, also where several states share a key head whose rotation is undone first."""
    monkeypatch.setattr(Tokens, "features", lambda *given: pytest.fail("features were made in torch"))
    spec = replace(RECIPES["pure"], **change)
    assert_same_gradients(build(spec, heads=MORE), build(spec, "triton", MORE), tokens(20, heads=MORE))


def test_what_the_branches_give_is_recorded() -> None:
    found = []
    for backend in ("torch", "triton"):
        mixer = build(RECIPES["pure"], backend)
        mixer.record = True
        run(mixer, tokens())
        found.append((mixer.last_output, mixer.last_linear))
    for want, got in zip(*found, strict=True):
        assert want is not None and got is not None
        assert relative(got, want) < LIMIT


def test_auto_leaves_the_cpu_to_torch() -> None:
    one, other = build(RECIPES["lolcats"]), build(RECIPES["lolcats"], "auto")
    assert torch.equal(run(one, tokens()), run(other, tokens()))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (RECIPES["based"], "taylor"),
        (MixerSpec(**{**EXTRA["shared-scalar-dt"], "window": 16}), "decay"),
        (replace(RECIPES["lolcats"], window=24), "24"),
    ],
)
def test_what_cannot_be_served_is_said(spec: MixerSpec, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot serve this: .*{reason}"):
        run(build(spec, "triton"), tokens())
    assert torch.equal(run(build(spec, "auto"), tokens()), run(build(spec), tokens()))


@pytest.mark.parametrize(
    ("name", "fits"), [("pure", False), ("hybrid", False), ("lolcats", True), ("mamba2", True), ("t2r", False)]
)
def test_float16_serves_where_it_holds_the_features(name: str, fits: bool) -> None:
    """Steep maps give features down to 1e-12, which float16 rounds to nothing, or such as soon add up to its end."""
    exact, mixer = build(RECIPES[name]), build(RECIPES[name], "triton")
    for one in (exact, mixer):
        if RECIPES[name].feature_map in LEARNED_MAPS:
            one.q_map.weight.data *= 12.0
            one.k_map.weight.data *= 12.0
        one.half()
    given = {n: v.half() for n, v in (tokens() | {"v": 30.0 * tokens()["v"].abs()}).items()}
    want = run(exact.double(), {n: v.double() for n, v in given.items()})
    if fits:
        assert relative(run(mixer, given).double(), want) < 1e-3
    else:
        with pytest.raises(ValueError, match=r"cannot serve this: .* leave the range of float16; bfloat16 has it"):
            run(mixer, given)
        mixer.backend = "auto"
        assert relative(run(mixer, given).double(), want) < 1e-3


def test_float16_leaves_to_torch_what_small_features_normalise_and_long_sums() -> None:
    """Of lolcats: the linear branch by itself, as an audit reads it, and more tokens than values of 8 allow."""
    exact, mixer = build(RECIPES["lolcats"]), build(RECIPES["lolcats"], "auto")
    for one in (exact, mixer):
        one.q_map.weight.data *= 12.0
        one.k_map.weight.data *= 12.0
        one.half()
    given = {n: v.half() for n, v in tokens().items()}
    assert unable(mixer, given["q"]) is None
    assert "float16" in str(unable(mixer, given["q"][:, :, :1].expand(-1, -1, 8193, -1)))
    exact.branches = mixer.branches = "linear"
    assert unable(mixer, given["q"].float()) is None
    assert "float16" in str(unable(mixer, given["q"]))
    want = run(exact.double(), {n: v.double() for n, v in given.items()})
    assert relative(run(mixer, given).double(), want) < 1e-3


def test_a_backend_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of auto, torch, triton"):
        run(build(RECIPES["lolcats"], "cuda"), tokens())
