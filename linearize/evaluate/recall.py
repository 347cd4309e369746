"""What a converted model remembers from beyond its window, beside its teacher and its teacher cut to that window.

The tasks are those of `recall_tasks`. A score is the share of values that are right, teacher-forced: the right one is
the most probable of its candidates given all true tokens before it (a tie is shared). Where all queries of a page have
the same candidates (pairs), each candidate's log-probability is first lessened by its mean over the page's queries, so
that a frequent word is not the answer to everything (after Holtzman et al. 2021, arXiv:2104.08315).

    share = (student - floor) / (teacher - floor) * 100

with floor the teacher, untrained, cut to the student's window and sinks in every layer: what a window alone can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from linearize.data import load_source
from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.evaluate.perplexity import (
    CHUNK,
    TOKENS_PER_BATCH,
    eval_mode,
    tokenizer_digest,
)
from linearize.evaluate.recall_tasks import SMALLEST_DISTANCE, RecallTask, longest_page, make_tasks
from linearize.evaluate.recovery import REFERENCE_WINDOW, require_same_tokenizer
from linearize.evaluate.subjects import default_context, open_subject, require_positions, require_softmax, warn_beyond
from linearize.evaluate.truncation import truncated
from linearize.modeling.family_table import body_and_head
from linearize.progress import tell

WINDOWS_AWAY = (2.5, 5, 10)
"""The distances that are asked unasked, in windows: 160, 320 and 640 tokens for one of 64."""

CLEAR = 0.1
"""How much more than the floor a teacher has to score before a share of the difference means anything."""

CERTAIN = 3.0
"""And by how many of its standard errors."""


def recall(
    out: Any,
    *,
    against: Any,
    data: str,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    queries: int = 64,
    distances: Sequence[int] | None = None,
    seed: int = 0,
    source: str | None = None,
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Recall at distances that the student's window does not reach, as a share of the teacher's own.

    Args:
        out, against: the converted model and its teacher; a folder, a Hub id, `demo`, or a (model, tokenizer) pair. A
            model that is not converted is judged like one whose window is REFERENCE_WINDOW.
        data, source: see `linearize.data.load_source`; of `demo` and of a Hub data set, the held-out part. Pages and
            words are taken from it.
        context: the most tokens of a page; None: the model's own context, at most 1024.
        dtype: of the weights; auto: as stored on a GPU, float32 on a CPU.
        queries: of pairs and of passkeys at each distance, 8 on a page; as many quotations as pages.
        distances: in tokens from a value to its query; None: WINDOWS_AWAY, as far as the context allows.
        teacher_bits: 8 or 4: hold the teacher in so many bits; see `linearize.teacher_bits`.

    Returns:
        What `compare` does, and model, against, context, distances, queries, seed, reference {window, sinks, own},
        data, tokenizer_sha256, dtype, device, teacher_bits, and beyond_trained (whether pages are longer than what a
        model was trained on).

    Raises:
        UsageError: bad input, a distance within the window's reach, or two tokenizers. RefusedError: too little text,
            or a context too short for any distance. VerificationError: a score that is not finite.
    """
    student = open_subject(out, device=device, dtype=dtype)
    teacher = open_subject(against, device=device, dtype=dtype, bits=teacher_bits)
    require_softmax(teacher)
    texts, read = load_source(data, split="heldout", source=source)
    require_same_tokenizer(student, teacher)
    window, sinks, own = reference_window(student.config)
    context = context or default_context(student.config)
    far = choose_distances(student.tokenizer, window=window, context=context, distances=distances)
    tasks = make_tasks(student.tokenizer, texts, distances=far, queries=queries, seed=seed, context=context)
    longest = max(task.tokens.shape[1] for task in tasks) - 1  # the last token is predicted, and never read
    pages = f"pages of {longest + 1:,} tokens"
    require_positions([student, teacher], longest, what=pages)
    notes = warn_beyond([student, teacher], longest, what=pages)
    model = student.load()
    report = {
        "model": student.name,
        "against": teacher.name,
        "context": context,
        "distances": far,
        "queries": queries,
        "seed": seed,
        "reference": {"window": window, "sinks": sinks, "own": own},
        "data": read.describe(),
        "tokenizer_sha256": tokenizer_digest(student.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "teacher_bits": teacher_bits,
        "beyond_trained": bool(notes),
    }
    mine = recall_scores(model, tasks, name=student.name)
    del model  # the teacher may need its room
    model = teacher.load()
    whole = recall_scores(model, tasks, name=teacher.name)
    with truncated(model, window, sinks):
        cut = recall_scores(model, tasks, name=f"{teacher.name} (cut to its window)")
    found = compare(tasks, student=mine, teacher=whole, floor=cut)
    if not own:
        found["notes"].append(
            f"without a window of its own: the floor is the teacher cut to a reference window of {window}"
        )
    return {**report, **found, "notes": [*notes, *teacher.notes, *found["notes"]]}


@torch.no_grad()
def recall_scores(model: Any, tasks: Sequence[RecallTask], *, name: str = "the model") -> list[np.ndarray]:
    """How right a model is on every query, for each task: float64 [R, Q], 1 for right, 1/n for a tie of n, 0 for wrong.

    The model is put in eval mode for the time; no cache is held, and logits only of scored tokens.

    Raises:
        VerificationError: a logit that is not finite.
    """
    pages = sum(len(task.tokens) for task in tasks)
    tell(f"asking {pages:,} pages of up to {max(task.tokens.shape[1] for task in tasks):,} tokens", name)
    with eval_mode(model):
        return [_score(model, task, name) for task in tasks]


def compare(
    tasks: Sequence[RecallTask],
    *,
    student: Sequence[np.ndarray],
    teacher: Sequence[np.ndarray],
    floor: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Scores of `recall_scores` side by side.

    Returns:
        share, share_se: percent, of all cells together (sum of differences over sum of differences) in which the
            teacher is CLEAR of the floor; None where it is in none.
        tasks: {name: {share, share_se}}, likewise by task.
        cells: [{task, distance, pages, queries, chance, teacher, floor, student and each with _se, share, share_se}].
        notes: where the teacher itself cannot do a task.

        A standard error takes pages, not queries, as independent, and is never below that of independent queries.
    """
    cells, clear = [], []
    for task, s, t, f in zip(tasks, student, teacher, floor, strict=True):
        gap = (t - f).mean(axis=1)
        good = bool(gap.mean() >= CLEAR and gap.mean() >= CERTAIN * _error(gap))
        pair = ((s - f).mean(axis=1), gap)
        clear.append((task, pair) if good else None)
        cell = {
            "task": task.form.name,
            "distance": task.distance,
            "pages": len(s),
            "queries": s.size,
            "chance": task.chance,
        }
        for name, scores in (("teacher", t), ("floor", f), ("student", s)):
            cell |= {name: float(scores.mean()), f"{name}_se": _score_error(scores)}
        cells.append(cell | _share([pair] if good else []))
    names = list(dict.fromkeys(task.form.name for task in tasks))
    known = [one for one in clear if one is not None]
    by_task = {name: _share([pair for task, pair in known if task.form.name == name]) for name in names}
    notes = []
    for name in names:
        failed = [str(c["distance"]) for c in cells if c["task"] == name and c["share"] is None]
        if failed:
            notes.append(
                f"{name} at {', '.join(failed)} tokens: no share, because the teacher itself is not clearly better "
                "there than when cut to the window"
            )
    return {**_share([pair for _, pair in known]), "tasks": by_task, "cells": cells, "notes": notes}


def reference_window(config: Any) -> tuple[int, int, bool]:
    """(window, sinks, whether they are the model's own) to which a model's teacher is cut to make the floor."""
    spec = config.mixer_spec() if hasattr(config, "mixer_spec") and config.linear_layers else None
    return (spec.window, spec.sinks, True) if spec is not None and spec.window else (REFERENCE_WINDOW, 0, False)


def choose_distances(tokenizer: Any, *, window: int, context: int, distances: Sequence[int] | None = None) -> list[int]:
    """`distances` if they lie beyond the window (own block of W and the one before), or the usual ones that fit.

    Raises:
        UsageError: a distance that the window reaches. RefusedError: a context too short for any of the usual ones.
    """
    if distances is not None:
        near = [d for d in distances if d <= 2 * window]
        if near or not distances:
            raise UsageError(
                f"distance {', '.join(map(str, near)) or '(none)'}: not beyond the window (two blocks of {window})",
                f"Give distances above {2 * window}",
            )
        return sorted(set(distances))
    usual = [max(int(away * window), SMALLEST_DISTANCE) for away in WINDOWS_AWAY]
    fit = [d for d in dict.fromkeys(usual) if longest_page(tokenizer, d) <= context]
    if not fit:
        need = longest_page(tokenizer, usual[0])
        raise RefusedError(
            f"context {context} is too short to ask for what lies beyond a window of {window}",
            f"It takes at least {need} tokens",
        )
    return fit


def _score(model: Any, task: RecallTask, name: str) -> np.ndarray:
    size = max(1, TOKENS_PER_BATCH.get(model.device.type, 4096) // task.tokens.shape[1])
    parts = []
    for start in range(0, len(task.tokens), size):
        rows = slice(start, start + size)
        ids, places = (torch.from_numpy(a[rows]).to(model.device) for a in (task.tokens, task.places))
        wanted = None if task.candidates is None else torch.from_numpy(task.candidates[rows]).to(model.device)
        right = _right(model, ids, places, wanted, centred=task.form.records > 1)
        if not torch.isfinite(right).all():
            raise VerificationError(f"{name}: a logit is not finite here", "The weights are damaged or overflow")
        parts.append(right.double().cpu().numpy())
    return np.concatenate(parts)


def _right(
    model: Any, ids: torch.Tensor, places: torch.Tensor, wanted: torch.Tensor | None, *, centred: bool
) -> torch.Tensor:
    """fp32 [B, Q]: 1, 1/n, 0, or nan for a logit that is not finite. ids [B, L], places [B, Q], wanted [B, Q, K]."""
    targets = ids.gather(1, places)[..., None]  # [B, Q, 1]
    if (known := body_and_head(model)) is not None:
        inner, head = known
        states = inner(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [B, L - 1, hidden]
    else:
        states, head = model(input_ids=ids[:, :-1], use_cache=False).logits, torch.nn.Identity()
    states = states.gather(1, (places - 1)[..., None].expand(-1, -1, states.shape[-1]))  # [B, Q, hidden]
    step = max(1, CHUNK // (int(model.config.get_text_config().vocab_size) * places.shape[1]))
    found = []
    for rows in torch.arange(len(ids), device=ids.device).split(step):
        logits = head(states[rows]).float()
        bad = ~torch.isfinite(logits).all(dim=-1)
        if wanted is not None:
            logits = logits.gather(2, wanted[rows])  # [b, Q, K]
            # The softmax's denominator is one number a query, so that logits do for log-probabilities.
            logits = logits - logits.mean(dim=1, keepdim=True) if centred else logits
            own = logits[wanted[rows] == targets[rows]].view(*logits.shape[:2], 1)
        else:
            own = logits.gather(2, targets[rows])
        right = (own == logits.amax(dim=-1, keepdim=True)).float() / (logits == own).sum(dim=-1, keepdim=True)
        found.append(right[..., 0].masked_fill(bad, float("nan")))
    return torch.cat(found)


def _share(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
    """Percent and standard error of sum(mean(won)) / sum(mean(gap)) over pairs (won, gap) of float64 [R]."""
    if not pairs:
        return {"share": None, "share_se": None}
    total = sum(gap.mean() for _, gap in pairs)
    ratio = sum(won.mean() for won, _ in pairs) / total
    spread = sum(_error(won - ratio * gap) ** 2 for won, gap in pairs)  # of a ratio of two means, to first order
    return {"share": float(100 * ratio), "share_se": float(100 * np.sqrt(spread) / total)}


def _error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values [R >= 2]."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _score_error(scores: np.ndarray) -> float:
    """Standard error of the mean of [R, Q] by pages; at least the binomial one, with one success and failure added."""
    rate, count = (scores.sum() + 1) / (scores.size + 2), scores.size + 2
    return max(_error(scores.mean(axis=1)), float(np.sqrt(rate * (1 - rate) / count)))
