"""How well a masked language model finds hidden tokens, teacher beside student, under a named and seeded protocol.

`masked@N`: every document is cut into windows of its own of at most N tokens, special tokens around each. 15 % of a
window's tokens become the mask, all at once: accuracy, and nats per hidden token. On the same windows pseudo-perplexity
(Salazar et al. 2020, arXiv 1910.14659): exp of the mean nats of a token that is hidden alone, over a sample of tokens.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from linearize.data import load_source, tokenize_documents
from linearize.errors import UsageError, VerificationError
from linearize.evaluate.perplexity import (
    CHUNK,
    TOKENS_PER_BATCH,
    eval_mode,
    safe_exp,
    tokenizer_digest,
)
from linearize.evaluate.recovery import require_same_tokenizer
from linearize.evaluate.subjects import Subject, open_subject
from linearize.masking import IGNORE, RATE, Marks, document_windows, hide, marks_of, one_at_a_time
from linearize.modeling.encoder_spec import usable_positions
from linearize.modeling.family_table import body, logits
from linearize.progress import tell
from linearize.teacher_bits import require_comparison_bits

NAME = "masked"
DEFAULT_CONTEXT = 512
WINDOWS = 256
"""Windows that are read unasked."""
ALONE = 512
"""Tokens that are hidden alone, each in a run of its window, for the pseudo-perplexity."""


def evaluate_masked(
    model: Any,
    *,
    data: str,
    protocol: str | None = None,
    context: int | None = None,
    against: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    source: str | None = None,
    max_windows: int | None = None,
    alone: int = ALONE,
    seed: int = 0,
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Accuracy and pseudo-perplexity of a masked language model, and of `against` beside it on the same masks.

    Args:
        model, against: a folder, a Hub id, or a (model, tokenizer) pair that is used as it is, on its device.
        data, source: see `linearize.data.load_source`; of `demo` and of a Hub data set, the held-out part.
        protocol: `masked@N`; context: N, where the protocol does not say it; None: the model's own, at most 512.
        dtype: of the weights; auto: as stored on a GPU, float32 on a CPU.
        batch_size: rows at once; None: by the device.
        max_windows: None: WINDOWS, spread over all of the text.
        alone: tokens of the pseudo-perplexity. seed: of the masks and of that sample.
        teacher_bits: 8 or 4: hold `against` in so many bits; see `linearize.teacher_bits`.

    Returns:
        model, model_type, protocol, context, windows, masking {rate, hidden, replaced_by, alone, seed}, accuracy
        (share of hidden tokens whose most probable token is right), masked_nll, masked_perplexity, pseudo_nll,
        pseudo_perplexity, dtype, device, data, tokenizer_sha256, notes; `against`, the same of the other model, or
        None; `ratio` of the perplexities, model over against; and `teacher_bits`.

    Raises:
        UsageError: bad input, a model that is not a masked one, or two tokenizers. RefusedError: too little text.
        VerificationError: a loss that is not finite.
    """
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"max_windows {max_windows} is not positive")
    require_comparison_bits(teacher_bits, against)
    texts, read = load_source(data, split="heldout", source=source)
    subjects = [open_subject(model, device=device, dtype=dtype, masked=True)]
    length = choose_context(protocol, context, subjects[0].config)
    if against is not None:
        subjects.append(open_subject(against, device=device, dtype=dtype, masked=True, bits=teacher_bits))
        require_same_tokenizer(*subjects)
        choose_context(None, length, subjects[1].config)  # it may have fewer positions
    docs = tokenize_documents(texts, subjects[0].tokenizer)
    marks = marks_of(subjects[0].tokenizer, subjects[0].config)
    windows = spread(document_windows(docs, length, marks), max_windows or WINDOWS)
    together, single = hide(windows, marks, seed, "judge"), one_at_a_time(windows, marks, seed, "alone", most=alone)
    results: list[dict[str, Any]] = []
    for subject in subjects:
        loaded = subject.load()
        found = {
            "model": subject.name,
            "model_type": loaded.config.model_type,
            "protocol": f"{NAME}@{length}",
            "context": length,
            "windows": len(windows),
            "masking": {
                "rate": RATE,
                "hidden": int((together[1] != IGNORE).sum()),
                "replaced_by": subject.tokenizer.mask_token,
                "alone": len(single[0]),
                "seed": seed,
            },
            **_scores(loaded, marks, together, batch_size=batch_size, subject=subject, prefix="masked"),
            **_scores(loaded, marks, single, batch_size=batch_size, subject=subject, prefix="pseudo"),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "data": read.describe(),
            "tokenizer_sha256": tokenizer_digest(subject.tokenizer),
            "notes": subject.notes,
        }
        results.append(found)
        del loaded  # two large models need not fit at once
    result, other = results[0], results[1] if len(results) > 1 else None
    keys = ("masked_perplexity", "pseudo_perplexity")
    ratio = other and {key: result[key] / other[key] for key in keys}
    return {**result, "against": other, "ratio": ratio, "teacher_bits": teacher_bits}


