"""What a model is trained to predict: the next token of a causal model, or the hidden tokens of a masked one.

Everything in which the two conversions differ is here: how text becomes rows, what a model is called with, and which
tokens it is to find. The stages, the export and its verification ask the task and are the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearize.data import document_marks, pack, tokenize_documents
from linearize.errors import UsageError
from linearize.masking import IGNORE, Marks, document_windows, hide, marks_of
from linearize.modeling.family_table import TASKS, lookup
from linearize.modeling.layout import Layout, packed_layout
from linearize.repeats import with_repeats

MUCH = 0.25
"""Share of padding that is worth a word."""
NEW_TOKENS = 32
"""Tokens that the check of an export continues a text by."""


@dataclass(frozen=True, kw_only=True)
class Causal:
    """Next tokens; documents are joined and cut."""

    auto: str = TASKS["ForCausalLM"]
    """Transformers' Auto class that loads such a model."""

    def windows(self, texts: list[str], tokenizer: Any, context: int) -> np.ndarray:
        """Rows of tokens to train on: int32 [N, context].

        Raises:
            RefusedError, UsageError: too little text.
        """
        return pack(tokenize_documents(texts, tokenizer), context, **document_marks(tokenizer))

    def repeated(self, windows: np.ndarray, tokenizer: Any, share: float, *, seed: int) -> np.ndarray:
        """The windows [N, T], in a share of which passages come again: see `with_repeats`."""
        return with_repeats(
            windows, share, seed=seed, marks=tokenizer.all_special_ids, documents=self.documents(windows)
        )

    def documents(self, windows: np.ndarray) -> np.ndarray | None:
        """Which document of its row a token is of, where documents are kept apart: [N, T]; else None."""
        return None

    def notes(self, windows: np.ndarray) -> list[str]:
        """What is to be said of the rows, one line each."""
        return []

    def examples(self, rows: np.ndarray, *key: object) -> tuple[Tensor, Tensor]:
        """What a model reads and what it is to find there (else IGNORE): int64 [B, T] both, from `key` alone."""
        ids = torch.from_numpy(rows).long()
        return ids, shifted_labels(ids)

    def real(self, ids: Tensor) -> Tensor | None:
        """bool [B, T], False at padding; None: there is none."""
        return None

    def call(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of a model's forward for ids [B, T]."""
        return {"input_ids": ids, "use_cache": False}

    def layout(self, ids: Tensor) -> Layout | None:
        """Where the sequences of a decoder's rows lie, ids [B, T]; None: one a row."""
        return None

    def whole(self, windows: np.ndarray) -> np.ndarray:
        """The windows [N, T] that can be read without asking this task: one sequence a row."""
        return windows

    @property
    def sparse(self) -> bool:
        """Whether most tokens have no label, so that logits are best taken of the others alone."""
        return False

    @property
    def varied(self) -> bool:
        """Whether the shapes of a step depend on its tokens, so that no step can be recorded for others."""
        return self.sparse

    @property
    def mask(self) -> int | None:
        """The token that hides others, if the model finds hidden tokens."""
        return None

    def prompt(self, ids: Tensor) -> int:
        """How many tokens of the first row of ids [B, T] are continued, where a text is continued."""
        return max(1, ids.shape[1] // 4)

    @torch.no_grad()
    def answer(self, model: Any, ids: Tensor) -> list[int]:
        """What the model makes of the first row of ids [B, T]: a greedy continuation of its first quarter."""
        prompt = ids[:1, : self.prompt(ids)]
        return model.generate(prompt, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS)[0].tolist()


@dataclass(frozen=True, kw_only=True)
class Apart(Causal):
    """Next tokens; documents are joined and cut, and yet each is alone.

    Attention, state, window and positions start anew with every document of a window, in the student and in the
    teacher, and no token is predicted from the document before its own. A document that the cut has parted goes on in
    the next window as if it began there.
    """

    bos: int | None
    """The token before each document, or None where `eos` stands after each."""
    eos: int | None

    def starts(self, ids: Tensor) -> Tensor:
        """Where a document begins, other than at the start of a row: bool [B, T]."""
        begins = torch.zeros_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] == self.bos if self.bos is not None else ids[:, :-1] == self.eos
        return begins

    def positions(self, ids: Tensor) -> Tensor:
        """Tokens since the start of the document, or of the row: int64 [B, T]."""
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return place - torch.where(self.starts(ids), place, 0).cummax(1).values

    def documents(self, windows: np.ndarray) -> np.ndarray:
        """Which document of its row a token is of: int64 [N, T], from 0."""
        return self.starts(torch.from_numpy(windows)).cumsum(1).numpy()

    def examples(self, rows: np.ndarray, *key: object) -> tuple[Tensor, Tensor]:
        """The rows, and the next token of the same document as label."""
        ids, labels = super().examples(rows, *key)
        labels[:, :-1][self.starts(ids)[:, 1:]] = IGNORE
        return ids, labels

    def call(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of a model's forward for ids [B, T]; documents are told by positions that start anew."""
        return super().call(ids) | {"position_ids": self.positions(ids)}

    def layout(self, ids: Tensor) -> Layout | None:
        """Each document a sequence; None: one a row."""
        return packed_layout(self.positions(ids), len(ids))

    def whole(self, windows: np.ndarray) -> np.ndarray:
        """The windows that hold tokens of one document alone."""
        return windows[~self.starts(torch.from_numpy(windows)).any(1).numpy()]

    @property
    def varied(self) -> bool:
        """Every step has documents of other lengths."""
        return True


@dataclass(frozen=True, kw_only=True)
class Masked(Causal):
    """Hidden tokens; every row is a window of one document with its special tokens."""

    auto: str = TASKS["ForMaskedLM"]
    marks: Marks
    vocabulary: int

    def windows(self, texts: list[str], tokenizer: Any, context: int) -> np.ndarray:
        """Rows of tokens, padded at the end: int32 [N, context]."""
        return document_windows(tokenize_documents(texts, tokenizer), context, self.marks)

    def notes(self, windows: np.ndarray) -> list[str]:
        """How much of the rows is padding, where that is a good part."""
        share = float((windows == self.marks.pad).mean())
        if share < MUCH:
            return []
        longest = int((windows != self.marks.pad).sum(axis=1).max())
        return [
            f"{share:.0%} of the windows of {windows.shape[1]} tokens is padding: documents are not mixed (the longest "
            f"window holds {longest}); a smaller context wastes less"
        ]

    def examples(self, rows: np.ndarray, *key: object) -> tuple[Tensor, Tensor]:
        """The rows with 15 % of their tokens hidden, as BERT was trained, and those tokens as labels."""
        ids, labels = hide(rows, self.marks, *key, vocabulary=self.vocabulary)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def real(self, ids: Tensor) -> Tensor | None:
        """bool [B, T], False at padding."""
        return ids != self.marks.pad

    def call(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of a model's forward for ids [B, T]; padding is masked."""
        return {"input_ids": ids, "attention_mask": (ids != self.marks.pad).long()}

    @property
    def sparse(self) -> bool:
        """Most tokens are not hidden."""
        return True

    @property
    def mask(self) -> int | None:
        """The token that hides others."""
        return self.marks.mask

    @torch.no_grad()
    def answer(self, model: Any, ids: Tensor) -> list[int]:
        """The first row of ids [B, T] with every mask replaced by the most probable token."""
        best = model(**self.call(ids[:1])).logits[0].argmax(-1)
        return torch.where(ids[0] == self.marks.mask, best, ids[0]).tolist()


Task = Causal
"""Any kind: the others are `Causal` with parts replaced."""

CAUSAL = Causal()


def task_of(config: Any, tokenizer: Any, *, apart: bool = False) -> Task:
    """The task of a model's family; `apart`: windows keep documents apart.

    Raises:
        UsageError: a masked language model whose tokenizer has no mask or padding token; a family or a tokenizer that
            cannot keep documents apart.
    """
    family = lookup(config)
    if apart and (family.bidirectional or not family.packs):
        why = "its rows are one document each anyway" if family.bidirectional else "it is not told of them by positions"
        raise UsageError(f"documents=apart: {config.model_type} does not pack documents apart: {why}", "Leave it out")
    if not family.bidirectional and apart:
        marks = document_marks(tokenizer)
        if marks["bos_id"] is None and marks["eos_id"] is None:
            raise UsageError("documents=apart: the tokenizer has neither BOS nor EOS to tell them by", "Leave it out")
        return Apart(bos=marks["bos_id"], eos=marks["eos_id"])
    if not family.bidirectional:
        return CAUSAL
    return Masked(marks=marks_of(tokenizer, config), vocabulary=config.vocab_size)


def shifted_labels(ids: Tensor) -> Tensor:
    """The next token of every position, IGNORE at the last: [B, T] -> [B, T]."""
    return torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), IGNORE)), dim=1)
