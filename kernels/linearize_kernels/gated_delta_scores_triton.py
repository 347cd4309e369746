"""Causal scores inside every chunk of the gated delta rule, and the lengths of the queries.

    P_ij = e^{G_i - G_j} q_i.k_j for j <= i, else 0

Made once for all tiles of V, forwards and backwards.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .gated_delta_tiles import inverse_length, load_rows, pair_decay, span_of_chunk
from .tuning import gated_delta_scores


@triton.jit(do_not_specialize=["T", "NC"])
def scores_kernel(
    q, k, g_cum, r_q, r_k, scores, table, sqb, sqh, sqt, skb, sks, skt, T, H, NC,
    R: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr, UNIT: tl.constexpr,
    SCORES: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (chunks times batch times query heads).

    q [B, H, T, F]; k [B, H / R, T, F]; g_cum, r_k [B, H / R, T] -> scores [B, H, NC, C, C] in q's dtype, if SCORES;
    r_q [B, H, T], if UNIT.
    """
    pid = tl.program_id(0)
    c = pid % NC
    h = (pid // NC % H).to(tl.int64)
    b = (pid // NC // H).to(tl.int64)
    s = h // R
    first, end, _ = span_of_chunk(table, c, T, C, PACKED)
    left = end - first
    at = tl.cast(first, tl.int64)
    i = tl.arange(0, C)
    channel = tl.arange(0, BF)
    q_rows = load_rows(q + b * sqb + h * sqh + at * sqt, sqt, i, left, channel, F, BF)
    if UNIT:
        r = inverse_length(q_rows)
        tl.store(r_q + (b * H + h) * T + at + i, r, mask=i < left)
    if SCORES:
        per_token = (b * (H // R) + s) * T + at
        k_rows = load_rows(k + b * skb + s * sks + at * skt, skt, i, left, channel, F, BF)
        made = tl.dot(q_rows, tl.trans(k_rows), input_precision=PREC)
        g = tl.zeros([C], tl.float32)
        if GATED:
            g = tl.load(g_cum + per_token + i, mask=i < left, other=0.0)
        made *= pair_decay(g[:, None], g[None, :], i[:, None] >= i[None, :], GATED)
        if UNIT:
            made *= r[:, None] * tl.load(r_k + per_token + i, mask=i < left, other=0.0)[None, :]
        cell = i[:, None] * C + i[None, :]
        tl.store(scores + pid.to(tl.int64) * C * C + cell, made.to(scores.dtype.element_ty))


def gate_cases(arch: int = 80) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int], str]]:
    """Default configurations for a card, in bfloat16, for the compile gate; those for 80 fit every card."""
    signature = {
        "q": "*bf16", "k": "*bf16", "g_cum": "*fp32", "scores": "*bf16", "T": "i32", "H": "i32", "NC": "i32",
        **{f"s{x}": "i32:16" for x in ("qb", "qh", "qt", "kb", "ks", "kt")},
    }  # fmt: skip
    constants = {"R": 1, "F": 128, "BF": 128, "C": 64, "GATED": True, "UNIT": False, "SCORES": True, "PACKED": False,
                 "PREC": "tf32", "r_q": None, "r_k": None, "table": None}  # fmt: skip
    return [(scores_kernel, signature, constants, gated_delta_scores(arch, 128, torch.bfloat16), "F=128 C=64")]
