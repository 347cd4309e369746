"""From what a user types to a folder, a device and a dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from linearize.artifacts import load
from linearize.artifacts.config_reader import build_config
from linearize.artifacts.load import check_checkpoint, resolve, select_device, select_dtype
from linearize.errors import UsageError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, build_llama) -> Path:
    return build_llama(tmp_path_factory.mktemp("names") / "teacher")


@pytest.fixture
def folder(teacher, tmp_path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "copy"))


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def test_resolve(teacher, tmp_path, monkeypatch):
    assert resolve(teacher) == teacher and resolve(str(teacher)) == teacher
    with pytest.raises(UsageError, match=r"no model '.*/teachr'.*Did you mean 'teacher'"):
        resolve(str(teacher.parent / "teachr"))
    with pytest.raises(UsageError, match="is a file"):
        resolve(teacher / "config.json")
    monkeypatch.chdir(teacher.parent)
    with pytest.raises(UsageError, match="Did you mean 'teacher'"):
        resolve("techer")
    with pytest.raises(UsageError, match="Did you mean 'demo'"):
        resolve("dema")
    with pytest.raises(UsageError, match="there is no model"):
        resolve("teacher/sub")  # a folder that is there: a path, not a Hub id
    with pytest.raises(UsageError, match="the Hub's model of that name is teacher/sub@main"):
        resolve("teacher/sub")
    asked = []
    monkeypatch.setattr(load, "download", lambda name: asked.append(name) or teacher)
    assert resolve("teacher/sub@main") == teacher and asked == ["teacher/sub@main"]
    assert resolve("owner/name") == teacher and asked[1:] == ["owner/name"]
    with pytest.raises(UsageError, match="there is no model"):
        resolve("")


def test_demo_is_the_embedded_teacher_even_beside_a_folder_of_that_name(tmp_path, monkeypatch, root):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    embedded = root / "linearize" / "demo" / "teacher"
    if (embedded / "config.json").is_file():
        assert resolve("demo") == embedded
        check_checkpoint(embedded, finite=True)
    else:
        with pytest.raises(UsageError, match="embedded teacher is missing"):
            resolve("demo")
    assert resolve("./demo") == Path("demo")


def test_hub_id(monkeypatch, teacher):
    import huggingface_hub

    asked = {}

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns, never=ignore_patterns)
        return str(teacher)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/some-model.v1") == teacher
    assert asked["repo"] == "owner/some-model.v1"
    assert not [p for p in asked["patterns"] if p.endswith((".py", ".bin", ".pt"))]
    assert {"*.py", "*.bin", "*.pt", "*.pkl", "*/*"} <= set(asked["never"]) and asked["revision"] is None
    assert resolve("owner/some-model.v1@refs/pr/1") == teacher and asked["revision"] == "refs/pr/1"

    def fail(repo, **patterns):
        raise OSError("404 Client Error.\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UsageError, match=r"no folder 'owner/model'.*404 Client Error") as caught:
        resolve("owner/model")
    assert "\n" not in str(caught.value)


def test_select_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == select_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="torch sees 0 CUDA GPUs"):
        select_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto").type == "cuda" and select_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:-1", "gpu", "cud", "", "cuda:99999"):
        with pytest.raises(UsageError, match="device"):
            select_device(name)


def test_select_dtype(folder):
    assert select_dtype("bfloat16") == torch.bfloat16
    assert select_dtype("auto") == torch.float32
    assert select_dtype("auto", torch.float16) == torch.float16
    assert select_dtype("auto", build_config(folder)) == torch.float32
    edit(folder, dtype="bfloat16")
    assert select_dtype("auto", folder) == torch.bfloat16
    edit(folder, dtype=..., torch_dtype="float16")
    assert select_dtype("auto", folder) == torch.float16
    edit(folder, torch_dtype=...)
    assert select_dtype("auto", folder) == torch.float32  # from the weights
    with pytest.raises(UsageError, match="Did you mean 'bfloat16'"):
        select_dtype("bflot16", folder)


def test_checking_needs_no_transformers_to_import(root):
    """The modules that `--help` passes through stay light."""
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import linearize.errors, linearize.artifacts.manifest, "
        "linearize.artifacts.load; assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True)


def test_near_names_survive_an_unreadable_parent():
    assert load._names(Path("/nonexistent/folder")) == []
