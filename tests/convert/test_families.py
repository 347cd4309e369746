"""Which teachers are taken, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BloomConfig, LlamaConfig

import linearize.modeling.configuration_linearized as configurations
import linearize.modeling.modeling_linearized as models
from linearize.artifacts.config_reader import SUPPORTED, build_config
from linearize.artifacts.load import load_model
from linearize.convert.families import check_fit, family_of, module_paths, require_family
from linearize.convert.lora import target_modules
from linearize.convert.plan import inspect, make_plan
from linearize.convert.surgery import linearize_model, trained_names
from linearize.convert.teacher import checked_tensors
from linearize.errors import UsageError
from linearize.modeling.configuration_linearized import CONFIGS, linearized_config
from linearize.modeling.family_table import FAMILIES, PROJECTIONS, TASKS
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import MODELS
from linearize.recipe import load_recipe
from tests.docs.fences import blocks
from tests.modeling.families import DECODERS, SIZES, UNGROUPED, save_with_images, teacher, teacher_config

SPEC = MixerSpec(window=8)


def fit(config: Any, context: int | None = 64, spec: MixerSpec = SPEC) -> list[str]:
    return check_fit(config, spec=spec, linear_layers=range(config.num_hidden_layers), context=context)


# --------------------------------------------------------------------------------------------------------- the table


def test_every_family_has_its_classes() -> None:
    assert set(FAMILIES) == set(SUPPORTED) == set(CONFIGS) == set(MODELS)
    assert {"llama", "gemma3_text", "qwen3_moe"} < set(DECODERS)
    for kind, family in FAMILIES.items():
        for registry, module, ending in ((CONFIGS, configurations, "Config"), (MODELS, models, family.task)):
            name = f"Linearized{family.name}{ending}"
            assert registry[kind].__name__ == name and getattr(module, name) is registry[kind]
            assert registry[kind].__module__ == module.__name__
        assert MODELS[kind].config_class is CONFIGS[kind] and family.task in TASKS
    assert models.LinearizedLlamaAttention.family is FAMILIES["llama"]  # type: ignore[attr-defined]
    for module in (configurations, models):
        with pytest.raises(AttributeError, match="LinearizedLamaConfig"):
            module.LinearizedLamaConfig  # noqa: B018
    assert "lama" not in CONFIGS
    with pytest.raises(KeyError):
        MODELS["lama"]


@pytest.mark.parametrize("kind", DECODERS)
def test_parts_lie_where_the_table_says(kind: str) -> None:
    family, model = FAMILIES[kind], teacher(kind)
    names = [name for name, _ in model.named_parameters()]
    for layer in range(3):
        assert family.attention_of(model, layer) is model.get_submodule(family.attention_path(layer))
        for projection in PROJECTIONS:
            model.get_submodule(f"{family.layer_path(layer)}.{family.projections[projection]}")
        inside = [name for name in names if name.startswith(f"{family.layer_path(layer)}.")]
        assert inside and {family.layer_index(name) for name in inside} == {layer}
    assert model.get_input_embeddings() is family.body_of(model).get_submodule(family.embedding)
    assert model.get_output_embeddings() is model.get_submodule(family.head)
    assert family.layer_index("lm_head.weight") is None


def test_other_families_are_not_imported() -> None:
    """Nor is any family before it is used, by `import linearize` and the Auto classes."""
    code = (
        "import sys, linearize; from transformers import AutoConfig, AutoModelForCausalLM; "
        "config = AutoConfig.for_model('linearized_qwen3', num_hidden_layers=2, vocab_size=32, hidden_size=32, "
        "intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16); "
        "model = AutoModelForCausalLM.from_config(config); "
        "assert type(model).__name__ == 'LinearizedQwen3ForCausalLM'; "
        "print(*(m.rpartition('.')[2] for m in sys.modules if m.startswith('transformers.models.') "
        "and '.modeling_' in m and '.auto.' not in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["modeling_qwen3"]


# ---------------------------------------------------------------------------------------------------------- refusals


def test_an_unsupported_family_is_named_with_the_supported_ones() -> None:
    with pytest.raises(UsageError, match=r"'bloom'.*llama, mistral, qwen2, qwen3.*gemma2"):
        family_of(BloomConfig())
    with pytest.raises(UsageError, match="SequenceClassification"):
        family_of(LlamaConfig(architectures=["LlamaForSequenceClassification"]))
    with pytest.raises(UsageError, match=r"'gemma3' reads more than text.*gemma3_text"):
        family_of(AutoConfig.for_model("gemma3"))


def test_the_language_model_of_a_larger_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused as a whole, by the config that lies there; the lines of docs/families.md save its part."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    save_with_images(tmp_path / "path" / "to" / "gemma-3")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"'gemma3' reads more than text.*gemma3_text.*docs/families.md"):
        inspect("path/to/gemma-3")
    page = Path(__file__).parents[2] / "docs" / "families.md"
    (code,) = (code for code in blocks(page, "python") if "gemma-3" in code)
    exec(code, {})
    assert inspect("gemma-3-text", load_recipe("lolcats"))["family"] == "gemma3_text"
    text = AutoModelForCausalLM.from_pretrained("gemma-3-text")
    assert text.dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    whole = AutoModelForImageTextToText.from_pretrained("path/to/gemma-3")
    assert torch.equal(text(ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "of the family mistral,"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "of the family llama,"),
        ({"model_type": "gemma3"}, "of the family gemma3_text,"),
        ({"model_type": "gemma3", "text_config": 5}, "of the family gemma3_text,"),
        ({"model_type": "llava", "text_config": {"model_type": "bloom"}}, "Supported families"),
        ({"model_type": "phi" * 10_000}, r"the family '(phi){19}ph cannot be converted"),
        ({"model_type": "phi"}, "'phi' cannot be converted. Supported families"),  # and is no phi3
    ],
)
def test_what_lies_in_a_larger_model_is_named(config: dict[str, Any], part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=part):
        require_family(tmp_path)


def test_windows_that_give_way_are_told_in_one_line() -> None:
    """Not in one a layer: Gemma 2 has two dozen of them."""
    kinds = ["full_attention", *["sliding_attention"] * 3, "full_attention", "sliding_attention"]
    config = teacher_config("gemma2", num_hidden_layers=6, layer_types=kinds)
    words = "the teacher's sliding window of 160 tokens gives way to the linear branch"
    for linear, named in (([0, 1, 2, 3, 4, 5], "layers 1-3, 5"), ([0, 3], "layer 3"), ([1, 3, 5], "layers 1, 3, 5")):
        notes = check_fit(config, spec=SPEC, linear_layers=linear, context=512)
        assert [note for note in notes if "gives way" in note] == [f"{named}: {words}"]
    assert not any("gives way" in note for note in check_fit(config, spec=SPEC, linear_layers=[1], context=160))


def test_a_converted_model_is_not_converted_again() -> None:
    config = linearized_config(LlamaConfig(num_hidden_layers=2), layer_mixers=["linear", "softmax"], spec=SPEC)
    with pytest.raises(UsageError, match="already linearized"):
        family_of(config)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_decoder_that_sees_later_tokens_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=r"use_bidirectional_attention is True: .*past tokens only"):
        family_of(teacher_config(kind, use_bidirectional_attention=True))
    assert family_of(teacher_config(kind)) is FAMILIES[kind]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(kind: str) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match=rf"'{kind}'.*default, linear, llama3, yarn"):
        fit(config)
    assert "every layer stays softmax" in check_fit(config, spec=SPEC, linear_layers=[], context=64)[0]


def test_rope_is_judged_layer_by_layer() -> None:
    """Gemma 3 has one RoPE for each kind of layer; SmolLM3 leaves some layers without."""
    gemma = teacher_config("gemma3_text")
    gemma.rope_parameters["full_attention"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match="'dynamic'"):
        fit(gemma)
    check_fit(gemma, spec=SPEC, linear_layers=[0, 2], context=64)
    smol = teacher_config("smollm3")
    smol.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match="'dynamic'"):
        fit(smol)
    check_fit(smol, spec=SPEC, linear_layers=[1], context=64)


def test_windows() -> None:
    mistral = AutoConfig.for_model("mistral", sliding_window=15, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"layer 0: .*16 tokens.*sliding window of 15.*mixer.window=7"):
        fit(mistral)
    mistral.sliding_window = 16
    (note,) = fit(mistral)
    assert note.startswith("layers 0-1: the teacher's sliding window of 16 tokens")
    qwen = AutoConfig.for_model(
        "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=2
    )
    with pytest.raises(UsageError, match="layer 1: "):
        fit(qwen)
    assert check_fit(qwen, spec=SPEC, linear_layers=[0], context=64) == []
    assert [FAMILIES["gemma2"].window_of(teacher_config("gemma2"), i) for i in range(3)] == [160, None, 160]
    assert FAMILIES["qwen3_moe"].window_of(teacher_config("qwen3_moe", use_sliding_window=False), 0) is None


def test_contexts() -> None:
    config = LlamaConfig(max_position_embeddings=64, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"context 65 .*context=64"):
        fit(config, 65)
    with pytest.raises(UsageError, match=r"context 16 .*never be used"):
        fit(config, 16)
    assert fit(config, 17) == fit(config, None) == []


# ------------------------------------------------------------------------------------------- what recipes can name


def student_of(kind: str) -> Any:
    return linearize_model(teacher(kind), spec=SPEC, layer_mixers=["linear"] * 3, seed=0)[0]


def test_a_fused_projection_is_trained_as_one_or_not_at_all() -> None:
    student = student_of("phi3")
    every = ["q_proj", "k_proj", "v_proj", "o_proj"]
    path = "model.layers.1.self_attn.qkv_proj"
    assert trained_names(student, every[:3], [1]) == trained_names(student, ["qkv_proj"], [1]) == [f"{path}.weight"]
    assert [n for n in target_modules(student, every) if "layers.1." in n] == ["model.layers.1.self_attn.o_proj", path]
    assert len(target_modules(student, ["qkv_proj"])) == 3
    with pytest.raises(
        UsageError,
        match=r"align\.train: q_proj cannot be trained without k_proj and v_proj.*phi3.*qkv_proj.*Name q_proj",
    ):
        trained_names(student, ["mixer", "q_proj"], key="align.train")
    with pytest.raises(UsageError, match=r"targets: k_proj cannot be trained without q_proj.*one projection, qkv_proj"):
        target_modules(student, ["k_proj", "v_proj", "o_proj"])
    with pytest.raises(UsageError, match=r"gate_proj cannot be trained without up_proj.*gate_up_proj"):
        target_modules(student, ["gate_proj"])
    assert module_paths(FAMILIES["llama"], ["q_proj", "mixer"], key="x") == ["self_attn.q_proj", "mixer"]


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """plan(kind, *overrides): what a conversion of its small teacher would do."""

    def make(kind: str, *overrides: str) -> dict[str, Any]:
        if not (tmp_path / kind).exists():
            teacher(kind).save_pretrained(tmp_path / kind)
        quick = ["context=128", "mixer.window=16", "mixer.feature_dim=8", *overrides]
        return make_plan(tmp_path / kind, recipe=load_recipe("lolcats", quick))

    return make


def test_plans_refuse_before_any_work(plan: Callable[..., dict[str, Any]]) -> None:
    assert plan("phi3")["trained"]["finetune"] > 0
    with pytest.raises(UsageError, match=r"align\.train: q_proj cannot"):
        plan("phi3", "align.train=[mixer,q_proj]")
    with pytest.raises(UsageError, match=r"finetune\.full: v_proj cannot"):
        plan("phi3", "finetune.lora=null", "finetune.full=[v_proj]")
    attention = "finetune.lora.targets=[q_proj,k_proj,v_proj,o_proj]"
    with pytest.raises(UsageError, match=r"no module 'gate_proj'; only attention is converted: the experts") as refused:
        plan("mixtral", "finetune.lora.targets=[q_proj,o_proj,gate_proj]")
    assert "write finetune.lora.targets=[q_proj,o_proj]" in str(refused.value)
    with pytest.raises(UsageError, match=r"experts .* as they are. It has k_proj, lm_head, .*or finetune\.lora=null"):
        plan("mixtral", "finetune.lora.targets=[gate_proj,up_proj,down_proj]")
    assert plan("mixtral", "finetune.lora=null", "finetune.full=[mixer,q_proj]")["trained"]["finetune"] > 0
    rows = plan("mixtral", attention)
    assert rows["notes"][0].startswith("only attention is converted") and rows["trained"]["finetune"] > 0


def test_experts_stay_as_they_are(plan: Callable[..., dict[str, Any]]) -> None:
    for kind in ("mixtral", "qwen3_moe"):
        student = student_of(kind)
        names = trained_names(student, ["mixer", *PROJECTIONS])
        assert names and not any("mlp" in name or "gate.weight" in name for name in names if ".mixer." not in name)
        assert not any("expert" in name for name in target_modules(student, ["q_proj"]))


# ------------------------------------------------------------------------------------------------ bounds on scores


def test_an_implementation_that_drops_the_bound_is_not_used(tmp_path: Path) -> None:
    """Transformers' sdpa computes Gemma 2 without its bound, in silence."""
    from transformers import AutoModelForCausalLM

    import linearize.modeling

    linearize.modeling.register()
    native = teacher("gemma2")
    student, _ = linearize_model(native, spec=SPEC, layer_mixers=["linear", "softmax", "linear"], seed=0)
    assert native.config._attn_implementation == student.config._attn_implementation == "eager"
    for name, model in (("teacher", native), ("student", student)):
        model.save_pretrained(tmp_path / name)
        assert load_model(tmp_path / name, device="cpu").config._attn_implementation == "eager"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    x = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, student(x).logits)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "student", attn_implementation="sdpa")


