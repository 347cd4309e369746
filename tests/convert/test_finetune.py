"""Losses against sums by hand, adapters and their merge, recomputation, and what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linearize.convert import finetune as module
from linearize.convert import finetune_loss
from linearize.convert.checkpoint import open_run
from linearize.convert.export import merge
from linearize.convert.finetune import (
    branches,
    finetune_model,
    kept_names,
    prepare,
    training_mode,
    window_hidden,
)
from linearize.convert.finetune_loss import backward_losses, mean_loss, token_losses
from linearize.convert.lora import extract, inject, merged_weight, target_modules
from linearize.convert.optim import trainable
from linearize.convert.stages import StageState, stage_shape
from linearize.convert.surgery import linearize_model, mixer_plan
from linearize.errors import UsageError, VerificationError
from linearize.masking import IGNORE
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import MixerSpec
from linearize.progress import NullProgress
from linearize.recipe import Finetune, Lora
from linearize.task import shifted_labels

SPEC = MixerSpec(window=8)


def ids(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def student_of(teacher: Any, softmax: set[int] = frozenset(), own: Any = lambda name: False) -> Any:
    plan = mixer_plan(teacher.config.num_hidden_layers, softmax)
    teacher.requires_grad_(False)
    return linearize_model(teacher, spec=SPEC, layer_mixers=plan, seed=0, own=own)[0]


def test_losses_are_token_sums_under_the_mask_equal_to_sums_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(7, 11, generator=generator) * 4 for _ in range(2))
    labels = torch.tensor([3, IGNORE, 0, 10, IGNORE, 5, 5])
    ce = kl = 0.0
    for row in range(7):
        if labels[row] == IGNORE:
            continue
        p = ours[row].double().exp() / ours[row].double().exp().sum()
        q = theirs[row].double().exp() / theirs[row].double().exp().sum()
        ce -= float(p[labels[row]].log())
        kl += sum(float(q[v] * (q[v].log() - p[v].log())) for v in range(11))
    got = token_losses(ours, labels, theirs)
    assert [float(x) for x in got] == pytest.approx([ce, kl], rel=1e-5)
    assert token_losses(ours.bfloat16(), labels, None)[0].dtype == torch.float32
    assert float(token_losses(ours, labels, None)[1]) == 0.0
    assert float(token_losses(ours, labels, ours)[1]) == pytest.approx(0.0, abs=1e-5)


def test_labels_are_the_next_tokens() -> None:
    assert shifted_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, IGNORE]]


@pytest.mark.parametrize("piece", [7, 1000])
def test_gradients_in_pieces_are_those_of_the_whole(
    make_teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(finetune_loss, "PIECE", piece)
    teacher = make_teacher("qwen2 biases, tied")
    student = student_of(teacher, {0})
    trained = prepare(student, Finetune(full=("mixer",), kl=1.0), seed=0)
    with torch.no_grad():
        for parameter in trained.adapters.values():
            parameter.normal_(std=0.1)
    labels = shifted_labels(ids())
    labels[0, :5] = IGNORE
    count = int((labels != IGNORE).sum())
    with trainable(trained.parameters.values()):
        sums = backward_losses(student, teacher, ids(), labels, ce=0.7, kl=0.3, scale=1 / count)
        pieces = {n: p.grad.clone() for n, p in trained.parameters.items()}
        student.zero_grad()
        ours, theirs = (m(input_ids=ids(), use_cache=False).logits.flatten(0, 1) for m in (student, teacher))
        whole = token_losses(ours, labels.flatten(), theirs)
        ((0.7 * whole[0] + 0.3 * whole[1]) / count).backward()
        for got, want in zip(sums, whole, strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-4)
        for name, parameter in trained.parameters.items():
            assert float(parameter.grad.abs().max()) > 0, name
            torch.testing.assert_close(pieces[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_recomputation_changes_nothing(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    gradients = []
    for checkpointing in (False, True):
        student = student_of(teacher, {1})
        trained = prepare(student, Finetune(lora=Lora(dropout=0.2), full=("mixer",)), seed=0)
        torch.manual_seed(0)
        with trainable(trained.parameters.values()), training_mode(student, checkpointing=checkpointing):
            backward_losses(student, teacher, ids(), shifted_labels(ids()), ce=1.0, kl=1.0, scale=1.0)
            gradients.append({n: p.grad.clone() for n, p in trained.parameters.items()})
        assert not student.training and not student.is_gradient_checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_attention_dropout_of_the_teacher_stays_off(make_teacher: Callable[..., Any]) -> None:
    student = student_of(make_teacher("llama", attention_dropout=0.5), {0, 1, 2})
    with torch.no_grad(), training_mode(student, checkpointing=False):
        one, two = (student(input_ids=ids(), use_cache=False).logits for _ in range(2))
    assert torch.equal(one, two)
    assert student.model.layers[0].self_attn.attention_dropout == 0.5


def test_merge_is_fp32_and_leaves_the_teacher_alone(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("qwen3 norms, head_dim 16, yarn")
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    student = student_of(teacher, {2})
    adapters = inject(student, Lora(r=2, alpha=6, targets=("q_proj", "down_proj")), seed=0)
    assert len(adapters) == 2 * 2 * 3 and all(p.dtype == torch.float32 for p in adapters.values())
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1)
    down = student.model.layers[0].mlp.down_proj
    by_hand = before["model.layers.0.mlp.down_proj.weight"] + 3.0 * (
        down.lora_B["default"].weight @ down.lora_A["default"].weight
    )
    torch.testing.assert_close(merged_weight(down), by_hand.detach())
    errors = merge(student, ids(), torch.bfloat16)
    assert errors["merge"]["max"] < 1e-3 < errors["cast"]["max"]
    assert errors["merge"]["mean"] <= errors["merge"]["max"]
    assert all(p.dtype == torch.bfloat16 for p in student.parameters())
    assert not [n for n, _ in student.named_modules() if "lora" in n or "base_layer" in n]
    assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters())


@pytest.mark.parametrize(("by", "named"), [(1e6, r", for model\.norm\.weight is not"), (3e4, "")])
def test_numbers_that_float16_does_not_hold_are_named_at_once(
    make_teacher: Callable[..., Any], by: float, named: str
) -> None:
    """Whether weights are too large for it or only what is computed of them."""
    for dtype in (torch.float16, torch.bfloat16):
        teacher = make_teacher("llama")
        student = student_of(teacher, own=lambda name: name == "model.norm.weight")
        with torch.no_grad():
            student.model.norm.weight.fill_(by)
        if dtype == torch.bfloat16:
            merge(student, ids(), dtype)
            continue
        with pytest.raises(VerificationError, match=rf"^in float16 the .* logits that are not finite{named}\. float16 "
                           r"ends at 65,504: convert with dtype=bfloat16 or dtype=float32"):  # fmt: skip
            merge(student, ids(), dtype)


def test_adapters_start_as_nothing_and_from_the_seed(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher)
    with torch.no_grad():
        plain = student(input_ids=ids(), use_cache=False).logits
        torch.manual_seed(0)
        one = {n: p.clone() for n, p in inject(student, Lora(), seed=3).items()}
        assert torch.equal(student(input_ids=ids(), use_cache=False).logits, plain)
        extract(student, merge=False)
        assert torch.equal(student(input_ids=ids(), use_cache=False).logits, plain)
        torch.manual_seed(1)
        two = inject(student, Lora(), seed=3)
    assert all(torch.equal(one[n], p) for n, p in two.items())
    bounds = {n: float(p.abs().max()) for n, p in one.items() if "lora_A" in n}
    assert all(0.8 * 32**-0.5 < bound <= 32**-0.5 for bound in bounds.values())


def test_what_is_trained(make_teacher: Callable[..., Any]) -> None:
    student = student_of(make_teacher("qwen2 biases, tied"), {0})
    with pytest.raises(UsageError, match=r"no module 'q_porj'. Did you mean 'q_proj'"):
        target_modules(student, ["q_porj"])
    trained = prepare(student, Finetune(lora=Lora(targets=("o_proj",)), full=("mixer", "q_proj")), seed=0)
    assert sorted({n.split(".")[4] for n in trained.full}) == ["mixer", "q_proj"]
    assert {n.split(".")[2] for n in trained.full if "q_proj" in n} == {"0", "1", "2"}
    assert len(trained.adapters) == 2 * 3
    kept = kept_names(["model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.k_proj.bias"], student)
    assert list(kept) == ["model.layers.1.self_attn.o_proj.base_layer.weight", "model.layers.1.self_attn.k_proj.bias"]


def train(student: Any, teacher: Any, options: Finetune, out: Path, steps: int = 12, length: int = 48) -> Any:
    windows = np.random.default_rng(0).integers(0, 16, (16, length), dtype=np.int32)
    shape = stage_shape("finetune", tokens=steps * 4 * length, batch_tokens=4 * length, context=length)
    trained = prepare(student, options, seed=0)
    with open_run(out) as run:
        return finetune_model(
            student,
            teacher,
            trained,
            finetune=options,
            shape=shape,
            micro=3,
            seed=0,
            windows=windows,
            checkpointing=False,
            keep={},
            carried={},
            run=run,
            start=None,
            progress=NullProgress(),
        )


@pytest.mark.parametrize("options", [
    Finetune(lr=1e-2), Finetune(ce=0.0, kl=1.0, lr=1e-2), Finetune(lora=None, full=("mixer", "v_proj"), full_lr=3e-3),
], ids=["ce", "kl", "full"])  # fmt: skip
def test_finetuning_lowers_the_loss(make_teacher: Callable[..., Any], tmp_path: Path, options: Finetune) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher, own=lambda name: "v_proj" in name)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    state = train(student, teacher, options, tmp_path / "out", steps=30)
    assert state.loss_last < state.loss_first
    assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters())


def branches_in(student: Any) -> set[str]:
    return {mixer.branches for mixer in student.modules() if isinstance(mixer, Mixer)}


def test_a_hidden_window_is_hidden_in_every_layer_and_comes_back(make_teacher: Callable[..., Any]) -> None:
    student = student_of(make_teacher("llama"), {1})
    with torch.no_grad():
        full = student(input_ids=ids(), use_cache=False).logits
        with branches(student, "linear"):
            assert branches_in(student) == {"linear"}
            hidden = student(input_ids=ids(), use_cache=False).logits
        assert (hidden - full).abs().max() > 1e-3
        with pytest.raises(ZeroDivisionError), branches(student, "linear"):
            1 / 0  # noqa: B018
        assert branches_in(student) == {"full"}
        assert torch.equal(student(input_ids=ids(), use_cache=False).logits, full)


def test_hidden_windows_follow_from_seed_and_step() -> None:
    def draws(seed: int, share: float) -> list[bool]:
        return [window_hidden(Finetune(window_dropout=share), seed=seed, step=step) for step in range(400)]

    assert not any(draws(0, 0.0)) and all(draws(0, 1.0))
    third = draws(0, 0.3)
    assert 0.22 < sum(third) / 400 < 0.38
    random = torch.get_rng_state()
    torch.manual_seed(9)
    assert draws(0, 0.3) == third != draws(1, 0.3)
    torch.set_rng_state(random)
    half = draws(0, 0.5)
    assert all(b for a, b in zip(third, half, strict=True) if a), "a larger share hides more steps, not other ones"
    assert not any(draws(0, 0.0)) and all(draws(0, 1.0))


def test_hidden_steps_train_the_linear_branch_alone(make_teacher: Callable[..., Any], tmp_path: Path) -> None:
    """Every micro-batch of a hidden step runs without the window: gamma, the window's weight, then gets nothing."""
    teacher = make_teacher("llama")
    for share, moves in ((1.0, False), (0.0, True)):
        student = student_of(teacher)
        before = {n: p.clone() for n, p in student.named_parameters()}
        options = Finetune(window_dropout=share, lora=None, full=("mixer",), lr=1e-2)
        state = train(student, teacher, options, tmp_path / f"out {share}", steps=3)
        assert state.step == 3 and branches_in(student) == {"full"}
        after = {n: p for n, p in student.named_parameters() if n.endswith("mixer.window_logit")}
        assert len(after) == 3 and all(torch.equal(p, before[n]) != moves for n, p in after.items())
        assert not torch.equal(student.model.layers[0].self_attn.mixer.q_map.weight, before[
            "model.layers.0.self_attn.mixer.q_map.weight"])  # fmt: skip


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_mixers_and_projections_have_rates_of_their_own(
    make_teacher: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    teacher = make_teacher("llama")
    tiny, real = 1e-30, 1e-2  # the first moves next to nothing
    for rates, moves in (
        ({"lr": tiny, "full_lr": tiny, "mixer_lr": real}, {"mixer"}),
        ({"lr": tiny, "full_lr": real, "mixer_lr": tiny}, {"v_proj"}),
        ({"lr": real, "full_lr": tiny, "mixer_lr": tiny}, {"lora"}),
        ({"lr": tiny, "full_lr": real}, {"v_proj", "mixer"}),
        ({"lr": real, "mixer_lr": tiny}, {"v_proj", "lora"}),
    ):
        student = student_of(teacher, own=lambda name: "v_proj" in name)
        options = Finetune(lora=Lora(targets=("up_proj",)), full=("mixer", "v_proj"), optimizer=kind, **rates)
        before = {n: p.clone() for n, p in student.named_parameters()}
        train(student, teacher, options, tmp_path / "out", steps=2)
        start = before | {n: torch.zeros_like(p) for n, p in student.named_parameters() if "lora_B" in n}
        moved = [
            n
            for n, p in student.named_parameters()
            if "lora_A" not in n and (p - start[n.replace(".base_layer", "")]).abs().max() > 1e-12
        ]
        assert {"lora" if "lora" in n else n.split(".")[4] for n in moved} == moves


def test_the_mean_loss_is_that_of_the_model(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    with torch.no_grad():
        want = torch.stack([teacher(input_ids=row[None], labels=row[None]).loss for row in ids(3)]).mean()
    assert mean_loss(teacher, ids(3)) == pytest.approx(float(want), rel=1e-5)


def test_a_dead_training_is_an_error(make_teacher: Callable[..., Any], tmp_path: Path) -> None:
    teacher = make_teacher("llama")
    student = student_of(teacher)
    with torch.no_grad():
        student.model.layers[1].self_attn.mixer.q_map.weight[0, 0, 0] = float("nan")
    with pytest.raises(VerificationError, match="not finite at step 1"):
        train(student, teacher, Finetune(), tmp_path / "out")
    with pytest.raises(VerificationError, match=r"layer 0: finetuning moved none .* in 10 steps"):
        # Rates so small that fp32 does not notice.
        train(student_of(teacher, own=lambda n: True), teacher, Finetune(lora=None, full=("v_proj",), lr=1e-30),
              tmp_path / "out")  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_loss_that_runs_away_is_an_error() -> None:
    state = StageState()
    for step, loss in enumerate([3.0, 2.9, 4.0, 6.0, 2.5]):  # a spike is no divergence
        module._take_in(state, loss, 0.0, Finetune(), 1.0, {}, step, hidden=False)
    with pytest.raises(VerificationError, match=r"finetuning diverged: its loss is 7\.55 at step 12 and was 2\.95"):
        for step in range(5, 50):
            assert state.loss_first is not None
            module._take_in(state, 9.0, 0.0, Finetune(), 1.0, {}, step, hidden=False)


def test_an_end_far_above_the_beginning_is_told() -> None:
    state, finetune = StageState(), Finetune(ce=0.0, kl=1.0)
    for step in range(40):
        module._take_in(state, 0.0, 0.1 if step < 20 else 0.19, finetune, 1.0, {}, step, hidden=False)
    assert module.ended_worse(state) is None
    for step in range(40, 80):
        module._take_in(state, 0.0, 0.9, finetune, 1.0, {}, step, hidden=False)
    told = module.ended_worse(state)
    assert told is not None and "its loss is 0.9 and was 0.1" in told and "finetune.mixer_lr" in told


def test_steps_without_windows_stay_out_of_the_figures() -> None:
    state, parameters = StageState(), {}
    finetune = Finetune(ce=0.0, kl=1.0, window_dropout=0.5)
    module._take_in(state, 0.0, 9.0, finetune, 1.0, parameters, 0, hidden=True)
    assert state.loss_first is state.loss_last is None, "nor the very first one"
    for step, (loss, hidden) in enumerate([(1.0, False), (50.0, True), (3.0, False)], start=1):
        module._take_in(state, 0.0, loss, finetune, 1.0, parameters, step, hidden=hidden)
    assert state.loss_last == pytest.approx((1.0 + 3.0) / 2) == state.loss_first
    with pytest.raises(VerificationError, match="not finite"):
        module._take_in(state, 0.0, float("nan"), finetune, 1.0, parameters, 4, hidden=True)
