"""Other people's kernels for the same work: each a function from a shape to a `Subject`.

A package that is missing is an ImportError, which becomes a row that names it. Peers get what a user of theirs would
give them: heads repeated where they know no groups, layouts as they want them, both inside the timed call.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks import kernels_reference as reference
from benchmarks.kernels_shapes import Shape, Subject, drawn, inputs


def softmax_sdpa(backend: str) -> Any:
    """torch's scaled_dot_product_attention by one of its backends, grouped queries as they are."""

    def build(shape: Shape, device: str) -> Subject:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernel = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
        x = inputs(shape, device)

        def forward() -> Tensor:
            with sdpa_kernel(kernel):
                return nnf.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, enable_gqa=True)

        return Subject(forward=forward, leaves=x, reference=reference.softmax_attention(shape, "causal"))

    return build


def flex_window(kind: str) -> Any:
    """torch's flex_attention, compiled, over a window; `kind` block or sliding."""

    def build(shape: Shape, device: str) -> Subject:
        x = inputs(shape, device)
        attend = _flex(shape, kind, device)

        def forward() -> Tensor:
            return attend(x["q"], x["k"], x["v"], enable_gqa=True)

        return Subject(forward=forward, leaves=x, reference=reference.softmax_attention(shape, kind))

    return build


_COMPILED: dict[str, Any] = {}


def _compiled(name: str, function: Any) -> Any:
    """torch.compile, once a process, anew for every size and every set of tensors that want a gradient."""
    if name not in _COMPILED:
        # Beyond its limit torch would go on uncompiled, and flex_attention would write every score.
        torch._dynamo.config.recompile_limit = 64
        _COMPILED[name] = torch.compile(function, dynamic=False)
    return _COMPILED[name]


def _flex(shape: Shape, kind: str, device: str) -> Any:
    """flex_attention over a window, as a function of q, k, v."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = _mask(kind, shape.length, shape.window, device)
    run = _compiled("flex", flex_attention)
    return lambda q, k, v, **options: run(q, k, v, block_mask=mask, **options)


@cache
def _mask(kind: str, length: int, width: int, device: str) -> Any:
    """flex's mask of a window; kept, for making it takes a [T, T] tensor, and another one would be compiled anew."""
    from torch.nn.attention.flex_attention import create_block_mask

    def block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i // width - j // width <= 1)

    def sliding(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < width)

    return create_block_mask(block if kind == "block" else sliding, None, None, length, length, device=device)


def composed(shape: Shape, device: str) -> Subject:
    """A LoLCATs layer from what can be installed: the strongest composition that was found.

    repeat_kv, compiled maps, flex sliding window, fla's chunk_simple_gla without a gate over the keys that left the
    window, running key sums, compiled merge. Two things are cheaper than ours: the window is LoLCATs' own sliding one,
    W keys a query where ours reads its block and the one before; and it is normalised before the merge (its mass is
    gamma), because flex gives no largest score that a gradient could go through.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    x = inputs(shape, device) | layer_weights(shape, device)
    attend, width = _flex(shape, "sliding", device), shape.window
    maps, merge = _compiled("maps", _composed_maps), _compiled("merge", _composed_merge)

    def forward() -> Tensor:
        fq, fk, v = maps(x["q"], x["k"], x["v"], x["wq"], x["wk"])  # [B, T, H, .]
        near = attend(x["q"], x["k"], x["v"], enable_gqa=True)
        late_k, late_v = (nnf.pad(y[:, :-width], (0, 0, 0, 0, width, 0)) for y in (fk, v))
        far = chunk_simple_gla(fq, late_k, late_v, scale=1.0)[0]
        merged: Tensor = merge(near, far, fq, late_k, x["logit"])
        return merged

    return Subject(
        forward=forward,
        leaves=x,
        reference=_composed_reference(shape),
        maps=("wq", "wk", "logit"),
        note="sliding window, normalised before the merge",
    )


def layer_weights(shape: Shape, device: str) -> dict[str, Tensor]:
    """Maps wq, wk [H, D, f] and the window's logit [H]: what LoLCATs trains, float32."""
    size = (shape.heads, shape.head_dim, shape.feature_dim)
    made = {name: drawn(*size, device=device, seed=n, scale=0.2) for n, name in enumerate(("wq", "wk"), 1)}
    made["logit"] = drawn(shape.heads, device=device, seed=3) - 2.0
    return {name: value.requires_grad_() for name, value in made.items()}


def _composed_maps(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features and repeated values, token first."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    found = []
    for x, weight in ((q, wq), (k, wk)):
        y = torch.einsum("bhtd,hdf->bthf", x, weight.to(x.dtype)).float()
        found.append(torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1).to(x.dtype))
    return found[0], found[1], v.transpose(1, 2).contiguous()


