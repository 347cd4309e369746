"""Window + linear attention and the window alone on a GPU, in bfloat16.

Held against float64, the kernels' error is at most twice that of torch in bfloat16, for outputs and all gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linearize_kernels.window_attention import window_attention
from linearize_kernels.window_linear import _sequence, window_linear
from linearize_kernels.window_linear_plan import PROJECTED

pytestmark = pytest.mark.gpu
MAPS = ("q_weight", "k_weight", "q_bias", "k_bias", "fq", "fk")


def tensors(
    *, heads: tuple[int, int], length: int, size: int, width: int, map: str, mix: str, batch: int = 1
) -> dict[str, torch.Tensor]:
    """Inputs in float32, rounded to bfloat16 where the model has that."""
    draw = torch.Generator("cuda").manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda")

    many, few = heads
    made = {
        name: normal(batch, length, n, size).bfloat16().float().transpose(1, 2)
        for name, n in zip("qkv", (many, few, few))
    }
    if map in PROJECTED:
        # Rounded, so that float64 and bfloat16 have the same weights.
        for name in ("q_weight", "k_weight"):
            made[name] = (normal(many, size, width) * size**-0.5).bfloat16().float()
        if map != "hedgehog_softmax":
            made |= {"q_bias": 0.1 * normal(many, width), "k_bias": 0.1 * normal(many, width)}
    if map == "precomputed":
        made |= {name: normal(batch, many, length, width).abs().bfloat16().float() for name in ("fq", "fk")}
    if mix == "shared":
        made["gamma"] = 0.1 + 0.5 * torch.rand(many, generator=draw, device="cuda")
    elif mix == "gate":
        made["gate"] = torch.rand(batch, many, length, generator=draw, device="cuda")
    elif mix == "mass":
        made["mass"] = normal(batch, many, length) + 3
    return made


def run(x: dict[str, torch.Tensor], dtype: torch.dtype, backend: str, **options: Any) -> dict[str, torch.Tensor]:
    """Output and gradients; weights, gates and biases stay float32 beside bfloat16 (float64 beside float64)."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    low = {"q", "k", "v", "fq", "fk"}
    leaves = {name: y.to(dtype if name in low else kept).requires_grad_() for name, y in x.items()}
    out = window_linear(**leaves, backend=backend, **options)
    draw = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, device="cuda").bfloat16().to(out.dtype)
    wanted = {name: y for name, y in leaves.items() if options.get("train") != "maps" or name not in "qkv"}
    grads = torch.autograd.grad(out, list(wanted.values()), weight)
    return {"out": out.detach()} | dict(zip(wanted, grads))


def in_bfloat16(x: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """The torch path with every product and sum in bfloat16."""
    leaves = {name: y.bfloat16().requires_grad_() for name, y in x.items()}
    near = leaves.get("gamma", leaves.get("gate", leaves.get("mass")))
    window, width = options["window"], leaves.get("k_weight", leaves.get("fk", leaves["k"]))
    states = width.shape[0] if "k_weight" in leaves else width.shape[1]
    out, _final = _sequence(
        leaves["q"], leaves["k"], leaves["v"], options["map"], *(leaves.get(n) for n in MAPS), window,
        options["scale"], options["mix"], True, 1 if not window or options.get("coverage") == "all" else 2, near, 0.5,
        options.get("sinks", 0), options.get("softcap"), None, states,
    )  # fmt: skip
    draw = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, device="cuda").bfloat16()
    wanted = {name: y for name, y in leaves.items() if options.get("train") != "maps" or name not in "qkv"}
    grads = torch.autograd.grad(out, list(wanted.values()), weight, allow_unused=True)
    return {"out": out.detach()} | dict(zip(wanted, grads))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    "map,mix,heads,length,size,width,options",
    [
        ("hedgehog_softmax", "shared", (8, 2), 1000, 128, 64, {"window": 64}),
        ("hedgehog_softmax", "shared", (8, 2), 1000, 128, 64, {"window": 64, "train": "maps"}),
        ("hedgehog_softmax", "shared", (4, 2), 700, 64, 64, {"window": 64, "sinks": 4}),
        ("hedgehog_softmax", "shared", (4, 1), 300, 96, 32, {"window": 32}),
        ("hedgehog_softmax", "shared", (4, 1), 300, 256, 64, {"window": 64}),
        ("hedgehog_softmax", "gate", (4, 2), 600, 128, 128, {"window": 64}),
        ("hedgehog_softmax", "mass", (4, 2), 600, 128, 64, {"window": 128}),
        ("hedgehog_exp", "none", (4, 2), 500, 128, 128, {"window": 0}),
        ("relu", "none", (4, 4), 500, 128, 128, {"window": 0, "train": "maps"}),
        ("precomputed", "gate", (4, 2), 500, 128, 153, {"window": 64, "coverage": "all"}),
        # Gemma 2's bounds on scores, of its large model and of the others; the second binds.
        ("hedgehog_softmax", "shared", (8, 4), 700, 128, 64, {"window": 64, "softcap": 50.0}),
        ("hedgehog_softmax", "shared", (4, 2), 700, 128, 64, {"window": 64, "softcap": 1.5, "sinks": 4}),
        ("hedgehog_softmax", "shared", (4, 2), 300, 256, 64, {"window": 64, "softcap": 1.5}),
        ("hedgehog_softmax", "mass", (4, 2), 640, 128, 64, {"window": 64, "softcap": 1.5, "sinks": 4}),
        ("precomputed", "gate", (4, 2), 500, 128, 100, {"window": 64, "coverage": "all", "softcap": 1.5}),
        # Long enough for the scan to be cut into segments.
        ("hedgehog_softmax", "shared", (8, 2), 2112, 128, 64, {"window": 64}),
        ("hedgehog_softmax", "shared", (8, 2), 2112, 128, 64, {"window": 64, "train": "maps"}),
        ("hedgehog_softmax", "shared", (4, 1), 1500, 96, 32, {"window": 32}),
        ("precomputed", "gate", (4, 2), 1800, 128, 153, {"window": 64, "coverage": "all"}),
    ],
)
def test_error_is_that_of_bfloat16(
    map: str, mix: str, heads: tuple[int, int], length: int, size: int, width: int, options: dict[str, Any]
) -> None:
    x = tensors(heads=heads, length=length, size=size, width=width, map=map, mix=mix)
    options = {"map": map, "mix": "sum" if mix == "none" else mix, "scale": size**-0.5} | options
    want = run(x, torch.float64, "torch", **options)
    low = in_bfloat16(x, **options)
    got = run(x, torch.bfloat16, "triton", **options)
    found = {name: (error(got[name], want[name]), error(low[name], want[name])) for name in want}
    assert all(ours <= 2 * torchs + 1e-5 for ours, torchs in found.values()), found


