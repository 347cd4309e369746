"""Finetuning's loss by the kernel: the figures and gradients of the torch path, and only where the heads are plain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from linearize.convert import finetune_loss as module
from linearize.convert.finetune_loss import backward_losses
from linearize.task import shifted_labels
from linearize_kernels.backend import HAS_TRITON, VARIABLE, interpreting

pytestmark = pytest.mark.skipif(not HAS_TRITON or not interpreting(), reason="needs Triton's interpreter")
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """An embedding in place of a decoder, and a head."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.lm_head = nn.Linear(width, 40, bias=bias)
        self.config = SimpleNamespace(model_type="llama")

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def model(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def losses(monkeypatch: pytest.MonkeyPatch, backend: str, *, kl: float, bias: bool = False) -> list[torch.Tensor]:
    """Both sums, and the gradients of the table and the head."""
    monkeypatch.setenv(VARIABLE, backend)
    torch.manual_seed(1)
    student, teacher = Model(16, bias), Model(24)
    sums = backward_losses(student, teacher, IDS, shifted_labels(IDS), ce=0.7, kl=kl, scale=torch.tensor(0.25))
    assert student.lm_head.weight.grad is not None and student.table.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())
    return [sums, student.table.weight.grad, student.lm_head.weight.grad]


@pytest.mark.parametrize("kl", [0.0, 1.3])
def test_the_kernel_gives_what_torch_gives(monkeypatch: pytest.MonkeyPatch, kl: float) -> None:
    want = losses(monkeypatch, "torch", kl=kl)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the torch path ran")

    monkeypatch.setattr(module, "_backward_by_pieces", refuse)
    for a, b in zip(losses(monkeypatch, "triton", kl=kl), want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_not_plain_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    want = losses(monkeypatch, "torch", kl=1.0, bias=True)
    for a, b in zip(losses(monkeypatch, "triton", kl=1.0, bias=True), want, strict=True):
        assert torch.equal(a, b)
