"""Who reads what: a teacher's and its student's attention weights on the same tokens, and Hedgehog's two properties.

Each model reads the tokens by itself. Of a linear layer two maps are taken: of the layer as it runs, and of its linear
branch alone, over all past tokens, from the same queries and keys.

The properties are those that make softmax work (Hedgehog, arXiv 2402.04347, section 3): its weights are spiky, so their
entropy is low, and they are monotone in q.k.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TOKENS = 128
"""Tokens of a map, where the student's window does not ask for more."""
MOST_TOKENS = 256
MOST = 12
"""Most layers, and most heads of a layer, whose maps go into a report."""
ROW = 8
"""Least keys of a row whose order says something."""
LEVELS = 127
TINY = 1e-12


@dataclass(kw_only=True)
class LayerMaps:
    """One layer's weights [H, T, T] fp32, of the chosen heads; None: there are none to show."""

    kind: str
    """linear | softmax"""
    teacher: np.ndarray | None = None
    student: np.ndarray | None = None
    linear: np.ndarray | None = None
    """Of the linear branch alone."""
    scores: np.ndarray | None = None
    """q.k of the student's own queries and keys, scaled."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which layers and heads are shown."""

    layers: list[int]
    heads: list[int]


def tokens_for(window: int, context: int) -> int:
    """Tokens of the maps: three windows, so that a third of the rows look beyond the window and the block before."""
    return min(context, max(TOKENS, min(3 * window, MOST_TOKENS)))


def spread(count: int, most: int, wanted: int | None) -> list[int]:
    """At most `most` of range(count), evenly spread with both ends, and `wanted` among them."""
    if count <= most:
        return list(range(count))
    chosen = {round(i * (count - 1) / (most - 1)) for i in range(most)}
    if wanted is not None and wanted not in chosen:
        chosen.discard(min(chosen - {0, count - 1}, key=lambda i: abs(i - wanted)))
        chosen.add(wanted)
    return sorted(chosen)


@torch.no_grad()
def collect(student: Any, teacher: Any, ids: torch.Tensor, chosen: Chosen) -> dict[int, LayerMaps]:
    """The maps of the chosen layers and heads on ids [1, T]; the two models may be on different devices."""
    from linearize.convert.capture import TeacherLayer, captured
    from linearize.modeling.modeling_linearized import attention_layers

    linear = {i: module.mixer for i, module in attention_layers(student) if i in chosen.layers}
    found = {i: LayerMaps(kind="linear" if i in linear else "softmax") for i in chosen.layers}

    def take(into: str) -> Any:
        def on_layer(layer: TeacherLayer) -> None:
            assert layer.weights is not None
            setattr(found[layer.index], into, _heads(layer.weights, chosen.heads))

        return on_layer

    def on_mixer(index: int, scores: torch.Tensor, full: torch.Tensor | None, alone: torch.Tensor | None) -> None:
        maps = found[index]
        maps.scores = _heads(scores, chosen.heads)
        maps.student = None if full is None else _heads(full, chosen.heads)
        maps.linear = None if alone is None else _heads(alone, chosen.heads)

    with captured(teacher, chosen.layers, take("teacher"), weights=True):
        _read(teacher, ids)
    kept = [i for i in chosen.layers if i not in linear]
    with captured(student, kept, take("student"), weights=True), watched(linear, on_mixer):
        _read(student, ids)
    return found


def _read(model: Any, ids: torch.Tensor) -> None:
    from linearize.modeling.family_table import body

    body(model)(input_ids=ids.to(next(model.parameters()).device), use_cache=False)


def _heads(weights: torch.Tensor, heads: Sequence[int]) -> np.ndarray:
    """[1, H, T, T] -> the chosen heads [h, T, T] fp32."""
    chosen: np.ndarray = weights[0, list(heads)].float().cpu().numpy()
    return chosen


