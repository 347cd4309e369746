"""Attention transfer: what is taken from the teacher, the losses, and that a dead layer is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linearize.convert import align as align_module
from linearize.convert import align_loss
from linearize.convert.align import (
    align_layers,
    aligned_names,
    branches_of,
    match,
    shared_projections,
    transfer_micro_batch,
    window_hidden,
)
from linearize.convert.align_loss import joint_loss, layer_loss, student_layer
from linearize.convert.capture import TeacherLayer, captured
from linearize.convert.checkpoint import open_run
from linearize.convert.optim import trainable
from linearize.convert.stages import stage_shape
from linearize.convert.surgery import linearize_model, mixer_plan
from linearize.errors import VerificationError
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import attention_layers
from linearize.progress import NullProgress
from linearize.recipe import Align

SPEC = MixerSpec(window=8)
MASS = {"normaliser": "own", "mix": "mass", "coverage": "all", "window": 8, "sinks": 2}
ALL = {
    "mass-own": MixerSpec(feature_map="hedgehog_exp", decay="scalar", own_qk=True, state_heads="kv", **MASS),
    "mass-scale-delta": MixerSpec(feature_map="crelu", write="delta", **MASS | {"normaliser": "scale"}),
    "gate-norm": MixerSpec(feature_map="elu", **MASS | {"mix": "gate", "normaliser": "norm"}),
}
"""Mixers whose linear branch reads the same tokens in the mix as alone."""


def ids(batch: int = 2, length: int = 50) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def student_of(teacher: Any, softmax: set[int] = frozenset(), spec: MixerSpec = SPEC) -> Any:
    plan = mixer_plan(teacher.config.num_hidden_layers, softmax)
    teacher.requires_grad_(False)
    return linearize_model(teacher, spec=spec, layer_mixers=plan, seed=0)[0]


def take(teacher: Any, layers: list[int], tokens: torch.Tensor, weights: bool = True, **kwargs: Any) -> Any:
    taken: list[TeacherLayer] = []
    with torch.no_grad(), captured(teacher, layers, taken.append, weights=weights):
        teacher.model(input_ids=tokens, use_cache=False, **kwargs)
    return taken


def test_captured_heads_and_weights_are_the_teachers(make_teacher: Callable[..., Any], variant: str) -> None:
    teacher = make_teacher(variant)
    with torch.no_grad():
        plain = teacher.model(input_ids=ids(), use_cache=False).last_hidden_state
        taken = take(teacher, [0, 2], ids())
        teacher.set_attn_implementation("eager")
        eager = teacher.model(input_ids=ids(), use_cache=False, output_attentions=True).attentions
        teacher.set_attn_implementation("sdpa")
        again = teacher.model(input_ids=ids(), use_cache=False).last_hidden_state
    assert torch.equal(plain, again)
    assert [layer.index for layer in taken] == [0, 2]
    for layer in taken:
        torch.testing.assert_close(layer.weights, eager[layer.index], rtol=1e-4, atol=1e-5)
        module = teacher.model.layers[layer.index].self_attn
        torch.testing.assert_close(module.o_proj(layer.heads.flatten(2)), layer.output)


def test_a_padded_batch_reaches_the_teacher_with_its_mask(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    weights = take(teacher, [0], ids(2, 20), attention_mask=mask)[0].weights
    assert float(weights[0, :, 7:, :7].abs().max()) == 0.0
    assert float(weights[1, :, 7:, :7].abs().max()) > 0.0


def test_what_is_left_on_the_teacher_is_nothing(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("mistral full")
    with pytest.raises(ZeroDivisionError), captured(teacher, [0, 1], lambda layer: 1 / 0):  # type: ignore[arg-type]
        teacher.model(input_ids=ids(), use_cache=False)
    assert teacher.config._attn_implementation == "sdpa"
    for layer in teacher.model.layers:
        assert not layer.self_attn._forward_hooks
        assert not [name for name in vars(layer.self_attn) if name.startswith("linearize")]


@pytest.mark.parametrize("objective", ["output", "weights", "hidden"])
@pytest.mark.parametrize("branch", ["mix", "both"])
def test_gradients_are_those_of_the_joint_loss(make_teacher: Callable[..., Any], objective: str, branch: str) -> None:
    teacher = make_teacher("qwen3 norms, head_dim 16, yarn")
    student = student_of(teacher, {1})
    align = Align(objective=objective, branch=branch, train=("mixer", "q_proj", "k_proj"))
    attentions = dict(attention_layers(student))
    named = dict(student.named_parameters())
    parameters = {n: named[n] for n in aligned_names(student, align, list(attentions))}
    assert len(parameters) == 2 * 5
    with trainable(parameters.values()):
        result = transfer_micro_batch(teacher, attentions, ids(), align, scale=0.5)
        at_once = {n: p.grad.clone() for n, p in parameters.items()}
        student.zero_grad()
        joint = torch.zeros(())
        for layer in take(teacher, list(attentions), ids()):
            for branches in branches_of(align, hidden=False):
                joint = joint + layer_loss(attentions[layer.index], layer, branches, objective)[0]
        (joint * 0.5).backward()
        for name, parameter in parameters.items():
            assert float(parameter.grad.abs().max()) > 0, name
            torch.testing.assert_close(at_once[name], parameter.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result[0].sum(), joint.detach())


@pytest.mark.parametrize("objective", ["output", "hidden"])
@pytest.mark.parametrize("name", ALL)
def test_one_run_of_the_layer_gives_both_losses(make_teacher: Callable[..., Any], name: str, objective: str) -> None:
    """The loss of the mix and of the linear branch alone, and their gradients, as two runs of the layer give them."""
    teacher = make_teacher("llama tied, head_dim 16, biases")
    student = student_of(teacher, {1}, ALL[name])
    align = Align(objective=objective, branch="both", train=("mixer", "q_proj", "k_proj", "v_proj"))
    if objective == "hidden":
        align = replace(align, train=(*align.train, "o_proj"))
    attentions, named = dict(attention_layers(student)), dict(student.named_parameters())
    parameters = {n: named[n] for n in aligned_names(student, align, list(attentions))}
    torch.manual_seed(0)
    with torch.no_grad():  # away from the zeros and ones that some start at
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with trainable(parameters.values()):
        for layer in take(teacher, list(attentions), ids()):
            attention = attentions[layer.index]
            loss, error = joint_loss(attention, layer, objective)
            mixer = attention.mixer
            assert not mixer.record and mixer.last_output is None and mixer.last_linear is None
            loss.backward()
            found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
            student.zero_grad()
            mix, linear = (layer_loss(attention, layer, which, objective) for which in ("full", "linear"))
            (mix[0] + linear[0]).backward()
            torch.testing.assert_close(loss, mix[0] + linear[0])
            torch.testing.assert_close(error, mix[1])
            assert abs(float((mix[0] - linear[0]).detach())) > 1e-3, (
                "the two losses must differ for this to say anything"
            )
            wanted = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            assert len(wanted) == len(parameters) / 2 and found.keys() == wanted.keys()
            for n in wanted:
                assert float(wanted[n].abs().max()) > 0, n
                torch.testing.assert_close(found[n], wanted[n], rtol=1e-4, atol=1e-7, msg=n)
            student.zero_grad()


def test_the_layer_runs_once_where_one_run_gives_both(
    make_teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_teacher("llama")
    runs: list[str] = []
    joint, single = align_module.joint_loss, align_module.layer_loss
    monkeypatch.setattr(align_module, "joint_loss", lambda *given: runs.append("both") or joint(*given))
    monkeypatch.setattr(align_module, "layer_loss", lambda *given: runs.append(given[2]) or single(*given))
    once, twice = ALL["mass-own"], SPEC  # the second reads other tokens alone than in the mix
    for spec, options, hidden, expected in (
        (once, {}, False, ["both"]),
        (once, {}, True, ["linear"]),
        (once, {"branch": "mix"}, False, ["full"]),
        (once, {"branch": "linear"}, False, ["linear"]),
        (once, {"objective": "weights"}, False, ["full", "linear"]),
        (twice, {}, False, ["full", "linear"]),
    ):
        student = student_of(teacher, {1, 2}, spec)
        align = Align(**{"objective": "hidden", "branch": "both"} | options)
        runs.clear()
        with trainable([p for n, p in student.named_parameters() if "mixer" in n]):
            struck = range(8) if hidden else ()
            transfer_micro_batch(teacher, dict(attention_layers(student)), ids(), align, hidden=struck)
        assert runs == expected, (spec, options)


def test_one_layers_activations_at_a_time(make_teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    teacher = make_teacher("llama")
    student = student_of(teacher)
    alive: list[int] = []
    heads: list[Any] = []
    run = align_loss.student_layer

    def watched(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(ref() is not None for ref in heads))
        out = run(*args, **kwargs)
        heads.append(weakref.ref(out[0]))
        return out

    monkeypatch.setattr(align_loss, "student_layer", watched)
    with trainable([p for n, p in student.named_parameters() if "mixer" in n]):
        transfer_micro_batch(teacher, dict(attention_layers(student)), ids(), Align())
    assert alive == [0, 0, 0]


def test_losses_by_hand(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher)
    attention = dict(attention_layers(student))[1]
    layer = take(teacher, [1], ids())[0]
    with torch.no_grad():
        heads, output, weights = student_layer(attention, layer, "full", weights=True)
        mse = ((heads - layer.heads) ** 2).sum() / (layer.heads**2).sum()
        torch.testing.assert_close(layer_loss(attention, layer, "full", "output")[0], mse)
        entropy = -(layer.weights * weights.clamp_min(1e-12).log()).sum() / weights.shape[:3].numel()
        torch.testing.assert_close(layer_loss(attention, layer, "full", "weights")[0], entropy)
        distance = ((output - layer.output) ** 2).sum(-1).sqrt().mean() / 32**0.5
        torch.testing.assert_close(layer_loss(attention, layer, "full", "hidden")[0], distance)
        linear = student_layer(attention, layer, "linear", weights=False)[0]
    assert not torch.allclose(heads, linear)
    assert attention.mixer.branches == "full" and attention.mixer.last_output is None


def test_o_proj_runs_only_where_what_it_gives_is_compared(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher, {1}, ALL["mass-own"])
    attention = dict(attention_layers(student))[0]
    layer = take(teacher, [0], ids())[0]
    plain, runs = attention.o_proj.forward, []

    def counted(heads: torch.Tensor) -> torch.Tensor:
        runs.append(heads.shape)
        return plain(heads)

    attention.o_proj.forward = counted  # as libraries wrap a module's forward
    with torch.no_grad():
        for objective in ("output", "weights"):
            layer_loss(attention, layer, "full", objective)
        joint_loss(attention, layer, "output")
        assert runs == [] and attention.o_proj.forward is counted
        layer_loss(attention, layer, "full", "hidden")
        assert len(runs) == 1
        joint_loss(attention, layer, "hidden")
        assert len(runs) == 3  # the mix, and the linear branch alone
    del attention.o_proj.forward
    layer_loss(attention, layer, "full", "output")
    assert "forward" not in attention.o_proj.__dict__


@pytest.mark.parametrize("name", ["llama tied, head_dim 16, biases", "qwen3 norms, head_dim 16, yarn"])
@pytest.mark.parametrize("mixer", [SPEC, ALL["mass-own"], ALL["mass-scale-delta"]])
def test_the_teachers_projections_serve_where_they_are_the_students(
    make_teacher: Callable[..., Any], name: str, mixer: MixerSpec
) -> None:
    """Bit by bit the same losses and gradients, and no projection is made twice."""
    teacher = make_teacher(name)
    student = student_of(teacher, {1}, mixer)
    attentions, runs = dict(attention_layers(student)), []
    named = {n: p for n, p in student.named_parameters() if ".mixer." in n}
    for attention in attentions.values():
        attention.q_proj.register_forward_hook(lambda *_: runs.append(1))
    for objective in ("output", "weights", "hidden"):
        for branch in ("mix", "both"):
            align, found = Align(objective=objective, branch=branch), []
            for projected in ((), attentions):
                with trainable(named.values()):
                    runs.clear()
                    table = transfer_micro_batch(teacher, attentions, ids(), align, projected=projected)
                    found.append([table, *(p.grad.clone() for p in named.values() if p.grad is not None)])
                assert bool(runs) == (not projected)
            assert len(found[0]) == len(found[1]) > 1
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_projections_of_its_own_are_the_students(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama tied, head_dim 16, biases")
    student = student_of(teacher, {1})
    attentions = dict(attention_layers(student))

    def shared(*train: str) -> frozenset[int]:
        align = Align(train=("mixer", *train))
        return shared_projections(teacher, attentions, {i: aligned_names(student, align, [i]) for i in attentions})

    assert shared() == set(attentions) == {0, 2}
    assert shared("q_proj") == shared("v_proj") == set()
    with torch.no_grad():
        attentions[2].k_proj.bias.add_(1e-3)
    assert shared() == {0}


def test_branches_and_dropped_windows() -> None:
    assert branches_of(Align(branch="both"), hidden=False) == ("full", "linear")
    assert branches_of(Align(branch="both"), hidden=True) == branches_of(Align(branch="linear"), hidden=False)
    align = Align(window_dropout=0.3)
    draws = [window_hidden(align, layer, seed=0, step=s, micro=0) for s in range(300) for layer in range(4)]
    assert 0.25 < sum(draws) / len(draws) < 0.35
    assert draws == [window_hidden(align, layer, seed=0, step=s, micro=0) for s in range(300) for layer in range(4)]
    assert not any(window_hidden(Align(), layer, seed=0, step=0, micro=0) for layer in range(100))


def train(student: Any, teacher: Any, align: Align, out: Path, steps: int = 12, length: int = 48) -> Any:
    windows = np.random.default_rng(0).integers(0, 256, (16, length), dtype=np.int32)
    shape = stage_shape("align", tokens=steps * 4 * length, batch_tokens=4 * length, context=length)
    assert shape.steps == steps
    with open_run(out) as run:
        return align_layers(
            student,
            teacher,
            align=align,
            shape=shape,
            micro=3,
            seed=0,
            windows=windows,
            run=run,
            start=None,
            progress=NullProgress(),
        )


@pytest.mark.parametrize(
    "options", [{}, {"window_dropout": 1.0}, {"branch": "linear"}, {"objective": "weights"}], ids=str
)
def test_alignment_lowers_every_layers_loss(
    make_teacher: Callable[..., Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher)
    frozen = {n: p.clone() for n, p in student.named_parameters() if "mixer" not in n}
    state = train(student, teacher, Align(lr=1e-2, **options), tmp_path / "out", steps=30)
    rows = match(state)
    assert [row["layer"] for row in rows] == ([] if options.get("window_dropout") else [0, 1, 2])
    assert all(row["loss"] < row["loss_first"] for row in rows), rows
    assert all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())
    assert asdict(state)["step"] == 30


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_mixers_have_a_rate_of_their_own(make_teacher: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """A tiny rate moves next to nothing: which parameters stay says whose rate it was."""
    teacher = make_teacher("llama")
    for lr, mixer_lr, moves in ((1e-2, 1e-30, "q_proj"), (1e-30, 1e-2, "mixer")):
        align = Align(lr=lr, mixer_lr=mixer_lr, train=("mixer", "q_proj"), optimizer=kind)
        student = student_of(teacher)
        before = {n: p.clone() for n, p in student.named_parameters()}
        train(student, teacher, align, tmp_path / moves, steps=2)
        moved = {n.split(".")[4] for n, p in student.named_parameters() if (p - before[n]).abs().max() > 1e-12}
        assert moved == {moves}


def test_a_layer_that_does_not_move_is_named(make_teacher: Callable[..., Any], tmp_path: Path) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher)
    mixer = student.model.layers[1].self_attn.mixer
    forward = mixer.forward

    def dead(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs).detach().requires_grad_()  # no gradient reaches this layer's parameters
        mixer.last_output = out
        return out

    mixer.forward = dead
    with pytest.raises(VerificationError, match=r"layer 1: alignment moved none .* in 10 steps"):
        train(student, teacher, Align(), tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_a_layer_that_is_not_finite_is_named(make_teacher: Callable[..., Any], tmp_path: Path) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher)
    with torch.no_grad():
        student.model.layers[2].self_attn.mixer.q_map.weight[0, 0, 0] = float("nan")
    with pytest.raises(VerificationError, match=r"layer 2: .* not finite at step 1"):
        train(student, teacher, Align(), tmp_path / "out")


def test_a_layer_that_diverges_is_named(make_teacher: Callable[..., Any], tmp_path: Path) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher)
    align = Align(lr=10.0, warmup=0.0, train=("v_proj",))
    with pytest.raises(VerificationError, match=r"layer \d: the alignment diverged"):
        train(student, teacher, align, tmp_path / "out", steps=40)
