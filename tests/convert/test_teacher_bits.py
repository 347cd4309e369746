"""Frozen weights in 8 or 4 bits while a conversion trains, and an export that has none of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linearize import teacher_bits
from linearize.artifacts.load import load_model
from linearize.artifacts.quantised import quantised_modules
from linearize.artifacts.verify import verify
from linearize.convert import exact, export, pipeline
from linearize.convert.exact import put_together
from linearize.convert.pipeline import convert
from linearize.convert.plan import make_plan
from linearize.convert.surgery import linearize_model
from linearize.errors import RefusedError, UsageError
from linearize.modeling.mixer_spec import MixerSpec
from linearize.recipe import load_recipe
from linearize.task import CAUSAL
from linearize_cli.app import main
from tests import encoders
from tests.conftest import save_byte_tokenizer
from tests.convert.test_family_matrix import short_lists
from tests.interrupter import Interrupter
from tests.modeling.families import teacher as make_teacher

needs = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (the extra quantize)")
SMALL = ["context=32", "mixer.window=8", "mixer.feature_dim=8", "device=cpu", "align.tokens=512",
         "align.batch_tokens=128", "finetune.tokens=512", "finetune.batch_tokens=128"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    """A small Llama, stored in bfloat16."""
    place = tmp_path_factory.mktemp("bits")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    build_llama(place / "float", initializer_range=0.2, **sizes)
    model = load_model(place / "float", device="cpu", dtype="bfloat16")
    model.save_pretrained(place / "teacher")
    save_byte_tokenizer(place / "teacher")
    return place / "teacher"


def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes are another test's matter."""
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})


def weights(place: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in place.glob("*.safetensors") for name, value in load_file(path).items()}


# ------------------------------------------------------------------------------------------------ refused, by name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--teacher-bits", "5"], "--teacher-bits: 5 is not one of 4, 8. Use 8 or 4"),
        (["--teacher-bits", "4", "--stream"], "with --stream one layer is held at a time"),
        (["--teacher-bits", "4"], "needs bitsandbytes, which is not installed. pip install 'bitsandbytes>=0.49.2'"),
        (["--teacher-bits", "8", "--plan"], "needs bitsandbytes, which is not installed"),
    ],
)
def test_refused_before_any_work(
    options: list[str], told: str, folder: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(teacher_bits.importlib.util, "find_spec", lambda name: None)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--data", str(text_file), *options]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_refused(family: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_teacher(family, vocab_size=259).save_pretrained(tmp_path / "teacher")
    save_byte_tokenizer(tmp_path / "teacher")
    monkeypatch.setattr(teacher_bits.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match=f"does not quantise the experts of {family}"):
        options: dict[str, Any] = {"recipe": "lolcats", "data": str(text_file), "overrides": SMALL}
        convert(tmp_path / "teacher", tmp_path / "out", teacher_bits=4, **options)
    with pytest.raises(UsageError, match="does not quantise the experts"):
        make_plan(tmp_path / "teacher", recipe=load_recipe("lolcats", SMALL), teacher_bits=4)


def test_a_plan_says_what_it_saves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    undocumented: Callable[[str, dict[str, Any]], list[str]],
) -> None:  # fmt: skip
    monkeypatch.setattr(teacher_bits.importlib.util, "find_spec", lambda name: True)
    recipe = load_recipe("lolcats", SMALL)
    whole, eight, four = (make_plan(folder, recipe=recipe, teacher_bits=bits) for bits in (None, 8, 4))
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert whole["memory_bytes"] - eight["memory_bytes"] == 3 * linear
    assert whole["memory_bytes"] - four["memory_bytes"] == round(3.484 * linear)
    assert (whole["teacher_bits"], four["teacher_bits"]) == (None, 4)
    assert undocumented("convert --plan", four) == []
    command = ["convert", str(folder), str(tmp_path / "out"), *SMALL, "-r", "lolcats", "--plan", "--teacher-bits", "4"]
    assert main(command) == 0
    assert "frozen weights are held in 4 bit while it trains; the export is exact" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the quantised side


