"""Decode of every family: frozen softmax layers between linear ones, and heads that are rotated in part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from linearize.modeling.cache_linearized import LinearizedCache, LinearStateLayer
from linearize.modeling.family_table import FAMILIES
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.rotary import rotate, unrotate
from linearize_kernels.backend import HAS_TRITON, interpreting
from tests.modeling.families import DECODERS, teacher
from tests.modeling.test_decode import GREEDY, Replay, graphs, padded  # noqa: F401 - a fixture
from tests.modeling.test_model import SPECS, convert

SMALL = replace(SPECS["liger-gla"], window=16)
HEADS, GROUPS, WIDTH, HIDDEN = 4, 2, 16, 24


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_generate_is_the_same_by_replays(family: str, graphs: list[Replay]) -> None:  # noqa: F811
    """With a kept layer of full attention between; a sliding one has no buffer of fixed addresses, and says so."""
    native = teacher(family)
    student = convert(native, SMALL, ["linear", "softmax", "linear"])
    x, mask = padded(2, 40)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, **GREEDY}
    student.decode_graphs = False
    want = student.generate(x, **options)
    student.decode_graphs = True
    assert torch.equal(student.generate(x, **options), want)
    if FAMILIES[family].window_of(native.config, 1) is None:
        assert student.decode_graph_reason is None and graphs[-1].replays == 10
    else:
        assert "sliding window" in student.decode_graph_reason and not graphs


def mixer_of(spec: MixerSpec, backend: str) -> Mixer:
    torch.manual_seed(1)
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": GROUPS, "head_dim": WIDTH}
    mixer = Mixer(spec, **sizes, scaling=WIDTH**-0.5)
    for p in mixer.parameters():
        p.data += 0.2 * torch.randn_like(p)
    mixer.backend = backend
    return mixer


def tables(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(length)[None, :, None] * (10.0 ** -torch.linspace(0, 3, width // 2)).repeat(2)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("part", [4, 8, WIDTH])
def test_a_part_of_a_head_is_turned_and_turned_back(part: int) -> None:
    x = torch.randn(2, HEADS, 30, WIDTH, dtype=torch.float64)
    cos, sin = (1.3 * table.double() for table in tables(30, part))
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., part:], x[..., part:]) and not torch.allclose(turned[..., :part], x[..., :part])
    torch.testing.assert_close(unrotate(turned, cos, sin), x)


@pytest.mark.skipif(not HAS_TRITON or not interpreting(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("recipe", ["liger-gla", "pure"])
@pytest.mark.parametrize("part", [8, None], ids=["part", "none"])
@torch.no_grad()
def test_the_decode_kernel_undoes_what_was_rotated(recipe: str, part: int | None) -> None:
    """Half of every head is rotated, or nothing is: a step of the kernel is one of the definition."""
    spec = replace(SPECS[recipe], window=16)
    spec = replace(spec, feature_dim=16) if spec.feature_dim else spec
    assert not spec.rope
    q, k, v = (torch.randn(1, n, 20, WIDTH) for n in (HEADS, GROUPS, GROUPS))
    inputs, rotation = torch.randn(1, 20, HIDDEN), None if part is None else tables(20, part)
    outs = {}
    for backend in ("torch", "triton"):
        mixer, cache, found = mixer_of(spec, "torch"), LinearStateLayer(), []
        for a, b in ((0, 17), (17, 18), (18, 19), (19, 20)):
            mixer.backend = "torch" if a == 0 else backend
            turned = None if rotation is None else tuple(table[:, a:b] for table in rotation)
            options: dict[str, Any] = {"inputs": inputs[:, a:b], "rotation": turned, "cache": cache}
            found.append(mixer(*(x[:, :, a:b] for x in (q, k, v)), **options))
        outs[backend] = torch.cat(found, 1)
    torch.testing.assert_close(outs["triton"], outs["torch"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_cache_knows_sliding_layers_from_the_table() -> None:
    student = convert(teacher("gemma2"), SMALL, ["softmax", "softmax", "linear"])
    kinds = [type(layer).__name__ for layer in LinearizedCache(student.config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "DynamicLayer", "LinearStateLayer"]
