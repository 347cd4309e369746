"""Perplexity of a causal LM under a named protocol."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from linearize.data import load_source
from linearize.errors import VerificationError
from linearize.evaluate.protocols import Row, Task, make_task, parse_protocol
from linearize.evaluate.subjects import (
    Subject,
    beyond_trained,
    default_context,
    open_subject,
    require_positions,
    warn_beyond,
)
from linearize.modeling.family_table import body_and_head
from linearize.progress import tell
from linearize.teacher_bits import require_comparison_bits

FIRST_EDGE = 64
CHUNK = 1 << 24
"""fp32 logits that exist at once (64 MB)."""
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Sums of negative log-likelihood in nats, by position (how many tokens a prediction could see)."""

    nll: np.ndarray  # float64 [N]
    counts: np.ndarray  # int64 [N]

    @property
    def mean(self) -> float:
        """Nats per scored token."""
        return float(self.nll.sum() / self.counts.sum())

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return safe_exp(self.mean)


def evaluate(
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
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Perplexity of `model`, and of `against` beside it in the same run.

    Args:
        model: a folder, a Hub id, `demo`, or a pair (model, tokenizer) that is used as it is, on its device.
        data: see `linearize.data.load_source`; of `demo` and of a Hub data set, the held-out part.
        protocol: `concat@N` (None means this one), `documents@N` or `lm-eval/wikitext@N`; see `protocols`.
        context: N, where the protocol does not say it; None: the model's own, at most 1024.
        against: a second model, judged under the same protocol with its own tokenizer.
        dtype: of the weights; auto: as stored on a GPU, float32 on a CPU.
        batch_size: rows at once; None: by the device.
        source: keep the records of this source. max_windows: score only the first rows.
        teacher_bits: 8 or 4: hold `against` in so many bits; see `linearize.teacher_bits`.

    Returns:
        The figures of `figures`, with `against` (the same figures of the other model, or None), `ratio` (perplexities
        of `model` over those of `against`) and `teacher_bits`.

    Raises:
        UsageError: bad input. RefusedError: less text than one window. VerificationError: a loss that is not finite.
    """
    require_comparison_bits(teacher_bits, against)
    texts, read = load_source(data, split="heldout", source=source)
    subjects = [open_subject(model, device=device, dtype=dtype)]
    if against is not None:
        subjects.append(open_subject(against, device=device, dtype=dtype, bits=teacher_bits))
    # The second model is judged with the context of the first.
    chosen = parse_protocol(protocol, context=context, default_context=default_context(subjects[0].config))
    require_positions(subjects, chosen.context, what=chosen.windows)
    tasks = [make_task(chosen, texts, subject.tokenizer, max_windows=max_windows) for subject in subjects]
    for subject, task in zip(subjects, tasks, strict=True):
        warn_beyond([subject], task.reads, what=task.protocol.windows)
    results: list[dict[str, Any]] = []
    for subject, task in zip(subjects, tasks, strict=True):
        loaded = subject.load()
        scores = score(loaded, task.rows, batch_size=batch_size, name=subject.name)
        results.append(figures(subject, loaded, task, scores, data=read.describe()))
        del loaded  # two large models need not fit at once
    result, other = results[0], results[1] if len(results) > 1 else None
    keys = ("token_perplexity", "word_perplexity", "byte_perplexity")
    ratio = None if other is None else {k: result[k] / other[k] for k in keys if result[k] and other[k]}
    return {**result, "against": other, "ratio": ratio, "teacher_bits": teacher_bits}


def figures(subject: Subject, model: Any, task: Task, scores: Scores, *, data: dict[str, Any]) -> dict[str, Any]:
    """All that a number needs to be compared: what was measured, on what, how, and the perplexities.

    `token_perplexity`, `word_perplexity` and `byte_perplexity` are exp(nll / count), `bits_per_byte` is nll / bytes /
    ln 2; `nll` is in nats per token. Word and byte figures are None where the text under the tokens is unknown. `notes`
    says what the figures themselves do not; `beyond_trained` is whether windows are longer than what the model was
    trained on.
    """
    total = float(scores.nll.sum())
    far = beyond_trained(subject, task.reads, what=task.protocol.windows)
    return {
        "model": subject.name,
        "model_type": getattr(model.config, "model_type", None),
        "protocol": str(task.protocol),
        "context": task.protocol.context,
        "windows": len(task.rows),
        "tokens": task.tokens,
        "words": task.words,
        "bytes": task.bytes,
        "bos": task.bos,
        "eos": task.eos,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "data": data,
        "tokenizer_sha256": tokenizer_digest(subject.tokenizer),
        "nll": scores.mean,
        "token_perplexity": scores.perplexity,
        "word_perplexity": safe_exp(total / task.words) if task.words else None,
        "byte_perplexity": safe_exp(total / task.bytes) if task.bytes else None,
        "bits_per_byte": total / task.bytes / math.log(2) if task.bytes else None,
        "by_position": by_position(scores),
        "beyond_trained": far is not None,
        "notes": [*([] if far is None else [far]), *subject.notes],
    }


def by_position(scores: Scores) -> list[dict[str, Any]]:
    """Perplexity of tokens that saw [from, to) tokens before them: up to 64, and then by doublings."""
    rows, low, high = [], 0, FIRST_EDGE
    while low < len(scores.counts):
        count = int(scores.counts[low:high].sum())
        if count:
            nll = float(scores.nll[low:high].sum()) / count
            rows.append({"from": low, "to": high, "tokens": count, "nll": nll, "perplexity": safe_exp(nll)})
        low, high = high, high * 2
    return rows


@torch.no_grad()
def score(model: Any, rows: list[Row], *, batch_size: int | None = None, name: str = "the model") -> Scores:
    """Negative log-likelihood of the scored tokens of `rows`, with fp32 log-softmax.

    The model is put in eval mode for the time; neither a cache nor all logits of a batch in fp32 are ever held.

    Raises:
        VerificationError: a loss that is not finite.
    """
    longest = max(len(row.tokens) for row in rows)
    tell(f"reading {len(rows):,} window{'s' if len(rows) > 1 else ''} of {longest:,} tokens", name)
    nll, counts = np.zeros(longest), np.zeros(longest, dtype=np.int64)
    size = batch_size or max(1, TOKENS_PER_BATCH.get(model.device.type, 4096) // longest)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    with eval_mode(model):
        for start in range(0, len(order), size):
            batch = [rows[i] for i in order[start : start + size]]
            width = len(batch[0].tokens)
            # Padding lies to the right, where nothing that is scored can see it.
            ids = np.zeros((len(batch), width), dtype=np.int64)
            scored = np.zeros((len(batch), width - 1), dtype=bool)
            for r, row in enumerate(batch):
                ids[r, : len(row.tokens)] = row.tokens
                scored[r, len(row.tokens) - row.scored - 1 : len(row.tokens) - 1] = True
            losses = _losses(model, torch.from_numpy(ids).to(model.device), torch.from_numpy(scored).to(model.device))
            if not np.isfinite(losses).all():
                raise VerificationError(
                    f"{name}: the loss is not finite on this text", "The weights are damaged or overflow"
                )
            positions = np.nonzero(scored)[1] + 1
            np.add.at(nll, positions, losses)
            np.add.at(counts, positions, 1)
    return Scores(nll=nll, counts=counts)


def _losses(model: Any, ids: torch.Tensor, scored: torch.Tensor) -> np.ndarray:
    """float64 [scored tokens], row by row; ids int64 [B, T], scored bool [B, T - 1]."""
    inputs, targets = ids[:, :-1], ids[:, 1:][scored]
    if (known := body_and_head(model)) is not None:
        inner, head = known
        states = inner(input_ids=inputs, use_cache=False).last_hidden_state[scored]  # [S, hidden]
    else:
        states, head = model(input_ids=inputs, use_cache=False).logits[scored], torch.nn.Identity()
    step = max(1, CHUNK // int(model.config.get_text_config().vocab_size))
    parts = [
        F.cross_entropy(head(s).float(), t, reduction="none") for s, t in zip(states.split(step), targets.split(step))
    ]
    return torch.cat(parts).double().cpu().numpy()


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """`model` in eval mode, put back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does: its whole pipeline where it can be written down, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are settings of the last caller, not of the tokenizer.
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        content = tokenizer.get_vocab()
    text = json.dumps([content, tokenizer.bos_token_id, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def safe_exp(value: float) -> float:
    """exp, held below the largest float: a perplexity of 1e300 says as much as infinity and is valid JSON."""
    return math.exp(min(value, 690.0))
