"""`linearize verify`: what an export says of itself is recomputed, and whatever differs is named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import linearize
from linearize.artifacts.manifest import MANIFEST
from linearize.artifacts.verify import verify
from linearize.errors import UsageError
from linearize_cli.app import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, `text.txt` and `made`, its conversion."""
    from tests.artifacts.fault_artifacts import tiny

    base = tmp_path_factory.mktemp("verify")
    tiny(base)
    return base


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "made", tmp_path / "out"))


def results(report: dict[str, Any]) -> dict[str, str]:
    return {row["check"]: row["result"] for row in report["checks"]}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_made_is_verified_down_to_teacher_and_text(made: Path, out: Path) -> None:
    report = linearize.verify(out, against=made / "teacher", data=str(made / "text.txt"))
    assert report["ok"] and report["problems"] == [] and report["notes"] == []
    names = ("files", "weights", "recipe", "figures", "teacher", "data", "code", "versions")
    assert results(report) == dict.fromkeys(names, "ok")
    listed = json.loads((out / MANIFEST).read_text())["files"]
    assert report["files"] == {
        "listed": len(listed),
        "bytes": sum((out / name).stat().st_size for name in listed),
        "unlisted": [],
    }
    assert results(verify(out)) == {**results(report), "teacher": "not checked", "data": "not checked"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "mixer.py", "tokenizer.json"])
def test_one_bit_of_any_file_is_noticed(out: Path, name: str) -> None:
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    report = verify(out)
    assert not report["ok"] and f"{name} differs from its sha256" in report["problems"][0]
    assert results(report)["files"] == "differs"


def test_files_that_are_not_listed(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    (out / "LICENSE").write_text("terms")
    report = verify(out)
    assert report["ok"] and report["files"]["unlisted"] == ["LICENSE", "notes.txt"]
    assert "unlisted files: LICENSE, notes.txt" in " ".join(report["notes"]).replace(";", ",")
    for name in ("special_tokens_map.json", "extra.py", "sub/model.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        problems = verify(out)["problems"]
        assert len([line for line in problems if f"{name} is not in {MANIFEST}" in line]) == 1, name
        (out / name).unlink()


def rehash(out: Path) -> None:
    """As somebody would who changes a file and the manifest too."""
    from linearize.artifacts.atomic import sha256

    def change(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["files"].items():
            entry |= {"sha256": sha256(out / name), "size": (out / name).stat().st_size}

    edit(out, change)


def test_weights_are_finite_and_complete_whatever_the_hashes_say(out: Path) -> None:
    import torch
    from safetensors.torch import load, save_file

    good = load(
        (out / "model.safetensors").read_bytes()
    )  # not load_file: its tensors are the file that is written over
    name = "model.layers.1.mlp.up_proj.weight"
    bad = {
        f"{name}.*holds NaN": {**good, name: torch.full_like(good[name], torch.nan)},
        f"lacks the weight {name}": {key: value for key, value in good.items() if key != name},
        "does not use: model.evil": {**good, "model.evil": torch.zeros(2)},
        f"wrong shape for the weight .*{name}": {**good, name: torch.zeros(3, 3)},
    }
    for words, tensors in bad.items():
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        rehash(out)
        report = verify(out)
        assert results(report)["files"] == "ok" and results(report)["weights"] == "differs"
        assert any(re.search(words, line) for line in report["problems"]), (words, report["problems"])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m["recipe"].update(seed=99), "is not the one of its recipe_digest"),
        (lambda m: m.update(recipe_digest="0" * 64), "is not the one of its recipe_digest"),
        (lambda m: m["recipe"]["mixer"].update(window=16), "has mixer_window 8, the recipe 16"),
        (lambda m: m.update(recipe=None), "holds no recipe"),
        (lambda m: m["figures"]["parameters"].update(model=7), "numbers, and linearize.json says 7"),
        (lambda m: m["figures"].update(state_bytes=7), "for figures.state_bytes, linearize.json 7"),
        (lambda m: m["figures"]["stages"]["align"].update(loss_last=0.5), "for figures.stages.align.loss_last"),
        (lambda m: m["figures"]["merge_error"]["cast"].update(max=0.5), "for figures.merge_error.cast.max"),
        (lambda m: m["figures"]["layers"][0].update(explained=0.999), "layer 0 explains 0.999"),
        (lambda m: m["data"].update(sha256="0" * 64), "for data.sha256"),
        (lambda m: m["figures"].update(verification={"import": {"same_text": False}}), "was not verified (import)"),
        (lambda m: m.update(format=99), "has format 99"),
        (lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "size": 1}}), "outside its folder"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_the_card(out: Path, change: Any, words: str) -> None:
    edit(out, change)
    report = verify(out)
    assert not report["ok"] and any(words in line for line in report["problems"]), report["problems"]


def test_an_edited_card_is_no_fault_but_a_false_figure_is(out: Path) -> None:
    card = (out / "README.md").read_text()
    (out / "README.md").write_text("# My own words\n")
    assert verify(out)["ok"]
    (out / "README.md").unlink()
    assert verify(out)["ok"]
    (out / "README.md").write_text(card.replace("| parameters | ", "| parameters | 9,"))
    assert "README.md says 9," in verify(out)["problems"][0]


def test_another_teacher_text_or_version(made: Path, out: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(made / "teacher", tmp_path / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    (tmp_path / "text.txt").write_text((made / "text.txt").read_text().replace("lost", "found"))
    report = verify(out, against=teacher, data=str(tmp_path / "text.txt"))
    assert results(report)["teacher"] == results(report)["data"] == "differs"
    assert "is not the teacher 'teacher'" in report["problems"][0] and "another sha256" in report["problems"][1]
    edit(out, lambda m: m["versions"].update(torch="0.1"))
    edit(out, lambda m: m.update(code_digest="0" * 64))
    report = verify(out)
    assert report["ok"] and results(report)["versions"] == results(report)["code"] == "noted"
    assert any("torch 0.1 (now " in note for note in report["notes"])
    with pytest.raises(UsageError, match="there is no model"):
        verify(tmp_path / "nowhere")


def test_the_command(made: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["linearize"])
    assert main(["verify", str(out), "--against", str(made / "teacher"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and set(report) == {"out", "ok", "files", "checks", "problems", "notes"}
    assert main(["verify", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "is what was made" in told.err and "not checked" in told.err
    (out / "mixer.py").write_text("import os\n")
    (out / "evil.py").write_text("import os\n")
    assert main(["verify", str(out)]) == 4
    told = capsys.readouterr()
    assert "error: " in told.err and "mixer.py has 10 bytes" in told.err and "(and 1 more problem)" in told.err
    assert main(["verify", str(out), "--json"]) == 4
    told = capsys.readouterr()
    assert not json.loads(told.out)["ok"] and "Traceback" not in told.err
    (out / MANIFEST).write_text("{")
    assert main(["verify", str(out)]) == 4
    assert "linearize.json is not valid JSON" in capsys.readouterr().err
    assert main(["verify", str(out / "nowhere")]) == 2
