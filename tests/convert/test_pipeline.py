"""From a folder to a folder, and every way to be turned away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearize.artifacts.load import load_model, load_tokenizer
from linearize.artifacts.manifest import read_manifest, verify_manifest
from linearize.convert import pipeline, verify
from linearize.convert.pipeline import convert
from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.progress import NullProgress
from linearize.recipe import load_recipe

QUICK = ["context=128", "mixer.window=16", "device=cpu", "align.batch_tokens=512", "finetune.batch_tokens=512"]
SHORT = [*QUICK, "align.tokens=12k", "finetune.tokens=12k"]


class Watch(NullProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, float, dict[str, Any]]] = []
        self.messages: list[str] = []
        self.tables: list[Any] = []

    def step(self, stage: str, step: int, loss: float, tokens: int, extra: Mapping[str, Any]) -> None:
        self.steps.append((stage, step, loss, dict(extra)))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def layer_table(self, rows: Any) -> None:
        self.tables.append(rows)


def test_a_short_conversion(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (teacher := tmp_path / "teacher").mkdir()
    shutil.copytree(teacher_folder, teacher, dirs_exist_ok=True)
    (teacher / "LICENSE").write_text("terms")
    random, watch = torch.get_rng_state(), Watch()
    overrides = [*SHORT, "mixer.feature_dim=8", "keep_softmax=[1]", "dtype=bfloat16"]
    overrides += ["finetune.kl=1", "finetune.lr=1e-2"]
    report = convert(teacher, "made/out", recipe="lolcats", data=str(text_file), overrides=overrides, progress=watch)
    assert torch.equal(random, torch.get_rng_state()) and not torch.are_deterministic_algorithms_enabled()

    stages = report["stages"]
    assert stages["align"]["loss_last"] < stages["align"]["loss_first"]
    assert stages["finetune"]["loss_last"] < stages["finetune"]["loss_first"]
    assert [s["steps"] for s in stages.values()] == [23, 23] and stages["align"]["tokens"] == 23 * 512
    assert [row["layer"] for row in report["layers"]] == [0] and 0 < report["mean_match"] < 1
    assert report["verification"]["import"]["max_abs_difference"] == 0.0
    assert report["verification"]["remote"]["max_abs_difference"] == 0.0
    assert report["merge_error"]["merge"]["max"] < 1e-3 < report["merge_error"]["cast"]["max"]
    assert report["keys"]["new"] == 3 and report["parameters"]["new"] == 516
    assert [s[:2] for s in watch.steps] == [(stage, n) for stage in ("align", "finetune") for n in range(1, 24)]
    assert watch.steps[0][3]["layer"] == 0 and "kl" in watch.steps[-1][3] and len(watch.tables) == 1

    out = tmp_path / "made" / "out"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert verify_manifest(out) == []
    manifest = read_manifest(out)
    assert manifest["recipe_digest"] == load_recipe("lolcats", overrides).digest()
    assert manifest["figures"]["stages"] == stages and manifest["data"]["name"] == "text.txt"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (teacher / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_linearized.LinearizedLlamaConfig",
        "AutoModelForCausalLM": "modeling_linearized.LinearizedLlamaForCausalLM",
    }
    assert config["model_type"] == "linearized_llama" and config["layer_mixers"] == ["linear", "softmax"]
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LinearizedLlamaForCausalLM"]
    tensors = load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16} and not [n for n in tensors if "lora" in n]
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    card = (out / "README.md").read_text()
    front = "---\nlibrary_name: transformers\nlicense: other\nlicense_name: base-model-licence\nlicense_link: LICENSE\n"
    assert card.startswith(front) and "`teacher`, not from the Hub" in card
    digest = manifest["data"]["sha256"][:12]
    assert f"`text.txt`, sha256 `{digest}..." in card and "the last 16 to 32 tokens (blocks of 16), no sinks" in card
    assert card.count('from_pretrained("out"') == 4 and "audit out --against" in card and "FOLDER" not in card
    assert "`LICENSE`, as they lay" in card and card.count("running mean of the training loss") == 2
    assert "the attention of 1 of its 2 layers" in card and "trust_remote_code=True" in card and "{" not in card

    model, tokenizer = load_model(out, device="cpu"), load_tokenizer(out)
    made = model.generate(**tokenizer("import ", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert made.shape[1] == 12


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two fresh processes, which cost ten seconds."""
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})


