"""Cross-entropy and KL to a teacher from hidden states: never more logits at once than a piece of tokens has.

The loss is the last step of a training step, so its gradient is made on the way forward, piece by piece, in place of
the student's logits, and scaled on the way back (as Liger's fused linear losses do, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import pick, placed

IGNORE = -100
"""Label of a token that no loss is taken at."""
PIECE = 2048
"""Tokens whose logits are held at once."""


@placed
def distill_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    ce: float = 1.0,
    kl: float = 1.0,
    piece: int = PIECE,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """ce * CE + kl * KL(teacher || student), summed over tokens.

    Args:
        hidden: the student's last hidden states [N, C]; its head is `weight` [V, C], without bias.
        labels: [N], int64; tokens labelled -100 count for nothing.
        teacher_hidden: [N, D], with its head `teacher_weight` [V, D]; None: no KL. They get no gradient.
        ce: factor of the cross-entropy, a plain number as its gradient is made on the way forward.
        kl: factor of KL.
        piece: tokens whose logits, and the teacher's, are held at once.
        backend: auto, torch or triton, for what is done with a piece of logits; matrix products are torch's.

    Under autocast the products are in its dtype. Logits are rounded to that dtype, log-softmax is taken in float32
    (float64 for float64 inputs).

    Returns:
        The loss, with gradients for hidden and weight, once; and the sums of CE and KL [2] without. float32 (float64).

    Raises:
        ValueError: shapes that do not belong together, or a backend that cannot serve.
    """
    _check(hidden, weight, labels, teacher_hidden, teacher_weight, piece)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if teacher_hidden is None or teacher_weight is None:
        kl = 0.0
    else:
        teacher_hidden, teacher_weight = teacher_hidden.detach().to(dtype), teacher_weight.detach().to(dtype)
    with_grad = torch.is_grad_enabled()
    chosen = pick(backend, hidden, weight, labels, teacher_hidden, unable=_unable(hidden, weight))
    loss, sums, _, _ = distill_op(
        hidden, weight, labels, teacher_hidden, teacher_weight, float(ce), float(kl), piece, chosen == "triton",
        with_grad and hidden.requires_grad, with_grad and weight.requires_grad,
    )  # fmt: skip
    return loss, sums.detach()


@torch.library.custom_op("linearize::distill_loss", mutates_args=())
def distill_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    ce: float, kl: float, piece: int, fused: bool, want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the sums of CE and KL, and the loss's gradients for hidden and weight (empty where not wanted)."""
    if fused:
        from .distill_triton import losses_ as of_piece
    else:
        of_piece = _of_piece_
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums = torch.zeros(2, dtype=precise, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=precise) if want_weight else hidden.new_empty(0, dtype=precise)
    for begin in range(0, len(labels), piece):
        part = slice(begin, begin + piece)
        logits = hidden[part] @ weight.mT
        theirs = None
        if teacher_hidden is not None and teacher_weight is not None:
            theirs = teacher_hidden[part] @ teacher_weight.mT
        sums += of_piece(logits, theirs, labels[part].contiguous(), ce, kl, IGNORE, want_hidden or want_weight)
        if want_hidden:
            torch.mm(logits, weight, out=d_hidden[part])
        if want_weight:
            d_weight += logits.mT @ hidden[part]
    return ce * sums[0] + kl * sums[1], sums, d_hidden, d_weight


@distill_op.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, labels, teacher_hidden, teacher_weight, ce, kl, piece, fused, want_hidden, want_weight
):
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    d_hidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape if want_weight else (0,), dtype=precise)
    return hidden.new_empty((), dtype=precise), hidden.new_empty(2, dtype=precise), d_hidden, d_weight


def _of_piece_(
    logits: Tensor, theirs: Tensor | None, labels: Tensor, ce: float, kl: float, ignore: int, gradient: bool
) -> Tensor:
    """As `distill_triton.losses_`, in torch: sums of CE and KL [2]; their gradient in place of the logits."""
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counts = (labels != ignore).unsqueeze(1)
    at = labels.clamp_min(0).unsqueeze(1)
    log_p = logits.to(precise).log_softmax(-1)
    cross_entropy = -(log_p.gather(1, at) * counts).sum()
    divergence = torch.zeros_like(cross_entropy)
    p = log_p.exp()
    slope = (ce + kl) * p if theirs is not None else ce * p
    if theirs is not None:
        log_q = theirs.to(precise).log_softmax(-1)
        q = log_q.exp()
        # Where the teacher gives no weight at all, the difference may be inf or nan.
        divergence = (torch.where(q > 0, q * (log_q - log_p), 0.0) * counts).sum()
        slope -= kl * q
    if gradient:
        slope.scatter_add_(1, at, torch.full_like(log_p[:, :1], -ce))
        logits.copy_(torch.where(counts, slope, 0.0))
    return torch.stack((cross_entropy, divergence))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight = inputs[:2]
    ctx.save_for_backward(*output[2:])
    ctx.wanted = inputs[-2:]
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss, *_):  # type: ignore[no-untyped-def]
    found = [None, None]
    if d_loss is not None:
        for i, (gradient, wanted, dtype) in enumerate(zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes)):
            found[i] = (gradient * d_loss).to(dtype) if wanted else None
    return *found, *(None,) * 9


distill_op.register_autograd(_backward, setup_context=_keep)


def _unable(hidden: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot serve, or None."""
    if weight.shape[0] >= 2**31:
        return f"a vocabulary of {weight.shape[0]} is too large"
    return None


def _check(hidden, weight, labels, teacher_hidden, teacher_weight, piece) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError, with the shapes, where the arguments do not belong together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not belong together")
    if tuple(labels.shape) != (hidden.shape[0],):
        raise ValueError(f"labels {tuple(labels.shape)} is not {(hidden.shape[0],)}")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight go together")
    if teacher_hidden is not None and (
        teacher_hidden.shape[0] != hidden.shape[0]
        or tuple(teacher_weight.shape) != (weight.shape[0], teacher_hidden.shape[1])
    ):
        raise ValueError(
            f"teacher_hidden {tuple(teacher_hidden.shape)} and teacher_weight {tuple(teacher_weight.shape)} do not "
            f"belong to {hidden.shape[0]} tokens and {weight.shape[0]} logits"
        )
    if piece < 1:
        raise ValueError(f"piece: {piece} is not positive")
