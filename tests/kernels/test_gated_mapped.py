"""Feature maps inside the kernels of gated linear attention, in the interpreter, against features made in torch."""

from __future__ import annotations

import pytest
import torch

from linearize.modeling.feature_maps import ACTIVATIONS, BIASED
from linearize_kernels.gated_mapped import MAPS, map_features, mapped_gated_linear

BOUND = 1e-5
"""Relative to the norm of what is compared."""


def made(
    name: str,
    *,
    batch=1,
    heads=(2, 2, 1),
    length=21,
    size=12,
    values=20,
    width=24,
    decay="scalar",
    norm=False,
    steep=1.0,
):
    """Inputs in float64: heads are query, state and key-value heads."""
    draw = torch.Generator().manual_seed(length + width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    queries, states, kv = heads
    g = {"none": None, "fixed": -0.3 * normal(states).abs(), "scalar": -0.3 * normal(batch, states, length).exp()}
    signs = 2 if name in ("hedgehog_exp", "hedgehog_softmax", "crelu") else 1
    biased = name in BIASED
    return {
        "q": normal(batch, queries, length, size),
        "k": normal(batch, kv, length, size),
        "v": normal(batch, kv, length, values),
        "log_decay": g[decay],
        "q_weight": normal(queries, size, width) * size**-0.5 * steep,
        "q_bias": normal(queries, width) * 0.3 if biased else None,
        "k_weight": normal(states, size, width) * size**-0.5,
        "k_bias": normal(states, width) * 0.3 if biased else None,
        "state": normal(batch, states, signs * width, values + norm).abs(),
    }


def compare(x: dict, **options) -> None:
    found = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton")):
        own = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in x.items()}
        out, last = mapped_gated_linear(**own, return_state=True, backend=backend, **options)
        leaves = {name: t for name, t in own.items() if t is not None}
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(dtype) for t in (out, last)]
        loss = (out * weights[0]).sum() + 0.1 * (last * weights[1]).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found.append({"out": out, "last": last} | {f"d{n}": t for n, t in zip(leaves, gradients)})
    for name, right in found[0].items():
        got = found[1][name].detach().double()
        error = float((got - right.detach()).norm() / right.detach().norm())
        assert error < BOUND, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("name", MAPS)
def test_the_maps_are_those_of_the_mixer(name: str) -> None:
    x = made(name)
    y = torch.einsum("bhtd,hdf->bhtf", 9 * x["q"], x["q_weight"])
    want = ACTIVATIONS[name](y if x["q_bias"] is None else y + x["q_bias"][:, None])
    torch.testing.assert_close(map_features(9 * x["q"], x["q_weight"], x["q_bias"], name), want)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", MAPS)
def test_kernels_are_the_definition(name: str) -> None:
    """Odd sizes, state heads that share keys, and (where denominators keep away from zero) a normaliser."""
    normaliser = "none" if name == "linear" else "own"
    compare(made(name, norm=normaliser == "own"), map=name, normaliser=normaliser, scale=0.7)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["hedgehog_exp", "hedgehog_softmax", "learned_softmax"])
def test_query_heads_share_a_state_and_features_take_several_tiles(name: str) -> None:
    compare(made(name, heads=(2, 1, 1), batch=2, length=17, width=80, decay="fixed"), map=name)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("held", "slices"), [(1, [(1, 1)] * 4), (3 << 14, [(1, 2)] * 2), (1 << 30, [(2, 2)])])
def test_slices_are_parts_of_one_call(held: int, slices: list[tuple[int, int]], monkeypatch) -> None:
    """Key-value heads one by one, rows of the batch one by one, and all at once."""
    from linearize_kernels import gated_map_slices

    seen = []
    found = gated_map_slices.sliced

    def sliced(*known, **options):
        parts = found(*known, **options)
        seen.append([(plan.batch, plan.kv_heads) for plan, _ in parts])
        return parts

    monkeypatch.setattr(gated_map_slices, "gated_map_slice", lambda capability: held)
    monkeypatch.setattr(gated_map_slices, "sliced", sliced)
    x = made("hedgehog_exp", heads=(4, 2, 2), batch=2, length=18, size=8, values=8, width=16, norm=True)
    compare(x, normaliser="own")
    assert seen[-1] == slices


