"""A small streamed conversion, and whether two of them are the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from linearize.artifacts.weights import list_shards

SMALL = ["context=64", "mixer.window=16", "mixer.feature_dim=8", "device=cpu", "seed=5", "finetune.tokens=0",
         "align.tokens=1536", "align.batch_tokens=256"]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in list_shards(folder) for name, tensor in load_file(shard).items()}


def same(ours: Path, theirs: Path) -> None:
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
