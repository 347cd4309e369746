"""Invariants 18 and 19 where a checkpoint is read: it chooses nothing, and bad input ends in one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

from linearize.artifacts.config_reader import build_config, read_config
from linearize.artifacts.load import check_checkpoint, load_model, load_tokenizer
from linearize.errors import LinearizeError, RefusedError, UsageError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, build_llama) -> Path:
    return build_llama(tmp_path_factory.mktemp("load") / "teacher")


@pytest.fixture
def folder(teacher, tmp_path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "copy"))


def edit(folder: Path, name: str = "config.json", **changes) -> None:
    path = folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def test_loads_what_transformers_loads(teacher):
    from transformers import AutoModelForCausalLM

    model = load_model(teacher, device="cpu")
    assert not model.training and model.dtype == torch.float32 and model.device.type == "cpu"
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(teacher)))
    assert load_model(teacher, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(teacher, device="cpu", dtype=torch.float16).dtype == torch.float16
    assert load_model(teacher, device="cpu", attn_implementation="eager").config._attn_implementation == "eager"
    tokenizer = load_tokenizer(teacher)
    text = "def naïve(x):\n\treturn '€'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tied_and_sharded(tmp_path, build_llama):
    tied = build_llama(tmp_path / "tied", tie_word_embeddings=True, shards=30_000)
    assert len(list(tied.glob("*.safetensors"))) > 1
    model = load_model(tied, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_real_teachers(shared):
    greedy = shared / "teachers" / "stories260k"
    check_checkpoint(greedy, finite=True)
    check_checkpoint(shared / "teachers" / "llama-25m", finite=True)
    model, tokenizer = load_model(greedy, device="cpu"), load_tokenizer(greedy)
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == (greedy / "greedy.txt").read_text().strip()


HOSTILE = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "trust_remote_code": True,
    "_attn_implementation": "attacker/kernels",
    "_attn_implementation_internal": "attacker/kernels",
    "attn_implementation": "attacker/kernels",
    "_experts_implementation": "attacker/kernels",
    "transformers_weights": "../outside.safetensors",
    "_name_or_path": "attacker/model",
    "_commit_hash": "0" * 40,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "attacker/kernels"},
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipe"}},
    "name_or_path": "attacker/model",
    "per_layer_config": {"0": {"skip": True}},
}


@pytest.mark.parametrize("key", HOSTILE)
def test_config_cannot_choose(folder, teacher, key, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    edit(folder, **{key: HOSTILE[key]})
    assert key not in read_config(folder)
    assert vars(build_config(folder)).get(key) != HOSTILE[key]
    assert torch.equal(logits(load_model(folder, device="cpu")), logits(load_model(teacher, device="cpu")))
    load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_model_type_that_needs_code(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(folder, model_type="evil", auto_map=HOSTILE["auto_map"])
    for read in (read_config, load_model, load_tokenizer, lambda path: check_checkpoint(path, finite=False)):
        with pytest.raises(UsageError, match=r"'evil' is not native.*never run"):
            read(folder)
    edit(folder, model_type="lama", auto_map=...)
    with pytest.raises(UsageError, match=r"unknown model_type 'lama'.*Did you mean 'llama'"):
        read_config(folder)
    edit(folder, model_type="foobar")
    with pytest.raises(UsageError, match=r"unknown model_type 'foobar'\. Supported families: llama,"):
        read_config(folder)
    assert not (tmp_path / "ran").exists()


def test_a_family_with_other_names_for_its_sizes_is_refused_as_a_family(folder):
    (folder / "config.json").write_text('{"model_type": "bloom", "n_layer": 2, "hidden_size": 32, "n_head": 4}')
    with pytest.raises(UsageError, match=r"the family 'bloom' is not supported\. Supported families: llama,"):
        load_model(folder, device="cpu")


def test_a_weight_that_is_not_finite_is_refused_when_loaded(folder):
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"'model\.norm\.weight' .* holds NaN") as caught:
        load_model(folder, device="cpu")
    assert caught.value.exit_code == 3
    assert load_model(folder, device="cpu", finite=False) is not None


def test_tokenizer_that_needs_code(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: ...\n")
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", "evil.Tok"]}, tokenizer_class="Tok")
    try:
        load_tokenizer(folder)
    except UsageError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_adapter_is_not_followed(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "attacker/model", "peft_type": "LORA"}')
    with pytest.raises(UsageError, match="is an adapter"):
        load_model(folder, device="cpu")


BAD_SIZES = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**400},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 2.0},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": True},
    {"num_hidden_layers": ...},
    {"num_hidden_layers": [2]},
    {"num_hidden_layers": None},
    {"hidden_size": 10**9},
    {"hidden_size": "64"},
    {"hidden_size": -32},
    {"vocab_size": 10**12},
    {"vocab_size": ...},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3, "head_dim": None},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": -2},
    {"head_dim": 10**7},
    {"head_dim": -8},
    {"intermediate_size": 10**9},
    {"max_position_embeddings": -5},
    {"max_position_embeddings": 10**15},
    {"rms_norm_eps": -1e-6},
    {"rms_norm_eps": "tiny"},
    {"rope_theta": 0},
    {"sliding_window": 0},
    {"layer_types": ["full_attention"]},
    {"layer_types": [1, 2]},
    {"layer_types": "full"},
    {"mixer_window": 10**9},
    {"mixer_feature_dim": -(10**9)},
    {"pad_token_id": 259},
    {"pad_token_id": -2},
    {"dtype": "float8"},
    {"dtype": "os.system"},
    {"model_type": ...},
    {"model_type": ["llama"]},
    {"quantization_config": {"quant_method": "gptq"}},
]


@pytest.mark.parametrize("change", BAD_SIZES, ids=str)
def test_sizes_out_of_bounds(folder, change):
    edit(folder, **change)
    key = next(iter(change))
    with pytest.raises(UsageError, match=r"config\.json") as caught:
        check_checkpoint(folder, finite=False)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 300
    assert key in line or key in ("quantization_config", "num_attention_heads", "num_key_value_heads", "head_dim")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 900},
        {"vocab_size": 300},
        {"hidden_size": 64},
        {"intermediate_size": 80},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"attention_bias": True},
        {"hidden_act": "os.system"},
        {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_config_that_does_not_describe_the_weights(folder, change):
    edit(folder, **change)
    with pytest.raises(UsageError) as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_missing_and_left_over(folder):
    from safetensors.torch import load, save_file

    path = folder / "model.safetensors"
    good = load(path.read_bytes())  # not load_file: its tensors are the file that is written over
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({k: v for k, v in good.items() if k != name}, path)
    with pytest.raises(UsageError, match=rf"lacks the weight {name}"):
        load_model(folder, device="cpu")
    save_file({**good, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path)
    with pytest.raises(UsageError, match=r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(folder, device="cpu")
    save_file({**good, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, path)
    load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"a": NaN}', "[" * 100_000, "\ud800", '{"model_type": "llama", "model_type": "x"}']
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_unreadable_json(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    reader = load_tokenizer if name == "tokenizer.json" else read_config
    with pytest.raises(UsageError, match=r"config\.json|tokenizer") as caught:
        reader(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json", "chat_template.jinja"])
def test_no_file_is_read_through_a_link_that_leaves(folder, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UsageError, match=f"{name} is a link that leaves its folder"):
        check_checkpoint(folder, finite=False)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"max_length": "x", "cache_implementation": "evil"}', "\xff"])
def test_bad_generation_config(folder, text):
    """Either it is read or it is one line; transformers decides which of its keys matter."""
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    try:
        load_model(folder, device="cpu")
    except UsageError as error:
        assert "\n" not in str(error)


def test_missing_files(folder, tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        check_checkpoint(tmp_path / "nowhere", finite=False)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_tokenizer(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        load_model(folder, device="cpu")


def test_random_config_damage_only_raises_our_errors(folder):
    some = hypothesis.strategies
    original = json.loads((folder / "config.json").read_text())
    leaves = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=9)
    value = some.recursive(
        leaves,
        lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
        max_leaves=4,
    )

    @hypothesis.settings(max_examples=120, deadline=None, database=None, derandomize=True)
    @hypothesis.given(key=some.sampled_from(sorted(original)), new=value)
    def check(key, new):
        (folder / "config.json").write_text(json.dumps({**original, key: new}))
        try:
            check_checkpoint(folder, finite=False)
            build_config(folder)
        except LinearizeError as error:
            assert "\n" not in str(error)

    check()
