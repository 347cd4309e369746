"""The manifest says what every file is; what was changed, lost or slipped in is named."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from linearize.artifacts.manifest import MANIFEST, code_digest, read_manifest, verify_manifest, versions, write_manifest
from linearize.errors import UsageError


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (folder / "sub" / "modeling.py").write_text("pass\n")
    write_manifest(folder, {"recipe": {"name": "lolcats"}, "recipe_digest": "d" * 64, "figures": {"R": 16.0}})
    return folder


def test_what_it_holds(artifact):
    manifest = read_manifest(artifact)
    assert manifest["recipe"] == {"name": "lolcats"} and manifest["figures"] == {"R": 16.0}
    assert set(manifest["files"]) == {"model.safetensors", "sub/modeling.py"}
    assert manifest["files"]["model.safetensors"]["size"] == 100
    assert manifest["versions"] == versions() and {"python", "linearize"} <= set(manifest["versions"])
    assert manifest["code_digest"] == code_digest() and len(code_digest()) == 64
    assert str(artifact.parent) not in (artifact / MANIFEST).read_text()
    assert verify_manifest(artifact) == []


def test_a_copied_folder_still_verifies(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("mine")
    assert verify_manifest(tmp_path / "moved") == []


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"w" * 99), "has 99 bytes, linearize.json says 100"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"w" * 99 + b"v"),
            "model.safetensors differs from its sha256",
        ),
        (lambda f: (f / "sub" / "modeling.py").unlink(), "sub/modeling.py is missing"),
        (lambda f: (f / "extra.py").write_text("import os"), "extra.py is not in linearize.json"),
        (lambda f: (f / "model-2.safetensors").write_bytes(b""), "model-2.safetensors is not in linearize.json"),
        (lambda f: (f / MANIFEST).unlink(), "linearize.json cannot be read"),
        (lambda f: (f / MANIFEST).write_text("{"), "linearize.json is not valid JSON"),
        (lambda f: (f / MANIFEST).write_text("[]"), "is not a manifest"),
        (lambda f: (f / MANIFEST).write_text('{"files": {}, "format": 99}'), "has format 99"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda f: (f / MANIFEST).write_text("[" * 200_000), "is not valid JSON"),
    ],
)
def test_damage_is_named(artifact, damage, words):
    damage(artifact)
    problems = verify_manifest(artifact)
    assert len(problems) == 1 and words in problems[0] and "\n" not in problems[0]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..", "C:\\x", "a\\b", "./x", "", "x\0"])
def test_names_outside_the_folder_are_not_read(artifact, name):
    manifest = read_manifest(artifact)
    manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    assert [problem for problem in verify_manifest(artifact) if "outside its folder" in problem]


@pytest.mark.parametrize("entry", [None, 1, [], {}, {"size": 1}, {"sha256": "x"}, {"sha256": 1, "size": "1"}])
def test_entries_of_another_shape(artifact, entry):
    manifest = read_manifest(artifact)
    manifest["files"]["model.safetensors"] = entry
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    assert "has no size and sha256 for 'model.safetensors'" in verify_manifest(artifact)[0]


def test_callers_cannot_forge_what_is_computed(artifact):
    for key in ("files", "versions", "code_digest", "format"):
        with pytest.raises(ValueError, match=key):
            write_manifest(artifact, {key: {}})


def test_links_are_no_part_of_an_artifact(artifact):
    (artifact / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="no links"):
        write_manifest(artifact, {})


def test_missing_manifest_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"linearize\.json cannot be read"):
        read_manifest(tmp_path)


def test_what_a_killed_writer_left_is_no_part_of_the_artifact(artifact):
    (artifact / f".{MANIFEST}.tmp-999999999").write_text("half")
    assert set(write_manifest(artifact, {})["files"]) == {"model.safetensors", "sub/modeling.py"}


def test_links_pipes_and_endless_names_in_place_of_files(artifact, tmp_path):
    data = (artifact / "model.safetensors").read_bytes()
    (tmp_path / "elsewhere").write_bytes(data)
    (artifact / "model.safetensors").unlink()
    (artifact / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leaves its folder" in verify_manifest(artifact)[0]
    (artifact / "model.safetensors").unlink()
    os.mkfifo(artifact / "model.safetensors")
    assert "model.safetensors is missing" in verify_manifest(artifact)[0]
    manifest = read_manifest(artifact)
    manifest["files"]["x" * 5000] = {"sha256": "0" * 64, "size": 1}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    assert any("outside its folder" in problem for problem in verify_manifest(artifact))
    (artifact / MANIFEST).unlink()
    os.mkfifo(artifact / MANIFEST)
    assert "linearize.json is not a file" in verify_manifest(artifact)[0]
