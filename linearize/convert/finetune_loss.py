"""The losses of finetuning, and their gradients.

Logits are never held for all tokens at once: the loss is differentiated piece by piece back to the last hidden state,
and from there through the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from linearize.convert.lanes import Lanes
from linearize.convert.optim import autocast
from linearize.masking import IGNORE
from linearize.modeling.family_table import body, logits, lookup
from linearize.task import CAUSAL, Task
from linearize_kernels.backend import pick
from linearize_kernels.distill import distill_loss

PIECE = 2048
"""Tokens whose logits are held at once."""


def token_losses(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over tokens of the cross-entropy and of KL(teacher || student), each a fp32 scalar.

    Args:
        logits: [N, V] of the student, any float dtype; log-softmax is taken in fp32.
        labels: [N]; tokens labelled -100 count for neither sum.
        teacher_logits: [N, V], or None for no KL (the sum is then 0).
    """
    log_p = nnf.log_softmax(logits.float(), dim=-1)
    cross_entropy = nnf.nll_loss(log_p, labels, ignore_index=IGNORE, reduction="sum")
    if teacher_logits is None:
        return cross_entropy, cross_entropy.new_zeros(())
    log_q = nnf.log_softmax(teacher_logits.float(), dim=-1)
    per_token = nnf.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return cross_entropy, torch.where(labels != IGNORE, per_token, 0.0).sum()


def backward_losses(
    student: Any,
    teacher: Any | None,
    ids: Tensor,
    labels: Tensor,
    *,
    ce: float,
    kl: float,
    scale: float | Tensor,
    task: Task = CAUSAL,
    lanes: Lanes | None = None,
) -> Tensor:
    """Add the gradients of scale * (ce * sum CE + kl * sum KL) over ids, labels [B, T]; both sums [2], fp32.

    Student and teacher run side by side in `lanes`.
    """
    lanes = Lanes(ids.device) if lanes is None else lanes
    with autocast(ids.device):
        target = None
        if teacher is not None and kl > 0:
            with torch.no_grad(), lanes.beside(0, ids):
                target = body(teacher)(**task.call(ids)).last_hidden_state.flatten(0, 1)
        hidden = body(student)(**task.call(ids)).last_hidden_state.flatten(0, 1)
        lanes.join()
    flat = labels.flatten()
    if task.sparse:  # logits of labelled tokens alone
        labelled = (flat != IGNORE).nonzero().squeeze(1)
        hidden, flat = hidden[labelled], flat[labelled]
        target = None if target is None else target[labelled]
    leaf = hidden.detach().requires_grad_()
    models = [student] if target is None or teacher is None else [student, teacher]
    heads = [model.get_output_embeddings() for model in models]
    plain = lookup(student.config).plain_head(student.config)
    plain &= all(type(head) is nn.Linear and head.bias is None for head in heads)
    if plain and pick("auto", leaf, target) == "triton":
        theirs = {} if target is None else {"teacher_hidden": target, "teacher_weight": heads[-1].weight}
        with autocast(ids.device):
            loss, both = distill_loss(leaf, heads[0].weight, flat, **theirs, ce=ce, kl=kl, piece=PIECE)
        (loss * scale).backward()
    else:
        both = _backward_by_pieces(student, teacher, leaf, target, flat, ce=ce, kl=kl, scale=scale)
    assert leaf.grad is not None
    hidden.backward(leaf.grad)
    return both


def _backward_by_pieces(
    student: Any,
    teacher: Any | None,
    leaf: Tensor,
    target: Tensor | None,
    flat: Tensor,
    *,
    ce: float,
    kl: float,
    scale: float | Tensor,
) -> Tensor:
    """`backward_losses` from the hidden states on, in torch: the student's leaf, the teacher's target, flat labels."""
    sums = [torch.zeros((), device=leaf.device) for _ in range(2)]
    for begin in range(0, len(flat), PIECE):
        part = slice(begin, begin + PIECE)
        with autocast(leaf.device):
            ours = logits(student, leaf[part])
            with torch.no_grad():
                theirs = None if target is None or teacher is None else logits(teacher, target[part])
        ce_sum, kl_sum = token_losses(ours, flat[part], theirs)
        ((ce * ce_sum + kl * kl_sum) * scale).backward()
        sums[0] += ce_sum.detach()
        sums[1] += kl_sum.detach()
    return torch.stack(sums)


@torch.no_grad()
def mean_loss(model: Any, ids: Tensor) -> float:
    """Cross-entropy in nats per token over ids [B, T], a window at a time."""
    total = 0.0
    for row in ids.split(1):
        with autocast(ids.device):
            found = logits(model, body(model)(input_ids=row, use_cache=False).last_hidden_state[0])
        total += float(nnf.cross_entropy(found[:-1].float(), row[0, 1:]))
    return total / len(ids)
