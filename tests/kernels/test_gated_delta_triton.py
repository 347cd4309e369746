"""The gated delta rule's kernels in Triton's interpreter against the definition in float64, gradients too."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as nnf

pytest.importorskip("triton", reason="triton is for Linux alone")

from linearize_kernels import tuning
from linearize_kernels.gated_delta import gated_delta

pytestmark = pytest.mark.usefixtures("interpreter")
NAMES = ("q", "k", "v", "beta", "log_decay", "state")


def made(
    *,
    batch: int = 1,
    heads: tuple[int, int, int] = (1, 1, 1),
    length: int = 70,
    sizes: tuple[int, int] = (16, 16),
    decay: str = "token",
    state: int = 0,
    strength: float = 1.0,
    unit: bool = True,
) -> dict[str, torch.Tensor | None]:
    """Inputs in float64 as views of [B, T, heads, D], as a model has them; heads: query, state, value."""
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    features, values = sizes
    q, k, v = (normal(batch, length, n, d).transpose(1, 2) for n, d in zip(heads, (features, features, values)))
    if unit:
        q, k = nnf.normalize(q, dim=-1), nnf.normalize(k, dim=-1)
    beta = strength * torch.rand(batch, length, heads[1], generator=draw, dtype=torch.float64).transpose(1, 2)
    g = {"none": None, "token": -0.3 * normal(batch, heads[1], length).exp(), "fixed": -0.1 * normal(heads[1]).exp()}
    first = normal(state, heads[1], features, values) if state else None
    return dict(zip(NAMES, (q, k, v, beta, g[decay], first)))


def results(x: dict[str, torch.Tensor | None], backend: str, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    """Output, last state and all gradients of a random sum of both; gates and states in float32 for the kernels."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: t.to(dtype if name in "qkv" else kept).detach().requires_grad_() for name, t in x.items() if t is not None
    }
    out, last = gated_delta(**leaves, return_state=True, backend=backend, **options)
    draw = torch.Generator().manual_seed(1)
    total = sum((y.double() * torch.randn(y.shape, generator=draw, dtype=torch.float64)).sum() for y in (out, last))
    found = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out, "last": last, **{f"d {name}": d for name, d in zip(leaves, found)}}


def compare(x: dict[str, torch.Tensor | None], *, dtype=torch.float32, tolerance=2e-6, **options) -> None:
    want = results(x, "torch", torch.float64, **options)
    got = results(x, "triton", dtype, **options)
    for name, right in want.items():
        error = float((got[name].double() - right).norm().detach() / (right.norm().detach() + 1e-6))
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("length", [1, 2, 31, 32, 65, 129])
def test_any_length(length: int) -> None:
    compare(made(length=length, decay="token" if length % 2 else "none"))


def test_heads_share_states_and_values() -> None:
    compare(made(batch=2, heads=(4, 2, 1), length=40, decay="fixed", state=2, unit=False), normalise=True)


@pytest.mark.parametrize("sizes", [(8, 24), (40, 16)])
def test_odd_widths_without_decay(sizes: tuple[int, int]) -> None:
    compare(made(length=35, sizes=sizes, decay="none", unit=False, state=1), normalise=True)


