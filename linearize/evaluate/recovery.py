"""The audit of a converted model: what it won back of what truncation loses, and which of its branches did it.

Perplexity alone flatters a conversion, because most of it can come from the softmax window. So the student is set
beside two models that cost nothing: its teacher, and its teacher cut to the student's own window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linearize.artifacts.load import resolve
from linearize.artifacts.manifest import MANIFEST, read_manifest
from linearize.data import load_source
from linearize.errors import RefusedError, UsageError
from linearize.evaluate.perplexity import (
    Scores,
    Subject,
    by_position,
    figures,
    safe_exp,
    score,
)
from linearize.evaluate.protocols import Task, make_task, parse_protocol
from linearize.evaluate.subjects import default_context, open_subject, require_positions, require_softmax, warn_beyond
from linearize.evaluate.truncation import truncated

REFERENCE_WINDOW = 64
"""The window of the floor for a student that has none of its own."""

BRANCHES = ("full", "window", "linear", "none")
MINIMUM_GAP = 0.01
"""Nats per token (1 % of perplexity) that the cut must cost the teacher before a share of it means anything."""


def audit(
    out: Any,
    *,
    against: Any,
    data: str,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_windows: int | None = 64,
    source: str | None = None,
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Recovery, branch audit and perplexity by position, all on the same windows (protocol `concat@N`).

        R = (ln P_window - ln P_student) / (ln P_window - ln P_teacher) * 100

    with P_window the teacher cut to the student's window and sinks in every layer.

    Args:
        out, against: the converted model and its teacher; a folder, a Hub id, `demo`, or a (model, tokenizer) pair.
        data, source: see `linearize.data.load_source`; of `demo` and of a Hub data set, the held-out part.
        context: N; None: the one that the student was trained with if it reaches beyond the window, else the model's
            own, at most 1024.
        dtype: of the weights; auto: as stored on a GPU, float32 on a CPU.
        max_windows: how many windows to read; None: all.
        teacher_bits: 8 or 4: hold the teacher in so many bits; see `linearize.teacher_bits`.

    Returns:
        R (percent; None where the cut costs the teacher less than MINIMUM_GAP), ppl_teacher, ppl_window, ppl_student,
        branches {full, window, linear, none} (perplexities; `window` is None for a student without one), reference
        {window, sinks, own}, by_position [{from, to, tokens, teacher, window, student}], notes, teacher_bits,
        beyond_trained (of either model), and of the student all else that `perplexity.figures` reports.

    Raises:
        UsageError: bad input, a model that is not converted, or two tokenizers. RefusedError: less text than one
            window, or a context that the window already covers. VerificationError: a loss that is not finite.
    """
    student = open_subject(out, device=device, dtype=dtype)
    teacher = open_subject(against, device=device, dtype=dtype, bits=teacher_bits)
    spec = _spec(student)
    require_softmax(teacher)
    texts, read = load_source(data, split="heldout", source=source)
    require_same_tokenizer(student, teacher)
    window, sinks = (spec.window, spec.sinks) if spec.window else (REFERENCE_WINDOW, 0)
    own = _trained_context(out) or 0
    protocol = parse_protocol(
        None, context=context, default_context=own if own > 2 * window else default_context(student.config)
    )
    if protocol.context <= 2 * window:
        raise RefusedError(f"context {protocol.context} does not reach beyond the window (two blocks of {window})",
                           f"Give a context well above {2 * window}")  # fmt: skip
    require_positions([student, teacher], protocol.context, what=protocol.windows)
    task = make_task(protocol, texts, student.tokenizer, max_windows=max_windows)
    far = warn_beyond([student, teacher], task.reads, what=protocol.windows)
    model = student.load()
    branches = branch_scores(model, task, windowed=spec.window > 0, name=student.name)
    full = branches["full"]
    assert full is not None
    report = figures(student, model, task, full, data=read.describe())
    del model  # the teacher may need its room
    whole, cut = _teacher_scores(teacher, task, window=window, sinks=sinks)
    percent, notes = recovery(teacher=whole.mean, window=cut.mean, student=full.mean)
    alone = branches["window"]
    notes += harm(full=full.mean, window=None if alone is None else alone.mean)
    if not spec.window:
        notes.append(f"this recipe has no window; the floor is the teacher cut to a reference window of {window}")
    report.update(
        R=percent,
        against=teacher.name,
        ppl_teacher=whole.perplexity,
        ppl_window=cut.perplexity,
        ppl_student=full.perplexity,
        branches={name: None if s is None else s.perplexity for name, s in branches.items()},
        reference={"window": window, "sinks": sinks, "own": spec.window > 0},
        by_position=_side_by_side(teacher=whole, window=cut, student=full),
        teacher_bits=teacher_bits,
        beyond_trained=bool(far),
        notes=[*far, *teacher.notes, *notes],
    )
    return report