@needs
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_those_of_what_the_bits_say(bits: int, folder: Path) -> None:
    """Also after a call without gradients, on which bitsandbytes may change its weights for good."""
    from bitsandbytes.functional import dequantize_4bit

    model, stored = load_model(folder, device="cpu", dtype="float32", bits=bits), weights(folder)
    packed = quantised_modules(model)
    assert len(packed) == 14 and all("layers" in name for name in packed)
    for name, module in packed.items():
        held: Any = module.weight
        value = dequantize_4bit(held.data, held.quant_state) if bits == 4 else held.CB.float() * held.SCB[:, None] / 127
        whole = stored[f"{name}.weight"].float()
        assert 0.001 < (value - whole).norm() / whole.norm() < (0.1 if bits == 4 else 0.01)
        entering, leaving = (torch.randn(2, 24, size) for size in (module.in_features, module.out_features))
        with torch.no_grad():
            module(entering)
        found = module(entering.requires_grad_())
        found.backward(leaving)
        assert entering.grad is not None
        exact_gradient, exact_output = leaving @ value, entering.detach() @ value.T
        assert (entering.grad - exact_gradient).norm() < 1e-5 * exact_gradient.norm()
        allowed = 1e-5 if bits == 4 else 0.01  # LLM.int8 rounds what enters, too
        assert (found - exact_output).norm() < allowed * exact_output.norm()


@needs
def test_what_is_frozen_is_held_once(folder: Path) -> None:
    teacher = load_model(folder, device="cpu", dtype="float32", bits=4)
    whole = weights(folder)

    def own(name: str) -> bool:
        return name.endswith("q_proj.weight")

    student, report = linearize_model(
        teacher, spec=MixerSpec(window=8), layer_mixers=["linear", "softmax"], seed=0, own=own,
        exact=lambda name: whole[name].float(),
    )  # fmt: skip
    assert set(whole) <= set(report.mapped) and getattr(student.config, "quantization_config", None) is None
    for name, module in quantised_modules(teacher).items():
        if name.endswith("q_proj"):
            assert torch.equal(student.get_submodule(name).weight, whole[f"{name}.weight"].float())
        else:
            assert student.get_submodule(name) is module
    # 4 bits a weight, and scales
    assert sum(m.weight.nbytes for m in quantised_modules(teacher).values()) == sum(
        value.numel() // 2 for name, value in whole.items() if "_proj" in name
    )


