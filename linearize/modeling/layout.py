"""Rows of a batch to sequences that start at index 0, and back.

Padding and packing are one thing: a batch [B, T] holds N sequences of real tokens somewhere in it. A mixer works on
[N, L] with every sequence aligned left, so that windows and states start where the sequence starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each sequence's tokens lie in the batch.

    source: [N, L] index into B*T of token l of sequence n (0 where there is none).
    target: [B, T] index into N*L of the token at (b, t).
    valid: [N, L] bool; real: [B, T] bool, False at padding.
    lengths: [N] number of tokens of each sequence.
    packed: whether rows hold several sequences, and no padding.
    """

    source: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor
    real: torch.Tensor
    lengths: torch.Tensor
    packed: bool = False

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """[B, ..., T at dim, ...] -> [N, ..., L at dim, ...]."""
        rows, columns = self.source // self.real.shape[1], self.source % self.real.shape[1]
        moved = x.movedim(dim, 1)
        if moved.shape[0] == 1 and self.real.shape[0] != 1:
            rows = torch.zeros_like(rows)  # one row shared by the batch, as rotary tables are
        return moved[rows, columns].movedim(1, dim)

    def scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """[N, ..., L at dim, ...] -> [B, ..., T at dim, ...]; zeros at padding."""
        length = self.source.shape[1]
        out = x.movedim(dim, 1)[self.target // length, self.target % length]
        real = self.real.reshape(*self.real.shape, *([1] * (out.ndim - 2)))
        return torch.where(real, out, 0.0).movedim(1, dim)


def sequences(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    seen: int = 0,
    own_mask: bool = True,
) -> Layout | None:
    """Where the sequences of a call lie: by the mask's zeros, or by positions that start anew; None: one a row.

    Args:
        tokens: [B, T] or [B, T, C]; position_ids: [B, T].
        attention_mask: [B, at least seen + T], as transformers reads it; or, with `own_mask`, of these tokens [B, T].
        seen: tokens that a cache has read; only where there are none may rows hold several documents.
        own_mask: see above; softmax layers want all of the mask.

    Raises:
        ValueError: a mask of another shape; linear layers cannot follow an arbitrary 4D mask.
    """
    batch, length = tokens.shape[:2]
    if attention_mask is not None:
        width = attention_mask.shape[1] if attention_mask.ndim == 2 else 0
        if len(attention_mask) != batch or not (width >= seen + length or (own_mask and width == length)):
            raise ValueError(
                f"attention_mask: a converted model needs [{batch}, {seen + length} or more] with 0 at padding"
                f"{', the tokens in the cache first' if seen else ''}; got {list(attention_mask.shape)}"
            )
        first = seen if width >= seen + length else 0
        layout = padded_layout(attention_mask[:, first : first + length])
        if layout is not None:
            return layout
    if position_ids is not None and not seen and length > 1:
        return packed_layout(position_ids, batch)
    return None


def padded_layout(mask: torch.Tensor) -> Layout | None:
    """Layout of a batch whose `mask` [B, T] is 0 at padding, on either side; None where nothing is padded."""
    real = mask.bool()
    if bool(real.all()):
        return None
    starts = torch.zeros_like(real)
    starts[:, 0] = True
    return _layout(real, starts)


def packed_layout(position_ids: torch.Tensor, batch: int) -> Layout | None:
    """Layout of packed documents, a new one wherever `position_ids` [B or 1, T] does not go up by one; else None."""
    position_ids = position_ids.expand(batch, -1)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts[:, 1:].any()):
        return None
    return replace(_layout(torch.ones_like(starts), starts), packed=True)


def document_mask(position_ids: torch.Tensor, batch: int) -> torch.Tensor:
    """What tokens of packed documents may attend to: [B, 1, T, T] bool, their own document up to themselves."""
    position_ids = position_ids.expand(batch, -1)
    starts = torch.ones_like(position_ids)
    starts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).long()
    document = starts.cumsum(1)
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def _layout(real: torch.Tensor, starts: torch.Tensor) -> Layout:
    """Number sequences and places from where real tokens and sequence starts lie."""
    sequence = starts.flatten().cumsum(0) - 1  # [B*T]
    flat = real.flatten()
    count = int(sequence[-1]) + 1
    before = flat.long().cumsum(0) - flat.long()  # real tokens before this one, in the whole batch
    first = torch.zeros(count, dtype=torch.long, device=real.device)
    first[sequence[starts.flatten()]] = before[starts.flatten()]
    place = before - first[sequence]
    lengths = torch.zeros(count, dtype=torch.long, device=real.device)
    lengths.index_add_(0, sequence, flat.long())
    length = max(int(lengths.max()), 1)
    source = torch.zeros(count, length, dtype=torch.long, device=real.device)
    source[sequence[flat], place[flat]] = torch.arange(flat.numel(), device=real.device)[flat]
    valid = torch.arange(length, device=real.device) < lengths[:, None]
    target = torch.where(flat, sequence * length + place, 0).reshape(real.shape)
    return Layout(source=source, target=target, valid=valid, real=real, lengths=lengths)
