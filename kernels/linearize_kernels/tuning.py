"""Block sizes, warps and stages of every kernel: one small function an op, looked up, never searched for at run time.

A search on a user's machine takes minutes and gives another answer every day; what is here was measured once. Rows are
keyed by the card's compute capability, head size D, map width f, block W and dtype, and fall back to a row that any
card can run.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number, 90 for 9.0; 0 for any other device (the interpreter's)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tile(size: int, most: int) -> int:
    """A power of two that covers `size`, from 16 to `most`."""
    return max(16, min(most, 1 << (size - 1).bit_length()))


def gated_chunk(capability: int, features: int, values: int, dtype: torch.dtype, decay: str, *, backward: bool) -> int:
    """Tokens between two stored states of gated linear attention."""
    if capability == 0:
        return 16
    short = backward or dtype == torch.float32 or decay == "channel" or features > 128
    return 64 if short else 128


def gated_scan(capability: int, features: int, values: int, dtype: torch.dtype, decay: str) -> dict[str, int]:
    """Tiles of features and values, warps and stages of gated_scan_triton.scan_kernel."""
    return {"BF": _tile(features, 64), "BV": _tile(values, 64), "num_warps": 4, "num_stages": 3}


def gated_out(
    capability: int, features: int, values: int, dtype: torch.dtype, decay: str, *, norm: bool
) -> dict[str, int]:
    """Tiles, warps and stages of gated_out_triton.out_kernel."""
    if decay == "channel":
        return {"BF": _tile(features, 32), "BV": _tile(values, 128), "num_warps": 4, "num_stages": 1}
    # With a denominator the queries are read twice, by tensor cores and by a sum: of two stages Triton 3.6 makes a
    # pipeline that has one slot for them, and fills it while the tensor cores still read.
    stages = 1 if norm else 3 if _roomy(capability, dtype) else 2
    return {"BF": _tile(features, 64), "BV": _tile(values, 128), "num_warps": 8, "num_stages": stages}


def gated_prepare(capability: int, features: int, dtype: torch.dtype, *, pairs: bool) -> dict[str, int]:
    """Feature tile, warps and stages of gated_channel_prepare_triton.prepare_kernel, with its products or without."""
    wide = capability >= 90 and dtype != torch.float32
    return {"BF": _tile(features, 64 if wide else 32), "num_warps": 4, "num_stages": 1}


def gated_states(
    capability: int, features: int, values: int, dtype: torch.dtype, *, programs: int, reverse: bool
) -> dict[str, int]:
    """Value tile, warps and stages of gated_channel_scan_triton.states_kernel, forwards or in reverse.

    programs: states that are scanned side by side; few of them are cut finer, to fill the card. In reverse more is
    read, of which two stages leave room for several programs on a multiprocessor only where tiles are small.
    """
    large = features > 128 or dtype == torch.float32
    if reverse:
        staged = capability >= 90 and not large
        return {
            "BV": _tile(values, 32 if large or staged or programs < 66 else 64),
            "num_warps": 4,
            "num_stages": 1 + staged,
        }
    return {"BV": _tile(values, 32 if large or programs < 66 else 64), "num_warps": 4, "num_stages": 2}


def gated_grads(capability: int, features: int, values: int, dtype: torch.dtype, *, mild: bool) -> dict[str, int]:
    """Feature tile, warps and stages of gated_channel_grads_triton.grads_kernel, for chunks that forget little or much.

    Both have one tile: which of the two is meant is decided for a tile.
    """
    return {"BF": _tile(features, 32), "num_warps": 4 if mild and values <= 128 else 8, "num_stages": 1}


def gated_grads_span(capability: int, programs: int, chunks: int) -> int:
    """Chunks that a program of gated_channel_grads_triton.grads_kernel looks at that is for those that forget much.

    programs: as many as there would be with a chunk each, `chunks` of a head. One that only looks, and leaves, keeps a
    multiprocessor from others all the same: it has registers for the work.
    """
    if capability == 0:
        return 4  # the interpreter: several, and one cut short
    span = 1
    while span < 32 and span < chunks and programs // (2 * span) >= 8 * 132:
        span *= 2
    return span


def gated_at_hand(capability: int, dtype: torch.dtype, programs: int) -> bool:
    """Whether states of a decay per channel are scanned in one go, outputs and all; else cut into segments.

    programs: states that are scanned side by side.
    """
    if capability == 0:
        return programs >= 2
    return dtype == torch.bfloat16 and programs >= 32


def gated_dq(capability: int, features: int, values: int, dtype: torch.dtype, decay: str) -> dict[str, int]:
    """Feature tile, warps and stages of gated_dq_triton.dq_kernel."""
    return {
        "BF": _tile(features, 32 if decay == "channel" else 64),
        "num_warps": 8 if values > 128 else 4,
        "num_stages": 1,
    }


def gated_dkv(
    capability: int, features: int, values: int, dtype: torch.dtype, decay: str, *, many: bool
) -> dict[str, int]:
    """Feature tile, warps and stages of gated_dkv_triton.dkv_kernel; `many` heads share a value head."""
    narrow = decay == "channel" or (many and values > 64)
    return {"BF": _tile(features, 32 if narrow else 64), "num_warps": 8 if values > 128 else 4, "num_stages": 1}


def decode(
    capability: int, head_dim: int, features: int, window: int, batch: int, heads: int, group: int, ratio: int, *,
    split: bool,
) -> dict[str, int]:  # fmt: skip
    """Value channels BV and query heads GROUP of one program of decode_triton.decode_kernel, and its warps.

    group: query heads a key head; ratio: query heads a state head, which stay together. Few programs leave a GPU idle;
    many read keys and maps once each. split: whether value channels may lie in several programs. A program takes nearly
    all registers that a thread can have, so that with eight warps a multiprocessor holds one program, with four two.
    """
    whole = _tile(head_dim, 256)
    tall = features > 128 or head_dim > 128  # more registers a thread than four warps have
    if not split:
        return {"BV": whole, "GROUP": ratio, "num_warps": 8 if head_dim > 64 else 4}
    few = batch * heads // ratio < 132
    return {"BV": min(whole, 32 if few or tall else 64), "GROUP": ratio, "num_warps": 8 if tall else 4}


def decode_split(
    capability: int, head_dim: int, features: int, window: int, batch: int, kv_heads: int, dtype: torch.dtype
) -> dict[str, dict[str, int]] | None:
    """Of decode_split_triton's kernels: sequences ROWS and head channels TILE of a product of maps; value tile BV,
    tokens PART and channels VT of a fold; warps. None: one launch.

    features: all of a head. Few sequences fill a card better in one launch, in which every head makes all it needs at
    once. Tiles of the window, and of the state, have to fit into registers.
    """
    if capability == 0:  # the interpreter: both ways are tested
        far = {"BV": _tile(head_dim, 32), "VT": 16, "PART": 16, "num_warps": 4}
        return None if batch < 2 else {"near": {"ROWS": 16, "TILE": 16, "num_warps": 4}, "far": far}
    if batch * kv_heads < 16 or dtype != torch.bfloat16:
        return None
    if 2 * window * head_dim > 128 * 128 or features > 128:
        return None
    far = {"BV": _tile(head_dim, 64), "VT": 32, "PART": 16, "num_warps": 4, "maxnreg": 128}
    return {"near": {"ROWS": 16, "TILE": 128, "num_warps": 8}, "far": far}


MOST_PARTS = 128
"""Parts of one head's sum that decode_step_triton adds up at once."""


