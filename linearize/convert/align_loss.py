"""How far one layer of the student is from the teacher's: the losses of alignment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.convert.capture import TeacherLayer

FLOOR = 1e-12
"""Least attention weight whose logarithm is taken, and least mean square that is divided by."""


@contextmanager
def heads_alone(attention: Any) -> Iterator[None]:
    """Within the block an attention module gives the outputs of its heads, [B, T, H D]: its o_proj does nothing."""
    projection = attention.family.head_projection(attention)
    if projection is None:
        yield
        return
    before = projection.__dict__.get("forward")
    projection.forward = lambda heads: heads
    try:
        yield
    finally:
        if before is None:
            del projection.forward
        else:
            projection.forward = before


def student_layer(
    attention: nn.Module,
    layer: TeacherLayer,
    branches: str,
    *,
    weights: bool,
    projected: bool = True,
    real: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run a student's attention on the teacher's input; `real` bool [B, T] tells padding to an encoder's.

    Its mixer alone, where the teacher's queries, keys and values were taken, too.

    Returns its heads [B, T, H, D], its output [B, T, hidden], which is that of the heads side by side unless
    `projected`, and, with `weights`, its row weights [B, H, T, T] (else an empty tensor).
    """
    mixer: Any = attention.mixer
    mixer.branches, mixer.record, mixer.record_weights = branches, True, weights
    padding = {} if real is None else {"mixer_real": real}
    try:
        if layer.projected is not None:
            output = _from_projected(attention, layer, *layer.projected, projected=projected)
        else:
            with nullcontext() if projected else heads_alone(attention):
                output = attention(layer.hidden_states, **layer.kwargs, **padding)[0]
        return mixer.last_output, output, mixer.last_weights if weights else output.new_empty(0)
    finally:
        mixer.branches, mixer.record, mixer.record_weights = "full", False, False
        mixer.last_output = mixer.last_linear = mixer.last_weights = None


def same_projections(attention: nn.Module, teacher: nn.Module) -> bool:
    """Whether all of a student's attention but its mixer is the teacher's: then queries, keys and values are."""
    ours: dict[str, Tensor] = dict(attention.named_parameters()) | dict(attention.named_buffers())
    ours = {name: x for name, x in ours.items() if not name.startswith("mixer.")}
    theirs: dict[str, Tensor] = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    if ours.keys() != theirs.keys():
        return False
    return all(x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]) for name, x in ours.items())


def _from_projected(attention: Any, layer: TeacherLayer, q: Tensor, k: Tensor, v: Tensor, *, projected: bool) -> Tensor:
    """The attention's output, or its heads side by side, from queries, keys and values that are there."""
    given = dict(layer.kwargs)
    call = attention.mixer_call(layer.hidden_states, given, given.pop("mixer_layout", None))
    heads: Tensor = attention.mixer(q, k, v, **call)
    if projected:
        output: Tensor = attention.family.project_heads(attention, heads)
        return output
    return heads.flatten(-2)


def normalised_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """mean |ours - theirs|^2 / mean |theirs|^2, in fp32."""
    theirs = theirs.float()
    return _ratio((ours.float() - theirs).square(), theirs.square())


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return error.mean() / size.mean().clamp_min(FLOOR)


def layer_loss(
    attention: nn.Module, layer: TeacherLayer, branches: str, objective: str, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of one layer, with its graph, and its normalised error (of what is matched), without.

    Tokens that `real` [B, T] says are padding count for neither.

    output:  mean |y - y*|^2 / mean |y*|^2 over the outputs of the heads, before o_proj
    weights: mean over rows of -sum_j a*_j log a_j
    hidden:  mean over tokens of |o - o*|_2 / sqrt(hidden), after o_proj
    """
    how = {"weights": objective == "weights", "projected": objective == "hidden"}
    heads, output, weights = student_layer(attention, layer, branches, **how, real=real)
    if real is not None:
        layer = replace(
            layer,
            heads=layer.heads[real],
            output=layer.output[real],
            weights=None if layer.weights is None else layer.weights.transpose(1, 2)[real],
        )
        heads, output = heads[real], output[real]
        weights = weights.transpose(1, 2)[real] if objective == "weights" else weights
    return _distance(heads, output, weights, layer, objective)


def joint_loss(attention: nn.Module, layer: TeacherLayer, objective: str) -> tuple[Tensor, Tensor]:
    """The losses of the mix and of the linear branch alone, summed, and the mix's error, from one run of the layer.

    For mixers whose linear branch reads the same tokens in the mix as alone.
    """
    mixer: Any = attention.mixer
    mixer.record = True
    try:
        if layer.projected is not None:
            output = _from_projected(attention, layer, *layer.projected, projected=objective == "hidden")
        else:
            with nullcontext() if objective == "hidden" else heads_alone(attention):
                output = attention(layer.hidden_states, **layer.kwargs)[0]
        heads, linear = mixer.last_output, mixer.last_linear.to(output.dtype)
    finally:
        mixer.record, mixer.last_output, mixer.last_linear = False, None, None
    loss, error = _distance(heads, output, output.new_empty(0), layer, objective)
    if objective == "hidden":
        projected = attention.family.project_heads(attention, linear)  # type: ignore[union-attr, operator]
        return loss + _apart(projected, layer).mean() * output.shape[-1] ** -0.5, error
    return loss + normalised_error(linear, layer.heads), error


def _apart(output: Tensor, layer: TeacherLayer) -> Tensor:
    """|o - o*|_2 of every token [B, T], fp32."""
    return (output.float() - layer.output.float()).norm(dim=-1)


def _distance(
    heads: Tensor, output: Tensor, weights: Tensor, layer: TeacherLayer, objective: str
) -> tuple[Tensor, Tensor]:
    if objective == "hidden":
        distance = _apart(output, layer)
        # As `normalised_error`, from what is there; heads need not agree where o_proj may be trained.
        theirs = layer.output.float().square().sum(-1)
        return distance.mean() * output.shape[-1] ** -0.5, _ratio(distance.detach().square(), theirs)
    error = normalised_error(heads, layer.heads)
    if objective == "output":
        return error, error.detach()
    assert layer.weights is not None
    return -(layer.weights * weights.float().clamp_min(FLOOR).log()).sum(-1).mean(), error.detach()
