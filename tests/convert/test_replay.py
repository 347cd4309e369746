"""Steps replayed from a CUDA graph, and what they need of gradients and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import masking_utils

from linearize.convert.pipeline import convert
from linearize.convert.replay import VARIABLE, Replay, gradient_buffers, one_sequence_a_row, worth_recording

CPU = torch.device("cpu")


def test_gradients_have_buffers_that_stay() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    with gradient_buffers([used, unused]):
        where = used.grad.data_ptr()
        for _ in range(2):
            (used * 2).sum().backward()
        assert used.grad.data_ptr() == where
        assert used.grad.tolist() == [4.0] * 3 and unused.grad.tolist() == [0.0] * 2
    assert used.grad is None and unused.grad is None


def test_without_a_gpu_the_function_is_called() -> None:
    calls: list[Any] = []

    def function(x: Tensor, kind: str) -> Tensor:
        calls.append(kind)
        return x + 1

    replay = Replay(function, CPU, enabled=False)
    assert replay(torch.zeros(2), kind="a").tolist() == [1.0, 1.0]
    assert replay(torch.ones(2), kind="b").tolist() == [2.0, 2.0]
    assert calls == ["a", "b"]


def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Linear(2, 2)
    assert not worth_recording(small, CPU)
    assert worth_recording(small, torch.device("cuda"))
    monkeypatch.setenv(VARIABLE, "0")
    assert not worth_recording(small, torch.device("cuda"))
    monkeypatch.delenv(VARIABLE)
    with torch.device("meta"):
        large = nn.Linear(50_000, 50_000)
    assert not worth_recording(large, torch.device("cuda"))


def test_masks_are_made_without_asking_the_data_and_the_questions_come_back() -> None:
    positions = torch.tensor([[0, 1, 0, 1]])  # two packed documents
    before = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    with pytest.raises(ZeroDivisionError), one_sequence_a_row():
        assert masking_utils.find_packed_sequence_indices(positions) is None
        assert not masking_utils.is_tracing(positions)
        1 / 0  # noqa: B018
    assert (masking_utils.find_packed_sequence_indices, masking_utils.is_tracing) == before
    assert masking_utils.find_packed_sequence_indices(positions).tolist() == [[0, 0, 1, 1]]


@pytest.mark.gpu
def test_a_replayed_step_is_the_step() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, device=device)
    lines: list[str] = []

    def function(x: Tensor, factor: float) -> Tensor:
        lines.append("ran")
        loss = layer(x).square().mean() * factor
        loss.backward()
        return loss.detach()

    batches = torch.randn(6, 32, 64, device=device)
    plain, replayed = Replay(function, device, enabled=False), Replay(function, device, enabled=True)
    with gradient_buffers(layer.parameters()):
        for factor in (1.0, 2.0):
            for batch in batches:
                found = []
                for run in (plain, replayed):
                    layer.zero_grad(set_to_none=False)
                    found.append((run(batch, kind=factor), layer.weight.grad.clone()))
                assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert replayed.enabled and len(lines) == 12 + 2 * 3  # two warm-up steps and the recording, of each kind


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_kernel_by_kernel() -> None:
    device = torch.device("cuda")
    replay = Replay(lambda x, kind: x + float(x.sum()), device, enabled=True)  # asks the device in the middle
    one = torch.ones(2, device=device)
    for _ in range(5):
        assert replay(one, kind=None).tolist() == [3.0, 3.0]
    assert not replay.enabled


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["pure", "hybrid"])
def test_a_replayed_conversion_is_the_conversion(
    teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    options = [
        "context=128", "mixer.window=16", "mixer.feature_dim=8", "device=cuda", "calibrate.tokens=1k",
        "align.tokens=8k", "align.batch_tokens=512", "finetune.tokens=8k", "finetune.batch_tokens=512",
        "finetune.window_dropout=0.3",
    ]  # fmt: skip
    for name in ("0", "1"):
        monkeypatch.setenv(VARIABLE, name)
        convert(teacher_folder, tmp_path / name, recipe=recipe, data=str(text_file), overrides=options)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "1"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
