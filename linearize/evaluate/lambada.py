"""LAMBADA: is the last word of a passage predicted, where the passage as a whole is needed for it?

Protocol, that of lm-evaluation-harness's `lambada_openai` (0.4.13): context, one space and target word are tokenised
together, with the special tokens that the tokenizer adds of its own accord; the target is what comes after as many
tokens as the context alone has. What does not fit the model's context is cut from the left. A row counts as right when
every token of the target is the most probable one given all true tokens before it; perplexity is per target word,
exp(-mean over rows of the sum of log-probabilities of its tokens). Passages are short (about 100 tokens): most lie
within a block window of 64, so a model that is cut to it loses little here.

Data: Paperno et al. 2016 (arXiv:1606.06031), one {"context": ..., "continuation": ...} a line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.errors import UsageError, VerificationError
from linearize.evaluate.perplexity import (
    CHUNK,
    TOKENS_PER_BATCH,
    eval_mode,
    open_subject,
    safe_exp,
)
from linearize.modeling.family_table import body_and_head
from linearize.progress import tell

PROTOCOL = "lm-eval/lambada_openai"


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One row in tokens; the last `target` of them are to be predicted."""

    tokens: list[int]
    target: int


def lambada(
    model: Any,
    *,
    data: str | Path,
    limit: int | None = None,
    bos: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Accuracy and perplexity of the last word.

    Args:
        model: a folder, a Hub id, `demo`, or a pair (model, tokenizer) that is used as it is, on its device.
        data: a .jsonl file of {"context", "continuation"}.
        limit: read only the first rows; None: all.
        bos: put BOS before every passage, or never; None: as the tokenizer does unasked, which is what lm-eval does.
        dtype: of the weights; auto: as stored on a GPU, float32 on a CPU.
        batch_size: rows at once; None: by the device.

    Returns:
        accuracy (share of rows, 0 to 1), perplexity (per target word), rows, target_tokens, truncated (rows that were
        cut from the left), bos (whether rows begin with BOS), protocol, model.

    Raises:
        UsageError: bad input, with file and line. VerificationError: a loss that is not finite.
    """
    rows = read_rows(data, limit=limit)
    subject = open_subject(model, device=device, dtype=dtype)
    loaded = subject.load()
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    whole = [passage(context, word, subject.tokenizer, bos=bos) for context, word in rows]
    passages = [shorten(one, longest) for one in whole]
    nll, right = score_passages(loaded, passages, batch_size=batch_size, name=subject.name)
    marked = subject.tokenizer.bos_token_id is not None and whole[0].tokens[0] == subject.tokenizer.bos_token_id
    return {
        "model": subject.name,
        "protocol": PROTOCOL,
        "rows": len(rows),
        "target_tokens": sum(one.target for one in passages),
        "truncated": sum(len(a.tokens) != len(b.tokens) for a, b in zip(whole, passages, strict=True)),
        "bos": bool(marked),
        "accuracy": sum(right) / len(right),
        "perplexity": safe_exp(sum(nll) / len(nll)),
    }


def read_rows(data: str | Path, *, limit: int | None = None) -> list[tuple[str, str]]:
    """(context, target word) of the first `limit` lines.

    Raises:
        UsageError: no such file, a line that is not such a record, or no line at all.
    """
    path = Path(data).expanduser()
    if limit is not None and limit < 1:
        raise UsageError(f"LAMBADA: limit {limit} is not positive")
    rows: list[tuple[str, str]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_record(line, f"{path}, line {number}"))
    except OSError as error:
        raise UsageError(f"LAMBADA: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"LAMBADA: {path} is not UTF-8 text") from None
    if not rows:
        raise UsageError(f"LAMBADA: {path} holds no rows")
    return rows


def _record(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    context, word = (record.get("context"), record.get("continuation")) if isinstance(record, dict) else (None, None)
    if not (isinstance(context, str) and context.strip() and isinstance(word, str) and word.strip()):
        raise UsageError(f"{where}: is no LAMBADA row", 'A row is {"context": "...", "continuation": "..."}')
    return context, word


def passage(context: str, word: str, tokenizer: Any, *, bos: bool | None = None) -> Passage:
    """Context and word in tokens, encoded together; spaces around the seam belong to the word.

    Raises:
        UsageError: the word adds no token to its context, or `bos` is wanted of a tokenizer that has none.
    """
    stem = context.rstrip()
    gap = context[len(stem) :] or " "
    text = stem + gap + word.lstrip()
    kwargs: dict[str, Any] = {"verbose": False} | ({} if bos is None else {"add_special_tokens": False})
    before, whole = (list(tokenizer.encode(part, **kwargs)) for part in (stem, text))
    if bos:
        if tokenizer.bos_token_id is None:
            raise UsageError("LAMBADA: bos is wanted, and the tokenizer has no BOS token")
        before, whole = ([tokenizer.bos_token_id, *ids] for ids in (before, whole))
    if not before or len(whole) <= len(before):
        raise UsageError(f"LAMBADA: the word {word[:40]!r} adds no token to its context with this tokenizer")
    return Passage(tokens=whole, target=len(whole) - len(before))


def shorten(one: Passage, longest: int | None) -> Passage:
    """At most `longest` inputs, which is one token more: the last one is never read. Cut from the left.

    Raises:
        UsageError: the target alone does not fit.
    """
    if longest is None or len(one.tokens) <= longest + 1:
        return one
    if one.target > longest:
        raise UsageError(f"LAMBADA: a target of {one.target} tokens does not fit a context of {longest}")
    return Passage(tokens=one.tokens[-(longest + 1) :], target=one.target)


@torch.no_grad()
def score_passages(
    model: Any, passages: Sequence[Passage], *, batch_size: int | None = None, name: str = "the model"
) -> tuple[list[float], list[bool]]:
    """Of each passage: nats of its target (summed over tokens), and whether greedy decoding gives the target."""
    tell(f"reading {len(passages):,} LAMBADA passages", name)
    nll, right = [0.0] * len(passages), [False] * len(passages)
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i].tokens))
    room = TOKENS_PER_BATCH.get(model.device.type, 4096)
    size = batch_size or max(1, room // len(passages[order[0]].tokens))
    with eval_mode(model):
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            batch = [passages[i] for i in numbers]
            width = len(batch[0].tokens)
            # Padding lies to the right, where nothing that is scored can see it.
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            scored = torch.zeros(len(batch), width - 1, dtype=torch.bool)
            for r, one in enumerate(batch):
                ids[r, : len(one.tokens)] = torch.tensor(one.tokens)
                scored[r, len(one.tokens) - 1 - one.target : len(one.tokens) - 1] = True
            losses, hits = _targets(model, ids.to(model.device), scored.to(model.device))
            if not torch.isfinite(losses).all():
                raise VerificationError(f"{name}: the loss is not finite on LAMBADA", "The weights are damaged")
            at = 0
            for i, one in zip(numbers, batch, strict=True):
                part = slice(at, at + one.target)
                nll[i], right[i] = float(losses[part].sum()), bool(hits[part].all())
                at += one.target
    return nll, right


def _targets(model: Any, ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Nats (float64) and hit (bool) of the scored tokens, row by row; ids int64 [B, T], scored bool [B, T - 1]."""
    inputs, targets = ids[:, :-1], ids[:, 1:][scored]
    if (known := body_and_head(model)) is not None:
        inner, head = known
        states = inner(input_ids=inputs, use_cache=False).last_hidden_state[scored]  # [S, hidden]
    else:
        states, head = model(input_ids=inputs, use_cache=False).logits[scored], torch.nn.Identity()
    step = max(1, CHUNK // int(model.config.get_text_config().vocab_size))
    losses, hits = [], []
    for some, wanted in zip(states.split(step), targets.split(step), strict=True):
        logits = head(some).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(losses).double().cpu(), torch.cat(hits).cpu()
