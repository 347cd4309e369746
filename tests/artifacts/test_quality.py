"""Figures go into manifest and card so that a death at any moment leaves a valid export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from linearize.artifacts import atomic
from linearize.artifacts.manifest import read_manifest, verify_manifest, write_manifest
from linearize.artifacts.quality import BEGIN, save_audit
from linearize.errors import RefusedError

REPORT: dict[str, Any] = {
    "R": 12.5,
    "protocol": "concat@128",
    "context": 128,
    "windows": 2,
    "tokens": 254,
    "dtype": "float32",
    "device": "cpu",
    "ppl_teacher": 2.0,
    "ppl_window": 4.0,
    "ppl_student": 3.5,
    "bits_per_byte": 1.0,
    "branches": {"full": 3.5, "window": 4.0, "linear": 9.0, "none": 99.0},
    "reference": {"window": 16, "sinks": 0, "own": True},
    "notes": [],
    "data": {"kind": "file", "name": "/home/me/text.txt", "sha256": "ab" * 32, "documents": 1, "bytes": 1000},
}


@pytest.mark.parametrize("survives", [0, 1])
def test_a_full_disk_at_either_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"w")
    (tmp_path / "README.md").write_text("# Mine\n")
    write_manifest(tmp_path, {"name": "out"})
    write, written = atomic.write_bytes, []

    def full(path: Any, data: bytes) -> None:
        if len(written) == survives:
            raise RefusedError("no space left on the disk")
        written.append(path)
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_bytes", full)
        with pytest.raises(RefusedError, match="no space left"):
            save_audit(tmp_path, REPORT, against="demo")
    assert verify_manifest(tmp_path) == [] and (tmp_path / "README.md").read_text() == "# Mine\n"
    assert ("audit" in read_manifest(tmp_path)) == bool(survives)

    saved = save_audit(tmp_path, REPORT, against="demo")
    assert read_manifest(tmp_path)["audit"] == saved and saved["data"]["name"] == "text.txt"
    card = (tmp_path / "README.md").read_text()
    assert card.count(BEGIN) == 1 and "# Mine" in card and "**Recovery R = 12.50 %**" in card
    assert verify_manifest(tmp_path) == [] and "/home/me" not in card + (tmp_path / "linearize.json").read_text()


def test_a_teacher_in_few_bits_is_said_with_the_command_that_checks_it(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"name": "out"})
    plain = save_audit(tmp_path, REPORT, against="demo")
    card = (tmp_path / "README.md").read_text()
    assert "teacher_bits" not in plain and "--teacher-bits" not in card and "longer than" not in card
    found = save_audit(tmp_path, REPORT | {"teacher_bits": 4, "beyond_trained": True}, against="demo")
    card = (tmp_path / "README.md").read_text()
    assert (found["teacher_bits"], found["beyond_trained"]) == (4, True)
    assert "| the teacher, `demo`, held in 4 bit (nf4) | 2.0000 |" in card and "untrained, held in 4 bit" in card
    assert "--dtype float32 --teacher-bits 4\n" in card and "longer than what the models were trained on" in card
    assert "teacher_bits: 4" in card  # the metadata's entry of R


def test_an_export_without_a_card_gets_one(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"name": "out"})
    save_audit(tmp_path, REPORT, against="demo")
    assert (tmp_path / "README.md").read_text().startswith("---\nmodel-index:\n- name: out\n")