def test_chunks_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 16-bit inputs use on a GPU, in float32; beta in [0, 2]."""
    monkeypatch.setattr(tuning, "gated_delta_chunk", lambda *_: 64)
    compare(made(length=150, strength=2.0, state=1))


def test_half_precision() -> None:
    compare(made(length=70, unit=False), dtype=torch.float16, tolerance=3e-3, normalise=True)


def test_under_a_lag_beta_is_not_rounded_with_what_it_weighs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision rounds to 2.4e-4 on the average; beta's gradient, a sum of products in float32, to a fraction."""
    monkeypatch.setattr(tuning, "gated_delta_chunk", lambda *_: 64)
    x = made(length=300, sizes=(32, 32))
    x |= {n: x[n].half().double() for n in "qkv"}
    want = results(x, "torch", torch.float64, lag=True)["d beta"].detach()
    got = results(x, "triton", torch.float16, lag=True)["d beta"].detach()
    error = float((got.double() - want).norm() / want.norm())
    assert error < 1.2e-4, f"{error:.1e}"


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_the_same_key_again_and_again(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The powers of such a system grow without bound; its inverse does not."""
    monkeypatch.setattr(tuning, "gated_delta_chunk", lambda *_: 64)
    x = made(length=64, decay="none")
    x["k"], x["beta"] = x["k"][:, :, :1].expand_as(x["k"]), torch.full_like(x["beta"], strength)
    compare(x, tolerance=1e-5)


def test_nothing_written_and_all_forgotten() -> None:
    x = made(length=50, state=1)
    x["beta"] = x["beta"].clone()
    x["beta"][:, :, 10:20] = 0.0
    x["k"] = x["k"].clone()
    x["k"][:, :, 15:25] = 0.0
    x["log_decay"] = x["log_decay"].clone()
    x["log_decay"][:, :, 30] = -200.0
    compare(x)


@pytest.mark.parametrize("lag", [False, True])
def test_a_last_chunk_that_forgets_more_than_float32_holds(lag: bool) -> None:
    """Its rows beyond the sequence are no later than the others, by whom they would be e^1000 times outweighed."""
    x = made(heads=(2, 2, 1), length=75, state=1, unit=False)
    x["log_decay"] = torch.where(torch.arange(75) % 3 == 0, -100.0, -0.1).double().expand(1, 2, -1).clone()
    x["log_decay"][:, 1] = -0.1  # a head that remembers beside one that forgets
    compare(x, tolerance=3e-5, lag=lag, chunk=32, normalise=True)  # G of -1000 is rounded to 6e-5


@pytest.mark.parametrize(("block", "length"), [(16, 100), (32, 33), (64, 200)])
def test_lag(block: int, length: int) -> None:
    """Blocks of one chunk of 16 or 32 tokens, and of two."""
    heads = (2, 1, 1) if block == 32 else (1, 1, 1)
    compare(made(heads=heads, length=length, unit=False, state=1), lag=True, chunk=block, normalise=True)


@pytest.mark.parametrize("lag", [False, True])
def test_packed_sequences(lag: bool) -> None:
    """One of them empty, one of a single token."""
    bounds = torch.tensor([0, 1, 40, 40, 110])
    compare(made(length=110, state=4), cu_seqlens=bounds, lag=lag, chunk=32)


def test_packed_sequences_are_themselves_alone() -> None:
    x = {name: None if t is None else t.float() for name, t in made(length=60).items()}
    bounds = [0, 23, 60]
    together = gated_delta(**x, cu_seqlens=torch.tensor(bounds), backend="triton")
    for a, b in pairwise(bounds):
        alone = gated_delta(*(x[n][:, :, a:b] for n in NAMES[:5]), backend="triton")
        torch.testing.assert_close(together[:, :, a:b], alone, rtol=0, atol=0)


@pytest.mark.parametrize("lag", [False, True])
def test_padded_rows_have_the_state_of_their_own_end(lag: bool) -> None:
    x = made(batch=2, length=100)
    lengths = torch.tensor([100, 70])
    compare(x, lengths=lengths, lag=lag, chunk=32)
    short = {name: None if t is None else t[1:, :, :70] if name != "state" else t for name, t in x.items()}
    _, padded = gated_delta(**x, lengths=lengths, lag=lag, chunk=32, return_state=True)
    _, alone = gated_delta(**short, lag=lag, chunk=32, return_state=True)
    torch.testing.assert_close(padded[1:], alone)


@pytest.mark.parametrize("lag", [False, True])
def test_a_sequence_in_two_halves(lag: bool) -> None:
    """Under a lag the second half begins with the block before its own, as a prefill from a cache does."""
    x = {name: None if t is None else t.float() for name, t in made(length=128).items()}
    whole = gated_delta(**x, lag=lag, chunk=32, backend="triton")
    at = 96 if lag else 77
    resume = at - 32 if lag else at
    halves = [{n: t if t is None else t[:, :, cut] for n, t in x.items()} for cut in (slice(at), slice(resume, None))]
    first, state = gated_delta(**halves[0], lag=lag, chunk=32, return_state=True, backend="triton")
    halves[1]["state"] = state
    second = gated_delta(**halves[1], lag=lag, chunk=32, backend="triton")
    if lag:
        # The first two blocks of a call read its first state; of the second call, only the second is wanted.
        second = second[:, :, 32:]
    torch.testing.assert_close(torch.cat((first, second), dim=2), whole, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_state_alone() -> None:
    x = made(length=40)
    found = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        leaves = [x[n].to(dtype).detach().requires_grad_() for n in NAMES[:5]]
        _, last = gated_delta(*leaves, return_state=True, backend=backend)
        found.append(torch.autograd.grad(last.square().sum(), leaves[1:]))
    for want, got in zip(*found):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_compiles_in_one_graph() -> None:
    x = [None if t is None else t.float() for t in made(length=20, sizes=(16, 16)).values()]
    eager = gated_delta(*x[:5], normalise=True, backend="triton")
    compiled = torch.compile(gated_delta, backend="aot_eager", fullgraph=True)
    leaves = [t.requires_grad_() for t in x[:5]]
    found = compiled(*leaves, normalise=True, backend="triton")
    torch.testing.assert_close(found, eager)
    found.sum().backward()
    assert all(bool(t.grad.abs().sum() > 0) for t in leaves)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": torch.ones(1, 1, 3)}, "beta"),
        ({"log_decay": torch.ones(1, 1, 3)}, "log_decay"),
        ({"state": torch.ones(2, 1, 16, 16)}, "state"),
        ({"v": torch.ones(1, 1, 3, 16)}, "do not belong together"),
        ({"lag": True, "chunk": 24}, "multiple of 16"),
        ({"q": torch.ones(1, 1, 20, 16, dtype=torch.float16)}, "differ in dtype"),
        ({"lengths": torch.ones(3)}, "lengths"),
        ({"backend": "fla"}, "fla"),
        ({"backend": "cuda"}, "not one of"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, words: str) -> None:
    x = {name: None if t is None else t.float() for name, t in made(length=20).items()}
    with pytest.raises(ValueError, match=words):
        gated_delta(**(x | {"backend": "triton"} | change))