@pytest.mark.usefixtures("unverified")
def test_no_layer_converted_and_nothing_trained_is_the_teacher(
    make_teacher: Callable[..., Any], teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    model = make_teacher("qwen2 some sliding layers")
    pipeline.export.cast(model, torch.bfloat16)
    model.save_pretrained(teacher)
    watch = Watch()
    report = convert(
        teacher, tmp_path / "out", recipe="lolcats", data=str(text_file), progress=watch,
        overrides=[*QUICK, "keep_softmax=every 1", "finetune.tokens=0"],
    )  # fmt: skip
    assert report["layers"] == [] and report["mean_match"] is None and report["keys"]["new"] == 0
    assert watch.messages[0].startswith("align is skipped: no linear layer")
    assert watch.messages[1] == "finetune is skipped: finetune.tokens is 0"
    ids = torch.arange(200)[None]
    with torch.no_grad():
        ours, theirs = (load_model(tmp_path / n, device="cpu")(ids).logits for n in ("out", "teacher"))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("options", [
    ["align.train=[mixer,q_proj]", "finetune.full=[mixer]"],
    ["align.objective=hidden", "align.branch=both", "align.window_dropout=0.5", "finetune.tokens=0"],
    ["align.tokens=0", "finetune.lora=null", "finetune.full=[mixer,q_proj,k_proj]", "gradient_checkpointing=true"],
], ids=str)  # fmt: skip
def test_ways_to_train(teacher_folder: Path, text_file: Path, tmp_path: Path, options: list[str]) -> None:
    short = [*QUICK, "mixer.feature_dim=8", "align.tokens=4k", "finetune.tokens=4k", *options]
    report = convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=short)
    trained = [name for name, stage in report["stages"].items() if stage["steps"]]
    assert {n: report["parameters"]["trained"][n] > 0 for n in ("align", "finetune")} == {
        n: n in trained for n in ("align", "finetune")
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher_folder, tmp_path / "out"))
    moved = {n.split(".")[-2] for n, t in before.items() if not torch.equal(t, after[n])}
    expected = {"q_proj"} if "align.train=[mixer,q_proj]" in options else set()
    if "finetune" in trained:
        expected |= {"q_proj", "k_proj"} | (set() if "null" in options[1] else {"v_proj", "o_proj"})
    assert moved == expected


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("recipe", ["lolcats", "liger-hgrn2"])
def test_every_family_end_to_end(
    make_teacher: Callable[..., Any], variant: str, recipe: str, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(teacher_folder, teacher)
    make_teacher(variant).save_pretrained(teacher)
    short = [*QUICK, "align.tokens=1k", "finetune.tokens=1k"]
    convert(teacher, out, recipe=recipe, data=str(text_file), overrides=short)
    model = load_model(out, device="cpu")
    for name in ("rope_parameters", "tie_word_embeddings", "num_key_value_heads", "hidden_size"):
        assert getattr(model.config, name) == getattr(load_model(teacher, device="cpu").config, name)
    ids = torch.arange(60)[None] * 3 % 256
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :41], use_cache=True)
        steps = [first.logits]
        for at in range(41, 60):
            steps.append(model(ids[:, at : at + 1], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("unverified")
def test_a_large_export_is_sharded(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.export, "SHARD", "60KB")
    quick = [*QUICK, "mixer.feature_dim=8", "align.tokens=0", "finetune.tokens=0"]
    convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=quick)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify_manifest(tmp_path / "out") == []
    load_model(tmp_path / "out", device="cpu")


def refused(error: type[Exception], match: str, model: Path, out: Path, data: Path, *overrides: str) -> None:
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else None
    with pytest.raises(error, match=match):
        convert(model, out, recipe="lolcats", data=str(data), overrides=[*SHORT, "mixer.feature_dim=8", *overrides])
    assert before == (sorted(out.parent.rglob("*")) if out.parent.exists() else None)


def test_bad_input_is_refused_and_leaves_nothing(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    refused(UsageError, "no model", tmp_path / "absent", out, text_file)
    refused(UsageError, "no such file", teacher_folder, out, tmp_path / "absent.txt")
    refused(UsageError, r"context=256", teacher_folder, out, text_file, "context=512")
    refused(UsageError, "never be used", teacher_folder, out, text_file, "context=32")
    refused(UsageError, "keep_softmax", teacher_folder, out, text_file, "keep_softmax=[7]")
    (tmp_path / "short.txt").write_text("too short")
    refused(RefusedError, "shorter than one context: 10 tokens, needs 128", teacher_folder, out, tmp_path / "short.txt")
    (tmp_path / "full" / "out").mkdir(parents=True)
    (tmp_path / "full" / "out" / "notes.txt").write_text("mine")
    refused(RefusedError, "is not empty", teacher_folder, tmp_path / "full" / "out", text_file)


def test_no_space_is_refused(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(RefusedError, "1000 bytes free", teacher_folder, tmp_path / "new" / "out", text_file)


def test_a_damaged_teacher_is_refused_by_name(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "new" / "out"
    shutil.copytree(teacher_folder, teacher)
    weights = teacher / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.self_attn.k_proj.weight"
    for changed, error, match in (
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, RefusedError, rf"{name}.*NaN"),
        ({n: t for n, t in tensors.items() if n != name}, (RefusedError, UsageError), name),
        (tensors | {"model.layers.0.self_attn.sinks": torch.ones(4)}, (RefusedError, UsageError), "sinks"),
    ):
        save_file(changed, weights, metadata={"format": "pt"})
        refused(error, match, teacher, out, text_file)  # type: ignore[arg-type]
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    refused(UsageError, "model.safetensors", teacher, out, text_file)


def test_a_dead_training_leaves_nothing(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearize.convert import align, checkpoint

    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(align, "DIVERGED", 0.0)
    monkeypatch.setattr(align.LayerTrack, "add", lambda self, loss, nmse: self.__init__(first=1.0, loss=2.0, nmse=2.0))
    refused(VerificationError, "layer 0: the alignment diverged", teacher_folder, tmp_path / "new" / "out", text_file)


def test_an_export_that_differs_is_not_left_behind(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = [*QUICK, "mixer.feature_dim=8", "align.tokens=0", "finetune.tokens=0"]
    write = pipeline.export.write_export

    def damaged(folder: Path, *args: Any, **kwargs: Any) -> None:
        write(folder, *args, **kwargs)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(pipeline.export, "write_export", damaged)
    with pytest.raises(VerificationError, match=r"with import linearize, differs .* a logit by"):
        convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=quick)

    def broken(folder: Path, *args: Any, **kwargs: Any) -> None:
        write(folder, *args, **kwargs)
        (folder / "mixer_state.py").unlink()

    monkeypatch.setattr(pipeline.export, "write_export", broken)
    monkeypatch.setattr(verify, "MODES", {"remote": verify.MODES["remote"]})
    with pytest.raises(VerificationError, match="does not load in a fresh process with trust_remote_code=True: "):
        convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=quick)
    assert not list(tmp_path.iterdir())