@pytest.mark.usefixtures("interpreter")
def test_a_scan_in_segments_is_one_scan(monkeypatch) -> None:
    from linearize_kernels import gated_map_scan_triton as scans

    monkeypatch.setattr(scans, "WORTHWHILE", 2)
    monkeypatch.setattr(scans, "LEAST_SEGMENT", 1)
    grids = []
    kernel = scans.map_scan_kernel

    class Seen:
        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid[1])
            return kernel[grid]

    monkeypatch.setattr(scans, "map_scan_kernel", Seen())
    compare(made("hedgehog_exp", heads=(2, 1, 1), length=40, norm=True), normaliser="own")
    assert grids == [2, 3] * 3  # all but the last segment, then all: forwards, again, and backwards


@pytest.mark.usefixtures("interpreter")
def test_exponents_stop_at_their_limit() -> None:
    """Beyond it features are constant, and their gradient is nothing."""
    compare(made("hedgehog_exp", heads=(1, 1, 1), norm=True, steep=9.0), normaliser="own")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["hedgehog_softmax", "learned_softmax"])
def test_features_at_their_floor_have_no_slope(name: str) -> None:
    """A query whose codes are those of no key reads all keys by their floors: a gradient of a feature is then huge."""
    x = made(name, heads=(2, 1, 1), length=6, width=32, norm=True, steep=3.0) | {"state": None}
    place = torch.arange(32)
    x["q_bias"] = torch.where(place < 16, 25.0, 0.0).double().expand(2, -1).clone()
    x["k_bias"] = torch.where(place < 16, 0.0, 25.0).double().expand(1, -1).clone()
    for of in ("q", "k"):
        found = map_features(x[of], x[f"{of}_weight"], x[f"{of}_bias"], name)
        assert ((found > 1e-12) & (found < 1e-9)).any() and (found == 1e-12).any()
        assert not ((found > 1e-12) & (found < 1.02e-12)).any()  # which count as at the floor, as bfloat16 rounds them
    compare(x, map=name, normaliser="own")


@pytest.mark.usefixtures("interpreter")
def test_rows_beside_such_queries_are_spared_a_sum() -> None:
    """Denominators are near floors in the first chunk alone, so that later ones take the sums that are known."""
    x = made("learned_softmax", heads=(2, 1, 1), length=37, width=32, norm=True) | {"state": None}
    side = torch.where(torch.arange(32) < 16, 1.0, -1.0).double()
    for of, sign in (("q", 1.0), ("k", -1.0)):
        x[f"{of}_weight"][:, 0] = 14.0 * side
        x[of][..., 0] = torch.where(torch.arange(37) < 16, sign, x[of][..., 0].sign() * 0.05)
    fq, fk = (map_features(x[n], x[f"{n}_weight"], x[f"{n}_bias"], "learned_softmax") for n in ("q", "k"))
    den = torch.einsum("bhif,bhjf,ij->bhi", fq, fk.expand(-1, 2, -1, -1), torch.ones(37, 37).double().tril())
    assert (den[..., :16] < 1e-6).all() and (den[..., 20:] > 1e-2).all()
    compare(x, map="learned_softmax", normaliser="own")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["learned_softmax", "relu"])
def test_the_op_is_what_it_says(name: str, dtype: torch.dtype) -> None:
    """Schema, fake outputs and autograd, with what a softmax keeps for its gradients and without."""
    from linearize_kernels.gated_map_triton import mapped_gated_linear_op

    x = made(name, length=5, heads=(2, 1, 1), size=8, values=8, width=16, norm=True)
    wide = ("log_decay", "q_bias", "k_bias", "state")
    given = [None if t is None else t.to(torch.float32 if n in wide else dtype) for n, t in x.items()]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(mapped_gated_linear_op, (*given, None, name, 1.0, True, True, True), test_utils=tests)


