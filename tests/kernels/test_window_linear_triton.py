"""Window + linear attention: the torch reference against the definition, the kernels against it, gradients too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux alone")

from linearize_kernels import block_window_mask, linear_weights, window_weights
from linearize_kernels.window_linear import apply_map, window_linear

DOUBLE = torch.float64
interpreted = pytest.mark.usefixtures("interpreter")


def tensors(
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    length: int = 50,
    size: int = 16,
    width: int = 16,
    map: str = "hedgehog_softmax",
    mix: str = "shared",
    shared_state: bool = False,
    spread: float = 1.5,
) -> dict[str, torch.Tensor]:
    """Inputs in float64; q, k and v as views of [B, T, H, D], as a model gives them. shared_state: per key head."""
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=DOUBLE)

    many, few = heads
    states = few if shared_state else many
    made = {name: spread * normal(batch, length, n, size).transpose(1, 2) for name, n in zip("qkv", (many, few, few))}
    if map in ("hedgehog_softmax", "hedgehog_exp", "relu"):
        made |= {"q_weight": 0.4 * normal(many, size, width), "k_weight": 0.4 * normal(states, size, width)}
        if map != "hedgehog_softmax":
            made |= {"q_bias": 0.3 * normal(many, width), "k_bias": 0.3 * normal(states, width)}
    if map == "precomputed":
        made |= {"fq": normal(batch, many, length, width).abs(), "fk": normal(batch, states, length, width).abs()}
    if mix == "shared":
        made["gamma"] = 0.1 + 0.8 * torch.rand(many, generator=draw, dtype=DOUBLE)
    elif mix == "gate":
        made["gate"] = torch.rand(batch, length, many, generator=draw, dtype=DOUBLE).transpose(1, 2)
    elif mix == "mass":
        made["mass"] = normal(batch, many, length) + 3
    return made


def results(x: dict[str, torch.Tensor], backend: str, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    """Output, final state and the gradients of a random sum of the output."""
    leaves = {name: y.to(dtype).detach().requires_grad_() for name, y in x.items()}
    if "state" in options:
        options["state"] = options["state"].to(dtype)
    out, final = window_linear(**leaves, scale=0.3, return_state=True, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(dtype)
    wanted = {name: y for name, y in leaves.items() if options.get("train") != "maps" or name not in "qkv"}
    grads = torch.autograd.grad((out * weight).sum(), list(wanted.values()))
    return {"out": out.detach(), "state": final} | {f"d {name}": y for name, y in zip(wanted, grads)}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative; what should be zero is held against a tenth of the inputs' size."""
    scale = max(float(want.norm()), 0.1 * want.numel() ** 0.5)
    return float((got.double() - want).norm()) / scale


def compare(x: dict[str, torch.Tensor], tolerance: float = 5e-6, **options: Any) -> None:
    want = results(x, "torch", DOUBLE, **options)
    got = results(x, "triton", torch.float32, **options)
    found = {name: distance(got[name], want[name]) for name in want}
    assert all(y <= tolerance for y in found.values()), found


@pytest.mark.parametrize(
    ("mix", "coverage"),
    [("shared", "outside"), *((mix, coverage) for mix in ("gate", "mass", "sum") for coverage in ("outside", "all"))],
)
@pytest.mark.parametrize("softcap", [None, 0.6])
def test_the_reference_is_the_definition(mix: str, coverage: str, softcap: float | None) -> None:
    """Every weight of every pair, written out, for odd lengths."""
    for length in (1, 15, 16, 33, 70):
        x = tensors(heads=(4, 2), length=length, mix=mix)
        options: dict[str, Any] = {"window": 16, "mix": mix, "coverage": coverage, "sinks": 3, "window_weight": 0.3}
        got = window_linear(**x, scale=0.3, softcap=softcap, backend="torch", **options)
        seen, grouped = block_window_mask(length, 16, 3), x["q"].unflatten(1, (2, -1))
        found = window_weights(grouped, x["k"], scale=0.3, seen=seen, softcap=softcap)
        near, largest = (y.flatten(1, 2) for y in found)
        fq = apply_map(x["q"], "hedgehog_softmax", x["q_weight"], None)
        fk = apply_map(x["k"].repeat_interleave(2, dim=1), "hedgehog_softmax", x["k_weight"], None)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        covered = causal & ~seen if coverage == "outside" else causal
        far = linear_weights(fq.unsqueeze(2), fk, covered=covered).flatten(1, 2)
        mass = near.sum(-1, keepdim=True)
        if mix == "shared":
            weights = x["gamma"][:, None, None] * near + far
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            part = 0.3
            if mix == "gate":
                part = x["gate"][..., None]
            elif mix == "mass":
                part = torch.sigmoid(mass.log() + largest - x["mass"][..., None])
            weights = part * near / mass + (1 - part) * far / far.sum(-1, keepdim=True).clamp_min(1e-30)
        torch.testing.assert_close(got, weights @ x["v"].repeat_interleave(2, dim=1), rtol=1e-9, atol=1e-9)


