"""Chunked and stepped kernels against the quadratic definition, outputs and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from linearize_kernels import (
    block_window_mask,
    chunk_delta,
    chunk_linear,
    chunk_window,
    linear_weights,
    step_delta,
    step_linear,
    window_weights,
)
from linearize_kernels.decayed import decayed_scores
from linearize_kernels.linear import scan_chunks, split_chunks

LENGTHS = (1, 2, 63, 64, 65, 127, 129, 200)


def inputs(length: int, *, decay: str, seed: int = 0, strength: float = 0.3) -> dict[str, torch.Tensor | None]:
    """q [2, 2, 3, T, 8], k [2, 2, T, 8], v [2, 2, T, 5], log decay and beta, float64, wanting gradients."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    made: dict[str, torch.Tensor | None] = {
        "q": normal(2, 2, 3, length, 8),
        "k": torch.nn.functional.normalize(normal(2, 2, length, 8), dim=-1),
        "v": normal(2, 2, length, 5),
        "log_decay": None,
        "beta": normal(2, 2, length).sigmoid() * 2,
    }
    if decay != "none":
        made["log_decay"] = -strength * normal(2, 2, length, *((8,) if decay == "channel" else ())).exp()
    return {name: None if x is None else x.requires_grad_() for name, x in made.items()}


def lagged_cover(length: int, chunk: int) -> torch.Tensor:
    block = torch.arange(length) // chunk
    return block[:, None] - block[None] >= 2


def assert_same_with_gradients(got, want, leaves, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=want.dtype)
    found = torch.autograd.grad((got * weight).sum(), leaves, retain_graph=True, allow_unused=True)
    right = torch.autograd.grad((want * weight).sum(), leaves, allow_unused=True)
    for one, other, leaf in zip(found, right, leaves):
        zeros = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zeros if one is None else one, zeros if other is None else other, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_chunked_linear_is_the_definition(decay: str, lag: bool) -> None:
    for length in LENGTHS:
        x = inputs(length, decay=decay)
        q, k, v, g = x["q"], x["k"], x["v"], x["log_decay"]
        cover = lagged_cover(length, 64) if lag else torch.ones(length, length, dtype=torch.bool).tril()
        want = linear_weights(q, k, log_decay=g, covered=cover) @ v.unsqueeze(2)
        got, _ = chunk_linear(q, k, v, log_decay=g, chunk=64, lag=lag)
        assert_same_with_gradients(got, want, [leaf for leaf in (q, k, v, g) if leaf is not None])


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_chunked_delta_is_the_definition(decay: str, lag: bool) -> None:
    for length in LENGTHS:
        x = inputs(length, decay=decay)
        q, k, v, g, beta = x["q"], x["k"], x["v"], x["log_decay"], x["beta"]
        cover = lagged_cover(length, 64) if lag else torch.ones(length, length, dtype=torch.bool).tril()
        want = linear_weights(q, k, log_decay=g, beta=beta, covered=cover) @ v.unsqueeze(2)
        got, _ = chunk_delta(q, k, v, beta, log_decay=g, chunk=64, lag=lag)
        assert_same_with_gradients(got, want, [leaf for leaf in (q, k, v, g, beta) if leaf is not None], 1e-8)


