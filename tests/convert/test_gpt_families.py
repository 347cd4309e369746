"""GPT-NeoX, GPT-2 and OPT from a folder to a folder: names, buffers and shapes as their published files have them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize.artifacts.config_reader import read_config
from linearize.artifacts.load import load_model
from linearize.convert import lora, pipeline
from linearize.convert.families import check_fit
from linearize.convert.finetune import training_mode
from linearize.convert.lora import extract, inject
from linearize.convert.pipeline import convert
from linearize.convert.plan import inspect, make_plan
from linearize.convert.surgery import linearize_model, trained_names
from linearize.convert.swap import measure, swapped, window_attentions
from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.evaluate.truncation import truncated
from linearize.modeling.mixer_spec import MixerSpec
from linearize.recipe import Lora, load_recipe
from tests.conftest import save_byte_tokenizer
from tests.modeling.families import UNGROUPED, teacher

TINY: dict[str, Any] = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
                        "max_position_embeddings": 128, "initializer_range": 0.2, "init_std": 0.2}  # fmt: skip
ATTENTION, MLP = "q_proj, k_proj, v_proj, o_proj", "gate_proj, up_proj, down_proj"
SHORT = [
    *(
        "context=64",
        "device=cpu",
        "mixer.window=8",
        "mixer.feature_dim=8",
        "align.train=[mixer, q_proj, k_proj, v_proj]",
    ),
    *("align.tokens=6k", "align.batch_tokens=256", "align.lr=3e-3"),
    *("finetune.tokens=3k", "finetune.batch_tokens=256", "finetune.lr=1e-2", "finetune.full_lr=1e-3"),
    *(f"finetune.lora.targets=[{MLP}]", f"finetune.full=[mixer, {ATTENTION}]"),
]
"""`lolcats` with all that other recipes train: projections in full, adapters on the MLP."""
SPEC = MixerSpec(feature_dim=8, window=16)


def published(family: str, tensors: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The tensors under the names, and beside the buffers, of the family's files on the Hub."""
    tril = torch.ones(1, 1, 8, 8).tril()
    if family == "gpt2":
        found = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
        return found | {f"h.{i}.attn.bias": tril.clone() for i in range(3)}
    if family == "gpt_neox":
        found = {name.replace("lm_head.", "embed_out."): t for name, t in tensors.items()}
        for i in range(3):
            place = f"gpt_neox.layers.{i}.attention."
            found |= {place + "bias": tril.bool().clone(), place + "masked_bias": torch.tensor(-1e9)}
            found[place + "rotary_emb.inv_freq"] = torch.ones(3)
        return found
    return tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folders(family) -> a small teacher on disk, as it would come from the Hub."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "teacher"
            model = teacher(family, **TINY)
            model.save_pretrained(folder)
            tensors = load_file(folder / "model.safetensors")
            save_file(published(family, tensors, model), folder / "model.safetensors", metadata={"format": "pt"})
            save_byte_tokenizer(folder)
            made[family] = folder
        return made[family]

    return build


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_published_files_are_read(family: str, folders: Callable[[str], Path]) -> None:
    plan = make_plan(folders(family), recipe=load_recipe("lolcats", SHORT))
    assert {"gpt2": 3, "gpt_neox": 9, "opt": 0}[family] == len(plan["dropped"])
    assert plan["trained"]["align"] > plan["new_parameters"] and plan["trained"]["finetune"] > plan["new_parameters"]
    found = inspect(folders(family), load_recipe("lolcats", SHORT))
    assert found["kv_heads"] == found["heads"] == 4 and found["break_even_context"] > 0
    model, native = load_model(folders(family), device="cpu"), teacher(family, **TINY)
    x = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x).logits, native(x).logits)