@interpreted
@pytest.mark.parametrize(
    "heads,length,more",
    [
        ((2, 2), 1, {}),
        ((2, 1), 16, {}),
        ((3, 1), 50, {"size": 24}),
        ((4, 2), 35, {"shared_state": True}),
        ((4, 2), 96, {}),
        ((1, 1), 97, {"batch": 2, "width": 20}),
    ],
)
def test_shared_mix(heads: tuple[int, int], length: int, more: dict[str, Any]) -> None:
    """LoLCATs, in odd sizes and in whole blocks; 97 tokens are enough for the scan to be cut into segments."""
    compare(tensors(heads=heads, length=length, **more), window=16)


@interpreted
@pytest.mark.parametrize("mix", ["shared", "gate", "mass"])
def test_alignment_alone(mix: str) -> None:
    """Gradients of maps, gamma, gates and masses; and none of q, k and v."""
    x = tensors(length=53, mix=mix)
    compare(x, window=16, mix=mix, train="maps")
    leaves = {name: y.float().requires_grad_() for name, y in x.items()}
    out = window_linear(**leaves, scale=0.3, window=16, mix=mix, train="maps", backend="triton")
    out.sum().backward()
    assert all((leaves[name].grad is None) == (name in "qkv") for name in leaves)


@interpreted
@pytest.mark.parametrize(
    "map,mix,more,options",
    [
        ("hedgehog_exp", "shared", {"width": 20}, {}),
        ("relu", "gate", {}, {}),
        ("softmax", "mass", {}, {}),
        ("hedgehog_softmax", "mass", {"length": 48}, {}),
        ("precomputed", "shared", {"width": 20}, {}),
        ("hedgehog_softmax", "sum", {}, {"normaliser": "none", "window_weight": 0.3}),
        ("hedgehog_softmax", "gate", {"shared_state": True, "heads": (4, 2)}, {"coverage": "all"}),
        ("precomputed", "gate", {"width": 150}, {"coverage": "all"}),
        ("relu", "none", {"length": 100}, {"window": 0}),
        ("hedgehog_exp", "none", {"length": 100, "shared_state": True}, {"window": 0, "train": "maps"}),
        ("softmax", "none", {"length": 70}, {"window": 0, "normaliser": "none"}),
    ],
)
def test_maps_and_mixes(map: str, mix: str, more: dict[str, Any], options: dict[str, Any]) -> None:
    options = {"window": 16, "mix": "sum" if mix == "none" else mix, "map": map} | options
    compare(tensors(map=map, mix=mix, **more), **options)


@interpreted
@pytest.mark.parametrize("mix,coverage,sinks", [("shared", "outside", 3), ("mass", "outside", 16), ("gate", "all", 5)])
def test_sinks(mix: str, coverage: str, sinks: int) -> None:
    compare(tensors(length=66, mix=mix), window=16, mix=mix, coverage=coverage, sinks=sinks)


@interpreted
def test_padding_packing_and_an_initial_state() -> None:
    """Each sequence as if alone; padding gives zeros."""
    draw = torch.Generator().manual_seed(5)
    first = torch.rand(2, 2, 32, 17, generator=draw, dtype=DOUBLE)
    padded = tensors(batch=2, length=50)
    compare(padded, window=16, starts=torch.tensor([13, 0]), sinks=2, state=first)
    out = window_linear(
        **{name: y.float() for name, y in padded.items()}, scale=0.3, window=16, starts=torch.tensor([13, 0]),
        backend="triton",
    )  # fmt: skip
    assert out[0, :, :13].abs().max() == 0 and out[0, :, 13:].abs().min() > 0
    compare(tensors(length=60, mix="mass"), window=16, mix="mass", cu_seqlens=torch.tensor([0, 20, 21, 60]), sinks=2)
    compare(tensors(length=48), window=16, cu_seqlens=torch.tensor([0, 40, 48]), state=first)


@interpreted
@pytest.mark.parametrize("coverage", ["outside", "all"])
def test_segments(coverage: str) -> None:
    """Sequences that are cut, one of them shorter than a segment, with a state before the first token; lag 1 and 2."""
    draw = torch.Generator().manual_seed(6)
    first = torch.rand(3, 2, 32, 17, generator=draw, dtype=DOUBLE)
    options: dict[str, Any] = {"window": 16, "mix": "mass", "coverage": coverage, "state": first}
    compare(tensors(length=190, mix="mass"), cu_seqlens=torch.tensor([0, 150, 161, 190]), **options)
    compare(tensors(batch=3, length=150, mix="mass"), starts=torch.tensor([100, 0, 21]), sinks=2, **options)


@interpreted
@pytest.mark.parametrize(
    "softcap,mix,more,options",
    [
        (3.0, "shared", {"heads": (4, 2), "length": 50}, {}),
        (0.5, "shared", {"length": 66, "spread": 4.0}, {"sinks": 3}),
        (50.0, "shared", {"length": 70, "size": 24}, {"window": 32}),
        (0.5, "mass", {"length": 66}, {"sinks": 16}),
        (3.0, "gate", {"length": 48, "heads": (3, 1)}, {"coverage": "all", "sinks": 5}),
        (2.0, "sum", {"length": 35, "heads": (4, 2), "shared_state": True}, {"window_weight": 0.3}),
        (2.0, "shared", {"length": 53}, {"train": "maps"}),
        (1.0, "shared", {"length": 150, "heads": (2, 1)}, {"window": 64, "sinks": 2}),
    ],
)
def test_bounded_scores(softcap: float, mix: str, more: dict[str, Any], options: dict[str, Any]) -> None:
    """Far below the bound, about it, and so far beyond that slopes are nearly zero."""
    compare(tensors(mix=mix, **more), **({"window": 16, "mix": mix, "softcap": softcap} | options))


