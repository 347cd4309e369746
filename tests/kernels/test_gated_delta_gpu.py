"""The gated delta rule on a GPU: its error in bfloat16 is at most twice that of torch under autocast.

All but the last state: torch carries the state in products that autocast leaves in float32, which no product of
bfloat16 reaches. Its error is measured against `rounded_state`, torch with bfloat16 operands and float32 sums.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf

from linearize_kernels.backend import Call, decay_kind, untrusted
from linearize_kernels.gated_delta import gated_delta

pytestmark = pytest.mark.gpu
NAMES = ("q", "k", "v", "beta", "log_decay")


def made(
    *, heads: tuple[int, int, int], length: int, width: int, decay: bool, dtype: torch.dtype, unit: bool = True
) -> dict[str, torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(length)
    shape = (2, length)
    rows = [torch.randn(*shape, n, width, generator=draw, device="cuda") for n in heads]
    if unit:
        rows[:2] = (nnf.normalize(x, dim=-1) for x in rows[:2])
    beta = torch.rand(*shape, heads[1], generator=draw, device="cuda").transpose(1, 2)
    g = -0.2 * torch.rand(2, heads[1], length, generator=draw, device="cuda")
    q, k, v = (x.to(dtype).transpose(1, 2) for x in rows)
    return {"q": q, "k": k, "v": v, "beta": beta} | ({"log_decay": g} if decay else {})


def results(x: dict[str, torch.Tensor], backend: str, **options) -> dict[str, torch.Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
    if backend == "triton":
        call = Call(features=x["q"].shape[3], values=x["v"].shape[3], decay=decay_kind(x.get("log_decay")))
        if reason := untrusted("gated_delta", call, *leaves.values()):
            pytest.skip(f"{reason}; TRITON_PTXAS_PATH can name a newer ptxas")
    out, last = gated_delta(**leaves, return_state=True, backend=backend, **options)
    draw = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(y.shape, generator=draw, device="cuda").to(y.dtype) for y in (out, last)]
    found = torch.autograd.grad((out, last), list(leaves.values()), weights)
    return {"out": out, "last": last, **{f"d {n}": d for n, d in zip(leaves, found)}}


def errors(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, float]:
    return {n: float((found[n].double() - w).norm().detach() / w.norm().detach()) for n, w in right.items()}


def rounded_state(x: dict[str, torch.Tensor], *, normalise: bool = False, lag: bool = False, chunk: int = 64):  # type: ignore[no-untyped-def]
    """The last state [B, S, F, V] in chunks of 64: the operands of every product in bfloat16, all else in float32."""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t.bfloat16().float()

    k, v, beta = (x[name].detach().float() for name in NAMES[1:4])
    g = x["log_decay"].detach().float() if "log_decay" in x else torch.zeros_like(beta)
    v = v.repeat_interleave(k.shape[1] // v.shape[1], dim=1)
    r = 1 / k.norm(dim=-1).clamp_min(1e-6) if normalise else torch.ones_like(beta)
    tokens = max(k.shape[2] // chunk - 1, 0) * chunk if lag else k.shape[2]
    state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    for start in range(0, tokens, 64):
        at = slice(start, min(start + 64, tokens))
        keys, strength, length, total = k[:, :, at], beta[:, :, at, None], r[:, :, at, None], g[:, :, at].cumsum(2)
        decay = (total[..., None] - total[..., None, :]).tril().exp()
        lower = (strength * length * (keys @ keys.mT) * length.mT * decay).tril(-1)
        solve = torch.linalg.inv(lower + torch.eye(lower.shape[-1], device=k.device))
        total = total[..., None]
        right = strength * (v[:, :, at] - total.exp() * length * (keys @ rounded(state)))
        written = (total[:, :, -1:] - total).exp() * length * (rounded(solve) @ rounded(right))
        state = total[:, :, -1:].exp() * state + keys.mT @ rounded(written)
    return state


@pytest.mark.parametrize(
    ("heads", "length", "width", "options"),
    [
        ((4, 4, 4), 300, 128, {}),
        ((4, 4, 2), 200, 64, {"normalise": True}),
        ((4, 2, 1), 130, 128, {"normalise": True}),
        ((2, 2, 2), 129, 96, {}),
        ((2, 2, 2), 200, 256, {}),
        ((2, 2, 2), 65, 16, {}),
        ((2, 2, 2), 300, 128, {"lag": True, "normalise": True}),
        ((2, 2, 2), 300, 64, {"lag": True, "chunk": 128}),  # fewer tokens than two blocks would read nothing
    ],
)
@pytest.mark.parametrize("decay", [False, True])
def test_error_in_bfloat16(heads: tuple[int, int, int], length: int, width: int, options: dict, decay: bool) -> None:
    unit = "normalise" not in options
    x = made(heads=heads, length=length, width=width, decay=decay, dtype=torch.bfloat16, unit=unit)
    right = results({n: t.double() for n, t in x.items()}, "torch", **options)
    with torch.autocast("cuda", torch.bfloat16):
        plain = errors(results(x, "torch", **options), right)
    plain |= errors({"last": rounded_state(x, **options)}, {"last": right["last"]})
    for name, error in errors(results(x, "triton", **options), right).items():
        assert error <= 2 * plain[name], f"{name}: {error:.1e}, torch {plain[name]:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    x = made(heads=(2, 2, 2), length=130, width=64, decay=True, dtype=dtype)
    right = results({n: t.double() for n, t in x.items()}, "torch")
    assert max(errors(results(x, "triton"), right).values()) < tolerance


def test_packed_sequences_are_themselves_alone() -> None:
    x = {n: t[:1] for n, t in made(heads=(4, 4, 4), length=300, width=64, decay=True, dtype=torch.bfloat16).items()}
    bounds = [0, 5, 100, 100, 300]
    together = gated_delta(**x, cu_seqlens=torch.tensor(bounds, device="cuda"), backend="triton")
    for a, b in ((0, 5), (5, 100), (100, 300)):
        alone = gated_delta(**{n: t[:, :, a:b] for n, t in x.items()}, backend="triton")
        torch.testing.assert_close(together[:, :, a:b], alone, rtol=0, atol=0)


def test_repeats_itself() -> None:
    """Nothing is added up in an order that changes."""
    x = made(heads=(4, 4, 4), length=300, width=128, decay=True, dtype=torch.bfloat16)
    first, second = results(x, "triton"), results(x, "triton")
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_many_heads_and_sequences() -> None:
    """Far more programs than a GPU has multiprocessors, and more than 65535 chunks."""
    draw = torch.Generator("cuda").manual_seed(0)
    k = nnf.normalize(torch.randn(2200, 32, 65, 16, generator=draw, device="cuda"), dim=-1).bfloat16()
    v = torch.randn(2200, 32, 65, 16, generator=draw, device="cuda").bfloat16()
    beta = torch.rand(2200, 32, 65, generator=draw, device="cuda")
    whole = gated_delta(k, k, v, beta, backend="triton")
    torch.testing.assert_close(whole[-2:], gated_delta(k[-2:], k[-2:], v[-2:], beta[-2:], backend="triton"))


def test_fla_is_the_same_where_it_serves() -> None:
    pytest.importorskip("fla")
    x = made(heads=(2, 2, 2), length=128, width=64, decay=False, dtype=torch.bfloat16)
    torch.testing.assert_close(
        gated_delta(**x, backend="fla"), gated_delta(**x, backend="triton"), rtol=2e-2, atol=2e-2
    )