@pytest.mark.parametrize("write", ["add", "delta"])
def test_recurrence_is_the_definition(write: str) -> None:
    """The formula of the papers, token by token, gives the quadratic form and the chunk states."""
    x = inputs(130, decay="scalar" if write == "delta" else "channel")
    q, k, v, g, beta = (x[name].detach() for name in ("q", "k", "v", "log_decay", "beta"))
    state, out = torch.zeros(2, 2, 8, 5, dtype=torch.float64), []
    for t in range(130):
        if write == "add":
            state = step_linear(state, k[:, :, t], v[:, :, t], log_decay=g[:, :, t])
        else:
            state = step_delta(state, k[:, :, t], v[:, :, t], beta[:, :, t], log_decay=g[:, :, t])
        out.append(torch.einsum("nsrf,nsfv->nsrv", q[:, :, :, t], state))
    causal = torch.ones(130, 130, dtype=torch.bool).tril()
    want = linear_weights(q, k, log_decay=g, beta=beta if write == "delta" else None, covered=causal) @ v.unsqueeze(2)
    torch.testing.assert_close(torch.stack(out, 3), want, rtol=1e-9, atol=1e-9)
    op = chunk_linear if write == "add" else chunk_delta
    extra = () if write == "add" else (beta,)
    _, states = op(q, k, v, *extra, log_decay=g, chunk=64)
    torch.testing.assert_close(states[:, :, -1], state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("write", ["add", "delta"])
def test_a_state_continues(write: str, lag: bool) -> None:
    x = inputs(192, decay="scalar")
    q, k, v, g, beta = (x[name].detach() for name in ("q", "k", "v", "log_decay", "beta"))

    def run(a: int, b: int, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"log_decay": g[:, :, a:b], "state": state, "chunk": 64, "lag": lag}
        if write == "delta":
            return chunk_delta(q[..., a:b, :], k[:, :, a:b], v[:, :, a:b], beta[:, :, a:b], **options)
        return chunk_linear(q[..., a:b, :], k[:, :, a:b], v[:, :, a:b], **options)

    whole, states = run(0, 192, None)
    _, first = run(0, 64, None)
    rest, last = run(64, 192, first[:, :, -1])
    torch.testing.assert_close(last[:, :, -1], states[:, :, -1])
    # With a lag, the first chunk of a continued call stands for what the window holds: its outputs are not used.
    torch.testing.assert_close(rest[..., 64 * lag :, :], whole[..., 64 + 64 * lag :, :])


def test_strong_decay_stays_finite() -> None:
    """e^(sum of log decays) leaves float32 within a chunk; the factored form k exp(-G) would be infinite."""
    x = inputs(128, decay="channel", strength=20.0)
    q, k, v, g = (x[name].detach().float() for name in ("q", "k", "v", "log_decay"))
    g.requires_grad_()
    out, _ = chunk_linear(q, k, v, log_decay=g, chunk=64)
    causal = torch.ones(128, 128, dtype=torch.bool).tril()
    want = linear_weights(q.double(), k.double(), log_decay=g.double(), covered=causal) @ v.double().unsqueeze(2)
    # Weights are exponentials of differences of a running sum, which float32 holds to eps |G|.
    bound = torch.finfo(torch.float32).eps * g.detach().cumsum(2).abs().max().item()
    assert bound < 1e-3
    assert (out.double() - want).norm() < bound * want.norm()
    assert torch.autograd.grad(out.sum(), g)[0].isfinite().all()


def test_decayed_scores_split_every_pair_once() -> None:
    x = inputs(16, decay="channel")
    ones_q, ones_k = torch.ones_like(x["q"]), torch.ones_like(x["k"])
    counts = decayed_scores(ones_q, ones_k, torch.zeros_like(x["log_decay"]))
    assert torch.equal(counts, torch.full_like(counts, 8.0).tril())


@pytest.mark.parametrize("window,sinks", [(64, 0), (16, 5), (16, 40), (1, 0)])
def test_chunked_window_is_the_definition(window: int, sinks: int) -> None:
    for length in LENGTHS:
        x = inputs(length, decay="none")
        q, k, v = x["q"], x["k"], x["v"]
        v = v.detach()[..., :1].expand(-1, -1, -1, 8).contiguous().requires_grad_()
        seen = block_window_mask(length, window, sinks)
        weights, largest = window_weights(q, k, scale=0.7, seen=seen)
        want = weights @ v.unsqueeze(2) / weights.sum(-1, keepdim=True)
        sink = (k[:, :, :sinks], v[:, :, :sinks]) if sinks else (None, None)
        options = {"window": window, "scale": 0.7, "sink_k": sink[0], "sink_v": sink[1]}
        numerator, denominator, peak = chunk_window(q, k, v, **options)
        assert_same_with_gradients(numerator / denominator, want, [q, k, v])
        scores = (torch.einsum("nkrid,nkjd->nkrij", q, k) * 0.7).masked_fill(~seen, float("-inf"))
        mass = scores.logsumexp(-1, keepdim=True)
        torch.testing.assert_close(weights.sum(-1, keepdim=True).log() + largest, mass, rtol=1e-9, atol=1e-9)
        assert_same_with_gradients(denominator.log() + peak, mass, [q, k])


def test_block_window_mask_counts() -> None:
    """Row 140 of blocks of 64 sees its own 13 tokens and the 64 before; no row depends on the length."""
    mask = block_window_mask(200, 64, 0)
    assert mask[140].sum() == 140 - 64 + 1
    assert mask[140, 63].item() is False and mask[140, 64].item() is True
    assert torch.equal(mask[:141, :141], block_window_mask(141, 64, 0))
    assert block_window_mask(200, 64, 3)[140, :4].tolist() == [True, True, True, False]


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_scan_over_many_chunks(decay: str) -> None:
    """More chunks than one product takes, against the recurrence written out."""
    x = inputs(4 * 70, decay=decay)
    update = torch.randn(2, 2, 70, 8, 5, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 2, 8, 5, dtype=torch.float64, requires_grad=True)
    g = None if x["log_decay"] is None else split_chunks(x["log_decay"], 2, 4).cumsum(3)
    want = [state]
    for n in range(70):
        keep = 1.0 if g is None else g[:, :, n, -1].exp()
        keep = keep[..., None, None] if decay == "scalar" else keep if g is None else keep[..., None]
        want.append(want[-1] * keep + update[:, :, n])
    leaves = [leaf for leaf in (update, state, x["log_decay"]) if leaf is not None]
    assert_same_with_gradients(scan_chunks(update, g, state), torch.stack(want, dim=2), leaves)