@interpreted
def test_bounded_scores_of_packed_and_padded_rows() -> None:
    draw = torch.Generator().manual_seed(5)
    first = torch.rand(2, 2, 32, 17, generator=draw, dtype=DOUBLE)
    options: dict[str, Any] = {"window": 16, "softcap": 1.0, "sinks": 2}
    compare(tensors(batch=2, length=50), starts=torch.tensor([13, 0]), state=first, **options)
    packed = torch.tensor([0, 20, 21, 60])
    compare(tensors(length=60, mix="mass"), mix="mass", cu_seqlens=packed, **options)


@interpreted
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_bound_changes_the_output_where_there_is_a_window(backend: str) -> None:
    """And none is read where there is not: no kernel is compiled for it."""
    x = {name: y.float() for name, y in tensors(length=20).items()}
    options: dict[str, Any] = {"scale": 0.3, "backend": backend}
    plain, bound = (window_linear(**x, window=16, softcap=cap, **options) for cap in (None, 0.5))
    assert float((plain - bound).norm()) > 1e-2 * float(plain.norm())
    apart = [window_linear(**x, window=0, softcap=cap, **options) for cap in (None, 0.5)]
    assert torch.equal(*apart)


@interpreted
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_bound_is_a_constant_of_its_kernels(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In base 2, as scores are; 0.0 where there is none, for which the compiler leaves all of it out."""
    from linearize_kernels import window_linear_backward, window_linear_launch

    made: dict[str, float] = {}

    def watched(found: Any, kernel: Any, programs: Any, given: Any, constants: dict[str, Any], tag: str = "") -> None:
        if "BOUND" in constants:
            made[kernel.fn.__name__] = constants["BOUND"]
        start(found, kernel, programs, given, constants, tag)

    start = window_linear_launch.start
    monkeypatch.setattr(window_linear_launch, "start", watched)
    monkeypatch.setattr(window_linear_backward, "start", watched)
    results(tensors(length=40), "triton", torch.float32, window=16, sinks=2, softcap=softcap)
    names = ("read_kernel", "query_pairs_kernel", "key_pairs_kernel", "sink_pairs_kernel")
    assert made == dict.fromkeys(names, 0.0 if softcap is None else pytest.approx(2.0 / math.log(2.0)))


@interpreted
def test_equal_and_large_scores() -> None:
    """Of equal largest scores one gets the gradient, which leaves dq and the sum over the keys as they are."""
    x = tensors(length=40, spread=1.0)
    x["k"] = x["k"][:, :, :1].expand_as(x["k"]).clone()
    want = results(x, "torch", DOUBLE, window=16)
    got = results(x, "triton", torch.float32, window=16)
    assert distance(got["d q"], want["d q"]) < 5e-6
    difference = (got["d k"].double() - want["d k"]).sum(2)  # large terms cancel in the sum
    assert float(difference.norm()) < 5e-6 * float(want["d k"].norm())
    compare(tensors(length=40, spread=5.0), tolerance=5e-5, window=16)


@interpreted
def test_the_op_keeps_its_promises_to_the_compiler() -> None:
    """Schema, shapes of the fake tensors, and a backward that autograd finds."""
    from linearize_kernels.window_linear_ops import window_linear_op

    x = {name: y.float().requires_grad_() for name, y in tensors(length=18).items()}
    arguments = (
        x["q"], x["k"], x["v"], x["q_weight"], x["k_weight"], None, None, None, None, x["gamma"],
        None, None, None, None, None, 2, "hedgehog_softmax", 16, 2, "shared", True, 0.3, 0.5, 0,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for softcap, keep, maps_only in ((None, False, False), (None, True, False), (2.0, False, False), (2.0, True, True)):
        torch.library.opcheck(window_linear_op, (*arguments, softcap, True, keep, maps_only), test_utils=checks)


def test_what_it_refuses() -> None:
    x = tensors(length=20)
    for change, words in (
        ({"map": "cosine"}, "cosine"),
        ({"k": x["k"].repeat_interleave(2, dim=1)}, "belong together"),
        ({"gamma": None}, "gamma"),
        ({"coverage": "all"}, "outside"),
        ({"q_weight": None}, "q_weight"),
        ({"window": 24, "backend": "triton"}, "24"),
        ({"sinks": 17, "backend": "triton"}, "17"),
        ({"scale": -0.3, "backend": "triton"}, "-0.3"),
        ({"softcap": 0.0, "backend": "triton"}, "bounded by more than 0"),
    ):
        with pytest.raises(ValueError, match=words):
            window_linear(**({**x, "window": 16, "scale": 0.3} | change))
