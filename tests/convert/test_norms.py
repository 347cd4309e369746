"""Norms in one launch: the same numbers, for what is the plain formula and nothing else; and native classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from linearize.convert import norms
from linearize.modeling.pointwise import OneKernel
from tests.modeling.families import teacher


class OddRMSNorm(LlamaRMSNorm):
    """Called a norm, and something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class Plain(LlamaRMSNorm):
    """The formula under a name that does not say so."""


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.ModuleDict:
    """One of each, as if on a GPU."""
    monkeypatch.setattr(norms, "_fast", lambda weight: True)
    torch.manual_seed(0)
    made = nn.ModuleDict(
        {"llama": LlamaRMSNorm(24, 1e-3), "gemma": Gemma2RMSNorm(24), "odd": OddRMSNorm(24), "plain": Plain(24)}
        | {"layer": nn.LayerNorm(24), "narrow": LlamaRMSNorm(24).bfloat16()}
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return made


def test_only_what_is_the_formula(model: nn.ModuleDict) -> None:
    with norms.in_one_launch(model, model):
        assert [name for name, module in model.items() if "forward" in module.__dict__] == ["llama"]
    assert not any("forward" in module.__dict__ for module in model.values())


def test_the_numbers_stay(model: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 24, requires_grad=True)
    upstream = torch.randn(2, 5, 24)
    called: list[torch.dtype] = []
    run = norms._norm
    monkeypatch.setattr(norms, "_norm", lambda x, *rest: called.append(x.dtype) or run(x, *rest))
    wanted = model["llama"](x)
    (theirs,) = torch.autograd.grad(wanted, x, upstream)
    low = model["llama"](x.bfloat16())
    with norms.in_one_launch(model):
        called.clear()
        found = model["llama"](x)
        (ours,) = torch.autograd.grad(found, x, upstream)
        assert called == [torch.float32]
        assert torch.equal(model["llama"](x.bfloat16()), low) and len(called) == 1  # rounded as its own code rounds
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model["llama"](x).dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours, theirs)


def test_off_a_gpu_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([LlamaRMSNorm(8)])
    with norms.in_one_launch(model):
        assert "forward" not in model[0].__dict__
    monkeypatch.setattr(norms, "_fast", lambda weight: True)
    with pytest.raises(KeyboardInterrupt), norms.in_one_launch(model):
        assert "forward" in model[0].__dict__
        raise KeyboardInterrupt
    assert "forward" not in model[0].__dict__


def test_native_modules_call_kernels_within_it() -> None:
    """And are what they were afterwards, also after an error."""
    model = teacher("llama")
    before = [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), norms.in_one_launch(model):
        quick = [type(module).__name__ for module in model.modules() if isinstance(module, OneKernel)]
        assert sorted(set(quick)) == ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm"]
        raise KeyboardInterrupt
    assert [type(module) for module in model.modules()] == before
