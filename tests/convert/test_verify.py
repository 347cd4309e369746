"""What the check of an export compares: both sides by the definition, whatever kernels the machine has."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linearize.convert import verify
from linearize.errors import VerificationError

VARIABLE = "LINEARIZE_KERNELS"
IDS = torch.arange(8).reshape(1, 8)


class Model:
    """Notes by which kernels it was asked to run."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[str | None] = []

    def __call__(self, **given: Any) -> Any:
        self.asked.append(os.environ.get(VARIABLE))
        return SimpleNamespace(logits=torch.zeros(1, 8, 4))

    def generate(self, ids: torch.Tensor, **given: Any) -> torch.Tensor:
        self.asked.append(os.environ.get(VARIABLE))
        return ids


@pytest.mark.parametrize("before", [None, "triton"])
def test_the_model_in_memory_answers_by_the_definition(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    model = Model()
    expected = verify.expect(model, SimpleNamespace(decode=str), IDS)
    assert model.asked == ["torch", "torch"]
    assert os.environ.get(VARIABLE) == before
    assert expected.tokens == [0, 1]
    with pytest.raises(ZeroDivisionError), verify.by_definition():
        1 / 0  # noqa: B018
    assert os.environ.get(VARIABLE) == before


def test_and_so_do_the_fresh_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    seen: list[str] = []

    def run(command: list[str], **given: Any) -> Any:
        seen.append(given["env"][VARIABLE])
        return subprocess.CompletedProcess(command, 1, "", "no such luck")

    monkeypatch.setattr(verify.subprocess, "run", run)
    (tmp_path / "out").mkdir()
    expected = verify.expect(Model(), SimpleNamespace(decode=str), IDS)
    with pytest.raises(VerificationError, match="no such luck"):
        verify.verify_export(tmp_path / "out", expected, device=torch.device("cpu"), room=tmp_path / "room")
    assert seen == ["torch"]


@pytest.mark.parametrize(("device", "size", "together"), [("cuda", 10, True), ("cuda", 11, False), ("cpu", 10, False)])
def test_both_ways_at_once_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, size: int, together: bool
) -> None:
    monkeypatch.setattr(verify, "SMALL", 10)
    (tmp_path / "model.safetensors").write_bytes(b"x" * size)
    running: list[str] = []
    both = threading.Barrier(2)

    def ask(mode: str, *_: Any) -> Any:
        running.append(mode)
        if together:
            both.wait(timeout=30)  # until the other one runs as well
        else:
            assert len(running) == 1
            running.remove(mode)
        return mode, {}

    monkeypatch.setattr(verify, "_ask", ask)
    expected = verify.expect(Model(), SimpleNamespace(decode=str), IDS)
    found = verify._answers(tmp_path, tmp_path, expected, torch.device(device))
    assert [mode for mode, _ in found] == list(verify.MODES)
