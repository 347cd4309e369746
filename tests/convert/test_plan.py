"""Plans and inspections: from configs and headers alone."""

from __future__ import annotations

import json
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linearize.artifacts.config_reader import supported_families
from linearize.convert import pipeline
from linearize.convert.checkpoint import open_run
from linearize.convert.early import run_folder
from linearize.convert.plan import inspect, make_plan
from linearize.errors import RefusedError, UsageError
from linearize.recipe import load_recipe
from tests.interrupter import Interrupter

SMALL = ["context=128", "mixer.window=16", "mixer.feature_dim=8", "align.tokens=10k", "align.batch_tokens=512"]


def test_plan(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe("lolcats", [*SMALL, "keep_softmax=[1]", "finetune.tokens=0"])
    plan = make_plan(teacher_folder, recipe=recipe, data=str(text_file), out=tmp_path / "out")
    assert plan["layers"][0] == {
        "index": 0, "from": "softmax", "to": "linear", "heads": 4, "kv_heads": 2, "head_dim": 8, "feature_dim": 16,
        "state_bytes": 4 * 4 * 16 * 9 + 2 * 32 * 2 * 8 * 4 + 8, "new_parameters": 2 * 4 * 8 * 8 + 4,
    }  # fmt: skip
    assert plan["layers"][1]["to"] == "softmax" and plan["layers"][1]["state_bytes"] == 0
    assert plan["new_parameters"] == plan["trained"]["align"] == 516
    assert plan["trained"]["finetune"] == 0 and plan["skipped"] == {"finetune": "finetune.tokens is 0"}
    assert plan["steps"] == {"align": 20, "finetune": 0} and plan["tokens"]["align"] == 20 * 4 * 128
    assert plan["memory_bytes"] > 4 * plan["parameters"] and plan["disk_bytes"] > 4 * plan["parameters"]
    assert not list(tmp_path.iterdir())


def test_plan_loads_no_weights(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors
    import safetensors.torch

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "safe_open", fail)
    monkeypatch.setattr(safetensors.torch, "load_file", fail)
    make_plan(teacher_folder, recipe=load_recipe("liger-gla", ["context=128"]))
    inspect(teacher_folder, load_recipe("mamba2"))


def test_refusals(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe("lolcats", SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(RefusedError, match="is not empty"):
        make_plan(teacher_folder, recipe=recipe, out=tmp_path / "full")
    with pytest.raises(UsageError, match="no such file"):
        make_plan(teacher_folder, recipe=recipe, data=str(tmp_path / "absent.txt"))
    with pytest.raises(UsageError, match="context=256"):
        make_plan(teacher_folder, recipe=load_recipe("lolcats"))
    with pytest.raises(UsageError, match="5"):
        make_plan(teacher_folder, recipe=load_recipe("lolcats", [*SMALL, "keep_softmax=[5]"]))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"num_key_value_heads": 4},
            r"k_proj\.weight \(and \d+ more\) is .* in the teacher's files and .* by its config",
        ),
        ({"intermediate_size": 40}, r"mlp\.\w+\.weight \(and \d+ more\) is .* in the teacher's files"),
        ({"hidden_act": "slu"}, r"config\.json: hidden_act is 'slu', .* Did you mean 'silu'\?"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(
    changes: dict[str, Any], refusal: str, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    recipe = load_recipe("lolcats", SMALL)
    with pytest.raises(UsageError, match=refusal):
        make_plan(tmp_path / "teacher", recipe=recipe)
    with pytest.raises(UsageError, match=refusal):
        pipeline.convert(tmp_path / "teacher", tmp_path / "out", recipe=recipe, data=str(text_file))


WEIGHED = ["mixer.mix=mass", "align.tokens=1k"]
"""Makes of `liger-gla` a recipe whose mixer trains what weighs its branches, and nothing else."""


@pytest.mark.parametrize(
    ("options", "refusal", "instead"),
    [
        (
            ["align.window_dropout=0.5"],
            r"align\.window_dropout: .* for far_mass only weighs it",
            "align.window_dropout=0",
        ),
        (["align.branch=linear"], r"align\.branch: the linear branch alone trains nothing", "align.branch=mix"),
        (
            ["align.branch=both"],
            r"Use align\.branch=mix, or name projections in align\.train too",
            "align.train=[q_proj]",
        ),
        (
            ["finetune.lora=null", "finetune.full=[mixer]", "finetune.window_dropout=0.1"],
            r"finetune\.window_dropout: .*Use finetune\.window_dropout=0, or name projections in finetune\.full",
            "finetune.full=[mixer, v_proj]",
        ),
        (
            ["mixer.mix=sum", "finetune.lora=null", "finetune.full=[mixer]"],
            r"finetune: nothing of this model is trained\. Set finetune\.lora",
            "finetune.full=[v_proj]",
        ),
    ],
)
def test_a_stage_that_has_nothing_to_train_is_refused(
    options: list[str], refusal: str, instead: str, teacher_folder: Path
) -> None:
    """Before the work: a step without gradients failed in the middle of it, or only once alignment was done."""
    short = ["context=128", "mixer.window=16", *WEIGHED, *options]
    with pytest.raises(UsageError, match=refusal):
        make_plan(teacher_folder, recipe=load_recipe("liger-gla", short))
    make_plan(teacher_folder, recipe=load_recipe("liger-gla", [*short, instead]))
    none = [*short, "align.tokens=0", "finetune.tokens=0"]
    make_plan(teacher_folder, recipe=load_recipe("liger-gla", none))


def no_out(tmp_path: Path) -> dict[str, Path]:
    """OUTs that a conversion refuses, by why."""
    for name in ("full", "export", "closed"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "export" / "linearize.json").write_text("{}")
    (tmp_path / "dangling").symlink_to("nowhere")
    checkpoint = run_folder(tmp_path / "begun") / "00-align-00000120"
    checkpoint.mkdir(parents=True)
    return {
        "not empty": tmp_path / "full",
        "is a file": tmp_path / "file",
        "file is not a folder": tmp_path / "file" / "out",
        "inside": tmp_path / "export" / "out",
        "cannot be written to": tmp_path / "closed" / "deep" / "out",
        "dangling": tmp_path / "dangling",
        "Add --resume": tmp_path / "begun",
    }


def test_a_plan_refuses_the_out_that_a_conversion_refuses(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, asked = load_recipe("lolcats", SMALL), {"data": str(text_file)}
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and allowed(path, mode))
    for why, out in no_out(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        told = []
        for ask in (make_plan, pipeline.convert):
            with pytest.raises(RefusedError, match=why) as caught:
                ask(teacher_folder, out=out, recipe=recipe, **asked)
            told.append(str(caught.value))
        assert told[0] == told[1]
        assert sorted(tmp_path.rglob("*")) == before, "nothing was made"
    for out, why in (("", "OUT is empty"), ("a\0b", "zero byte"), ("o" * 241, "longer than 240 bytes")):
        with pytest.raises(UsageError, match=why):
            make_plan(teacher_folder, recipe=recipe, out=out)
    assert run_folder(tmp_path / ("o" * 240)).exists() is False  # the longest that a disk takes
    with open_run(tmp_path / "taken"), pytest.raises(RefusedError, match="another convert writes there"):
        make_plan(teacher_folder, recipe=recipe, out=tmp_path / "taken")


def test_a_plan_says_what_a_resume_goes_on_from(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL, "finetune.tokens=0", "device=cpu"]
    recipe, out = load_recipe("lolcats", options), tmp_path / "out"
    with pytest.raises(UsageError, match="no unfinished run to resume"):
        make_plan(teacher_folder, recipe=recipe, out=out, resume=True)
    with pytest.raises(KeyboardInterrupt):
        pipeline.convert(teacher_folder, out, recipe=recipe, data=str(text_file), progress=Interrupter("align", 3))
    with pytest.raises(RefusedError, match="Add --resume"):
        make_plan(teacher_folder, recipe=recipe, out=out)
    assert make_plan(teacher_folder, recipe=recipe, out=out, resume=True)["resumes"] == {"stage": "align", "step": 3}
    shutil.rmtree(run_folder(out) / "00-align-00000003")
    plan = make_plan(teacher_folder, recipe=recipe, out=out, resume=True)
    assert plan["resumes"] is None and any("begins anew" in note for note in plan["notes"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = load_recipe("lolcats", [*options, "seed=7"])
    with pytest.raises(RefusedError, match="seed=7, begun with 0"):
        make_plan(teacher_folder, recipe=other, out=out, resume=True)
    with pytest.raises(RefusedError, match="--stream"):
        make_plan(teacher_folder, recipe=recipe, out=out, resume=True, stream=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert make_plan(teacher_folder, recipe=recipe, out=tmp_path / "other")["resumes"] is None


def test_a_plan_says_that_the_disk_is_too_small(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("lolcats", SMALL)
    assert not make_plan(teacher_folder, recipe=recipe, out=tmp_path / "out")["notes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=1000))
    (note,) = make_plan(teacher_folder, recipe=recipe, out=tmp_path / "out")["notes"]
    assert note.startswith("not on this disk:") and "1000 bytes free" in note


def test_inspect(teacher_folder: Path) -> None:
    plain = inspect(teacher_folder)
    assert (plain["family"], plain["layers"], plain["dtype"]) == ("llama", 2, "float32")
    assert plain["kv_bytes"] == {str(n): 2 * 2 * 2 * 8 * 4 * n for n in (2048, 32768, 131072)}
    found = inspect(teacher_folder, load_recipe("lolcats"))  # whatever the context of training
    even = found["break_even_context"]
    per_token = plain["kv_bytes"]["2048"] // 2048
    assert (even - 1) * per_token < found["state_bytes"] <= even * per_token
    half = inspect(teacher_folder, load_recipe("lolcats", ["keep_softmax=every 2"]))
    assert half["state_bytes"] * 2 == found["state_bytes"] and half["break_even_context"] == even
    assert half["softmax_kv_bytes"]["2048"] * 2 == plain["kv_bytes"]["2048"]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bloom", {"n_layer": 2, "hidden_size": 32, "n_head": 4, "vocab_size": 259}),
        ("electra", {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 259}),
        ("foobar", {}),
    ],
)
def test_another_family_is_refused_as_such(
    teacher_folder: Path, tmp_path: Path, kind: str, sizes: dict[str, int]
) -> None:
    model = tmp_path / kind
    shutil.copytree(teacher_folder, model)
    (model / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    recipe = load_recipe("lolcats", SMALL)
    line = f"the family '{kind}' cannot be converted. {supported_families()}"
    for ask in (
        lambda: inspect(model),
        lambda: inspect(model, recipe),
        lambda: make_plan(model, recipe=recipe),
        lambda: pipeline.convert(model, tmp_path / "out", recipe=recipe, data="demo"),
    ):
        with pytest.raises(UsageError) as caught:
            ask()
        assert str(caught.value) == line


def test_parameters_are_those_of_the_model(make_teacher: Callable[..., Any], variant: str, tmp_path: Path) -> None:
    from linearize.convert.surgery import linearize_model

    make_teacher(variant).save_pretrained(tmp_path)
    recipe = load_recipe("lolcats", ["context=64", "mixer.window=8", "mixer.feature_dim=4"])
    plan = make_plan(tmp_path, recipe=recipe)
    teacher = make_teacher(variant)
    student, _ = linearize_model(teacher, spec=recipe.mixer, layer_mixers=["linear"] * 3, seed=0)
    assert plan["parameters"] == sum(p.numel() for p in student.parameters())
    assert plan["new_parameters"] == plan["parameters"] - sum(p.numel() for p in teacher.parameters())
    assert inspect(tmp_path)["parameters"] == plan["parameters"] - plan["new_parameters"]