def choose_context(protocol: str | None, context: int | None, config: Any) -> int:
    """N of `masked@N`: what is asked for, else the model's own, at most DEFAULT_CONTEXT.

    Raises:
        UsageError: another protocol, two different contexts, or one that the model has no positions for.
    """
    match = re.fullmatch(rf"{NAME}(@(\d{{1,9}}))?", protocol or NAME)
    if match is None:
        raise UsageError(
            f"protocol {protocol!r} is for models that predict the next token", f"Use {NAME}@N for masked ones"
        )
    given = int(match[2]) if match[2] else None
    if given is not None and context is not None and given != context:
        raise UsageError(f"protocol {protocol!r} says {given} tokens and context says {context}", "Give one of them")
    limit = usable_positions(config)
    length = given or context or min(limit, DEFAULT_CONTEXT)
    if length > limit:
        raise UsageError(f"context {length} is beyond the {limit} positions of the model", f"Use {NAME}@{limit}")
    return length


def spread(windows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows (all, if there are fewer), evenly spread over all of them."""
    count = min(count, len(windows))
    return windows[np.arange(count) * len(windows) // count]


@torch.no_grad()
def _scores(
    model: Any,
    marks: Marks,
    rows: tuple[np.ndarray, np.ndarray],
    *,
    batch_size: int | None,
    subject: Subject,
    prefix: str,
) -> dict[str, float]:
    """Over the labelled places of (ids, labels) [N, T]: {prefix}_nll, _perplexity, and accuracy."""
    ids, labels = rows
    lengths = (ids != marks.pad).sum(axis=1)
    tell(f"reading {len(ids):,} windows of at most {lengths.max():,} tokens ({prefix})", subject.name)
    size = batch_size or max(1, TOKENS_PER_BATCH.get(model.device.type, 4096) // int(lengths.max()))
    order = np.argsort(-lengths, kind="stable")
    nll, right, count = 0.0, 0, 0
    step = max(1, CHUNK // int(model.config.vocab_size))
    with eval_mode(model):
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            width = int(lengths[part].max())
            batch, target = (torch.from_numpy(x[part, :width]).to(model.device) for x in (ids, labels))
            hidden = body(model)(input_ids=batch, attention_mask=(batch != marks.pad).long()).last_hidden_state
            picked = target != IGNORE
            for states, wanted in zip(hidden[picked].split(step), target[picked].split(step), strict=True):
                found = logits(model, states).float()
                nll += float(F.cross_entropy(found, wanted, reduction="sum").double())
                right += int((found.argmax(-1) == wanted).sum())
                count += len(wanted)
    if not np.isfinite(nll):
        raise VerificationError(
            f"{subject.name}: the loss is not finite on this text", "The weights are damaged or overflow"
        )
    figures = {f"{prefix}_nll": nll / count, f"{prefix}_perplexity": safe_exp(nll / count)}
    return {"accuracy": right / count, **figures} if prefix == "masked" else figures
