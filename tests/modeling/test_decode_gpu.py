"""Decode on a GPU: the kernel beside the torch step in bfloat16, and `generate` by graphs beside `generate` without."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch

from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import LEARNED_MAPS, MixerSpec
from tests.modeling.families import teacher
from tests.modeling.test_model import convert, ids
from tests.specs import all_specs

pytestmark = pytest.mark.gpu
WIDE = 1024
"""Outputs of a map a sign, as the default recipe has them; elsewhere maps are small, however recipes change."""
SPECS = {
    name: replace(spec, feature_dim=min(spec.feature_dim or 64, 128) if spec.feature_map in LEARNED_MAPS else None)
    for name, spec in all_specs().items()
    if spec.feature_map != "taylor"
}
SPECS["pure-wide"] = replace(SPECS["pure"], feature_dim=WIDE)
PLAN = ["linear", "softmax", "linear"]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def steps(mixer: Mixer, x: dict[str, torch.Tensor], backend: str) -> tuple[torch.Tensor, LinearStateLayer]:
    """All tokens of x one by one."""
    mixer.backend, cache, out = backend, LinearStateLayer(), []
    for t in range(x["q"].shape[2]):
        heads = (x[name][:, :, t : t + 1] for name in "qkv")
        turned = x["cos"][:, t : t + 1], x["sin"][:, t : t + 1]
        out.append(mixer(*heads, inputs=x["inputs"][:, t : t + 1], rotation=turned, cache=cache))
    return torch.cat(out, 1), cache


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-3)).item()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_steps_in_bfloat16(name: str, width: int) -> None:
    """Against the torch step on the same bfloat16 inputs in float64: at most twice the error of torch's own step."""
    spec: MixerSpec = SPECS[name]
    heads, kv_heads, hidden, batch, length = 8, 2, 256, 3, 3 * max(spec.window, 16) + 5
    torch.manual_seed(0)
    mixer = Mixer(spec, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=width,
                  scaling=width**-0.5).cuda().bfloat16()  # fmt: skip
    for p in mixer.parameters():
        p.data += 0.05 * torch.randn_like(p)
    angle = torch.arange(length)[None, :, None] * (10.0 ** -torch.linspace(0, 3, width // 2)).repeat(2)
    x = {
        "q": torch.randn(batch, length, heads, width).transpose(1, 2),
        "k": torch.randn(batch, length, kv_heads, width).transpose(1, 2),
        "v": torch.randn(batch, length, kv_heads, width).transpose(1, 2),
        "inputs": torch.randn(batch, length, hidden),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }
    x = {key: value.cuda().bfloat16() for key, value in x.items()}
    got, mine = steps(mixer, x, "triton")
    near, torch_state = steps(mixer, x, "torch")
    exact, truth = steps(mixer.double(), {key: value.double() for key, value in x.items()}, "torch")
    assert error(got, exact) <= 2 * error(near, exact) + 1e-6
    for key in ("state", "z", "position"):
        if key in truth.tensors and truth.tensors[key].numel():
            bound = 2 * error(torch_state.tensors[key], truth.tensors[key]) + 1e-5
            assert error(mine.tensors[key], truth.tensors[key]) <= bound, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [["linear"] * 3, PLAN])
@pytest.mark.parametrize("recipe", ["lolcats", "pure", "pure-wide", "liger-gla", "gated-deltanet", "mamba2"])
@torch.no_grad()
def test_graphs_change_nothing(recipe: str, plan: list[str], dtype: torch.dtype) -> None:
    """Token for token: greedy with left padding over several blocks, samples, beams, a second call."""
    student = convert(teacher("llama"), SPECS[recipe], plan).cuda().to(dtype)
    x, mask = ids(4, 90).cuda(), torch.ones(4, 90, dtype=torch.long, device="cuda")
    for row in range(4):
        mask[row, : 11 * row] = 0
    x = x.masked_fill(mask == 0, 0)
    for options in (
        {"max_new_tokens": 150, **GREEDY},
        {"max_new_tokens": 20, "do_sample": True, "top_k": 9, "pad_token_id": 0},
        {"max_new_tokens": 20, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0},
        {"max_new_tokens": 9, **GREEDY},
    ):
        found = []
        for graphs in (False, True):
            student.decode_graphs = graphs
            torch.manual_seed(3)
            found.append(student.generate(x, attention_mask=mask, **options))
        assert student.decode_graph_reason is None
        assert torch.equal(found[0], found[1])


@torch.no_grad()
def test_a_replay_reads_no_more_after_many_tokens() -> None:
    """The memory that a decoding model holds does not grow."""
    student = convert(teacher("llama"), SPECS["lolcats"]).cuda().bfloat16()
    peaks = []
    for tokens in (40, 200, 400):  # the first compiles, and libraries make their workspaces
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        student.generate(ids(2, 40).cuda(), max_new_tokens=tokens, min_new_tokens=tokens, **GREEDY)
        peaks.append(torch.cuda.max_memory_allocated())
    assert student.decode_graph_reason is None
    assert peaks[2] - peaks[1] < 1e5


@pytest.mark.parametrize("recipe", ["lolcats", "pure", "liger-gla", "gated-deltanet", "mamba2"])
@torch.no_grad()
def test_weights_that_accelerate_keeps_on_the_cpu(recipe: str) -> None:
    """Kernels read them where they are brought to, in prefill and in decode, and no graph is made of what moves."""
    student = convert(teacher("llama"), SPECS[recipe], PLAN).bfloat16()
    x, options = ids(2, 90).cuda(), {"max_new_tokens": 30, **GREEDY}
    here = copy.deepcopy(student).cuda()
    here.decode_graphs = False
    away = accelerate.cpu_offload(student, execution_device=torch.device("cuda", 0))
    assert torch.equal(away(x).logits, here(x).logits)
    assert torch.equal(away.generate(x, **options), here.generate(x, **options))
    assert away.decode_graph_reason is not None


@pytest.mark.parametrize("recipe", ["lolcats", "pure"])
@torch.no_grad()
def test_threads_capture_and_replay_side_by_side(recipe: str) -> None:
    """Of one model, each its own graph; none waits for the device while another one captures."""
    student = convert(teacher("llama"), SPECS[recipe], PLAN).cuda().bfloat16()
    texts = [ids(2, 100 + 40 * n, n).cuda() for n in range(3)]
    options = {"max_new_tokens": 20, **GREEDY}
    want = [student.generate(x, **options) for x in texts]

    def work(n: int) -> bool:
        return all(torch.equal(student.generate(texts[n], **options), want[n]) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [True] * 3
    assert student.decode_graph_reason is None
