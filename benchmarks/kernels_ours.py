"""Our ops as subjects of the kernel benchmarks. Asked for by name: a slow path is never timed in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import kernels_reference as reference
from benchmarks.kernels_peers import gate_inputs, layer_weights
from benchmarks.kernels_shapes import Shape, Subject, drawn, inputs
from linearize_kernels.gated import gated_linear
from linearize_kernels.gated_delta import gated_delta
from linearize_kernels.window_attention import window_attention
from linearize_kernels.window_linear import window_linear


def layer(shape: Shape, device: str) -> Subject:
    """LoLCATs: Hedgehog softmax maps, block window, shared denominator."""
    x = inputs(shape, device) | layer_weights(shape, device)
    options: dict[str, Any] = {"window": shape.window, "scale": shape.head_dim**-0.5, "backend": "triton"}

    def run(train: str) -> Tensor:
        found = window_linear(
            x["q"],
            x["k"],
            x["v"],
            q_weight=x["wq"],
            k_weight=x["wk"],
            gamma=x["logit"].sigmoid(),
            train=train,
            **options,
        )
        assert isinstance(found, Tensor)
        return found

    return Subject(
        forward=lambda: run("all"),
        leaves=x,
        reference=reference.window_and_linear(shape, "block"),
        maps=("wq", "wk", "logit"),
        maps_forward=lambda: run("maps"),
    )


def window(shape: Shape, device: str) -> Subject:
    """The softmax window alone."""
    x = inputs(shape, device)
    options: dict[str, Any] = {"window": shape.window, "scale": shape.head_dim**-0.5, "backend": "triton"}
    return Subject(
        forward=lambda: window_attention(x["q"], x["k"], x["v"], **options)[0],
        leaves=x,
        reference=reference.softmax_attention(shape, "block"),
    )


def gated(kind: str) -> Any:
    """Additive memory under a scalar or per-channel decay."""

    def build(shape: Shape, device: str) -> Subject:
        x = gate_inputs(shape, device, channel=kind == "channel")
        scale = shape.head_dim**-0.5

        def forward() -> Tensor:
            found = gated_linear(x["q"], x["k"], x["v"], x["g"], scale=scale, backend="triton")
            assert isinstance(found, Tensor)
            return found

        return Subject(forward=forward, leaves=x, reference=reference.gated(shape, scale=scale))

    return build


def delta(*, gate: bool) -> Any:
    """The delta rule, keys made of length one inside, with or without a scalar decay."""

    def build(shape: Shape, device: str) -> Subject:
        x = gate_inputs(shape, device, channel=False, delta=True)
        if not gate:
            del x["g"]

        def forward() -> Tensor:
            found = gated_delta(x["q"], x["k"], x["v"], x["beta"], x.get("g"), normalise=True, backend="triton")
            assert isinstance(found, Tensor)
            return found

        return Subject(forward=forward, leaves=x, reference=reference.gated(shape, scale=1.0, delta=True))

    return build


def pure_layer(shape: Shape, device: str) -> Subject:
    """The mixer of the recipe `pure`, gates included: codes of unrotated vectors, a decay, window and sinks, mass."""
    from linearize.modeling.mixer import Mixer
    from linearize.recipe import load_recipe

    hidden = shape.heads * shape.head_dim
    sizes = {"hidden_size": hidden, "num_heads": shape.heads, "num_kv_heads": shape.kv_heads}
    with torch.random.fork_rng(devices=[device]):
        torch.manual_seed(0)
        mixer = Mixer(load_recipe("pure").mixer, **sizes, head_dim=shape.head_dim, scaling=shape.head_dim**-0.5)
    mixer.to(device).backend = "triton"
    x = inputs(shape, device)
    x["inputs"] = drawn(shape.batch, shape.length, hidden, device=device, seed=6).bfloat16().requires_grad_()
    weights = dict(mixer.named_parameters())
    slow = 10.0 ** -torch.linspace(0, 4, shape.head_dim // 2, device=device).repeat(2)
    angle = torch.arange(shape.length, device=device)[None, :, None] * slow
    rotation = angle.cos().bfloat16(), angle.sin().bfloat16()

    def forward() -> Tensor:
        out: Tensor = mixer(x["q"], x["k"], x["v"], inputs=x["inputs"], rotation=rotation)
        return out.transpose(1, 2)

    def exact(given: dict[str, Tensor]) -> Tensor:
        twin = Mixer(mixer.spec, **sizes, head_dim=shape.head_dim, scaling=mixer.scaling).to(device).double()
        twin.execution = "quadratic"
        held = {name: given[name] for name in weights}
        call = {"inputs": given["inputs"], "rotation": tuple(y.double() for y in rotation)}
        out = torch.func.functional_call(twin, held, (given["q"], given["k"], given["v"]), call)
        found: Tensor = out.transpose(1, 2)
        return found

    return Subject(
        forward=forward,
        leaves=x | weights,
        reference=exact,
        maps=tuple(weights),
        note="gates, maps and own projections of the recipe included",
    )