@contextmanager
def watched(mixers: dict[int, Any], on_mixer: Any) -> Iterator[None]:
    """Call `on_mixer(layer, q.k, weights, weights of the linear branch)` after each mixer has run."""
    handles = []

    def hook_of(index: int) -> Any:
        def hook(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            q, k = args[0].float(), args[1].float()
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = (q @ keys.transpose(-1, -2)) * mixer.scaling
            parts = [weights_of(mixer, args, kwargs, branches) for branches in ("full", "linear")]
            on_mixer(index, scores, *parts)

        return hook

    for index, mixer in mixers.items():
        handles.append(mixer.register_forward_hook(hook_of(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_of(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], branches: str) -> torch.Tensor | None:
    """A mixer's row weights [1, H, T, T] with these branches; None where it has no weights of single pairs."""
    spec = mixer.spec
    if spec.write == "none":
        if branches == "linear":
            return None
    elif spec.normaliser == "norm":
        return None  # what is summed is normalised as a whole
    before = mixer.branches
    mixer.branches, mixer.record_weights = branches, True
    try:
        mixer.forward(*args, **kwargs)  # not called: the hook that calls this would run again
        weights: torch.Tensor | None = mixer.last_weights
        return weights
    finally:
        mixer.branches, mixer.record_weights, mixer.last_weights = before, False, None


def entropy(weights: np.ndarray) -> np.ndarray:
    """Mean row entropy of each head in nats, [H, T, T] -> [H]; signed weights count by their size.

    The first row has one key and is left out.
    """
    share = np.abs(weights[:, 1:].astype(np.float64))
    share /= share.sum(-1, keepdims=True).clip(TINY)
    found: np.ndarray = -(share * np.log(share.clip(TINY))).sum(-1).mean(-1)
    return found


def monotonicity(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mean over rows of Spearman's rank correlation of weight and q.k, [H, T, T] twice -> [H]; 1: softmax's own.

    Rows of fewer than `ROW` keys are left out.
    """
    found = np.zeros(len(weights))
    length = weights.shape[-1]
    for head in range(len(weights)):
        rows = [
            _correlation(_ranks(weights[head, t, : t + 1]), _ranks(scores[head, t, : t + 1]))
            for t in range(ROW - 1, length)
        ]
        found[head] = sum(rows) / len(rows)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: np.ndarray = (ends - counts + ends - 1) / 2
    return means[inverse.reshape(-1)]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size > 0 else 0.0


def pack_map(weights: np.ndarray) -> bytes:
    """The lower triangle of [T, T], row by row, a byte each: 128 + sign * 127 * sqrt(|weight|), weights cut to 1.

    The root spends the levels on small weights: the least that is seen is 1.6e-5.
    """
    rows, columns = np.tril_indices(weights.shape[-1])
    values = weights[rows, columns].astype(np.float64)
    levels = np.rint(LEVELS * np.sqrt(np.abs(values).clip(0, 1))) * np.sign(values)
    return (128 + levels).astype(np.uint8).tobytes()


def unpack_map(data: bytes, tokens: int) -> np.ndarray:
    """What `pack_map` kept, [T, T] fp64, zeros above the diagonal."""
    levels = (np.frombuffer(data, dtype=np.uint8).astype(np.float64) - 128) / LEVELS
    full = np.zeros((tokens, tokens))
    full[np.tril_indices(tokens)] = np.sign(levels) * levels**2
    return full


def packed(maps: dict[int, LayerMaps], heads: Sequence[int]) -> tuple[list[dict[str, Any]], str]:
    """One row a layer and head, and all maps: packed, deflated and in base64.

    A row: layer, head, kind, and for teacher, student and linear {at: the map's place, entropy, monotonicity} or None.
    """
    blobs: list[bytes] = []
    rows: list[dict[str, Any]] = []
    for index, layer in maps.items():
        named = {"teacher": layer.teacher, "student": layer.student, "linear": layer.linear}
        figures = {name: _figures(name, weights, layer) for name, weights in named.items() if weights is not None}
        for place, head in enumerate(heads):
            row: dict[str, Any] = {"layer": index, "head": head, "kind": layer.kind}
            for name, weights in named.items():
                row[name] = None
                if weights is not None:
                    row[name] = {"at": len(blobs)} | {key: float(of[place]) for key, of in figures[name].items()}
                    blobs.append(pack_map(weights[place]))
            rows.append(row)
    return rows, base64.b64encode(zlib.compress(b"".join(blobs), 9)).decode()


def _figures(name: str, weights: np.ndarray, layer: LayerMaps) -> dict[str, np.ndarray]:
    softmax = name == "teacher" or layer.scores is None  # weights of a softmax are monotone by definition
    order = np.ones(len(weights)) if softmax or layer.scores is None else monotonicity(weights, layer.scores)
    return {"entropy": entropy(weights), "monotonicity": order}


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token in its place, spaces kept."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        grown = whole.startswith(before) and len(whole) > len(before)
        texts.append(whole[len(before) :] if grown else str(tokenizer.decode([ids[end - 1]])))
        before = whole
    return texts