@pytest.mark.usefixtures("interpreter")
def test_what_rounding_takes_off_is_kept_for_training() -> None:
    from linearize_kernels.gated_map_triton import mapped_gated_linear_op

    x = {name: None if t is None else t.float() for name, t in made("learned_softmax", norm=True).items()}
    x |= {name: x[name].half() for name in ("q", "k", "v", "q_weight", "k_weight")}
    given = [*(x[name] for name in list(x)), None, "learned_softmax", 1.0, True, False]
    out, *_, rest = mapped_gated_linear_op(*given, True)
    assert rest.stride() == out.stride() and rest.dtype == out.dtype and rest.any()
    assert torch.equal((out.float() + rest.float()).half(), out)
    assert mapped_gated_linear_op(*given, False)[-1].numel() == 0


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["hedgehog_exp", "learned_softmax"])
def test_packed_sequences_are_each_alone(name: str) -> None:
    x = made(name, length=33, norm=True)
    x["state"] = x["state"].expand(3, -1, -1, -1) * torch.arange(1, 4)[:, None, None, None]
    compare(x, map=name, normaliser="own", cu_seqlens=torch.tensor([0, 18, 18, 33]))


def test_other_decays_and_lags_are_served_from_features() -> None:
    x = {name: None if t is None else t.float() for name, t in made("relu", decay="none").items()}
    features = [map_features(x[n], x[f"{n}_weight"], x[f"{n}_bias"], "relu") for n in ("q", "k")]
    from linearize_kernels.gated import gated_linear

    want = gated_linear(*features, x["v"], state=x["state"], lag=True, chunk=16)
    torch.testing.assert_close(mapped_gated_linear(**x, map="relu", lag=True, chunk=16), want)


@pytest.mark.parametrize("name", ["hedgehog_exp", "hedgehog_softmax", "learned_softmax"])
def test_features_that_float16_cannot_hold_are_refused(name: str) -> None:
    x = {n: None if t is None else t.half() for n, t in made(name).items()}
    with pytest.raises(ValueError, match="is beyond float16; use bfloat16"):
        mapped_gated_linear(**x, map=name, backend="triton")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "normaliser"), [("crelu", "none"), ("relu", "own")])
def test_products_of_features_may_leave_float16(name: str, normaliser: str) -> None:
    x = made(name, heads=(2, 2, 2), norm=True, steep=100.0) | {"state": None}
    x["k_weight"] = 100.0 * x["k_weight"]
    x = {n: None if t is None else t.float() if n == "log_decay" else t.half() for n, t in x.items()}
    wide = {n: None if t is None else t.double() for n, t in x.items()}
    features = [map_features(wide[n], wide[f"{n}_weight"], wide[f"{n}_bias"], name) for n in ("q", "k")]
    assert torch.einsum("bhtf,bhtf->bht", *features).max() > 65504
    options = {"map": name, "normaliser": normaliser, "scale": 1e-3}
    got = mapped_gated_linear(**x, **options, backend="triton").double()
    want = mapped_gated_linear(**wide, **options, backend="torch")
    assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map": "taylor"}, "map 'taylor'"),
        ({"q_bias": None}, "both have a bias"),
        ({"k_weight": torch.zeros(2, 13, 24)}, "does not map"),
        ({"lag": True, "backend": "triton"}, "features that are given"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    x = {name: t.float() for name, t in made("hedgehog_exp").items()}
    with pytest.raises(ValueError, match=message):
        mapped_gated_linear(**(x | change))


@pytest.mark.usefixtures("interpreter")
def test_a_slice_is_known_by_all_that_decides_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices have sizes and places of their own, and machine code may rest on either."""
    from linearize_kernels import gated_map_slices as slices

    asked: list[tuple[object, list[int]]] = []

    def found_for(sizes: object, *given: torch.Tensor | None) -> None:
        hash(sizes)
        asked.append((sizes, [0 if y is None else y.data_ptr() for y in given]))

    monkeypatch.setattr(slices, "found_for", found_for)
    monkeypatch.setattr(slices, "gated_map_slice", lambda capability: 1)
    compare(made("hedgehog_exp", batch=2, heads=(4, 2, 2), norm=True), normaliser="own")
    forward, backward = asked[:4], asked[4:]  # each row of the batch, each key-value head
    assert len(backward) == 4
    for calls in (forward, backward):
        assert len({sizes for sizes, _ in calls}) == 1
        for places in list(zip(*(found for _, found in calls), strict=True))[:3]:  # queries, keys and values
            assert len(set(places)) == 4
