"""Gated linear attention on a GPU in bfloat16: its error against float64 is at most twice that of torch in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf

from linearize_kernels.gated import gated_linear
from linearize_kernels.gated_mapped import map_features, mapped_gated_linear
from linearize_kernels.linear import chunk_linear

pytestmark = pytest.mark.gpu
FLOOR = 1e-3
"""Relative error under which bfloat16 cannot be told from luck."""


def made(decay: str, heads: tuple[int, int, int], length: int, features: int, values: int, norm: bool) -> dict:
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    queries, states, kv = heads
    shape = {"none": None, "fixed": (states,), "scalar": (2, states, length)}.get(decay, (2, states, length, features))
    q, k = normal(2, queries, length, features), normal(2, states, length, features) * features**-0.5
    return {
        "q": q.abs() if norm else q,
        "k": k.abs() if norm else k,
        "v": normal(2, kv, length, values),
        "log_decay": None if shape is None else nnf.logsigmoid(normal(*shape) + 3),
    }


def torch_low(q, k, v, log_decay, norm: bool, chunk: int = 64) -> torch.Tensor:
    """The definition with products in bfloat16 and decays in float32, as the kernels have them."""
    states = k.shape[1]
    v = v.repeat_interleave(states // v.shape[1], dim=1)
    v = nnf.pad(v, (0, 1), value=1.0) if norm else v
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[:, None].expand(q.shape[0], -1, q.shape[2])
    with torch.autocast(q.device.type, torch.bfloat16):
        out, _ = chunk_linear(q.unflatten(1, (states, -1)), k, v, log_decay=log_decay, chunk=chunk)
    out = out.flatten(1, 2)
    return out[..., :-1] / out[..., -1:] if norm else out


def results(run, x: dict, weight: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in float64."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in x.items()}
    out = run(**leaves)
    wanted = [t for t in leaves.values() if t is not None]
    gradients = torch.autograd.grad(out, wanted, weight.to(out.dtype))
    return [t.detach().double() for t in (out, *gradients)]


def assert_as_good(x: dict, weight: torch.Tensor, exact, ours, *lows) -> None:
    """Each result of `ours` is at most twice as far from `exact` as those of `lows` are in the mean of squares."""
    single = ("log_decay",)
    rounded = {n: t if t is None or n in single else t.cuda().bfloat16() for n, t in x.items()}
    rounded = {n: None if t is None else t.cuda() for n, t in rounded.items()}
    weight = weight.cuda().bfloat16()
    right = results(exact, {n: None if t is None else t.double() for n, t in rounded.items()}, weight)
    names = ["out", *(f"d{n}" for n, t in x.items() if t is not None)]
    theirs = zip(*(results(low, rounded, weight) for low in lows))
    for name, r, a, others in zip(names, right, results(ours, rounded, weight), theirs):
        error, *bounds = (float((t - r).norm() / r.norm()) for t in (a, *others))
        bound = (sum(b * b for b in bounds) / len(bounds)) ** 0.5
        assert error <= max(2 * bound, FLOOR), f"{name}: {error:.1e} against {bound:.1e} of torch"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("decay", ["none", "fixed", "scalar", "channel"])
@pytest.mark.parametrize(
    ("heads", "length", "features", "values"),
    # From 32 states on, those of a decay per channel are scanned with their outputs.
    [
        ((4, 4, 2), 333, 128, 128),
        ((4, 2, 1), 130, 64, 64),
        ((2, 2, 2), 65, 96, 256),
        ((8, 8, 4), 200, 512, 64),
        ((36, 36, 18), 150, 128, 128),
    ],
)
def test_bfloat16_is_as_good_as_torchs(heads, length, features, values, decay, norm) -> None:
    x = made(decay, heads, length, features, values, norm)
    weight = torch.randn(2, heads[0], length, values, generator=torch.Generator().manual_seed(1))
    kind = "own" if norm else "none"
    # A fixed decay has one gradient a head, and of two numbers luck decides: torch rounds them in several ways.
    chunks = (16, 32, 64, 128) if decay == "fixed" else (64,)
    assert_as_good(
        x,
        weight,
        lambda **t: gated_linear(**t, normaliser=kind, backend="torch"),
        lambda **t: gated_linear(**t, normaliser=kind, backend="triton"),
        *(lambda chunk=chunk, **t: torch_low(**t, norm=norm, chunk=chunk) for chunk in chunks),
    )


def unmapped(heads: tuple[int, int, int], length: int, size: int, width: int, *, biased: bool) -> dict:
    """Inputs of `mapped_gated_linear`; heads are query, state and key-value heads."""
    draw = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    queries, states, kv = heads
    return {
        "q": normal(2, queries, length, size),
        "k": normal(2, kv, length, size),
        "v": normal(2, kv, length, size),
        "log_decay": nnf.logsigmoid(normal(2, states, length) + 3),
        "q_weight": normal(queries, size, width) * size**-0.5,
        "q_bias": normal(queries, width) * 0.3 if biased else None,
        "k_weight": normal(states, size, width) * size**-0.5,
        "k_bias": normal(states, width) * 0.3 if biased else None,
    }


@pytest.mark.parametrize(
    ("name", "heads", "size", "width"),
    [
        *((name, (4, 4, 2), 64, 256) for name in ("hedgehog_exp", "hedgehog_softmax", "learned_softmax", "crelu")),
        *((name, (4, 4, 2), 128, 64) for name in ("hedgehog_exp", "hedgehog_softmax", "crelu")),
        # Four query heads share a state, of 1024 features a sign.
        *(("hedgehog_exp", (8, 2, 2), size, 1024) for size in (64, 128)),
        ("learned_softmax", (8, 2, 2), 128, 2048),
    ],
)
def test_maps_inside_are_as_good_as_torchs(name: str, heads: tuple[int, int, int], size: int, width: int) -> None:
    x = unmapped(heads, 300, size, width, biased=name == "hedgehog_exp")

    def low(q, k, v, log_decay, q_weight, q_bias, k_weight, k_bias) -> torch.Tensor:
        fq, fk = map_features(q, q_weight, q_bias, name), map_features(k, k_weight, k_bias, name)
        return torch_low(fq, fk, v, log_decay, norm=True)

    options = {"map": name, "normaliser": "own"}
    assert_as_good(
        x,
        torch.randn(2, heads[0], 300, size, generator=torch.Generator().manual_seed(1)),
        lambda **t: mapped_gated_linear(**t, **options, backend="torch"),
        lambda **t: mapped_gated_linear(**t, **options, backend="triton"),
        low,
    )


def test_maps_inside_replay_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step gives what the same step gives at once, in slices too."""
    from linearize_kernels import gated_map_slices

    x = unmapped((8, 4, 4), 200, 64, 256, biased=True)
    x = {n: t.cuda() if n == "log_decay" else t.cuda().bfloat16() for n, t in x.items()}
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    weight = torch.randn(2, 8, 200, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> list[torch.Tensor]:
        out = mapped_gated_linear(**leaves, normaliser="own", backend="triton")
        gradients = torch.autograd.grad(out, list(leaves.values()), weight)
        return [out.detach(), *gradients]  # a graph of autograd's that lives on would tie the recording to its stream

    right = step()
    monkeypatch.setattr(gated_map_slices, "gated_map_slice", lambda capability: 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for t in found:
        t.zero_()
    graph.replay()
    for got, want in zip(found, right):
        assert float((got - want).norm() / want.norm()) < 5e-3


def test_channels_that_forget_much_beside_others() -> None:
    x = made("channel", (16, 16, 16), 150, 128, 128, False)
    x["log_decay"] = x["log_decay"].clone()
    x["log_decay"][..., 64:] -= 20.0
    weight = torch.randn(2, 16, 150, 128, generator=torch.Generator().manual_seed(1))
    assert_as_good(
        x,
        weight,
        lambda **t: gated_linear(**t, backend="torch"),
        lambda **t: gated_linear(**t, backend="triton"),
        lambda **t: torch_low(**t, norm=False),
    )


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_the_strongest_decay_stays_finite(decay: str) -> None:
    x = {n: None if t is None else t.cuda() for n, t in made(decay, (2, 2, 2), 300, 64, 64, False).items()}
    x["log_decay"] = torch.full_like(x["log_decay"], -20.0)
    weight = torch.ones(2, 2, 300, 64, device="cuda")
    right = results(lambda **t: gated_linear(**t, backend="torch"), {n: t.double() for n, t in x.items()}, weight)
    for got, want in zip(results(lambda **t: gated_linear(**t, backend="triton"), x, weight), right):
        assert float((got - want).norm() / want.norm()) < 1e-4


def test_compiled_graphs_stay_whole() -> None:
    x = {n: None if t is None else t.cuda().bfloat16() for n, t in made("scalar", (2, 2, 1), 100, 64, 64, True).items()}

    def run(q, k, v, log_decay):  # type: ignore[no-untyped-def]
        return gated_linear(q * 1.0, k, v, log_decay, normaliser="own", backend="triton").float() * 2

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(**x), run(**x), rtol=2e-2, atol=2e-2)
