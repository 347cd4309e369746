"""The output of gated linear attention from stored features (gated_out_triton.py, gated_maps.py).

Query heads that read one state are stacked, so that a tile of the state and of the keys serves them all. The state's
part of the denominator, phi(q) z, is a product too.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .compiled import start
from .gated_maps import GATE_SHAPES, MAP_POINTERS, SIGNS, map_gate_constants, options, two_columns
from .gated_plan import Plan, gate_signature
from .gated_tiles import TINY, chunk_span, pair_decay, product, row_decay
from .tuning import gated_map_chunk, gated_map_out


@triton.jit
def stacked(x, HEADS: tl.constexpr, C: tl.constexpr):
    """x [C] once for every stacked head: [HEADS C]."""
    return tl.reshape(tl.broadcast_to(x[None, :], (HEADS, C)), (HEADS * C,))


@triton.jit(do_not_specialize=["T", "H", "NT"])
def map_out_kernel(
    fq, fk, v, g, states, z_states, out, rest, den, table, svb, svh, svt, sgb, sgh, sgt, sob, soh, sot, scale, T, H, NT,
    R: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, SIGNED: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, REST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (batch, chunks, tiles of V, stacks of query heads, flat). den [B, H, T]: scale times the denominator.

    REST: what rounding takes off the output is kept beside it, rest [B, H, T, V] with the output's strides.
    """
    F: tl.constexpr = WIDTH * SIGNED
    VT: tl.constexpr = (V + BV - 1) // BV
    STACKS = H // HEADS
    pid = tl.program_id(0)
    h = (pid % STACKS * HEADS).to(tl.int64)
    tile = pid // STACKS % VT
    c = pid // STACKS // VT % NT
    b = (pid // STACKS // VT // NT).to(tl.int64)
    s = h // R
    slot = (b * (H // R) + s) * NT + c
    first, begin, end = chunk_span(c, table, T, C, 0, PACKED)
    token = tl.arange(0, C)
    in_chunk = (first + token >= begin) & (first + token < end)
    row = tl.arange(0, HEADS * C)
    head, t = h + row // C, first + row % C
    live = (t >= begin) & (t < end)
    at = (b * H + head) * T + t
    o = tile * BV + tl.arange(0, BV)
    in_o = o < V
    keys = ((b * (H // R) + s) * T + first) * F
    acc = tl.zeros([HEADS * C, BV], tl.float32)
    scores = tl.zeros([HEADS * C, C], tl.float32)
    mass = tl.zeros([HEADS * C, 16], tl.float32)
    for i in tl.range(0, (F + BF - 1) // BF):
        f = i * BF + tl.arange(0, BF)
        in_f = f < F
        qf = tl.load(fq + at[:, None] * F + f[None, :], mask=live[:, None] & in_f[None, :], other=0.0)
        kf = tl.load(fk + keys + token[None, :] * F + f[:, None], mask=in_chunk[None, :] & in_f[:, None], other=0.0)
        state = tl.load(
            states + slot * F * V + f[:, None] * V + o[None, :], mask=in_f[:, None] & in_o[None, :], other=0.0
        )
        acc = product(qf, state, acc, PREC)
        scores = tl.dot(qf, kf, scores, input_precision=PREC)
        if NORM:
            z = tl.load(z_states + slot * F + f, mask=in_f, other=0.0)
            mass = two_columns(qf, z, mass, PREC)
    running, _ = row_decay(g, b * sgb + s * sgh, sgt, first + token, in_chunk, C, DECAY)
    stack = stacked(running, HEADS, C)
    scores *= pair_decay(stack[:, None], running[None, :], (row % C)[:, None] >= token[None, :])
    vt = tl.load(
        v + b * svb + (s // G) * svh + first * svt + token[:, None] * svt + o[None, :],
        mask=in_chunk[:, None] & in_o[None, :], other=0.0,
    )  # fmt: skip
    reach = tl.exp2(stack)
    if vt.dtype == tl.float16:  # as in gated_out_triton.py
        factor = tl.zeros([HEADS * C], tl.float32) + scale
        if NORM:
            total = (tl.sum(mass, 1) * reach + tl.sum(scores, 1)) * scale
            factor = scale / tl.maximum(total, TINY)
        acc = tl.dot((scores * factor[:, None]).to(vt.dtype), vt, acc * (reach * factor)[:, None])
    else:
        acc = tl.dot(scores.to(vt.dtype), vt, acc * reach[:, None], input_precision=PREC) * scale
        if NORM:
            total = (tl.sum(mass, 1) * reach + tl.sum(scores, 1)) * scale
            acc = acc / tl.maximum(total, TINY)[:, None]
    if NORM:  # noqa: SIM102 (known when compiled, and then not)
        if tile == 0:
            tl.store(den + at, total, mask=live)
    to = (b * sob + head * soh + t * sot)[:, None] + o[None, :]
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + to, rounded, mask=live[:, None] & in_o[None, :])
    if REST:
        left = (acc - rounded.to(tl.float32)).to(rest.dtype.element_ty)
        tl.store(rest + to, left, mask=live[:, None] & in_o[None, :])


def map_outputs(
    plan: Plan,
    v: torch.Tensor,
    g: torch.Tensor | None,
    features: tuple[torch.Tensor, torch.Tensor],
    states: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    rest: torch.Tensor | None,
    den: torch.Tensor,
    *,
    chunk: int,
) -> None:
    """Fills out [B, H, T, V], any strides, what rounding took off it (rest, the same strides), and den [B, H, T]."""
    config = gated_map_out(plan.capability, plan.features, plan.values, plan.readers, v.dtype)
    table, _, count = plan.chunks(chunk)
    tiles = -(-plan.values // config["BV"])
    start(plan.found, map_out_kernel, plan.batch * count * tiles * (plan.heads // config["HEADS"]), (
        *features, v, g, *states, out, rest, den, table, *v.stride()[:3], *plan.decay_strides(g), *out.stride()[:3],
        plan.scale, plan.length, plan.heads, count,
    ), dict(
        G=plan.state_heads // plan.kv_heads, REST=rest is not None, **options(plan, chunk, v.dtype) | config
    ))  # fmt: skip


def gate_cases(arch: int = 90) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations in bfloat16 on a card of capability `arch`, for the compile gate."""
    cases = []
    for size, width, name in GATE_SHAPES:
        config = gated_map_out(arch, SIGNS[name] * width, size, 4, torch.bfloat16)
        launch = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        chunk = gated_map_chunk(arch, torch.bfloat16)
        constants = map_gate_constants(size, width, name, chunk) | {"G": 1, "REST": name == "learned_softmax"} | config
        constants.pop("MAP")
        pointers = MAP_POINTERS | {"out": "*bf16", "rest": "*bf16"}
        signature = gate_signature(map_out_kernel, pointers, constants)
        cases.append((map_out_kernel, signature, constants, launch, f"D {size} f {width} {name}"))
    return cases