@torch.no_grad()
def test_a_family_with_a_bound_converts_where_its_config_sets_none(tmp_path: Path) -> None:
    native = teacher("gemma2", attn_logit_softcapping=None)
    native.save_pretrained(tmp_path / "teacher")
    loaded = load_model(tmp_path / "teacher", device="cpu")
    student, _ = linearize_model(loaded, spec=SPEC, layer_mixers=["softmax"] * 3, seed=0)
    x = torch.arange(3, 60)[None]
    assert torch.equal(student(x).logits, loaded(x).logits) and torch.equal(loaded(x).logits, native(x).logits)
    student, _ = linearize_model(loaded, spec=MixerSpec(window=64), layer_mixers=["linear"] * 3, seed=0)
    assert torch.allclose(student(x).logits, native(x).logits, atol=1e-4), "the window sees all of the text"
    student.save_pretrained(tmp_path / "student")
    again = load_model(tmp_path / "student", device="cpu")
    assert again.config._attn_implementation == "eager" and torch.equal(again(x).logits, student(x).logits)


def test_sizes_of_every_family_are_bounded(tmp_path: Path) -> None:
    """By the names that the family gives them."""
    for kind, key in (("qwen3_moe", "num_local_experts"), ("gpt2", "n_layer"), ("gemma2", "num_hidden_layers")):
        config = json.loads(json.dumps(teacher_config(kind).to_dict()))
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert build_config(tmp_path).to_dict()[key] == config[key]
        for bad in (10**9, -1, "3"):
            (tmp_path / "config.json").write_text(json.dumps(config | {key: bad}))
            with pytest.raises(UsageError, match=key):
                build_config(tmp_path)


PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "rope_theta": 1e4, "sliding_window": 64, "cache_implementation": "hybrid"},
    "gemma3_text": {
        "head_dim": 16, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 64, "rope_scaling": None,
        "sliding_window_pattern": 2,
    },
    "phi3": {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5, "sliding_window": 2047},
    "olmo3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window": 64},
    "smollm3": {"rope_theta": 5e6, "no_rope_layers": [1, 1, 0], "use_sliding_window": False, "sliding_window": None},
    "granite": {"rope_theta": 1e4, "logits_scaling": 8.0, "attention_multiplier": 0.0078125},
    "stablelm": {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "qk_layernorm": True},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 20000},
    "mixtral": {"rope_theta": 1e6, "num_local_experts": 8, "sliding_window": None},
    "qwen3_moe": {"rope_theta": 1e6, "num_experts": 8, "moe_intermediate_size": 16, "head_dim": 16},
}  # fmt: skip
"""Keys as published checkpoints have them, some from before transformers 5."""


@torch.no_grad()
def test_an_opt_without_its_last_norm(tmp_path: Path) -> None:
    """As fairseq's were: what says so begins with an underscore, as do keys that a config may not set."""
    native = teacher("opt", _remove_final_layer_norm=True)
    assert native.model.decoder.final_layer_norm is None
    native.save_pretrained(tmp_path / "teacher")
    loaded = load_model(tmp_path / "teacher", device="cpu")
    assert checked_tensors(tmp_path / "teacher", loaded.config) == {}
    linearize_model(loaded, spec=SPEC, layer_mixers=["softmax"] * 3, seed=0)[0].save_pretrained(tmp_path / "student")
    x = torch.arange(3, 60)[None]
    assert torch.equal(load_model(tmp_path / "student", device="cpu")(x).logits, native(x).logits)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_reader_of_configs_loses_nothing_that_counts(kind: str, tmp_path: Path) -> None:
    """What is read through the allow-list is what transformers makes of the same file, and a student keeps it."""
    sizes = {key: value for key, value in SIZES.items() if kind not in UNGROUPED or key != "num_key_value_heads"}
    raw = {"model_type": kind, **sizes, **PUBLISHED[kind]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, theirs = build_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    ignored = {"cache_implementation", *(key for key in theirs.to_dict() if key.startswith("_"))}
    kept = {key: value for key, value in theirs.to_dict().items() if key not in ignored}
    assert {key: ours.to_dict().get(key) for key in kept} == kept
    student = linearized_config(ours, layer_mixers=["linear"] * 3, spec=SPEC).to_dict()
    changed = {"model_type", "architectures", "transformers_version"}
    assert {key: student[key] for key in kept if key not in changed} == {
        key: value for key, value in kept.items() if key not in changed
    }
