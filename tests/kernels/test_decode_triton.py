"""The decode kernel against the torch step, in the interpreter: every axis of a mixer, 200 tokens, all that is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.layout import Layout, padded_layout
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_decode import step_rule
from linearize.modeling.mixer_spec import LEARNED_MAPS, MixerSpec
from linearize_kernels import decode
from linearize_kernels.decode import MAPS
from tests.specs import all_specs

pytest.importorskip("triton", reason="triton is for Linux alone")
pytestmark = pytest.mark.usefixtures("interpreter")
HIDDEN = 24
BOUNDS = (0.2, 3.0)
"""Of scores of about 1: most are so far beyond the first that tanh is 1; the second bends a few."""
SMALL: dict[str, Any] = {"window": 16, "sinks": 0}
EXTRA: dict[str, dict[str, Any]] = {
    **{f"map-{name}": {"feature_map": name, "normaliser": "none", "mix": "sum", **SMALL} for name in MAPS},
    "delta-lagged-two-sided": {
        "feature_map": "crelu", "feature_dim": 5, "decay": "scalar", "dt_gain": True, "write": "delta",
        "normaliser": "norm", "mix": "sum", "window": 16, "sinks": 3,
    },
    "delta-lagged-plain": {"feature_map": "l2norm", "write": "delta", "normaliser": "none", "mix": "mass", **SMALL},
    "odd-window": {"window": 13, "sinks": 2, "decay": "scalar", "feature_dim": 6},
    "lagged-own-mass": {"normaliser": "own", "mix": "mass", "decay": "channel", "state_heads": "kv", **SMALL},
    "lagged-scale": {"normaliser": "scale", "mix": "gate", "decay": "fixed", **SMALL},
    "key-decay": {"feature_map": "elu", "decay": "key", "rope": False, "normaliser": "own", "window": 0,
                  "coverage": "all", "state_heads": "kv"},
}  # fmt: skip


def small(spec: MixerSpec) -> MixerSpec:
    """The same axes in sizes that the interpreter gets through: it takes milliseconds for every program."""
    window = min(spec.window, 4 if spec.window % 2 == 0 else 5)
    features = 6 if spec.feature_map in LEARNED_MAPS else None
    return replace(spec, window=window, sinks=min(spec.sinks, 6), feature_dim=features)


EVERY = all_specs() | {name: MixerSpec(**axes) for name, axes in EXTRA.items()}
WIDE_SPECS = {
    "pure": (replace(EVERY["pure"], feature_dim=40, window=4), 2, 1),
    "wide-codes": (
        replace(EVERY["pure"], feature_map="learned_softmax", feature_dim=40, own_qk=True, window=4), 4, 2,
    ),
    "wide-crelu": (
        MixerSpec(feature_map="crelu", feature_dim=33, decay="scalar", dt_gain=True, own_qk=True, normaliser="scale",
                  mix="sum", coverage="all", window=4, sinks=2), 2, 1,
    ),
    "wide-fixed": (
        MixerSpec(feature_map="relu", feature_dim=40, decay="fixed", normaliser="own", window=0, coverage="all",
                  mix="sum"), 2, 2,
    ),
}  # fmt: skip
"""Mixers whose features are read in tiles, with query and key heads."""
SPECS = {name: small(spec) for name, spec in EVERY.items() if spec.feature_map in MAPS}


def build(spec: MixerSpec, heads: int, kv_heads: int, width: int) -> Mixer:
    torch.manual_seed(1)
    mixer = Mixer(spec, hidden_size=HIDDEN, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, scaling=width**-0.5)
    for p in mixer.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return mixer


def tokens(length: int, batch: int, heads: int, kv_heads: int, width: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    angle = torch.arange(length)[None, :, None] * (10.0 ** -torch.linspace(0, 3, width // 2)).repeat(2)
    made = {
        # The model's own strides: heads lie inside a token.
        "q": torch.randn(batch, length, heads, width, generator=draw).transpose(1, 2),
        "k": torch.randn(batch, length, kv_heads, width, generator=draw).transpose(1, 2),
        "v": torch.randn(batch, length, kv_heads, width, generator=draw).transpose(1, 2),
        "inputs": torch.randn(batch, length, HIDDEN, generator=draw),
    }
    return made | {"cos": angle.cos(), "sin": angle.sin()}


def run(
    mixer: Mixer, x: dict[str, torch.Tensor], a: int, b: int, cache: LinearStateLayer, layout: Layout | None = None
) -> torch.Tensor:
    return mixer(
        *(x[name][:, :, a:b] for name in "qkv"),
        inputs=x["inputs"][:, a:b],
        rotation=(x["cos"][:, a:b], x["sin"][:, a:b]),
        layout=layout,
        cache=cache,
    )


def kept(cache: LinearStateLayer, window: int) -> dict[str, torch.Tensor]:
    """What a cache keeps; slots of the ring that left the window are nobody's, and the kernel leaves them."""
    found = {name: x.clone() for name, x in cache.tensors.items()}
    after = found["position"][:, None] - 1
    for name in [x for x in found if x.startswith("ring_")]:
        slot = torch.arange(2 * window)
        place = after - (after - slot) % (2 * window)
        live = (place >= 0) & (place >= ((after + 1) // window - 1) * window)
        found[name] = found[name].masked_fill(~live.reshape(len(live), 1, -1, *[1] * (found[name].ndim - 3)), 0.0)
    return found


def assert_close(got: torch.Tensor, want: torch.Tensor, words: str, tolerance: float = 2e-6) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-3)
    assert error < tolerance, f"{words}: {error:.1e}"


def compare(
    mixer: Mixer, x: dict[str, torch.Tensor], prefill: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens of x one by one but those of `prefill`, by torch and by the kernel: outputs, and all that is kept."""
    length, (start, end) = x["q"].shape[2], prefill
    caches = {"torch": LinearStateLayer(), "triton": LinearStateLayer()}
    out: dict[str, list[torch.Tensor]] = {"torch": [], "triton": []}
    for backend, cache in caches.items():
        places = set()
        for a, b in (*((t, t + 1) for t in range(start)), (start, end), *((t, t + 1) for t in range(end, length))):
            monkeypatch.setenv("LINEARIZE_KERNELS", backend if b == a + 1 else "torch")
            out[backend].append(run(mixer, x, a, b, cache))
            places.add(tuple(y.data_ptr() for y in cache.tensors.values()))
        assert len(places) == 1, "addresses changed"
    assert_close(torch.cat(out["triton"], 1), torch.cat(out["torch"], 1), "output")
    one, other = (kept(caches[b], mixer.spec.window) for b in ("triton", "torch"))
    assert one.keys() == other.keys()
    for key in one:
        assert_close(one[key], other[key], key)


COVERED = ("hedgehog", "hybrid", "lolcats-hybrid", "shared-fixed-wide-sinks", "window-alone", "key-decay",
           "map-softmax", "map-hedgehog_softmax", "map-hedgehog_exp", "map-learned_softmax", "map-relu",
           "map-elu")  # fmt: skip
"""Mixers whose axes, and pairs of axes that meet in the kernel, all are in others: for a patient run."""


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in COVERED)) for x in SPECS])
@torch.no_grad()
def test_steps_are_the_torch_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing, then a prefill, then on past the end of several blocks."""
    spec = SPECS[name]
    window = spec.window or 4
    length = 3 * window + 2
    mixer, x = build(spec, 2, 1, 8), tokens(length, 1, 2, 1, 8)
    compare(mixer, x, (window + 1, 2 * window - 2), monkeypatch)


@pytest.mark.parametrize(
    ("name", "batch", "bound"),
    [("pure", 2, None), ("pure", 5, None), ("pure", 2, BOUNDS[0]), ("wide-codes", 2, None), ("wide-codes", 5, None),
     ("wide-crelu", 2, None), ("wide-fixed", 5, None)],
)  # fmt: skip
@torch.no_grad()
def test_wide_maps(name: str, batch: int, bound: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features in three tiles, the last cut off; few sequences, and more; one query head a state, or two."""
    spec, heads, kv_heads = WIDE_SPECS[name]
    monkeypatch.setattr(decode, "WIDE", 32)
    mixer, x = build(spec, heads, kv_heads, 12), tokens(7, batch, heads, kv_heads, 12)
    mixer.softcap = bound
    rule = step_rule(mixer.spec, mixer.head_dim, mixer.state_heads, mixer.scaling, True)
    assert decode.wide(rule)
    compare(mixer, x, (2, 4), monkeypatch)


@pytest.mark.parametrize(
    ("changes", "turned", "inside"),
    [
        ({"feature_dim": 6}, 12, True),  # a map that is read at once
        ({"state_heads": "query"}, 12, True),  # two states a key head
        ({}, 4, False),  # RoPE on a part of the head
        ({"rope": True}, 12, False),  # what a projection makes has to be rotated, too
    ],
)
@torch.no_grad()
def test_own_projections(changes: dict[str, Any], turned: int, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a launch of their own, where the kernel can undo the rotation; else in torch."""
    from linearize_kernels import decode_triton

    made = []
    own_heads = decode_triton.own_heads
    monkeypatch.setattr(
        decode_triton, "own_heads", lambda *given, **sizes: made.append(1) or own_heads(*given, **sizes)
    )
    monkeypatch.setattr(decode, "WIDE", 32)
    mixer, x = build(replace(WIDE_SPECS["wide-codes"][0], **changes), 4, 2, 12), tokens(5, 2, 4, 2, 12)
    x |= {name: x[name][..., : turned // 2].repeat(1, 1, 2) for name in ("cos", "sin")}
    compare(mixer, x, (1, 3), monkeypatch)
    assert len(made) == (3 if inside else 0)  # one a step


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    "name", ["lolcats", "pure", "softmax-window-sinks", "window-alone", "gated-delta-lagged", "lagged-own-mass"]
)
@torch.no_grad()
def test_bounded_scores(name: str, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the window, of sinks and of the token itself, in one launch."""
    spec = SPECS[name]
    mixer, x = build(spec, 2, 1, 8), tokens(3 * spec.window + 2, 1, 2, 1, 8)
    mixer.softcap = bound
    compare(mixer, x, (spec.window + 1, 2 * spec.window - 2), monkeypatch)


def test_a_bound_is_more_than_zero() -> None:
    rule = step_rule(SPECS["lolcats"], 8, 1, 0.3, True)
    assert decode.unable(replace(rule, softcap=0.5), 8) is None
    assert "bounded by more than 0, not by 0.0" in str(decode.unable(replace(rule, softcap=0.0), 8))


@pytest.mark.parametrize("bound", [None, BOUNDS[0]])
@pytest.mark.parametrize(
    ("changes", "heads", "kv_heads", "width"),
    [({}, 4, 2, 12), ({"feature_map": "elu", "feature_dim": None, "window": 5}, 3, 1, 6),
     ({"feature_map": "hedgehog_exp", "feature_dim": 20, "window": 17}, 1, 1, 16)],
)  # fmt: skip
@torch.no_grad()
def test_split_steps(
    changes: dict[str, Any],
    heads: int,
    kv_heads: int,
    width: int,
    bound: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences that have read different numbers of tokens, through the two launches that a batch takes."""
    spec = replace(SPECS["lolcats"], **changes)
    length = 3 * spec.window + 1
    mixer, x = build(spec, heads, kv_heads, width), tokens(length, 2, heads, kv_heads, width)
    mixer.softcap = bound
    from linearize_kernels.decode_triton import split_constants

    rule = step_rule(mixer.spec, width, mixer.state_heads, mixer.scaling, True, bound)
    sizes: dict[str, Any] = {"head_dim": width, "heads": heads, "kv_heads": kv_heads, "card": 0, "dtype": torch.float32}
    assert split_constants(rule, batch=2, **sizes) is not None
    assert split_constants(rule, batch=1, **sizes) is None
    ahead = 2 * spec.window - 2
    real = torch.ones(2, ahead, dtype=torch.bool)
    real[0, : spec.window] = False
    caches = {"torch": LinearStateLayer(), "triton": LinearStateLayer()}
    out: dict[str, list[torch.Tensor]] = {"torch": [], "triton": []}
    for backend, cache in caches.items():
        monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
        run(mixer, x, 0, ahead, cache, padded_layout(real))
        assert cache.tensors["position"].tolist() == [ahead - spec.window, ahead]
        monkeypatch.setenv("LINEARIZE_KERNELS", backend)
        out[backend] = [run(mixer, x, t, t + 1, cache) for t in range(ahead, length)]
    assert_close(torch.cat(out["triton"], 1), torch.cat(out["torch"], 1), "output")
    one, other = (kept(caches[b], spec.window) for b in ("triton", "torch"))
    for key in one:
        assert_close(one[key], other[key], key)


def test_the_widest_map() -> None:
    """A map of 1024 features a sign is read in tiles; one whose features depend on each other cannot be."""
    rule = step_rule(EVERY["pure"], 128, 8, 0.1, True)
    assert decode.unable(replace(rule, width=1024), 128) is None
    assert decode.unable(replace(rule, width=2048, feature_map="learned_softmax", unrotate=False), 128) is None
    for other in ({"feature_map": "hedgehog_softmax"}, {"lagged": True}, {"write": "delta"}, {"decay": "channel"}):
        assert "512 features" in str(decode.unable(replace(rule, width=1024, **other), 128))


@pytest.mark.slow
@torch.no_grad()
def test_two_hundred_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build(replace(EVERY["lolcats"], window=16, feature_dim=16), 1, 1, 16), tokens(200, 1, 1, 1, 16)
    compare(mixer, x, (1, 3), monkeypatch)


@pytest.mark.parametrize("name", ["gated-delta-lagged", "softmax-window-sinks"])
@pytest.mark.parametrize("shape", [(4, 2, 24), (3, 3, 6), (4, 1, 16)])
@torch.no_grad()
def test_odd_heads(name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are no power of two, all ratios of query to key heads, tiles of value channels."""
    heads, kv_heads, width = shape
    spec = SPECS[name]
    mixer, x = build(spec, heads, kv_heads, width), tokens(2 * spec.window + 2, 1, heads, kv_heads, width)
    compare(mixer, x, (2, 2 * spec.window - 3), monkeypatch)
