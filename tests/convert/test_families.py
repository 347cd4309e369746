"""Which teachers are taken, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from linearize.artifacts.config_reader import SUPPORTED
from linearize.convert.families import FAMILIES, check_fit, family_of
from linearize.errors import UsageError
from linearize.modeling.configuration_linearized import CONFIGS, linearized_config
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import MODELS

SPEC = MixerSpec(window=8)


def fit(config: Any, context: int | None = 64, spec: MixerSpec = SPEC) -> list[str]:
    return check_fit(config, spec=spec, linear_layers=range(config.num_hidden_layers), context=context)


def test_every_family_has_its_classes() -> None:
    assert set(FAMILIES) == set(SUPPORTED) == set(CONFIGS) == set(MODELS) == {"llama", "mistral", "qwen2", "qwen3"}
    for kind, family in FAMILIES.items():
        assert MODELS[kind].__name__ == f"Linearized{family.name}ForCausalLM"


def test_an_unsupported_family_is_named_with_the_supported_ones() -> None:
    with pytest.raises(UsageError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        family_of(GPT2Config())
    with pytest.raises(UsageError, match="SequenceClassification"):
        family_of(LlamaConfig(architectures=["LlamaForSequenceClassification"]))


def test_a_converted_model_is_not_converted_again() -> None:
    config = linearized_config(LlamaConfig(num_hidden_layers=2), layer_mixers=["linear", "softmax"], spec=SPEC)
    with pytest.raises(UsageError, match="already linearized"):
        family_of(config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(kind: str) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match=rf"'{kind}'.*default, linear, llama3, yarn"):
        fit(config)
    assert "every layer stays softmax" in check_fit(config, spec=SPEC, linear_layers=[], context=64)[0]


def test_windows() -> None:
    mistral = AutoConfig.for_model("mistral", sliding_window=15, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"layer 0: .*16 tokens.*sliding window of 15.*mixer.window=7"):
        fit(mistral)
    mistral.sliding_window = 16
    assert fit(mistral)[1].startswith("layer 1: the teacher's sliding window of 16 tokens")
    qwen = AutoConfig.for_model(
        "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=2
    )
    with pytest.raises(UsageError, match="layer 1: "):
        fit(qwen)
    assert check_fit(qwen, spec=SPEC, linear_layers=[0], context=64) == []


def test_contexts() -> None:
    config = LlamaConfig(max_position_embeddings=64, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"context 65 .*context=64"):
        fit(config, 65)
    with pytest.raises(UsageError, match=r"context 16 .*never be used"):
        fit(config, 16)
    assert fit(config, 17) == fit(config, None) == []
