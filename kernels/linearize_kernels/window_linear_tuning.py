"""Block sizes, warps and stages of the window + linear kernels; see tuning.py.

Rows are keyed by compute capability, channels D, the tile that covers the map's width, block C and dtype.
"""

from __future__ import annotations

import torch

from .tuning import _tile


def _is_wide_ampere(capability: int, channels: int, chunk: int, dtype: torch.dtype) -> bool:
    """Heads of 256 on Ampere, where narrow tiles of a wide head spill thousands of bytes, and wide ones few or none."""
    return capability in range(80, 90) and channels > 128 and chunk <= 64 and dtype != torch.float32


_WIDE_AMPERE = {"num_warps": 8, "num_stages": 1, "maxnreg": 255}
"""Told that it may take all registers, the assembler does; else it stops at half of them, or at 32, and spills."""


def window_linear_scan(capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    """Value tile, how masses are summed, warps and stages of window_linear_scan_triton.scan_kernel."""
    by_dot = capability == 0 or dtype == torch.bfloat16  # float16 has no exponents to spare for gradients
    if capability in range(80, 90) or chunk > 64:
        return {"BV": _tile(channels, 64), "BY_DOT": by_dot, "num_warps": 8, "num_stages": 2}
    if width > 64:
        return {"BV": _tile(channels, 32), "BY_DOT": by_dot, "num_warps": 4, "num_stages": 2}
    most = 128 if channels <= 128 else 64
    return {"BV": _tile(channels, most), "BY_DOT": by_dot, "num_warps": 4, "num_stages": 2}


def window_linear_segments(capability: int, programs: int, blocks: int) -> int:
    """Into how many segments a scan is cut that has `programs` programs without, over `blocks` blocks each."""
    if capability == 0:
        return 1 + (blocks >= 6) + (blocks >= 9)  # the interpreter: one, two and three are tested
    wanted = 2 * 132 // max(programs, 1)  # two programs a multiprocessor, all at once
    return max(1, min(wanted, blocks // 8, 16))


def window_linear_join(capability: int, channels: int) -> dict[str, int]:
    """Value tile, warps and stages of window_linear_scan_triton.join_kernel."""
    return {"BV": _tile(channels, 32), "num_warps": 4, "num_stages": 1}


def window_linear_read(capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    """Value tile, warps and stages of window_linear_read_triton.read_kernel, and whether it asks for tiles ahead.

    A product of 64 rows has work for four warps; where its result feeds another, Hopper's second four repeat it. More
    than four are for larger tiles, or to spare registers.
    """
    if dtype == torch.float32 and channels > 64:  # four tiles of keys and values lie in shared memory
        return {"BV": 32, "PREFETCH": False, "num_warps": 8 if chunk > 64 or width > 64 else 4, "num_stages": 1}
    if _is_wide_ampere(capability, channels, chunk, dtype):
        return {"BV": 128, "PREFETCH": False, **_WIDE_AMPERE}
    large = chunk > 64 or width > 64 or capability in range(80, 90)
    return {
        "BV": _tile(channels, 64 if large or channels > 128 else 128),
        # Ampere has no such instruction; larger tiles leave no registers.
        "PREFETCH": capability >= 90 and dtype != torch.float32 and not large,
        "num_warps": 8 if large else 4,
        "num_stages": 2,
    }


def window_linear_maps(capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps and stages of the kernels of window_linear_maps_triton."""
    large = chunk > 64 or width > 64 or capability in range(80, 90)
    return {"num_warps": 8 if large else 4, "num_stages": 1}


def window_linear_team(capability: int, programs: int, group: int, dtype: torch.dtype, *, bounded: bool = False) -> int:
    """How many of the `group` query heads that share keys one program serves; `programs` if it serves all.

    On Ampere keys would wait in registers for the next head; in float32 shared memory is too small for them. Bounds on
    scores take the registers that a loop over heads needs.
    """
    while group > 8 and group % 2 == 0:
        group //= 2
    many = capability >= 90 and programs >= 2 * 132 and dtype != torch.float32
    return group if capability == 0 or (many and not bounded) else 1


def _is_llama(capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype) -> bool:
    """LoLCATs on Llama 3's heads, on Hopper: where a finer choice was measured."""
    return capability == 90 and (channels, width, chunk) == (128, 64, 64) and dtype == torch.bfloat16


def window_linear_fused_values(capability: int, channels: int) -> bool:
    """Whether window_linear_far_triton.far_keys_kernel also sums dv; elsewhere registers are too few for both."""
    return channels <= 128 and capability not in range(80, 90)


def window_linear_far(
    capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype, *, alone: bool = False
) -> dict[str, int]:
    """Warps and stages of window_linear_far_triton.far_keys_kernel; `alone`: without dv, and in whole blocks."""
    large = chunk > 64 or width > 64 or capability in range(80, 90)
    most = {"maxnreg": 128} if alone and _is_llama(capability, channels, width, chunk, dtype) else {}
    return {"num_warps": 8 if large else 4, "num_stages": 1, **most}


def window_linear_weights(capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps and stages of window_linear_maps_triton.weight_grad_kernel."""
    return {"num_warps": 4 if channels * width <= 8192 else 8, "num_stages": 2}


def window_linear_queries(
    capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype, *, bounded: bool = False
) -> dict[str, int]:
    """Channel tile, warps and stages of window_linear_queries_triton and window_linear_sinks_triton.

    bounded: scores are, which leaves registers for half of 128 channels; Ampere has them for all.
    """
    if _is_wide_ampere(capability, channels, chunk, dtype):
        return {"BN": 128, **_WIDE_AMPERE}
    small = width > 64 or channels > 128 or (bounded and capability not in range(80, 90))
    tile = _tile(channels, 64 if small else 128)
    warps = 8 if chunk > 64 or channels > 128 or capability in range(80, 90) else 4
    return {"BN": tile, "num_warps": warps, "num_stages": 1}


def window_linear_keys(
    capability: int,
    channels: int,
    width: int,
    chunk: int,
    dtype: torch.dtype,
    *,
    even: bool = False,
    bounded: bool = False,
) -> dict[str, int]:
    """Tiles of channels and queries, warps and stages of window_linear_keys_triton.key_pairs_kernel.

    even: every sequence has whole blocks. bounded: scores are, which takes registers.
    """
    if _is_wide_ampere(capability, channels, chunk, dtype):
        return {"BN": 128, "BQ": min(chunk, 32), **_WIDE_AMPERE}
    tile = _tile(channels, 64 if width > 64 or channels > 128 else 128)
    stages = 3 if even and _is_llama(capability, channels, width, chunk, dtype) else 2
    queries = 16 if bounded and tile > 64 and capability not in range(80, 90) else 32
    return {"BN": tile, "BQ": min(chunk, queries), "num_warps": 8 if chunk > 64 else 4, "num_stages": stages}


def window_linear_values(capability: int, channels: int, width: int, chunk: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of channels, warps and stages of window_linear_keys_triton.value_states_kernel."""
    if _is_wide_ampere(capability, channels, chunk, dtype):
        return {"BN": 64, **_WIDE_AMPERE}
    return {"BN": _tile(channels, 64 if width > 64 else 128), "num_warps": 8 if chunk > 64 else 4, "num_stages": 1}