def _composed_merge(near: Tensor, far: Tensor, fq: Tensor, late_k: Tensor, logit: Tensor) -> Tensor:
    """(gamma near + far) / (gamma + fq.sum_j fk): near [B, H, T, D], far [B, T, H, D], fq, late_k [B, T, H, F]."""
    gamma = logit.sigmoid()[:, None, None]
    below = (fq.float() * late_k.float().cumsum(1)).sum(-1).transpose(1, 2).unsqueeze(-1)
    return ((gamma * near + far.transpose(1, 2)) / (gamma + below)).to(near.dtype)


def _composed_reference(shape: Shape) -> Any:
    """window_and_linear over a sliding window that is normalised first."""

    def run(x: dict[str, Tensor]) -> Tensor:
        length, device = x["q"].shape[2], x["q"].device
        near = reference.softmax_attention(shape, "sliding")(x)
        seen = reference.seen_by("sliding", length, shape.window, device)
        covered = reference.seen_by("causal", length, 0, device) & ~seen
        k, v = (reference.repeated(x[name], shape.heads) for name in "kv")
        weights = reference.two_sided(x["q"], x["wq"]) @ reference.two_sided(k, x["wk"]).mT * covered
        mass = x["logit"].sigmoid()[:, None, None]
        return (mass * near + weights @ v) / (mass + weights.sum(-1, keepdim=True))

    return run


def gate_inputs(shape: Shape, device: str, *, channel: bool, delta: bool = False) -> dict[str, Tensor]:
    """q, k, v, log decays g [B, K, T] or [B, K, T, D] about -0.05 a token, and beta [B, K, T]; float32 gates."""
    x = inputs(shape, device)
    size = (shape.batch, shape.kv_heads, shape.length, *((shape.head_dim,) if channel else ()))
    x["g"] = nnf.logsigmoid(drawn(*size, device=device, seed=4) + 3.0).detach().requires_grad_()
    if delta:
        x["beta"] = drawn(*size, device=device, seed=5).sigmoid().detach().requires_grad_()
    return x


def fla_gated(name: str) -> Any:
    """fla-core: simple_gla (scalar gate), gla (a gate per channel), delta_rule, gated_delta_rule."""

    def build(shape: Shape, device: str) -> Subject:
        from fla import ops

        run = getattr(ops, f"chunk_{name}")
        gate, delta = name != "delta_rule", "delta" in name
        x = gate_inputs(shape, device, channel=name == "gla", delta=delta)
        if not gate:
            del x["g"]
        groups, scale = shape.heads // shape.kv_heads, 1.0 if delta else shape.head_dim**-0.5
        extra: dict[str, Any] = {"use_qk_l2norm_in_kernel": True} if delta else {}

        def forward() -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in (x["q"], x["k"], x["v"]))
            given = {key: x[key].transpose(1, 2) for key in ("g", "beta") if key in x}
            if groups > 1:
                k, v = (y.repeat_interleave(groups, dim=2) for y in (k, v))
                given = {key: y.repeat_interleave(groups, dim=2) for key, y in given.items()}
            given = {key: y.to(q.dtype) if key == "beta" else y for key, y in given.items()}
            out: Tensor = run(q, k, v, scale=scale, **given, **extra)[0]
            return out.transpose(1, 2)

        exact = reference.gated(shape, scale=scale, delta=delta)
        return Subject(forward=forward, leaves=x, reference=exact)

    return build


def tfla_mlstm(shape: Shape, device: str) -> Subject:
    """TFLA's mLSTM with sigmoid gates (mlstm_kernels, arXiv 2503.14376): scalar forget gate, input gate."""
    from mlstm_kernels.torch import get_mlstm_kernel

    run = get_mlstm_kernel("chunkwise--triton_xl_chunk_siging")
    x = gate_inputs(shape, device, channel=False)
    # It takes gates before the sigmoid: forget such that log sigmoid is g, input so large that its sigmoid is one.
    forget = x.pop("g").detach().exp().clamp(1e-6, 1 - 1e-6).logit().requires_grad_()
    x["forget"] = forget

    def forward() -> Tensor:
        take = torch.full_like(forget, 20.0)
        q, k, v = (x[name].contiguous() for name in "qkv")
        sizes: dict[str, Any] = {"chunk_size": 128, "autocast_kernel_dtype": torch.bfloat16}
        out: Tensor = run(q=q, k=k, v=v, i=take, f=x["forget"], normalize=False, **sizes)
        return out

    def exact(y: dict[str, Tensor]) -> Tensor:
        given = {**y, "g": nnf.logsigmoid(y["forget"])}
        return reference.gated(shape, scale=shape.head_dim**-0.5)(given)

    return Subject(forward=forward, leaves=x, reference=exact, note="sigmoid gates, not normalised")