def decode_wide(
    capability: int, head_dim: int, features: int, batch: int, states: int, readers: int
) -> dict[str, dict[str, int]]:
    """Features a program, sequences a program, and warps, of the kernels of decode_wide_triton and of their reader.

    features: all of a head; states: of all sequences; readers: query heads a state. One or two sequences are multiplied
    one by one. Of the state a program goes over EACH tiles of BF features, more where that leaves programs enough: sums
    over a tile cross warps. A tile times all its readers, and the next tile, have to fit into registers.
    """
    one_by_one = batch <= 2
    many = states >= 64
    tile, programs = (32, 1024) if many else (16, 256)
    tile = max(1, min(tile, 128 >> (readers - 1).bit_length()))
    each = 1 << (max(1, min(8, states * features // (tile * programs))).bit_length() - 1)
    while features > MOST_PARTS * tile * each:
        each *= 2
    if capability == 0:
        tile, each = 16, 2
    return {
        "features": {
            "BF": 64 if capability else 32 if one_by_one else 16,
            "ROWS": batch if one_by_one else 16,
            "num_warps": 2 if batch == 1 else 4,
        },
        "state": {"BF": tile, "EACH": each, "num_warps": max(1, _tile(head_dim, 256) // 32)},
        "step": {"BV": _tile(head_dim, 128 if many else 64), "num_warps": 4},
    }


def decode_own(capability: int, head_dim: int, channels: int, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """Channels of a head BD, inputs BC, sequences of a program, warps and stages of decode_own_triton.own_kernel.

    dtype: of the projections' weights.
    """
    if batch == 1:
        most = 32 if capability == 0 else 2048
        return {"BD": 2, "BC": _tile(channels, most), "ROWS": 1, "num_warps": 4, "num_stages": 1}
    most = 32 if capability == 0 else 512 if capability >= 90 and dtype != torch.float32 else 256
    stages = 3 if capability >= 90 else 2
    return {"BD": 16, "BC": _tile(channels, most), "ROWS": 16, "num_warps": 4, "num_stages": stages}


def blend_rows(width: int) -> dict[str, int]:
    """Rows R and padded channels BD of a program of blend_triton, and its warps: 16 bytes a thread and load."""
    channels = max(16, 1 << (width - 1).bit_length())
    return {"R": max(1, 2048 // channels), "BD": channels, "num_warps": 4}


def rms_norm_rows(width: int) -> dict[str, int]:
    """Rows R and padded channels BD of a program of rms_norm_triton, and its warps: 16 channels a thread."""
    channels = max(16, 1 << (width - 1).bit_length())
    rows = max(1, 2048 // channels)
    return {"R": rows, "BD": channels, "num_warps": min(16, max(1, rows * channels // 512))}


def rms_norm_backward_programs(tiles: int, *, weighed: bool) -> int:
    """Programs of rms_norm_triton's backward pass: one a tile, or some where each adds up a gradient of the weight."""
    return min(tiles, 4 * 132) if weighed else tiles


def gated_unit_stretch(width: int) -> dict[str, int]:
    """Columns and warps of a program of gated_unit_triton."""
    return {"STRETCH": min(2048, max(16, 1 << (width - 1).bit_length())), "num_warps": 4}


def rotate_heads(heads: int, width: int) -> dict[str, int]:
    """Heads R of a program of rotate_triton, and its warps: 16 channels a thread."""
    channels = max(16, 1 << (width - 1).bit_length())
    rows = max(1, min(32, 1 << (heads - 1).bit_length(), 4096 // channels))
    return {"R": rows, "num_warps": min(8, max(1, rows * channels // 512))}


def gated_delta_chunk(capability: int, features: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk of the gated delta rule: its system is solved at once, its states are stored."""
    return 32 if dtype == torch.float32 else 64


def gated_delta_system(capability: int, features: int, dtype: torch.dtype) -> dict[str, int]:
    """Feature tile, warps and stages of gated_delta_system_triton.system_kernel."""
    return {"BF": _tile(features, 64 if features <= 128 else 32), "num_warps": 1, "num_stages": 2}


def gated_delta_scores(capability: int, features: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps and stages of gated_delta_scores_triton.scores_kernel."""
    return {"num_warps": 4, "num_stages": 1}


def gated_delta_scan(
    capability: int, features: int, values: int, dtype: torch.dtype, *, programs: int, out: bool, readers: int = 1
) -> dict[str, int]:
    """Value tile, warps and stages of gated_delta_scan_triton.scan_kernel, with outputs or without.

    programs: states that are scanned side by side; few of them are cut finer, to fill the card. readers: query heads a
    state; a pipeline would hold the tiles of all of them at once, more than there is room for.
    """
    fine = features > 128 or programs < 66 or capability < 90 or dtype == torch.float32
    stages = 1 if out and readers > 1 else 2
    return {"BV": _tile(values, 32 if fine else 64), "num_warps": 4, "num_stages": stages}


def gated_delta_reverse(
    capability: int, features: int, values: int, dtype: torch.dtype, *, programs: int
) -> dict[str, int]:
    """Value tile, warps and stages of gated_delta_reverse_triton.reverse_kernel; programs as above."""
    fine = features > 128 or programs < 66 or dtype == torch.float32
    most = 16 if capability < 90 or features > 128 else 32 if fine else 64
    return {"BV": _tile(values, most), "num_warps": 4, "num_stages": 1}


def gated_delta_queries(capability: int, features: int, values: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages of gated_delta_queries_triton.queries_kernel."""
    return {"BF": _tile(features, 64), "BV": _tile(values, 64), "num_warps": 4, "num_stages": 1}


def gated_delta_keys(capability: int, features: int, values: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages of gated_delta_keys_triton.keys_kernel."""
    most = 32 if capability < 90 else 64
    return {"BF": _tile(features, most), "BV": _tile(values, 64), "num_warps": 4, "num_stages": 1}


def distill_rows(size: int) -> dict[str, int]:
    """Logits that a program of distill_triton.losses_kernel reads at a time, and its warps."""
    block = min(8192, 1 << (max(size, 128) - 1).bit_length())
    return {"BLOCK": block, "num_warps": 16 if block >= 8192 else 4 if block >= 512 else 1, "num_stages": 1}


def gated_map_chunk(capability: int, dtype: torch.dtype) -> int:
    """Tokens between two stored states of gated linear attention with a map inside."""
    if capability == 0:
        return 16
    return 32 if dtype == torch.float32 else 64


def gated_map_slice(capability: int) -> int:
    """Bytes of features, states and pairs that are held at a time, where one key-value head does not need more."""
    if capability == 0:
        return 1 << 16
    return 1 << 31 if capability in (90, 100, 103) else 1 << 30  # cards of 80 GB and more


def _roomy(capability: int, dtype: torch.dtype) -> bool:
    """Whether a block has the shared memory of a data centre's Hopper or Blackwell, and products are in bfloat16."""
    return capability in (90, 100, 103) and dtype == torch.bfloat16


def gated_map_sums(capability: int, width: int, size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages of gated_map_features_triton.log_sum_kernel."""
    if capability == 0 or dtype == torch.float32:
        return {"ROWS": 16 if capability == 0 else 32, "BF": _tile(width, 32), "num_warps": 4, "num_stages": 1}
    return {"ROWS": 128, "BF": _tile(width, 64), "num_warps": 4, "num_stages": 1}


def gated_map_features(capability: int, width: int, size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, tiles of a program, warps and stages of gated_map_features_triton.features_kernel."""
    if capability == 0:
        return {"ROWS": 16, "BF": _tile(width, 32), "SPAN": 2, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"ROWS": 32, "BF": _tile(width, 32), "SPAN": 1, "num_warps": 4, "num_stages": 1}
    tile = _tile(width, 128)
    return {"ROWS": 64, "BF": tile, "SPAN": min(4, -(-width // tile)), "num_warps": 4, "num_stages": 1}


def gated_map_scan(capability: int, features: int, values: int, dtype: torch.dtype, *, reverse: bool) -> dict[str, int]:
    """Tiles, warps and stages of gated_map_scan_triton.map_scan_kernel, and the PROGRAMS for which it is cut."""
    if capability == 0 or dtype == torch.float32:
        return {"BF": _tile(features, 32), "BV": _tile(values, 64), "PROGRAMS": 264, "num_warps": 4, "num_stages": 1}
    if not _roomy(capability, dtype):
        return {"BF": _tile(features, 64), "BV": _tile(values, 64), "PROGRAMS": 264, "num_warps": 4, "num_stages": 2}
    tile, programs = (128, 264) if reverse else (64, 132)
    return {
        "BF": _tile(features, 64), "BV": _tile(values, tile), "PROGRAMS": programs, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def gated_map_out(capability: int, features: int, values: int, readers: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, stacked query heads, warps and stages of gated_map_out_triton.map_out_kernel."""
    heads = 2 if readers % 2 == 0 and (values > 64 or capability == 0) else 1
    if not _roomy(capability, dtype):
        heads = heads if capability == 0 else 1
        return {"BF": _tile(features, 32), "BV": _tile(values, 64), "HEADS": heads, "num_warps": 8, "num_stages": 1}
    return {"BF": _tile(features, 64), "BV": _tile(values, 128), "HEADS": heads, "num_warps": 8, "num_stages": 4}


def gated_map_scores(capability: int, features: int, values: int, dtype: torch.dtype) -> dict[str, int]:
    """Feature tile, warps and stages of gated_map_scores_triton.map_scores_kernel."""
    if capability == 0 or dtype == torch.float32:
        return {"BF": _tile(features, 32), "num_warps": 8, "num_stages": 1}
    if not _roomy(capability, dtype):
        return {"BF": _tile(features, 64), "num_warps": 4, "num_stages": 2}
    if values > 64:
        return {"BF": _tile(features, 64), "num_warps": 4, "num_stages": 4}
    return {"BF": _tile(features, 128), "num_warps": 4, "num_stages": 3}


def gated_map_dq(capability: int, width: int, values: int, dtype: torch.dtype) -> dict[str, int]:
    """Column tile, tiles of a program, warps and stages of gated_map_dq_triton.map_dq_kernel."""
    if capability == 0:
        return {"BF": _tile(width, 32), "SPAN": 2, "num_warps": 4, "num_stages": 1}
    if not _roomy(capability, dtype) or values > 128:
        return {"BF": _tile(width, 32), "SPAN": 1, "num_warps": 8, "num_stages": 1}
    span, stages = (4, 2) if values <= 64 else (8 if width >= 2048 else 2, 1)
    tile = _tile(width, 64)
    return {"BF": tile, "SPAN": min(span, -(-width // tile)), "num_warps": 4, "num_stages": stages}


def gated_map_dk(capability: int, width: int, values: int, dtype: torch.dtype) -> dict[str, int]:
    """Column tile, warps and stages of gated_map_dk_triton.map_dk_kernel."""
    if not _roomy(capability, dtype) or values > 128:
        return {"BF": _tile(width, 32), "num_warps": 8, "num_stages": 1}
    return {"BF": _tile(width, 64), "num_warps": 4, "num_stages": 3}


def gated_map_dv(capability: int, features: int, values: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages of gated_map_dv_triton.map_dv_kernel."""
    if capability == 0 or dtype == torch.float32:
        return {"BF": _tile(features, 32), "BV": _tile(values, 64), "num_warps": 4, "num_stages": 1}
    if not _roomy(capability, dtype):
        return {"BF": _tile(features, 64), "BV": _tile(values, 64), "num_warps": 4, "num_stages": 2}
    return {"BF": _tile(features, 64), "BV": _tile(values, 128), "num_warps": 4, "num_stages": 3 + (values <= 64)}


def gated_map_inputs(capability: int, size: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages of gated_map_weights_triton.input_kernel."""
    if capability == 0 or dtype == torch.float32:
        return {"ROWS": 16 if capability == 0 else 64, "BF": _tile(width, 32), "num_warps": 4, "num_stages": 1}
    return {"ROWS": 128, "BF": _tile(width, 64), "num_warps": 8, "num_stages": 3 if _roomy(capability, dtype) else 2}


def gated_map_weights(capability: int, size: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages of gated_map_weights_triton.weight_kernel."""
    if capability == 0 or dtype == torch.float32:
        return {"ROWS": 16 if capability == 0 else 32, "BF": _tile(width, 32), "num_warps": 4, "num_stages": 1}
    if not _roomy(capability, dtype):
        return {"ROWS": 64, "BF": _tile(width, 128), "num_warps": 8, "num_stages": 2}
    return {"ROWS": 64, "BF": _tile(width, 128), "num_warps": 4, "num_stages": 3}
