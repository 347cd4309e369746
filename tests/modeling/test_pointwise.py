"""Norms, gated units and rotations by one kernel each: recognised by what they compute, the same in every family."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from linearize.modeling import pointwise
from linearize.modeling.mixer_spec import MixerSpec
from linearize_kernels.backend import HAS_TRITON, VARIABLE, interpreting
from tests.modeling.families import DECODERS, SIZES, teacher
from tests.modeling.test_model import convert

SPEC = MixerSpec(feature_dim=8, window=16)
PLAN = ["linear", "softmax", "linear"]
NORMLESS = ("gpt_neox", "gpt2", "opt", "stablelm")
"""Families with LayerNorm, which torch has as one kernel."""
UNGATED = ("gpt_neox", "gpt2", "opt", "mixtral")
"""Families whose MLPs have no gate, or are experts."""
UNTURNED = ("gpt2", "opt")


@pytest.fixture
def kernel_device() -> str:
    """Where kernels can run here."""
    return "cpu" if interpreting() else "cuda"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each op was called."""
    found = dict.fromkeys(("rms_norm", "gated_unit", "rotate"), 0)
    for name in found:
        op = getattr(pointwise, name)

        def counted(*args: Any, name: str = name, op: Any = op, **kwargs: Any) -> Any:
            found[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(pointwise, name, counted)
    return found


def read(model: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> torch.Tensor:
    """Logits of two rows, by ops of a backend; the mixers' are torch's."""
    for mixer in model.modules():
        if hasattr(mixer, "branches"):
            mixer.backend = "torch"
    monkeypatch.setenv(VARIABLE, backend)
    device = next(model.parameters()).device
    ids = torch.randint(3, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("family", DECODERS)
def test_every_family_is_the_same_by_kernels(
    family: str, calls: dict[str, int], kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = convert(teacher(family), SPEC, PLAN).to(kernel_device)
    calls.update(dict.fromkeys(calls, 0))  # what a class computes is tried once, when it is met
    trained = [x for name, x in student.named_parameters() if name.endswith(("norm.weight", "proj.weight"))]
    want = read(student, monkeypatch, "torch")
    wanted = torch.autograd.grad(want.logsumexp(-1).sum(), trained, allow_unused=True)
    assert not any(calls.values())
    found = read(student, monkeypatch, "triton")
    ours = torch.autograd.grad(found.logsumexp(-1).sum(), trained, allow_unused=True)
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-5)
    for x, y in zip(ours, wanted, strict=True):
        assert (x is None) == (y is None)
        assert x is None or y is None or torch.allclose(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    del found, want
    again = dict(calls)
    with torch.no_grad():
        read(student, monkeypatch, "triton")
    assert calls == {name: 2 * count for name, count in again.items()}
    calls.update(again)
    assert (calls["rms_norm"] > 0) == (family not in NORMLESS)
    assert (calls["gated_unit"] > 0) == (family not in UNGATED)
    turned = 0 if family in UNTURNED else 2 if family == "smollm3" else 3
    assert calls["rotate"] == turned


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_transforms_go_through_the_native_code(
    calls: dict[str, int], kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.func wraps looks like any tensor, and the ops have no rules for it."""
    student = convert(teacher("llama"), SPEC, PLAN).to(kernel_device)
    norm, mlp = student.model.norm, student.model.layers[0].mlp
    calls.update(dict.fromkeys(calls, 0))
    monkeypatch.setenv(VARIABLE, "triton")
    x = torch.randn(3, norm.weight.shape[0], device=kernel_device)
    found = torch.func.vmap(torch.func.grad(lambda row: mlp(norm(row[None])).sum()))(x)
    assert not any(calls.values())
    leaf = x.clone().requires_grad_()
    mlp(norm(leaf)).sum().backward()
    assert calls["rms_norm"] == calls["gated_unit"] == 1
    assert torch.allclose(found, leaf.grad, rtol=1e-4, atol=1e-6)


def test_a_copy_and_a_pickle_are_of_the_same_classes() -> None:
    student = convert(teacher("qwen3"), SPEC, PLAN)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert [type(x) for x in twin.modules()] == [type(x) for x in student.modules()]
        assert twin.model.norm.weight is not student.model.norm.weight
    assert isinstance(student.model.norm, pointwise.OneKernelNorm)
    assert type(student.model.norm).__name__ == "Qwen3RMSNorm"


def test_without_the_kernels_package_the_native_classes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

    monkeypatch.setattr(pointwise, "pick", None)
    pointwise.quick_class.cache_clear()
    try:
        assert all(pointwise.quick_class(kind) is None for kind in (LlamaAttention, LlamaMLP, LlamaRMSNorm))
    finally:
        pointwise.quick_class.cache_clear()


class Plain(nn.Module):
    """RMSNorm in the form of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class CentredRMSNorm(Plain):
    """What only its name calls RMSNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class PlainRMSNorm(Plain):
    """What it says."""


class OddMLP(nn.Module):
    """A gated unit with a square."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).square() * self.up_proj(x))  # type: ignore[no-any-return]


class BrokenMLP(nn.Module):
    """A module that needs more than a unit has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)  # type: ignore[no-any-return]


def test_a_class_is_known_by_what_it_computes() -> None:
    assert pointwise.norm_form(PlainRMSNorm) == (False, False)
    assert pointwise.quick_class(PlainRMSNorm) is not None
    assert pointwise.quick_class(Plain) is None  # of another name
    assert all(pointwise.quick_class(kind) is None for kind in (CentredRMSNorm, OddMLP, BrokenMLP))


def test_activations_are_known_by_what_they_compute() -> None:
    from transformers.activations import ACT2FN

    assert pointwise.activation_name(nn.SiLU()) == pointwise.activation_name(ACT2FN["silu"]) == "silu"
    assert pointwise.activation_name(ACT2FN["gelu_pytorch_tanh"]) == "gelu_tanh"
    assert pointwise.activation_name(ACT2FN["gelu"]) is None  # by the error function
    assert pointwise.activation_name(ACT2FN["relu"]) is None
    assert pointwise.activation_name(torch.nn.functional.silu) is None


def test_another_rotation_stays() -> None:
    """Pairs beside each other, as GPT-J turns them, are not halves."""

    def native(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def turned(x: torch.Tensor) -> torch.Tensor:
            pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
            return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

        return turned(q), turned(k)

    forward = type(lambda: 0)((lambda self, *x: apply_rotary_pos_emb(*x)).__code__, {pointwise.ROTATION: native})  # type: ignore[name-defined]  # noqa: F821
    assert pointwise.rotating(forward) is forward