@needs
def test_they_follow_autocast(folder: Path) -> None:
    module = quantised_modules(load_model(folder, device="cpu", dtype="float32", bits=4))["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 64)
    assert module(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_a_model_that_is_stored_narrow_computes_in_float32(folder: Path) -> None:
    model, wide = (load_model(folder, device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32"))
    ids = torch.arange(40)[None]
    with export.in_float32(model):
        assert torch.equal(export.logits_of(model, ids, CAUSAL), export.logits_of(wide, ids, CAUSAL))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(export.logits_of(model, ids, CAUSAL), export.logits_of(wide, ids, CAUSAL))


IMPORT = """
import sys
from linearize.artifacts.quantised import import_bitsandbytes
import_bitsandbytes()
assert "kernels" not in sys.modules
import kernels
"""


@needs
def test_no_code_comes_from_the_hub(tmp_path: Path, source_env: dict[str, str]) -> None:
    """Where the package `kernels` is installed, bitsandbytes would have it fetch some."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*names, **more):\n    print('fetched', names)\n")
    env = source_env | {"PYTHONPATH": f"{source_env['PYTHONPATH']}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------------------ conversions


@needs
@pytest.mark.slow
def test_the_export_is_exact(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    undocumented: Callable[[str, dict[str, Any]], list[str]],
) -> None:  # fmt: skip
    """What was not trained is the checkpoint's, bit for bit; adapters are merged into its own weights, cast once."""
    kept: list[exact.Kept] = []

    def watched(inputs: Any, trained: exact.Kept, ids: torch.Tensor) -> Any:
        kept.append(trained)
        return put_together(inputs, trained, ids)

    monkeypatch.setattr(exact, "put_together", watched)
    report = convert(folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=SMALL, teacher_bits=4)
    before, after = weights(folder), weights(tmp_path / "out")
    adapted = [name for name in before if "self_attn" in name]
    assert len(adapted) == 8
    for name, value in before.items():
        if name not in adapted:
            assert torch.equal(after[name], value), name
            continue
        path = name.removesuffix(".weight")
        down, up = (kept[0].values[f"{path}.lora_{side}.default.weight"] for side in "AB")
        assert up.abs().max() > 0
        scale = (lora := load_recipe("lolcats").finetune.lora).alpha / lora.r  # type: ignore[union-attr]
        assert torch.equal(after[name], (value.float() + scale * (up @ down)).bfloat16()), name
    for name in set(after) - set(before):
        assert torch.equal(after[name], kept[0].values[name].to(after[name].dtype)), name
    assert report["teacher_bits"] == 4 and report["merge_error"]["quantised"]["mean"] > 0
    assert report["merge_error"]["merge"]["max"] < 1e-3
    assert [way["max_abs_difference"] for way in report["verification"].values()] == [0.0, 0.0]
    assert undocumented("convert", report) == []
    assert json.loads((tmp_path / "out" / "linearize.json").read_text())["teacher_bits"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "held in 4 bit (nf4); these are the teacher's own again" in card and "--teacher-bits 4" in card
    assert verify(tmp_path / "out", against=str(folder))["ok"]
    (tmp_path / "out" / "README.md").write_text(card.replace("differs by at most ", "differs by at most 9"))
    assert "figures.merge_error.quantised.max" in verify(tmp_path / "out")["problems"][0]


@needs
def test_nothing_converted_is_the_teacher_bit_for_bit(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unverified(monkeypatch)
    more = ["keep_softmax=every 1", "finetune.tokens=0"]
    convert(folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=[*SMALL, *more], teacher_bits=4)
    before, after = weights(folder), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@needs
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_resumed_run_ends_with_the_same_bytes(
    stage: str, folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unverified(monkeypatch)
    run: dict[str, Any] = {"recipe": "lolcats", "data": str(text_file), "overrides": SMALL}
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", teacher_bits=8, progress=Interrupter(stage, 2), **run)
    for other in (4, None):
        with pytest.raises(RefusedError, match="another conversion; differing: --teacher-bits"):
            convert(folder, tmp_path / "out", teacher_bits=other, resume=True, **run)
    convert(folder, tmp_path / "out", teacher_bits=8, resume=True, **run)
    convert(folder, tmp_path / "whole", teacher_bits=8, **run)
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


FULL = ["finetune.lora=null", "finetune.full=[mixer,q_proj,k_proj,v_proj,o_proj]"]
MLP = ["finetune.lora.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"]
CASES: dict[str, tuple[str, list[str], int]] = {
    "gpt2": ("lolcats", MLP, 4),
    "phi3": ("lolcats", MLP, 4),
    "opt": ("lolcats", FULL, 4),
    "gpt_neox": ("lolcats", [], 8),
    "gemma2": ("lolcats", [*FULL, "keep_softmax=[0]"], 4),
    "stablelm": ("lolcats", ["keep_softmax=auto 1"], 8),
    "bert": ("hedgehog-encoder", [], 4),
}
"""Transposed and fused projections, biases, trained in full and by adapters; a family of each kind."""


@needs
@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_of_every_kind_of_family_what_is_frozen_comes_back(
    family: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unverified(monkeypatch)
    recipe, overrides, bits = CASES[family]
    data = text_file
    if family == "bert":
        encoders.build(tmp_path / "teacher", family)
        data = encoders.text_file(tmp_path / "text.jsonl")
    else:
        sharp = {"init_std" if family == "opt" else "initializer_range": 0.2}
        sizes = {"vocab_size": 259, "num_hidden_layers": 2, **sharp, **short_lists(family)}
        make_teacher(family, **sizes).save_pretrained(tmp_path / "teacher")
        save_byte_tokenizer(tmp_path / "teacher")
    common = [option for option in SMALL if family != "bert" or not option.startswith("mixer")]
    report = convert(
        tmp_path / "teacher", tmp_path / "out", recipe=recipe, data=str(data), overrides=[*common, *overrides],
        teacher_bits=bits,
    )  # fmt: skip
    before, after = weights(tmp_path / "teacher"), weights(tmp_path / "out")
    changed = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    trained = ("attn", "attention") + (("mlp",) if overrides is MLP else ())
    assert changed and all(any(part in name for part in trained) for name in changed)
    missing = {name.rpartition(".")[0].rpartition(".")[2] for name in before.keys() - after.keys()}
    assert missing <= {"embed_out"}  # as GPT-NeoX's head is called in files
    assert 0 < report["merge_error"]["quantised"]["mean"] < 2 and report["merge_error"]["merge"]["max"] < 1e-3
    assert report["stages"]["align"]["loss_last"] < 1.05 * report["stages"]["align"]["loss_first"]


# ------------------------------------------------------------------------------------------------------------ a GPU


@needs
def test_with_products_in_bfloat16_as_on_a_gpu(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained beside 4 bits is float32 there too, and is put back beside the checkpoint's own weights."""
    from linearize.artifacts import quantised
    from linearize.convert import align, finetune, finetune_loss

    unverified(monkeypatch)
    for module in (align, finetune_loss):
        mixed = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
        monkeypatch.setattr(module, "autocast", lambda device, mixed=mixed: mixed)
    plain, prepare = quantised.quantised_loading, finetune.prepare

    def loading(bits: int, device: torch.device) -> dict[str, Any]:
        how = plain(bits, device)
        how["quantization_config"].bnb_4bit_compute_dtype = torch.bfloat16
        return how

    trained = []

    def prepared(*args: Any, **kwargs: Any) -> Any:
        trained.append(prepare(*args, **kwargs))
        return trained[-1]

    monkeypatch.setattr(quantised, "quantised_loading", loading)
    monkeypatch.setattr(pipeline, "prepare", prepared)
    report = convert(folder, tmp_path / "out", recipe="lolcats", data=str(text_file), teacher_bits=4, overrides=SMALL)
    (found,) = trained
    assert found.adapters and {p.dtype for p in found.parameters.values()} == {torch.float32}
    assert 0 < report["merge_error"]["quantised"]["mean"] < 1
    before, after = weights(folder), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before if "self_attn" not in name)


@needs
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("recipe", ["lolcats", "pure"])
def test_on_a_gpu(
    bits: int,
    recipe: str,
    build_llama: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole conversions; the frozen side takes the memory that its bits say."""
    unverified(monkeypatch)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8}
    build_llama(tmp_path / "float", num_hidden_layers=4, max_position_embeddings=256, **sizes)
    model = load_model(tmp_path / "float", device="cpu", dtype="bfloat16")
    model.save_pretrained(tmp_path / "teacher")
    save_byte_tokenizer(tmp_path / "teacher")
    peaks = {}
    for kind in (None, bits):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        options = [option for option in SMALL if not option.startswith(("mixer", "device", "context"))]
        report = convert(
            tmp_path / "teacher", tmp_path / f"out{kind}", recipe=recipe, data=str(text_file), teacher_bits=kind,
            overrides=["context=256", "device=cuda", *options],
        )  # fmt: skip
        peaks[kind] = torch.cuda.max_memory_allocated()
    before, after = weights(tmp_path / "teacher"), weights(tmp_path / f"out{bits}")
    frozen = [name for name in before if "self_attn" not in name and (recipe == "lolcats" or "mlp" not in name)]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert report["merge_error"]["quantised"]["mean"] > 0
    linear = sum(value.numel() for name, value in before.items() if "_proj" in name)
    assert peaks[None] - peaks[bits] > 0.7 * (4 - bits / 8) * linear