@pytest.mark.parametrize("family", UNGROUPED)
def test_a_short_conversion_lowers_the_loss(
    family: str, folders: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained moves, and nothing else: fused projections as one, adapters where the MLP has its matrices."""
    monkeypatch.setattr(pipeline, "verify_export", lambda *a, **k: {})  # test_family_matrix loads in fresh processes
    overrides = [*SHORT, "keep_softmax=[1]"]
    report = convert(folders(family), tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=overrides)
    for stage in ("align", "finetune"):
        assert report["stages"][stage]["loss_last"] < report["stages"][stage]["loss_first"], stage
    before, after = load_file(folders(family) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    before = {name if name in after else name.replace("embed_out", "lm_head"): t for name, t in before.items()}
    before = {name if name in after else f"transformer.{name}": t for name, t in before.items()}
    moved = {
        re.sub(r".*\.\d\.", "", name) for name in set(before) & set(after) if not torch.equal(before[name], after[name])
    }
    both = ("weight", "bias")
    assert (
        moved
        == {
            "gpt_neox": {f"attention.{m}.{p}" for m in ("query_key_value", "dense") for p in both}
            | {"mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"},
            "gpt2": {f"attn.{m}.{p}" for m in ("c_attn", "c_proj") for p in both}
            | {"mlp.c_fc.weight", "mlp.c_proj.weight"},
            "opt": {f"self_attn.{m}.{p}" for m in ("q_proj", "k_proj", "v_proj", "out_proj") for p in both}
            | {"fc1.weight", "fc2.weight"},
        }[family]
    )


@pytest.mark.parametrize("head", ["absent", "embed_out", "lm_head"])
def test_tied_embeddings_of_gpt_neox_are_read(head: str, tmp_path: Path) -> None:
    """Whether or not their file holds the head a second time, and by which of its names."""
    native = teacher("gpt_neox", tie_word_embeddings=True, **TINY)
    native.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not [name for name in tensors if "embed_out" in name or "lm_head" in name]
    if head != "absent":
        tensors[f"{head}.weight"] = tensors["gpt_neox.embed_in.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_byte_tokenizer(tmp_path)
    dropped = make_plan(tmp_path, recipe=load_recipe("lolcats", SHORT))["dropped"]
    rules = {} if head == "absent" else {"lm_head.weight": "tied output embedding, the same as the input's"}
    assert dropped == rules
    loaded = load_model(tmp_path, device="cpu")
    student, _ = linearize_model(loaded, spec=SPEC, layer_mixers=["softmax"] * 3, seed=0)
    x = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(student(x).logits, native(x).logits)
    del tensors["gpt_neox.embed_in.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if head == "absent":
        with pytest.raises(RefusedError, match=r"the teacher's files lack gpt_neox\.embed_in\.weight"):
            make_plan(tmp_path, recipe=load_recipe("lolcats", SHORT))


@pytest.mark.parametrize("family", UNGROUPED)
def test_one_step_of_adapters_counts_as_movement(
    family: str, folders: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of every adapter has no gradient in its first step; a layer that stands still is named by its number."""
    monkeypatch.setattr(pipeline, "verify_export", lambda *a, **k: {})
    one = [*SHORT, "align.tokens=0", "calibrate.tokens=0", "finetune.tokens=1"]
    how: dict[str, Any] = {"recipe": "lolcats", "data": str(text_file)}
    report = convert(folders(family), tmp_path / "out", overrides=[*one, "finetune.full=[]"], **how)
    assert report["stages"]["finetune"]["steps"] == 1
    still = ["finetune.lora=null", f"finetune.full=[{ATTENTION}]", "finetune.full_lr=1e-30"]
    with pytest.raises(VerificationError, match=r"^layer 0: finetuning moved none of its parameters in 1 steps"):
        convert(folders(family), tmp_path / "still", overrides=[*one, *still], **how)


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_adapters_are_merged_as_they_compute(family: str) -> None:
    """Also into transposed and fused projections, whose update is of another shape."""
    student, _ = linearize_model(teacher(family), spec=SPEC, layer_mixers=["linear"] * 3, seed=0)
    recipe = Lora(r=3, alpha=6.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    made = inject(student, recipe, seed=0)
    for name, p in made.items():
        p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    x = torch.randint(3, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    adapted = student(x, use_cache=False).logits
    places = {name.rpartition(".lora_")[0].split(".", 4)[-1] for name in made}
    assert len(made) == 3 * 2 * {"gpt_neox": 4, "gpt2": 4, "opt": 6}[family], places
    widths = [lora.width_of(module.base_layer) for module in student.modules() if hasattr(module, "lora_A")]
    assert sum(p.numel() for p in made.values()) == 3 * sum(widths)
    extract(student, merge=True)
    merged = student(x, use_cache=False).logits
    assert not [name for name, _ in student.named_parameters() if "lora" in name]
    assert (
        (merged - adapted).abs().max() < 1e-5 * adapted.abs().max() < (merged - teacher(family)(x).logits).abs().max()
    )


@pytest.mark.parametrize(("family", "module"), [("gpt_neox", "query_key_value"), ("gpt2", "c_attn")])
def test_a_part_of_a_fused_projection_is_refused_by_name(family: str, module: str) -> None:
    student, _ = linearize_model(teacher(family), spec=SPEC, layer_mixers=["linear"] * 3, seed=0)
    with pytest.raises(UsageError, match=rf"q_proj cannot be trained without k_proj and v_proj.*{module}"):
        inject(student, Lora(targets=("q_proj",)), seed=0)
    with pytest.raises(UsageError, match=r"finetune.full: k_proj"):
        trained_names(student, ["k_proj"], key="finetune.full")
    assert {type(m) for n, m in student.named_modules() if n.endswith(module)} == {
        nn.Linear if family == "gpt_neox" else Conv1D
    }
    names = trained_names(student, ["q_proj", "k_proj", "v_proj", "mixer"], [1])
    assert all(".1." in name for name in names) and len([n for n in names if module in n]) == 2


@pytest.mark.parametrize("family", UNGROUPED)
def test_training_runs_without_the_teachers_dropout(family: str) -> None:
    native = teacher(family, **{"gpt2": {}, "opt": {"layerdrop": 0.5, "attention_dropout": 0.3}}.get(
        family, {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    ))  # fmt: skip
    student, _ = linearize_model(native, spec=SPEC, layer_mixers=["linear", "softmax", "linear"], seed=0)
    x = torch.randint(3, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    want = student(x, use_cache=False).logits
    with training_mode(student, checkpointing=False):
        assert torch.equal(student(x, use_cache=False).logits, want)
    student.train()
    assert not torch.equal(student(x, use_cache=False).logits, want)  # it is as it was before


def test_cross_attention_is_refused() -> None:
    native = teacher("gpt2")
    native.config.add_cross_attention = True
    with pytest.raises(UsageError, match="add_cross_attention is True"):
        check_fit(native.config, spec=SPEC, linear_layers=[0], context=128)


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_a_teacher_cut_to_its_window_is_a_student_of_windows(family: str) -> None:
    """The floor of the audit, and what layers are selected by, are one thing in these families too."""
    native = teacher(family)
    x = torch.randint(3, 96, (2, 100), generator=torch.Generator().manual_seed(0))
    whole = native(x).logits
    with truncated(native, 16, 2):
        cut = native(x).logits
    with swapped(native, window_attentions(native, window=16, sinks=2)):
        assert (native(x, use_cache=False).logits - cut).norm() < 1e-5 * cut.norm()
    assert torch.equal(native(x).logits, whole) and (cut - whole).norm() > 1e-3 * cut.norm()
    teachers, (swap,) = measure(
        native, x.int().numpy(), [window_attentions(native, window=16, sinks=2)], stage="window"
    )
    assert teachers.kl == 0 < swap.kl


@pytest.mark.parametrize("key", ["n_embd", "n_layer", "n_head", "n_positions", "vocab_size"])
def test_sizes_are_bounded_under_the_familys_own_names(
    key: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((folders("gpt2") / "config.json").read_text())
    for value, words in (
        (10**12, rf"{key} is 1000000000000"),
        (0, rf"{key} is 0"),
        ("4", rf"{key} must be an integer"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UsageError, match=words):
            read_config(tmp_path)
    if key != "n_positions":
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(UsageError, match=rf"has no {key}"):
            read_config(tmp_path)
