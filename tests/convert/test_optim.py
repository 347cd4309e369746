"""Schedule, groups, clipping, seeds, determinism."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from linearize.convert.optim import (
    CUBLAS,
    adamw,
    clip,
    derived_seed,
    derived_uniform,
    deterministic,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from linearize.convert.stages import stage_shape


def rates(steps: int, warmup: float, min_lr: float = 0.1) -> list[float]:
    return [learning_rate(s, steps=steps, lr=2.0, warmup=warmup, min_lr=min_lr) for s in range(steps)]


def test_schedule() -> None:
    values = rates(20, 0.25)
    assert values[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert values[-1] == pytest.approx(0.2)
    assert values[5:] == sorted(values[5:], reverse=True)
    assert rates(1, 0.05) == pytest.approx([2.0])
    assert rates(1, 0.0) == pytest.approx([0.2])
    assert rates(4, 1.0) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert all(v > 0 for n in range(1, 9) for v in rates(n, 0.3, 0.0)[:-1])


def test_groups() -> None:
    layer = nn.Linear(3, 4)
    optimizer = adamw([(layer.parameters(), 0.5), ([nn.Parameter(torch.ones(2, 2))], 0.1)], weight_decay=0.3)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (1, 0.5, 0.3), (1, 0.5, 0.0), (1, 0.1, 0.3),
    ]  # fmt: skip
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
    set_learning_rate(optimizer, 9, steps=10, warmup=0.0, min_lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.01])


def test_muon_takes_projections_and_adamw_the_rest() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.gate = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

    torch.manual_seed(0)
    block = Block()
    named = {f"layers.0.{name}".replace("gate", "mixer.gate"): p for name, p in block.named_parameters()}
    optimizer = make_optimizer("muon", [(named, 0.1)], weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in named.items()}
    (block.q_proj(torch.randn(8, 6)).square().sum() + block.gate(torch.randn(8, 6)).square().sum()).backward()
    optimizer.step()
    matrix = named["layers.0.q_proj.weight"]
    assert set(optimizer.state[matrix]) == {"momentum_buffer"}
    assert {"exp_avg", "step"} <= set(optimizer.state[named["layers.0.mixer.gate.weight"]])
    assert {"exp_avg", "step"} <= set(optimizer.state[named["layers.0.q_proj.bias"]])
    moved = torch.linalg.svdvals((matrix - before["layers.0.q_proj.weight"]).detach())
    assert moved.min() > 0.3 * moved.max()  # orthogonalised: no direction is left behind
    set_learning_rate(optimizer, 9, steps=10, warmup=0.0, min_lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01] * 3)
    optimizer.zero_grad()
    assert matrix.grad is None


def test_clip() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert float(clip(parameters, 10.0)) == pytest.approx(5.0)
    assert float(parameters[1].grad) == 4.0
    clip(parameters, 1.0)
    assert float(parameters[1].grad) == pytest.approx(0.8, rel=1e-4)


def test_seeds_do_not_depend_on_the_process() -> None:
    assert derived_seed(0, "align", 3) == 5769427143278484415
    assert derived_seed(0, "align", 3) != derived_seed(0, "align", 4)
    assert 0.0 <= derived_uniform(1, 2) < 1.0


def test_determinism_is_given_back() -> None:
    before = (torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS))
    with pytest.raises(ValueError), deterministic():
        assert torch.are_deterministic_algorithms_enabled() and os.environ[CUBLAS] == ":4096:8"
        raise ValueError
    assert before == (torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS))


def test_stage_shapes() -> None:
    align = stage_shape("align", tokens=10_000, batch_tokens=2_500, context=1_000)
    assert (align.steps, align.batch, align.tokens, align.offset) == (5, 2, 10_000, 0)
    finetune = stage_shape("finetune", tokens=1, batch_tokens=100, context=1_000, after=align)
    assert (finetune.steps, finetune.batch, finetune.tokens, finetune.offset) == (1, 1, 1_000, 10)
    assert stage_shape("align", tokens=0, batch_tokens=1, context=1).skipped == "align.tokens is 0"
