"""Codes of learned_softmax: they start at keys, and narrow ones are softmax attention itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from linearize.convert import codes as module
from linearize.convert.calibrate import calibrate
from linearize.convert.codes import start_codes
from linearize.convert.surgery import linearize_model, mixer_plan
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import attention_layers
from linearize.progress import NullProgress

SPEC: dict[str, Any] = dict(
    feature_map="learned_softmax", normaliser="own", state_heads="kv", mix="mass", coverage="all", rope=False, window=8
)  # fmt: skip


def mixer_of(width: int) -> Mixer:
    torch.manual_seed(0)
    spec = MixerSpec(**SPEC, feature_dim=width)
    return Mixer(spec, hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8, scaling=8**-0.5).double()


@torch.no_grad()
def test_a_narrow_code_for_every_key_is_softmax_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys with a common part, and biases: what all keys share must fall out."""
    monkeypatch.setattr(module, "WIDTH", 1e-3)
    mixer, draw = mixer_of(20), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 20, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    k = k + 3.0 * torch.randn(1, 2, 1, 8, generator=draw, dtype=torch.float64)
    start_codes(mixer, k[0])
    mixer.branches = "linear"
    found = mixer(q, k, v, inputs=torch.zeros(1, 20, 24, dtype=torch.float64), rotation=None)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, want.transpose(1, 2), rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_fewer_keys_than_codes_leave_the_others() -> None:
    mixer = mixer_of(20)
    before = {name: x.clone() for name, x in mixer.named_parameters()}
    start_codes(mixer, torch.randn(2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for name, x in mixer.named_parameters():
        if name.partition(".")[0] not in ("q_map", "k_map"):
            assert torch.equal(x, before[name]), name
            continue
        assert torch.equal(x[..., 12:], before[name][..., 12:]), name
        changed = (x != before[name])[..., :12].reshape(-1, 12).any(0)
        assert changed.all() or name == "q_map.bias", name


def test_calibration_starts_codes_at_the_teachers_keys(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    teacher.requires_grad_(False)
    spec = MixerSpec(**SPEC, feature_dim=40)
    plan = mixer_plan(teacher.config.num_hidden_layers, ())
    student = linearize_model(teacher, spec=spec, layer_mixers=plan, seed=0)[0]
    fresh = {index: x.mixer.k_map.weight.clone() for index, x in attention_layers(student)}
    rows = np.random.default_rng(0).integers(0, 256, (4, 96), dtype=np.int32)
    report = calibrate(student, teacher, windows=rows, tokens=192, seed=0, progress=NullProgress())
    for index, attention in attention_layers(student):
        mixer = attention.mixer
        columns = mixer.k_map.weight
        assert not torch.isclose(columns, fresh[index]).all(0).any(), "every column is a key"
        # A query reads the same centres, at another scale.
        of_query = mixer.q_map.weight.unflatten(0, (mixer.state_heads, -1))[:, 0]
        assert torch.nn.functional.cosine_similarity(columns, of_query, dim=1).min() > 0.9999
    assert all(row["error_after"] <= row["error_before"] for row in report)
