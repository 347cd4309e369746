"""The fused kernels of gated linear attention in Triton's interpreter (float32) against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from linearize_kernels.gated import gated_linear

pytest.importorskip("triton", reason="triton is for Linux alone")
pytestmark = pytest.mark.usefixtures("interpreter")

DECAYS = ("none", "fixed", "scalar", "channel")
BOUND = 1e-5
"""Relative to the norm of what is compared."""
STRONG = 20.0
"""Forgets e^-20 at every token."""


def made(
    decay: str,
    *,
    batch=1,
    heads=(2, 2, 2),
    length=37,
    features=16,
    values=16,
    norm=False,
    strength=None,
    sequences=None,
) -> dict[str, torch.Tensor | None]:
    """Inputs in float64: heads are query, state and value heads; a strength makes all log decays alike."""
    draw = torch.Generator().manual_seed(length + features)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    queries, states, kv = heads
    shape = {"none": None, "fixed": (states,), "scalar": (batch, states, length)}
    g_shape = shape.get(decay, (batch, states, length, features))
    q, k = normal(batch, queries, length, features), normal(batch, states, length, features) * features**-0.5
    if norm:  # as features of a kernel are, so that no denominator comes near zero
        q, k = q.abs() + 0.1, k.abs() + 0.1
    g = None if g_shape is None else -0.2 * normal(*g_shape).exp()
    return {
        "q": q,
        "k": k,
        "v": normal(batch, kv, length, values),
        "log_decay": g if strength is None or g is None else torch.full_like(g, -strength),
        "state": normal(sequences or batch, states, features, values + norm).abs(),
    }


def compare(x: dict[str, torch.Tensor | None], *, bound: float = BOUND, **options) -> None:
    """Output, last state and all gradients, Triton in float32 against torch in float64."""
    found = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton")):
        own = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in x.items()}
        out, last = gated_linear(**own, return_state=True, backend=backend, **options)
        leaves = {name: t for name, t in own.items() if t is not None}
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(dtype) for t in (out, last)]
        loss = (out * weights[0]).sum() + (last * weights[1]).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found.append({"out": out, "last": last} | {f"d{n}": t for n, t in zip(leaves, gradients)})
    for name, right in found[0].items():
        got = found[1][name]
        assert got.dtype == torch.float32 and got.shape == right.shape
        error = float((got.detach().double() - right.detach()).norm() / right.norm().clamp_min(1e-300))
        assert error < bound, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("normaliser", ["none", "own"])
@pytest.mark.parametrize("decay", DECAYS)
def test_kernels_are_the_definition(decay: str, normaliser: str) -> None:
    """Features and values that are no power of two, heads that share states and values, a ragged last chunk."""
    x = made(decay, heads=(4, 2, 1), features=24, values=20, norm=normaliser == "own")
    compare(x, normaliser=normaliser, scale=0.7)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("length", [1, 16, 33])
def test_lengths_at_the_edges_of_chunks(length: int, decay: str) -> None:
    compare(made(decay, length=length, batch=2, heads=(1, 1, 1), norm=True), normaliser="own")
    if decay == "channel":  # states and outputs in one scan
        compare(made(decay, length=length, batch=2, heads=(1, 1, 1)))


@pytest.mark.parametrize("normaliser", ["none", "own"])
@pytest.mark.parametrize("decay", DECAYS)
def test_lag_reads_what_a_block_window_cannot_see(decay: str, normaliser: str) -> None:
    x = made(decay, heads=(2, 1, 1), length=53, norm=normaliser == "own")
    compare(x, normaliser=normaliser, lag=True, chunk=16)


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_packed_sequences_are_each_alone(decay: str, lag: bool) -> None:
    """One of the sequences is empty, one a single token."""
    bounds = torch.tensor([0, 19, 19, 20, 45])
    x = made(decay, length=45, norm=True, sequences=4)
    compare(x, normaliser="own", lag=lag, chunk=16, cu_seqlens=bounds)
    if decay == "channel" and not lag:
        compare(made(decay, length=45, heads=(2, 2, 1), sequences=4, values=24), cu_seqlens=bounds)


@pytest.mark.parametrize("heads", [(2, 2, 1), (2, 1, 1)])
def test_channels_that_forget_much_beside_others(heads: tuple[int, int, int]) -> None:
    """Tiles of features go their own ways; one query head a state, which is scanned with its outputs, and two."""
    x = made("channel", heads=heads, length=50, features=40)
    x["log_decay"] = x["log_decay"].clone()
    x["log_decay"][..., 35:] -= STRONG
    compare(x)


@pytest.mark.parametrize("decay", ["fixed", "scalar", "channel"])
@pytest.mark.parametrize("strength", [STRONG, 0.0])
def test_the_strongest_decay_and_none_at_all(decay: str, strength: float) -> None:
    compare(made(decay, length=40, strength=strength), bound=3e-5)


@pytest.mark.parametrize("normaliser", ["none", "own"])
def test_products_of_features_may_leave_float16(normaliser: str) -> None:
    """Scores are scaled, or made shares of their sum, before they are rounded."""
    x = made("scalar", length=20, norm=normaliser == "own") | {"state": None}
    x |= {"q": 200.0 * x["q"], "k": 800.0 * x["k"]}
    assert torch.einsum("bhtf,bhtf->bht", x["q"], x["k"]).max() > 65504
    x = {name: None if t is None else t.half() if name in "qkv" else t.float() for name, t in x.items()}
    options = {"normaliser": normaliser, "scale": 1e-4}
    got = gated_linear(**x, **options, backend="triton").double()
    want = gated_linear(**{n: None if t is None else t.double() for n, t in x.items()}, **options, backend="torch")
    assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_segments_of_a_long_scan(decay: str) -> None:
    """More than two segments of chunks, more than one tile of features."""
    compare(made(decay, length=16 * 13 - 3, heads=(1, 1, 1), features=80, norm=True), normaliser="own")


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_views_are_read_by_their_strides(decay: str) -> None:
    """[B, T, H, D] transposed, as a model gives it; the output lies as the output projection wants it."""
    x = made(decay, batch=2, heads=(2, 2, 1))
    given = {name: x[name].float() for name in ("q", "k", "v")}
    turned = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in given.items()}
    g = x["log_decay"].float()
    want = gated_linear(**given, log_decay=g, backend="triton")
    got = gated_linear(**turned, log_decay=g.transpose(1, 2).contiguous().transpose(1, 2), backend="triton")
    assert torch.equal(got, want)
    assert got.transpose(1, 2).is_contiguous()


def test_a_state_of_the_middle_continues_the_sequence() -> None:
    x = {name: t.float() for name, t in made("scalar", length=50, norm=True).items()}
    whole, last = gated_linear(**x, normaliser="own", return_state=True, backend="triton")
    state, parts = x["state"], []
    for cut in (slice(0, 21), slice(21, 50)):
        piece = {name: x[name][:, :, cut] for name in ("q", "k", "v", "log_decay")}
        out, state = gated_linear(**piece, state=state, normaliser="own", return_state=True, backend="triton")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_the_operator_passes_torchs_own_checks(norm: bool) -> None:
    """Schema, fake tensors and autograd registration: what torch.compile relies on."""
    from linearize_kernels.gated_triton import gated_linear_op

    x = made("channel", length=17, norm=norm)
    q, k, v, g, state = (x[n].float().requires_grad_() for n in ("q", "k", "v", "log_decay", "state"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gated_linear_op, (q, k, v, g, state, None, 1.0, norm, 0, True), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normaliser": "shared"}, "normaliser 'shared'"),
        ({"state": torch.zeros(1, 2, 16, 17)}, "state"),
        ({"log_decay": torch.zeros(2, 37)}, "log_decay"),
        ({"v": torch.zeros(1, 2, 36, 16)}, "do not belong together"),
        ({"k": torch.zeros(1, 3, 37, 16)}, "no whole ratios"),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens"),
        ({"lag": True, "chunk": 24, "backend": "triton"}, "blocks of 16, 32, 64, 128"),
        ({"q": torch.zeros(1, 2, 37, 16, dtype=torch.float64), "backend": "triton"}, "float32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    x = {name: t.float() for name, t in made("scalar").items()}
    with pytest.raises(ValueError, match=message):
        gated_linear(**(x | change))
