"""A layer at a time is the same conversion: the same bytes, in less memory, whatever happens in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.artifacts.manifest import verify_manifest
from linearize.artifacts.weights import INDEX, list_shards
from linearize.convert import norms, pipeline, stream, stream_convert, stream_run
from linearize.convert.early import run_folder
from linearize.convert.pipeline import convert
from linearize.convert.stream_states import Stream
from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.progress import NullProgress
from tests.conftest import save_byte_tokenizer
from tests.convert.streamed import SMALL, same, weights
from tests.convert.test_pipeline import Watch
from tests.modeling.families import teacher as random_teacher

HIDDEN = ["calibrate.tokens=128", "keep_softmax=[1]", "repeats=1"]
EPOCHS = ["align.window_dropout=0.5", "align.train=[mixer,q_proj]", "align.tokens=7k", "align.batch_tokens=1024",
          "mixer.window=8"]  # fmt: skip
WEIGHTS = ["align.objective=weights", "align.optimizer=muon", "align.train=[mixer,q_proj,k_proj]", "mixer.window=0"]
CASES = {
    "llama": ("pure", HIDDEN),  # hidden states, both branches, calibrated, one layer kept
    "qwen3": ("lolcats", EPOCHS),  # outputs, windows hidden at random, more steps than text
    "mistral": ("hedgehog", WEIGHTS),  # attention weights, Muon
    **{family: ("lolcats", []) for family in ("qwen2", "phi3", "olmo2", "olmo3", "smollm3", "stablelm")},
}


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh processes are another test's matter."""
    for module in (pipeline, stream_convert):
        monkeypatch.setattr(module, "verify_export", lambda folder, expected, **places: {})


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write a random teacher in many shards, with a tokenizer of bytes."""
    sizes = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    with torch.random.fork_rng():
        model = random_teacher(family, **sizes, **config).to(dtype)
    model.save_pretrained(folder, max_shard_size=20_000)
    assert len(list_shards(folder)) > 2
    save_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", stream.FINAL_NORM)
def test_streamed_is_the_ordinary_conversion(family: str, text_file: Path, tmp_path: Path) -> None:
    recipe, more = CASES[family]
    teacher = save(tmp_path / "teacher", family, **({"num_hidden_layers": 6} if family == "llama" else {}))
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text()[:5000])
    common = {"recipe": recipe, "data": str(text), "overrides": [*SMALL, *more]}
    reports = {w: convert(teacher, tmp_path / w, stream=w == "streamed", **common) for w in ("whole", "streamed")}
    same(tmp_path / "streamed", tmp_path / "whole")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "modeling_linearized.py"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = reports["streamed"], reports["whole"]
    for key in ("layers", "mean_match", "keys", "parameters", "state_bytes", "break_even_context"):
        assert ours[key] == theirs[key], key
    if theirs["calibration"]:
        for key in ("tokens", "layers"):
            assert ours["calibration"][key] == theirs["calibration"][key]
    histories = [json.loads((tmp_path / way / "history.json").read_text())["stages"]["align"] for way in reports]
    assert histories[0]["steps"] == histories[1]["steps"]
    assert histories[0]["series"].keys() == histories[1]["series"].keys()
    for name, points in histories[0]["series"].items():
        others = histories[1]["series"][name]
        assert [p is None for p in points] == [p is None for p in others], name
        known = [(p, o) for p, o in zip(points, others, strict=True) if p is not None]
        assert [p for p, _ in known] == pytest.approx([o for _, o in known], rel=2e-5), name  # means of rounded figures
    assert not run_folder(tmp_path / "streamed").exists()


def test_shards_load_as_one_model(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    import linearize  # noqa: F401 - registers the classes

    monkeypatch.setattr(stream_convert, "SHARD_BYTES", 20_000)
    teacher = save(tmp_path / "teacher", "qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)
    before = weights(teacher)
    seen = {}
    read = Stream.read

    def watched(self: Stream, layer: int, numbers: torch.Tensor) -> torch.Tensor:
        seen[self.path(layer).name] = self.path(layer).stat().st_size
        return read(self, layer, numbers)

    monkeypatch.setattr(Stream, "read", watched)
    options = [*SMALL, "align.tokens=256"]
    report = convert(teacher, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=options, stream=True)
    assert (tmp_path / "out" / INDEX).is_file() and len(list_shards(tmp_path / "out")) > 3
    after = weights(tmp_path / "out")
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert [n for n, tensor in before.items() if not torch.equal(after[n], tensor)] == []  # only mixers are trained
    assert seen["align-00001.hidden"] == 4 * 64 * 48 * 2  # four windows, in the teacher's own type
    assert report["verification"]["streamed"] == {
        "way": "layer by layer", "max_abs_difference": 0.0, "tensors": len(after)
    }  # fmt: skip
    ids = torch.randint(0, 250, (1, 90), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with torch.no_grad():
        ours, native = (m(input_ids=ids).logits.float() for m in (model, theirs))
    assert bool(ours.isfinite().all())
    assert (
        torch.equal(ours[:, :16], native[:, :16])
        or (ours[:, :16] - native[:, :16]).abs().max() < 0.2 * native.abs().max()
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], r"--stream: finetune\.tokens: finetuning needs the whole model in memory\. Write finetune\.tokens=0"),
        (
            ["finetune.tokens=0", "keep_softmax=auto"],
            r"--stream: keep_softmax: 'auto' measures the whole model.*every 4",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    more: list[str], message: str, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ["context=64", "mixer.window=16", *more]
    with pytest.raises(UsageError, match=message):
        convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=options, stream=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_an_alignment_that_always_hides_the_window_ends_without_figures(
    teacher_folder: Path, text_file: Path, tmp_path: Path, streamed: bool
) -> None:
    options = [*SMALL, "align.window_dropout=1.0", "finetune.tokens=0"]
    watch = Watch()
    report = convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=options,
                     stream=streamed, progress=watch)  # fmt: skip
    align = report["stages"]["align"]
    assert align["steps"] and align["loss_first"] is None is align["loss_last"] and report["mean_match"] is None
    assert report["layers"] == [] and watch.tables == [[]] and {step[2] for step in watch.steps} == {None}
    assert "no training loss was measured" in (tmp_path / "out" / "README.md").read_text()
    assert verify_manifest(tmp_path / "out") == []


def test_a_family_that_cannot_be_streamed(text_file: Path, tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", "granite")  # scales its embeddings
    with pytest.raises(UsageError, match=r"the family 'granite' cannot be streamed\. These can: llama, mistral"):
        convert(teacher, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=SMALL, stream=True)


def test_it_is_chosen_where_memory_is_short(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearize.convert.plan import make_plan
    from linearize.recipe import load_recipe

    recipe = load_recipe("lolcats", SMALL)
    ordinary = make_plan(teacher_folder, recipe=recipe)
    assert ordinary["streamed"] is False and ordinary["hidden_bytes"] == 0
    assert make_plan(teacher_folder, recipe=recipe, stream=True)["streamed"] is True
    monkeypatch.setattr(stream, "memory_limit", lambda device: 1000)
    plan = make_plan(teacher_folder, recipe=recipe)
    assert plan["streamed"] is True
    assert plan["hidden_bytes"] == 2 * 1536 * 32 * 4
    assert plan["notes"][-1].startswith("streaming, a layer at a time: the teacher needs about")
    assert make_plan(teacher_folder, recipe=recipe, stream=False) == ordinary
    finetuned = make_plan(teacher_folder, recipe=load_recipe("lolcats", ["context=200"]))
    assert finetuned["streamed"] is False and "only streaming would do: finetune.tokens" in finetuned["notes"][-1]
    said: list[str] = []

    class Listening(NullProgress):
        def message(self, text: str) -> None:
            said.append(text)

    report = convert(
        teacher_folder, tmp_path / "out", recipe=recipe, data=str(text_file), progress=Listening()
    )  # fmt: skip
    assert report["streamed"]["hidden_bytes"] == plan["hidden_bytes"]
    assert said[0].startswith("streaming, a layer at a time: the teacher needs about")
    with pytest.raises(RefusedError, match=r"so only streaming would do: finetune\.tokens.*--no-stream"):
        convert(teacher_folder, tmp_path / "other", recipe="lolcats", data=str(text_file), overrides=["context=200"])


def test_on_the_command_line(
    teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from linearize_cli.app import main

    command = ["convert", str(teacher_folder), str(tmp_path / "out"), "-r", "lolcats", "--data", str(text_file)]
    assert main([*command, "--plan", "--stream", "--json", *SMALL]) == 0
    assert json.loads(capsys.readouterr().out)["streamed"] is True
    assert main([*command, "--plan", "--stream", *SMALL]) == 0
    assert "streamed, one layer at a time; of the disk, 384.0 KiB are hidden states" in capsys.readouterr().err
    assert main([*command, "--stream", "context=64", "mixer.window=16"]) == 2
    assert "finetuning needs the whole model in memory. Write finetune.tokens=0" in capsys.readouterr().err
    assert main([*command, "--stream", *SMALL, "align.tokens=256"]) == 0
    told = capsys.readouterr().err
    assert "Read back layer by layer: " in told and "Streamed, one layer at a time: " in told


@pytest.mark.parametrize("what", ["a bit", "a number", "the config"])
def test_an_export_that_is_not_what_was_made(
    what: str, teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = stream_convert._write_config

    def spoiled(folder: Path, inputs: Any) -> None:
        write(folder, inputs)
        if what == "the config":
            path = folder / "config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
            return
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4:] = bytes([data[-4] ^ 1, *data[-3:]]) if what == "a bit" else b"\x00\x00\xc0\x7f"
        path.write_bytes(data)

    monkeypatch.setattr(stream_convert, "_write_config", spoiled)
    message = {"a bit": "is not what was written", "a number": "not finite", "the config": "a logit by"}[what]
    with pytest.raises(VerificationError, match=message):
        convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=SMALL, stream=True)
    assert not (tmp_path / "out").exists()


def test_of_a_layer_that_died_nothing_is_kept(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    align, calls = stream_run.align_layers, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise VerificationError("layer 1: the alignment diverged")
        return align(*args, **kwargs)

    monkeypatch.setattr(stream_run, "align_layers", dying)
    with pytest.raises(VerificationError, match="layer 1: "):
        convert(teacher_folder, tmp_path / "out", recipe="lolcats", data=str(text_file), overrides=SMALL, stream=True)
    assert list(tmp_path.iterdir()) == []


MEASURED = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from linearize.convert import stream_convert, pipeline
torch.set_num_threads(1)
for module in (stream_convert, pipeline):
    module.verify_export = lambda folder, expected, **places: {}

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

data, options, figures = sys.argv[1], json.loads(sys.argv[2]), []
for teacher, out, streamed in json.loads(sys.argv[3]):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    pipeline.convert(teacher, out, recipe="lolcats", data=data, overrides=options, stream=streamed)
    figures.append(status("VmHWM") - before)
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux can begin a peak anew")
def test_memory_does_not_grow_with_the_layers(
    build_llama: Callable[..., Path], text_file: Path, tmp_path: Path, source_env: dict[str, str]
) -> None:
    """Two layers, then fourteen: the peak grows by less than one more layer. The ordinary way grows by them all."""
    sizes = {"hidden_size": 256, "intermediate_size": 3072, "initializer_range": 0.02, "max_position_embeddings": 256}
    layer = 4 * (256 * 256 * 3 + 3 * 256 * 3072)  # bytes in fp32: queries, keys and values, output; the MLP
    few, many = (build_llama(tmp_path / str(n), num_hidden_layers=n, shards=9_000_000, **sizes) for n in (2, 14))
    runs = [(few, "warm", True), (few, "few", True), (many, "many", True), (many, "whole", False)]
    places = json.dumps([(str(teacher), str(tmp_path / out), streamed) for teacher, out, streamed in runs])
    options = json.dumps([*SMALL, "align.tokens=256", "align.batch_tokens=256"])
    command = [sys.executable, "-c", MEASURED, str(text_file), options, places]
    done = subprocess.run(command, env=source_env, capture_output=True, text=True, check=True)
    _, fewer, more, whole = json.loads(done.stdout)
    assert more - fewer < layer
    assert whole - more > 6 * layer  # so that the line above could fail


def test_norms_are_those_of_the_ordinary_way(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In alignment they are one kernel each on a GPU, which rounds otherwise: so must they be between layers."""

    def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), eps).float()

    monkeypatch.setattr(norms, "_fast", lambda weight: True)
    monkeypatch.setattr(norms, "_norm", exact)
    teacher = save(tmp_path / "teacher", "llama", num_hidden_layers=3)
    common = {"recipe": "lolcats", "data": str(text_file), "overrides": [*SMALL, "align.tokens=512"]}
    for way in ("whole", "streamed"):
        convert(teacher, tmp_path / way, stream=way == "streamed", **common)
    same(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.gpu
def test_on_a_gpu_too(
    build_llama: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same mixers as the ordinary way, kernel by kernel; four more layers take less than one more of memory."""
    monkeypatch.setenv("LINEARIZE_CUDA_GRAPHS", "0")
    sizes = {"hidden_size": 256, "intermediate_size": 3072, "initializer_range": 0.02, "max_position_embeddings": 256}
    layer = 4 * (256 * 256 * 3 + 3 * 256 * 3072)
    options = [*SMALL, "device=cuda", "align.tokens=512"]
    run = {"recipe": "lolcats", "data": str(text_file), "overrides": options}
    few, many = (build_llama(tmp_path / str(n), num_hidden_layers=n, **sizes) for n in (2, 6))
    peaks = [
        convert(teacher, tmp_path / f"out-{teacher.name}", stream=True, **run)["streamed"]["peak_device_bytes"]
        for teacher in (few, many)
    ]
    assert peaks[1] - peaks[0] < layer
    convert(many, tmp_path / "whole", stream=False, **run)
    same(tmp_path / "out-6", tmp_path / "whole")
