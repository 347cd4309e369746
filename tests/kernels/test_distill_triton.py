"""The distillation loss against the sums written out in float64, in torch and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from linearize_kernels.backend import HAS_TRITON, interpreting
from linearize_kernels.distill import distill_loss

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is for Linux"))]


def made(tokens: int = 7, vocabulary: int = 70, channels: int = 8) -> dict[str, torch.Tensor]:
    """Hidden states and heads in float64, the teacher's wider; two labels are ignored."""
    draw = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    labels = torch.randint(vocabulary, (tokens,), generator=draw)
    labels[1] = labels[-1] = -100
    return {
        "hidden": normal(tokens, channels),
        "weight": normal(vocabulary, channels),
        "labels": labels,
        "teacher_hidden": normal(tokens, channels + 2),
        "teacher_weight": normal(vocabulary, channels + 2),
    }


def written_out(x: dict[str, torch.Tensor], ce: float, kl: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and sums of CE and KL(teacher || student) over the tokens that count."""
    real = x["labels"] != -100
    log_p = (x["hidden"] @ x["weight"].T).log_softmax(-1)[real]
    cross_entropy = -log_p[torch.arange(len(log_p)), x["labels"][real]].sum()
    divergence = torch.zeros_like(cross_entropy)
    if "teacher_hidden" in x:
        log_q = (x["teacher_hidden"] @ x["teacher_weight"].T).log_softmax(-1)[real]
        divergence = (log_q.exp() * (log_q - log_p)).sum()
    return ce * cross_entropy + kl * divergence, torch.stack((cross_entropy, divergence))


def cast(x: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in x.items()}


def check(x: dict[str, torch.Tensor], backend: str, *, piece: int = 3, ce: float = 0.7, kl: float = 0.4) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    tolerance = 2e-5 if backend == "triton" else 1e-12
    found = []
    for name, kind in (("want", torch.float64), (backend, dtype)):
        own = cast(x, kind)
        leaves = [own[n].requires_grad_() for n in ("hidden", "weight")]
        if name == "want":
            loss, sums = written_out(own, ce, kl)
        else:
            loss, sums = distill_loss(**own, ce=ce, kl=kl, piece=piece, backend=backend)
        found.append([loss, sums, *torch.autograd.grad(loss * 3.0, leaves)])
    for right, got in zip(*found):
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [33, 128, 9000])
def test_loss_and_gradients(backend: str, vocabulary: int) -> None:
    """9000 logits are more than one block of the kernel."""
    check(made(vocabulary=vocabulary), backend)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_teacher(backend: str) -> None:
    check({name: t for name, t in made().items() if not name.startswith("teacher")}, backend)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_apart(backend: str) -> None:
    """Exponentials of these would overflow, and some of the teacher's probabilities are zero in float32.

    Whole numbers, so that the logits are exact in float32 too.
    """
    x = made()
    x = {name: (t * (6 if "hidden" in name else 4)).round() if name != "labels" else t for name, t in x.items()}
    check(x, backend)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_the_teacher_rules_out(backend: str) -> None:
    """A teacher's logit of minus infinity, with a hidden state that makes it: KL stays finite."""
    x = cast(made(), torch.float32)
    x["teacher_weight"][5] = 0.0
    x["teacher_weight"][5, 0] = float("-inf")
    x["teacher_hidden"][:, 0] = 1.0
    x["hidden"].requires_grad_()
    loss, sums = distill_loss(**x, backend=backend)
    loss.backward()
    assert bool(sums.isfinite().all()) and bool(x["hidden"].grad.isfinite().all())


@pytest.mark.parametrize("piece", [1, 100])
def test_pieces_change_nothing(piece: int) -> None:
    check(made(), "torch", piece=piece)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x = made()
    x["hidden"].requires_grad_()
    x["teacher_hidden"].requires_grad_()
    loss, sums = distill_loss(**x, backend="torch")
    loss.backward()
    assert x["weight"].grad is None and x["teacher_hidden"].grad is None and not sums.requires_grad
    with torch.no_grad():
        assert not distill_loss(**x, backend="torch")[0].requires_grad


def test_all_tokens_ignored() -> None:
    x = made()
    x["labels"][:] = -100
    x["hidden"].requires_grad_()
    loss, _ = distill_loss(**x, backend="torch")
    loss.backward()
    assert float(loss) == 0.0 and not bool(x["hidden"].grad.any())


def test_autocast_products_and_gradients_in_the_leaves_dtype() -> None:
    x = cast(made(), torch.float32)
    x["hidden"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = distill_loss(**x, backend="torch")
    loss.backward()
    want, _ = written_out(made(), 1.0, 1.0)
    assert x["hidden"].grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=2e-2, atol=0)


def test_is_what_finetuning_sums() -> None:
    from linearize.convert.finetune_loss import token_losses

    x = cast(made(), torch.float32)
    _, sums = distill_loss(**x, backend="torch")
    theirs = x["teacher_hidden"] @ x["teacher_weight"].T
    torch.testing.assert_close(sums, torch.stack(token_losses(x["hidden"] @ x["weight"].T, x["labels"], theirs)))


@pytest.mark.skipif(not interpreting(), reason="tensors of the CPU")
def test_compiles_in_one_graph() -> None:
    x = cast(made(), torch.float32)
    x["hidden"].requires_grad_()
    eager, _ = distill_loss(**x, backend="torch")
    compiled, _ = torch.compile(distill_loss, backend="aot_eager", fullgraph=True)(**x, backend="torch")
    torch.testing.assert_close(compiled, eager)
    compiled.backward()
    assert bool(x["hidden"].grad.any())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(70, 9)}, "weight"),
        ({"labels": torch.ones(3, dtype=torch.long)}, "labels"),
        ({"teacher_weight": None}, "go together"),
        ({"teacher_weight": torch.ones(71, 10)}, "do not belong"),
        ({"piece": 0}, "piece"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        distill_loss(**(made() | change))
