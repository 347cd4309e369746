"""Calibration: means that hit their targets, scales that are the optimum, and nothing else touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from linearize.convert import calibrate as module
from linearize.convert import observe
from linearize.convert.align_loss import normalised_error, student_layer
from linearize.convert.calibrate import calibrate, propose, settle
from linearize.convert.capture import TeacherLayer, captured
from linearize.convert.observe import Observed, mixer_call, reach
from linearize.convert.surgery import linearize_model, mixer_plan
from linearize.convert.trial import Proposal, Trial, solve_scale, squared_error
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import attention_layers
from linearize.progress import NullProgress

LENGTH = 96
GDN: dict[str, Any] = {
    "feature_map": "l2norm",
    "decay": "scalar",
    "write": "delta",
    "window": 8,
    "sinks": 2,
    "coverage": "all",
}
SPECS: dict[str, MixerSpec] = {
    "delta, gate, norm": MixerSpec(**GDN, mix="gate", normaliser="norm"),
    "delta, mass, scale, kv, signed": MixerSpec(
        **GDN, mix="mass", normaliser="scale", state_heads="kv", negative_eigenvalues=True
    ),
    "delta outside, crelu": MixerSpec(
        **{**GDN, "feature_map": "crelu", "coverage": "outside"}, mix="mass", normaliser="norm", state_heads="kv"
    ),
    "channel decay, no window": MixerSpec(
        feature_map="identity", decay="channel", decay_power=1 / 16, normaliser="norm", window=0, coverage="all"
    ),
    "lolcats": MixerSpec(window=8),
    "sum, scale": MixerSpec(feature_map="softmax", mix="sum", normaliser="scale", window=8, coverage="all"),
    "own": MixerSpec(feature_map="hedgehog_exp", normaliser="own", window=0, coverage="all"),
}
MAY_CHANGE = (
    "decay.dt_bias",
    "decay.bias",
    "beta.bias",
    "mix_gate.weight",
    "mix_gate.bias",
    "far_mass.weight",
    "far_mass.bias",
    "window_logit",
    "linear_scale",
    "norm_weight",
)


@pytest.fixture(params=sorted(SPECS))
def spec(request: pytest.FixtureRequest) -> MixerSpec:
    """Each kind of mixer in turn."""
    return SPECS[request.param]


@pytest.fixture
def teacher(make_teacher: Callable[..., Any]) -> Any:
    model = make_teacher("llama")
    model.requires_grad_(False)
    return model


def windows(rows: int = 4, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, length), dtype=np.int32)


def student_of(teacher: Any, spec: MixerSpec) -> Any:
    plan = mixer_plan(teacher.config.num_hidden_layers, ())
    return linearize_model(teacher, spec=spec, layer_mixers=plan, seed=0)[0]


def mixers(student: Any) -> dict[int, Any]:
    return {index: attention.mixer for index, attention in attention_layers(student)}


def run(student: Any, teacher: Any, rows: np.ndarray | None = None) -> list[dict[str, Any]]:
    rows = windows() if rows is None else rows
    return calibrate(student, teacher, windows=rows, tokens=rows.size, seed=0, progress=NullProgress())


def layers(teacher: Any, rows: np.ndarray) -> list[list[TeacherLayer]]:
    """All layers of every row."""
    found: list[list[TeacherLayer]] = []
    for row in rows:
        taken: list[TeacherLayer] = []
        with torch.no_grad(), captured(teacher, [0, 1, 2], taken.append, weights=True):
            teacher.model(input_ids=torch.from_numpy(row[None]).long(), use_cache=False)
        found.append(taken)
    return found


@torch.no_grad()
def observed(teacher: Any, student: Any, index: int = 1, *, every: int = 1) -> Observed:
    seen, attention = Observed(), dict(attention_layers(student))[index]
    for number, taken in enumerate(layers(teacher, windows())):
        call = mixer_call(attention, taken[index])
        seen.add(attention.mixer, taken[index], call, every=every, offset=number)  # type: ignore[arg-type]
    return seen


@torch.no_grad()
def layer_errors(teacher: Any, student: Any) -> list[float]:
    """|y - y*|^2 / |y*|^2 of every layer's heads, through the student's own forward pass."""
    taken = layers(teacher, windows())
    errors = []
    for index, attention in attention_layers(student):
        ours = torch.cat([student_layer(attention, row[index], "full", weights=False)[0] for row in taken])
        errors.append(float(normalised_error(ours, torch.cat([row[index].heads for row in taken]))))
    return errors


def test_the_rows_tell_the_errors_of_the_model_itself_and_none_got_worse(teacher: Any, spec: MixerSpec) -> None:
    student = student_of(teacher, spec)
    before = layer_errors(teacher, student)
    rows = run(student, teacher)
    after = layer_errors(teacher, student)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert [row["error_before"] for row in rows] == pytest.approx(before, rel=1e-4)
    assert [row["error_after"] for row in rows] == pytest.approx(after, rel=1e-4)
    for row in rows:
        assert row["error_after"] <= row["error_before"] * (1 + 1e-6)
    if spec.normaliser in ("norm", "scale"):
        assert all(row["error_after"] < 0.9 * row["error_before"] for row in rows)


def test_only_biases_scales_and_the_mix_change(teacher: Any, spec: MixerSpec) -> None:
    student = student_of(teacher, spec)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    theirs = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    implementation = teacher.config._attn_implementation
    run(student, teacher)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.partition(".mixer.")[2] in MAY_CHANGE for name in changed)
    assert bool(changed) == (spec.normaliser != "own")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.config._attn_implementation == implementation
    assert all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())
    for mixer in mixers(student).values():
        assert mixer.branches == "full" and not mixer._forward_pre_hooks


def test_the_same_seed_gives_the_same_values_and_another_other_ones(teacher: Any) -> None:
    spec = SPECS["delta, mass, scale, kv, signed"]
    states = []
    for seed in (0, 0, 1):
        student = student_of(teacher, spec)
        torch.manual_seed(len(states))  # of no account
        rows = calibrate(student, teacher, windows=windows(16), tokens=200, seed=seed, progress=NullProgress())
        states.append((rows, {n: t for n, t in student.state_dict().items() if ".mixer." in n}))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(tensor, states[1][1][name]) for name, tensor in states[0][1].items())
    assert any(not torch.equal(tensor, states[2][1][name]) for name, tensor in states[0][1].items())


@pytest.mark.parametrize("name", ["delta, gate, norm", "channel decay, no window"])
@torch.no_grad()
def test_a_proposed_decay_has_the_half_life_that_was_asked_for(teacher: Any, name: str) -> None:
    student = student_of(teacher, SPECS[name])
    mixer, seen = mixers(student)[1], observed(teacher, student)
    for parameter in (mixer.decay.weight,) if mixer.decay.kind == "scalar" else (mixer.decay.up,):
        parameter.mul_(30)  # so that a bias which ignores the inputs would miss
    wanted = torch.linspace(3.0, 400.0, mixer.state_heads, dtype=torch.float64)
    inputs = torch.cat(seen.inputs)
    values = observe.decay_bias(mixer, inputs, wanted)
    for key, value in values.items():
        mixer.get_parameter(key).copy_(value)
    rate = -mixer.decay(inputs[None], inputs.new_zeros(0))  # [1, S, n] or [1, S, n, F]
    rate = rate.double().flatten(2).mean((0, 2))
    torch.testing.assert_close(math.log(2) / rate, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["delta, gate, norm", "delta, mass, scale, kv, signed"])
@torch.no_grad()
def test_a_proposed_write_strength_is_the_mean_over_real_inputs(teacher: Any, name: str) -> None:
    student = student_of(teacher, SPECS[name])
    mixer, seen = mixers(student)[1], observed(teacher, student)
    mixer.beta.weight.mul_(30)
    wanted = torch.linspace(0.1, 0.7, mixer.state_heads, dtype=torch.float64)
    inputs = torch.cat(seen.inputs)
    mixer.beta.bias.copy_(observe.write_bias(mixer, inputs, wanted)["beta.bias"])
    strength = mixer.gates(inputs[None], inputs.new_zeros(0))[1]
    torch.testing.assert_close(strength.double().mean((0, 2)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["delta, gate, norm", "delta, mass, scale, kv, signed", "lolcats"])
@torch.no_grad()
def test_a_balanced_mix_has_the_teachers_mean_share(teacher: Any, name: str) -> None:
    student = student_of(teacher, SPECS[name])
    mixer, attention = mixers(student)[1], dict(attention_layers(student))[1]
    values = observe.mix_values(mixer, observed(teacher, student))
    for key, value in values.items():
        mixer.get_parameter(key).copy_(value)
    ours, theirs = [], []
    for row in windows():
        taken = layers(teacher, row[None])[0][1]
        pairs, far = reach(mixer, LENGTH, torch.device("cpu"))
        assert taken.weights is not None
        theirs.append((taken.weights[0] * ~pairs).sum(-1)[:, far])
        trial = Trial(states=[Proposal(name="", values={})], mixes=[Proposal(name="", values={})])
        trial.add(mixer, mixer_call(attention, taken), taken.heads)
        assert isinstance(trial.shares, torch.Tensor)
        ours.append(trial.shares[0, 0] / trial.beyond)
    target = torch.cat(theirs, dim=1).double().mean(1)
    found = torch.stack(ours).mean(0)
    if name == "lolcats":  # gamma cannot exceed one
        capped = values["window_logit"] > 4.5
        assert not capped.all()
        found, target = found[~capped], target[~capped]
    assert 0.02 < float(target.mean()) < 0.98
    torch.testing.assert_close(found, target, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_learned_mass_follows_the_teachers_better_than_a_constant_does(teacher: Any) -> None:
    """With enough inputs the ridge fit explains some of the log mass; its residual is below the variance."""
    student = student_of(teacher, SPECS["delta, mass, scale, kv, signed"])
    seen = observed(teacher, student)
    weight, bias = observe.ridge(seen.gram, seen.cross)  # type: ignore[arg-type]
    share = torch.cat(seen.share).double()
    odds = (share.clamp_min(1e-30).log() - torch.log1p(-share)).clamp(-observe.LOG_ODDS, observe.LOG_ODDS)
    mass = torch.cat(seen.balance).double() - odds
    fitted = torch.cat(seen.inputs).double() @ weight.T + bias
    assert ((mass - fitted).square().mean(0) < 0.8 * mass.var(0)).all()


def test_ridge_is_least_squares_with_its_penalty() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, scores = torch.randn(50, 6, generator=draw).double(), torch.randn(50, 3, generator=draw).double() + 2
    wide = torch.cat((inputs, torch.ones(50, 1)), dim=1).double()
    weight, bias = observe.ridge(wide.T @ wide, wide.T @ scores)
    penalty = inputs.square().sum(1).mean()

    def loss(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (inputs @ w.T + b - scores).square().sum() + penalty * w.square().sum()

    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    gradients = torch.autograd.grad(loss(w, b), (w, b))
    assert max(g.abs().max() for g in gradients) < 1e-10


@pytest.mark.parametrize("name", ["delta, gate, norm", "delta, mass, scale, kv, signed"])
@torch.no_grad()
def test_no_other_scale_has_a_smaller_error(teacher: Any, name: str) -> None:
    student = student_of(teacher, SPECS[name])
    run(student, teacher)
    best = layer_errors(teacher, student)
    parameter = "norm_weight" if SPECS[name].normaliser == "norm" else "linear_scale"
    for factor in (0.9, 1.1):
        for mixer in mixers(student).values():
            mixer.get_parameter(parameter).mul_(factor)
        assert all(worse > least for worse, least in zip(layer_errors(teacher, student), best, strict=True))
        for mixer in mixers(student).values():
            mixer.get_parameter(parameter).div_(factor)


def test_scales_solve_the_normal_equations() -> None:
    draw = torch.Generator().manual_seed(0)
    rest, part = torch.randn(2, 40, 3, 5, generator=draw).double().unbind(0)  # [T, H, D]
    moments = torch.stack([(rest * rest).sum(0), (rest * part).sum(0), (part * part).sum(0)])
    for channels in (False, True):
        scale = solve_scale(moments, channels=channels)
        error = squared_error(moments, scale)
        torch.testing.assert_close(error, (rest - scale * part).square().sum((0, 2)))
        assert channels or (scale == scale[:, :1]).all()
        for nudge in (-0.01, 0.01):
            assert (squared_error(moments, scale + nudge) > error).all()
    assert (solve_scale(torch.zeros(3, 2, 4), channels=True) == 0).all()


def test_distances_shares_and_entropy_are_the_teachers(teacher: Any) -> None:
    """Against plain loops over the pairs."""
    student = student_of(teacher, SPECS["delta, mass, scale, kv, signed"])
    seen = observed(teacher, student)
    look, far_look, far_mass, entropy = (torch.zeros(4, dtype=torch.float64) for _ in range(4))
    for taken in layers(teacher, windows()):
        weights = taken[1].weights[0].double()
        for i in range(LENGTH):
            for j in range(i + 1):
                look += weights[:, i, j] * (i - j)
                if i // 8 - j // 8 > 1 and j >= 2:
                    far_look += weights[:, i, j] * (i - j)
                    far_mass += weights[:, i, j]
            if i:
                entropy += torch.special.entr(weights[:, i, : i + 1]).sum(-1) / math.log(i + 1)
    rows = 4 * LENGTH
    torch.testing.assert_close(seen.distance("all", 4), look / rows, rtol=1e-4, atol=0)
    torch.testing.assert_close(seen.distance("far", 4), far_look / far_mass, rtol=1e-4, atol=0)
    pairs = far_look.unflatten(0, (2, 2)).sum(1) / far_mass.unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(seen.distance("far", 2), pairs, rtol=1e-4, atol=0)
    torch.testing.assert_close(seen.entropy(4), entropy / (4 * (LENGTH - 1)), rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_proposal_that_makes_it_worse_is_not_taken(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(teacher, SPECS["lolcats"])

    def harmful(mixer: Any, seen: Observed) -> Trial:
        trial = propose(mixer, Observed())
        for logit in (-14.0, -15.0):  # nothing of the window, where a tenth was
            trial.mixes.append(Proposal(name="", values={"window_logit": torch.full((4,), logit)}))
        return trial

    errors = layer_errors(teacher, student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    monkeypatch.setattr(module, "propose", harmful)
    rows = run(student, teacher)
    kept = [row["new_mix"] == 0.0 for row in rows]
    assert any(kept)
    for index, row in enumerate(rows):
        assert row["error_after"] <= errors[index] * (1 + 1e-5)
        name = f"model.layers.{index}.self_attn.mixer.window_logit"
        assert torch.equal(student.state_dict()[name], before[name]) == kept[index]


@torch.no_grad()
def test_heads_choose_apart_but_those_of_one_state_together() -> None:
    from linearize.modeling.mixer import Mixer

    mixer = Mixer(
        SPECS["delta, mass, scale, kv, signed"], hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=4, scaling=0.5
    )
    old = mixer.beta.bias.clone()
    trial = Trial(
        states=[Proposal(name="kept", values={}), Proposal(name="b", values={"beta.bias": torch.tensor([7.0, 8.0])})],
        mixes=[Proposal(name="kept", values={}), Proposal(name="m", values={"far_mass.bias": torch.arange(4.0)})],
        shares=torch.ones(2, 2, 4).double(),
        gates=torch.ones(2, 2, 2).double(),
        target=torch.ones(4).double(),
        alone=torch.ones(4).double(),
        tokens=1,
        beyond=1,
    )
    rest = torch.tensor([[[1.0, 1, 5, 5], [9, 9, 9, 4]], [[4, 0, 5, 5], [9, 9, 3, 5]]]).double()  # [P, M, H]
    trial.moments = torch.zeros(2, 2, 3, 4, 4).double()
    trial.moments[:, :, 0, :, 0] = rest
    start = mixer.far_mass.bias.clone()
    row = settle(mixer, trial)
    # State 0: 1 + 1 against 4 + 0. State 1: 5 + 4 against 3 + 5.
    assert mixer.beta.bias.tolist() == [old[0].item(), 8.0]
    assert mixer.far_mass.bias.tolist() == [start[0].item(), start[1].item(), 2.0, start[3].item()]
    assert (row["error_before"], row["error_after"]) == (12 / 4, (1 + 1 + 3 + 5) / 4)
    assert (row["new_state"], row["new_mix"]) == (0.5, 0.25)


def test_a_context_that_the_window_covers_leaves_the_gates_alone(teacher: Any) -> None:
    student = student_of(teacher, SPECS["delta, gate, norm"])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    rows = run(student, teacher, windows(3, 16))
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.endswith("norm_weight") for name in changed)
    assert all(row["share_teacher"] is None and row["new_state"] is None for row in rows)


@torch.no_grad()
def test_every_family_is_calibrated(make_teacher: Callable[..., Any], variant: str) -> None:
    teacher = make_teacher(variant)
    teacher.requires_grad_(False)
    student = student_of(teacher, SPECS["delta outside, crelu"])
    rows = run(student, teacher, windows(2))
    assert all(row["error_after"] < row["error_before"] for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values() if value is not None)