@pytest.mark.parametrize("size,softcap", [(128, None), (128, 1.5), (256, 1.5)])
def test_window_alone(size: int, softcap: float | None) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    x = [torch.randn(2, 700, n, size, generator=draw, device="cuda").bfloat16().transpose(1, 2) for n in (8, 2, 2)]

    def results(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = [y.to(dtype).requires_grad_() for y in x]
        options = {"window": 64, "scale": size**-0.5, "sinks": 4, "softcap": softcap}
        out, mass = window_attention(*leaves, **options, backend=backend)
        return [out, mass, *torch.autograd.grad([out, mass], leaves, [torch.ones_like(out), torch.ones_like(mass)])]

    want = results(torch.float64, "torch")
    assert all(error(one, other) < 8e-3 for one, other in zip(results(torch.bfloat16, "triton"), want))


def test_float32_is_close() -> None:
    """Products in float32 proper, not in TF32."""
    x = tensors(heads=(4, 2), length=300, size=64, width=32, map="hedgehog_softmax", mix="shared")
    options = {"map": "hedgehog_softmax", "mix": "shared", "scale": 0.125, "window": 32}
    want = run(x, torch.float64, "torch", **options)
    got = run(x, torch.float32, "triton", **options)
    assert all(error(got[name], want[name]) < 2e-5 for name in want), {n: error(got[n], want[n]) for n in want}


def test_one_graph() -> None:
    x = tensors(heads=(4, 2), length=256, size=64, width=32, map="hedgehog_softmax", mix="shared")
    x = {name: y.bfloat16() if name in "qkv" else y for name, y in x.items()}

    def layer(**given: torch.Tensor) -> torch.Tensor:
        made = window_linear(**given, window=64, scale=0.125)
        assert isinstance(made, torch.Tensor)
        return made * 2.0

    compiled = torch.compile(layer, fullgraph=True)
    one = {name: y.clone().requires_grad_() for name, y in x.items()}
    other = {name: y.clone().requires_grad_() for name, y in x.items()}
    compiled(**one).sum().backward()
    layer(**other).sum().backward()
    for name, y in one.items():
        torch.testing.assert_close(y.grad, other[name].grad)


@pytest.mark.parametrize("train", ["all", "maps"])
def test_with_gradients_after_without(train: str) -> None:
    """Without gradients less is written, by other machine code: what was found for the one must not serve the other."""
    x = tensors(heads=(4, 2), length=192, size=64, width=32, map="hedgehog_softmax", mix="shared")
    options: dict[str, Any] = {"window": 64, "scale": 0.125, "map": "hedgehog_softmax", "train": train}
    first = run(x, torch.bfloat16, "triton", **options)
    low = {name: y.bfloat16() if name in "qkv" else y for name, y in x.items()}
    with torch.no_grad():
        plain = window_linear(**low, backend="triton", **options)
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, first["out"])
    again = run(x, torch.bfloat16, "triton", **options)
    assert all(torch.equal(again[name], first[name]) for name in first)