def recovery(*, teacher: float, window: float, student: float) -> tuple[float | None, list[str]]:
    """R in percent from nats per token, and what is to be said about it; None where it has no meaning."""
    gap = window - teacher
    if gap < MINIMUM_GAP:
        return None, [
            f"R is not defined: cut to the window, the teacher has perplexity {safe_exp(window):.4g} instead of "
            f"{safe_exp(teacher):.4g}; the cut costs it less than {MINIMUM_GAP:.0%} here, too little to take a share of"
        ]
    share = 100.0 * (window - student) / gap
    if student <= window:
        return share, []
    return share, [
        f"R is below 0: with perplexity {safe_exp(student):.4g} the student is worse than its teacher merely cut to "
        f"the window, {safe_exp(window):.4g}, which needs no training; give it more tokens (align.tokens, "
        "finetune.tokens) or another recipe (linearize recipes ls)"
    ]


def harm(*, full: float, window: float | None) -> list[str]:
    """What is to be said where the window does better without the linear branch; nats per token, `window`: of it
    alone, None where there is none."""
    if window is None or window > full - MINIMUM_GAP:
        return []
    return [
        f"the linear branch does harm: with its window alone the student has perplexity {safe_exp(window):.4g} instead "
        f"of {safe_exp(full):.4g}"
    ]


def branch_scores(model: Any, task: Task, *, windowed: bool, name: str) -> dict[str, Scores | None]:
    """The student with all branches, its window alone, its linear branch alone, and none; then set back to all."""
    from linearize.modeling.modeling_linearized import set_branches

    scores: dict[str, Scores | None] = dict.fromkeys(BRANCHES)
    try:
        for branch in BRANCHES:
            if windowed or branch != "window":
                set_branches(model, branch)
                scores[branch] = score(model, task.rows, name=f"{name} ({branch})")
    finally:
        set_branches(model, "full")
    return scores


def require_same_tokenizer(student: Subject, teacher: Subject) -> None:
    """UsageError unless both give the same ids to the same text, so that their perplexities count the same tokens."""
    mine, theirs = student.tokenizer, teacher.tokenizer
    probe = "Straße naïve 東京 \n\tdef f(x_1): return 3.14  # don't"
    same = (
        mine.get_vocab() == theirs.get_vocab()
        and (mine.bos_token_id, mine.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
        and mine.encode(probe, add_special_tokens=False) == theirs.encode(probe, add_special_tokens=False)
    )
    if not same:
        raise UsageError(
            f"{student.name} and {teacher.name} have different tokenizers, so their perplexities do not compare",
            "Give the teacher that the model was converted from",
        )


def _teacher_scores(teacher: Subject, task: Task, *, window: int, sinks: int) -> tuple[Scores, Scores]:
    model = teacher.load()
    whole = score(model, task.rows, name=teacher.name)
    with truncated(model, window, sinks):
        return whole, score(model, task.rows, name=f"{teacher.name} (cut to its window)")


def _spec(student: Subject) -> Any:
    config, name = student.config, student.name
    if not hasattr(config, "mixer_spec"):
        kind = getattr(config, "model_type", "?")
        raise UsageError(f"{name} is not a converted model (its type is {kind})", "Give the OUT of linearize convert")
    if not config.linear_layers:
        raise UsageError(f"{name} has no linear layer: it is its teacher, and there is nothing to audit")
    return config.mixer_spec()


def _trained_context(out: Any) -> int | None:
    """The context of the recipe that made the model, where its manifest says it."""
    if isinstance(out, tuple):
        return None
    folder = Path(resolve(out))
    if not (folder / MANIFEST).is_file():
        return None
    recipe = read_manifest(folder).get("recipe")
    context = recipe.get("context") if isinstance(recipe, dict) else None
    return context if isinstance(context, int) and context > 1 else None


def _side_by_side(**scores: Scores) -> list[dict[str, Any]]:
    tables = {name: by_position(s) for name, s in scores.items()}
    first = next(iter(tables.values()))
    return [
        {"from": row["from"], "to": row["to"], "tokens": row["tokens"]}
        | {name: table[i]["perplexity"] for name, table in tables.items()}
        for i, row in enumerate(first)
    ]
