"""A token through the decode kernels on a GPU, against the torch step in float64: one launch, two, and three.

Rows have read different numbers of tokens: none, less than a block, the last of a block, many. The second token is the
replay of a CUDA graph, in which launches overlap. Outputs may be off by twice what torch is off in bfloat16; a state,
which torch sums in float32, by what two bfloat16 products leave of a float32 one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import MixerSpec

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, WIDTH, HIDDEN = 4, 2, 128, 512
PLACES = [127, 2047, 0, 63, 5, 64, 1000, 191, 65]
STATE = 2e-5
WIDE = {
    "state_heads": "kv", "rope": False, "decay": "scalar", "normaliser": "own", "mix": "mass", "coverage": "all",
    "sinks": 4,
}  # fmt: skip
SPECS = {
    "lolcats": MixerSpec(feature_dim=64),
    "exp": MixerSpec(feature_map="hedgehog_exp", feature_dim=1024, **WIDE),
    "codes": MixerSpec(feature_map="learned_softmax", feature_dim=2048, own_qk=True, **WIDE),
}


def drawn(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=draw, device="cuda")


def build(spec: MixerSpec, batch: int, draw: torch.Generator) -> tuple[Mixer, LinearStateLayer]:
    """A mixer in bfloat16, and a memory in the middle of texts of various lengths."""
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH}
    mixer = Mixer(spec, **sizes, scaling=WIDTH**-0.5).to("cuda").requires_grad_(False)
    for name, p in mixer.named_parameters():
        scale = WIDTH**-0.5 if name.endswith("map.weight") else HIDDEN**-0.5 if p.shape[-1] == HIDDEN else 0.1
        p.copy_(drawn(draw, *p.shape) * scale)
    mixer = mixer.bfloat16()
    mixer.backend = "torch"
    cache = LinearStateLayer()
    token(mixer, cache, call(batch, draw))
    for name, x in sorted(cache.tensors.items()):
        if x.is_floating_point():
            made = drawn(draw, *x.shape)
            x.copy_(made.abs() if name in ("state", "z") else made)
    cache.tensors["position"].copy_(torch.tensor((PLACES * batch)[:batch]))
    cache.uniform = None
    return mixer, cache


def call(batch: int, draw: torch.Generator) -> dict[str, Any]:
    """What one token brings."""
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    made: dict[str, Any] = {name: drawn(draw, batch, n, 1, WIDTH).bfloat16() for name, n in heads.items()}
    angle = drawn(draw, 1, 1, WIDTH // 2).repeat(1, 1, 2)
    return made | {"inputs": drawn(draw, batch, 1, HIDDEN).bfloat16(), "rotation": (angle.cos(), angle.sin())}


def token(mixer: Mixer, cache: LinearStateLayer, given: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    x = {name: y if dtype is None or name == "rotation" else y.to(dtype) for name, y in given.items()}
    if dtype is not None:
        x["rotation"] = tuple(y.to(dtype) for y in given["rotation"])
    return mixer(x.pop("q"), x.pop("k"), x.pop("v"), **x, cache=cache)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, of the worst row."""
    difference = (got.double() - want).flatten(1).norm(dim=1)
    return float((difference / want.flatten(1).norm(dim=1).clamp_min(1e-3)).max())


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("name", "softcap"), [*((name, None) for name in SPECS), ("lolcats", 1.5), ("codes", 1.5)])
@torch.no_grad()
def test_two_tokens(name: str, softcap: float | None, batch: int) -> None:
    draw = torch.Generator("cuda").manual_seed(batch)
    mixer, cache = build(SPECS[name], batch, draw)
    mixer.softcap = softcap
    given = [call(batch, draw) for _ in range(2)]

    exact, other = copy.deepcopy(mixer).double(), copy.deepcopy(cache)
    other.tensors.update({n: x.double() for n, x in other.tensors.items() if x.is_floating_point()})
    other.workspace = {n: x.double() for n, x in other.workspace.items()}
    low = copy.deepcopy(cache)
    want = [token(exact, other, x, torch.float64) for x in given]
    plain = [token(mixer, low, x) for x in given]

    mixer.backend = "triton"
    got = [token(mixer, cache, given[0]).clone()]
    kept = {n: x.clone() for n, x in (cache.tensors | cache.workspace).items()}
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())  # what was kept is copied there
    with torch.cuda.stream(aside):
        token(mixer, cache, given[1])  # whatever the first call on a stream makes
        torch.cuda.synchronize()
        for n, x in (cache.tensors | cache.workspace).items():
            x.copy_(kept[n])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = token(mixer, cache, given[1])
        graph.replay()
        torch.cuda.synchronize()
    got.append(out)

    assert cache.tensors["position"].equal(other.tensors["position"])
    for n in range(2):
        assert error(got[n], want[n]) <= 2 * error(plain[n], want[n]) + 1e-4, f"token {n}"
    for part in ("state", "z"):
        assert error(cache.tensors[part], other.tensors[part]) < STATE, part
