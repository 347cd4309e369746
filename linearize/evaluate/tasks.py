"""Tasks of lm-evaluation-harness: teacher and student on the same questions, in one table.

The harness is the one that everyone quotes, so it is called as it is (its tasks, its prompts, its `hf` model class)
and nothing of it is written anew. Only the loading is ours: no code of a checkpoint is run. Tasks whose data lie on the
Hub are downloaded by the harness; tasks of a folder (`include_path`) over local files need no network. A task's YAML
may name Python functions of its own folder, which the harness runs: include only folders that you trust.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError, UsageError, did_you_mean
from linearize.progress import tell
from linearize.teacher_bits import require_comparison_bits

INSTALL = "pip install 'lm-eval>=0.4.12'"
PACKAGES = ("linearize", "lm_eval", "torch", "transformers", "datasets")
_USUAL = (
    "`pretrained` model kwarg",
    "HF model type is neither marked",
    "Passed an already-initialized model",
    "Overwriting default num_fewshot",
)
"""Beginnings of warnings that a model handed over in memory and a number of shots that was asked for always bring."""
_ABOUT_THE_MACHINE = ("get_git_commit_hash", "add_env_info")
"""What the harness runs other programs for after a run; `versions` says it without."""
_OTHERS = ("alias", "name", "sample_len", "sample_count")


def evaluate_tasks(
    model: Any,
    *,
    tasks: Sequence[str] | str,
    against: Any = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike[str] | None = None,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    bars: bool = False,
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Scores of `model`, and of `against` beside it, on tasks of lm-evaluation-harness.

    Args:
        model: a folder, a Hub id, `demo`, or a pair (model, tokenizer) that is used as it is, on its device.
        tasks: names of tasks or groups, as in `lm-eval ls tasks`; or one string of them, with commas.
        against: the teacher, asked the same questions.
        limit: only the first so many questions of a task; None: all.
        fewshot: solved examples before a question; None: what the task says.
        batch_size: questions at once.
        include_path: a folder with task files (YAML) of your own, which may run code.
        context: most tokens of a prompt, cut on the left; None: what `model` was trained on, for both.
        dtype: of the weights; auto: as stored on a GPU, float32 on a CPU.
        bars: let the harness draw its progress bars.
        teacher_bits: 8 or 4: hold `against` in so many bits; see `linearize.teacher_bits`.

    Returns:
        model, against, rows, groups (rows again, where a group of tasks has a score), tasks, limit, fewshot,
        batch_size, context, dtype, device, versions, teacher_bits, beyond_trained (whether prompts may be longer than
        what a model was trained on) and notes. A row: task, version, filter, fewshot, questions,
        metric, higher_is_better; student and student_se (the harness's own figure and standard error, in the metric's
        own unit, shares as 0 to 1), teacher and teacher_se, and difference (student - teacher) and difference_se, whose
        error takes questions in pairs: both models were asked the same ones. What is not known is None.

    Raises:
        UsageError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    names = _checked(tasks, limit=limit, fewshot=fewshot, batch_size=batch_size, context=context)
    require_comparison_bits(teacher_bits, against)
    require_harness()
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"{include_path}: no such folder of tasks", "Give the folder that holds their YAML files.")
    from linearize.evaluate.subjects import open_subject, require_positions, trained_positions, warn_beyond

    subjects = [open_subject(model, device=device, dtype=dtype)]
    if against is not None:
        subjects.append(open_subject(against, device=device, dtype=dtype, bits=teacher_bits))
    context = context or trained_positions(subjects[0].config)
    prompts = f"prompts of up to {context or 0:,} tokens"
    require_positions(subjects, context or 0, what=prompts)
    far = warn_beyond(subjects, context or 0, what=prompts)
    notes: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    with _listening(notes), _bars(bars):
        manager = _manager(include_path)
        names = _known(names, manager)
        tell(f"reading the data of {', '.join(names)}", "lm-eval")
        with _blamed("the data or the settings"):
            manager.load(list(names))  # before any weight is loaded
        for subject in subjects:
            loaded = subject.load()
            if not loaded.can_generate():
                raise UsageError(f"{subject.name} is no causal language model", "The harness asks those alone")
            tell(f"asking {', '.join(names)}", subject.name)
            found.append(_ask(subject, loaded, names, manager, limit, fewshot, batch_size, context))
            about = {"dtype": str(loaded.dtype).removeprefix("torch."), "device": str(loaded.device)}
            del loaded  # two large models need not fit at once
    student, teacher = found[0], found[1] if len(found) > 1 else None
    if teacher is not None:
        _require_same_questions(student, teacher)
    return {
        "model": subjects[0].name,
        "against": subjects[1].name if teacher is not None else None,
        "tasks": list(names),
        "rows": _rows(student, teacher, "results"),
        "groups": _rows(student, teacher, "groups"),
        "limit": limit,
        "fewshot": fewshot,
        "batch_size": batch_size,
        "context": context,
        **about,
        "versions": installed_versions(PACKAGES),
        "teacher_bits": teacher_bits,
        "beyond_trained": bool(far),
        "notes": [
            *far,
            *(note for subject in subjects for note in subject.notes),
            *(text if count == 1 else f"{text} ({count:,} times)" for text, count in notes.items()),
        ],
    }


def require_harness() -> None:
    """UsageError, with how to install it, where lm-eval is absent."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs the package lm-eval, which is not installed", INSTALL)


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """{name: version} of what is installed of `packages`, and of Python."""
    found = {"python": platform.python_version()}
    for name in packages:
        if name == "linearize":
            from linearize import __version__

            found[name] = __version__
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _checked(
    tasks: Sequence[str] | str, *, limit: int | None, fewshot: int | None, batch_size: int, context: int | None
) -> tuple[str, ...]:
    given = tasks.split(",") if isinstance(tasks, str) else tasks
    names = tuple(dict.fromkeys(name.strip() for name in given if name.strip()))
    if not names:
        raise UsageError("no task is named", "Give names such as piqa,arc_easy; `lm-eval ls tasks` lists them")
    for what, value, least in (("limit", limit, 1), ("fewshot", fewshot, 0), ("batch_size", batch_size, 1),
                               ("context", context, 2)):  # fmt: skip
        if value is not None and value < least:
            raise UsageError(f"{what} {value} is less than {least}")
    return names


def _manager(include_path: str | os.PathLike[str] | None) -> Any:
    from lm_eval.tasks import TaskManager

    with _blamed("the task files"):
        return TaskManager(include_path=None if include_path is None else str(include_path))


def _known(names: Sequence[str], manager: Any) -> tuple[str, ...]:
    for name in names:
        # A path to a YAML file would be accepted by the harness too; folders are what --include-path is for.
        if name not in manager.all_tasks:
            raise UsageError(
                f"lm-eval {version('lm_eval')} has no task {name!r}.{did_you_mean(name, manager.all_tasks)}",
                "`lm-eval ls tasks` lists them; --include-path DIR adds your own",
            )
    return tuple(names)


def _ask(
    subject: Any,
    model: Any,
    names: Sequence[str],
    manager: Any,
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
    context: int | None,
) -> dict[str, Any]:
    """What the harness returns for one model, with its answers to every question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _blamed(subject.name), _no_other_programs():
        harness = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=batch_size, max_length=context)
        done = simple_evaluate(
            model=harness,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            num_fewshot=fewshot,
            batch_size=batch_size,
            log_samples=True,
        )
    assert done is not None  # None only on a second process of a distributed run, which this is not
    return dict(done)


def _rows(student: Mapping[str, Any], teacher: Mapping[str, Any] | None, part: str) -> list[dict[str, Any]]:
    rows = []
    groups = student.get("groups") or {}
    for task, scores in (student.get(part) or {}).items():
        if part == "results" and task in groups:  # a group's score stands among the tasks' as well
            continue
        theirs = {} if teacher is None else teacher[part][task]
        for key in sorted(key for key in scores if key not in _OTHERS and "_stderr," not in key):
            metric, _, chosen = key.partition(",")
            error = f"{metric}_stderr,{chosen}"
            mine, other = _number(scores[key]), _number(theirs.get(key))
            if mine is None:
                continue
            rows.append({
                "task": task,
                "version": student["versions"].get(task),
                "filter": chosen,
                "fewshot": student["n-shot"].get(task),
                "questions": student.get("n-samples", {}).get(task, {}).get("effective", scores.get("sample_len")),
                "metric": metric,
                "higher_is_better": student.get("higher_is_better", {}).get(task, {}).get(metric),
                "student": mine,
                "student_se": _number(scores.get(error)),
                "teacher": other,
                "teacher_se": _number(theirs.get(error)),
                "difference": None if other is None else mine - other,
                "difference_se": None if teacher is None else _paired(student, teacher, task, metric, chosen, mine),
            })  # fmt: skip
    return rows


def _paired(
    student: Mapping[str, Any], teacher: Mapping[str, Any], task: str, metric: str, chosen: str, score: float
) -> float | None:
    """Standard error of the mean difference over questions; None where the score is no mean of its questions'."""
    both = []
    for found in (student, teacher):
        answers = [a for a in found.get("samples", {}).get(task, []) if a.get("filter") == chosen]
        both.append([_number(a.get(metric)) for a in answers])
    mine, theirs = both
    if len(mine) < 2 or len(mine) != len(theirs) or None in mine or None in theirs:
        return None
    if not math.isclose(sum(mine) / len(mine), score, rel_tol=1e-9, abs_tol=1e-12):  # type: ignore[arg-type]
        return None
    gaps = [a - b for a, b in zip(mine, theirs, strict=True)]  # type: ignore[operator]
    mean = sum(gaps) / len(gaps)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))


def _require_same_questions(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Both models must have read the same prompts, or a difference means nothing."""

    def asked(found: Mapping[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
        return {
            task: [(a["doc_id"], a["filter"], a["doc_hash"], a["prompt_hash"]) for a in answers]
            for task, answers in found.get("samples", {}).items()
        }

    if asked(student) != asked(teacher):
        raise UsageError("the tasks asked the two models different questions", "Evaluate them one by one")


def _number(value: Any) -> float | None:
    """A figure, or None for what is no finite number: "N/A", a pair that is summed up later, nan."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Whatever the harness raises, as one line: it has no errors of its own for a user's mistakes."""
    try:
        yield
    except (LinearizeError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        text = " ".join(str(error).split())[:300]
        raise UsageError(
            f"lm-eval could not go on with {what}: {type(error).__name__}: {text}",
            "Check the names and the network; local tasks (--include-path) need none",
        ) from error


@contextmanager
def _listening(notes: Counter[str]) -> Iterator[None]:
    """Count the harness's warnings, numbers aside, instead of printing each."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if record.levelno >= logging.WARNING and not text.startswith(_USUAL):
                notes["lm-eval: " + re.sub(r"\d+", "N", text)[:300]] += 1

    logger = logging.getLogger("lm_eval")
    listener, propagate = Listener(), logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Without `shown`, no progress bar of any library meanwhile: they are for terminals."""
    if shown:
        yield
        return
    from tqdm import tqdm

    before = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = before  # type: ignore[method-assign]


@contextmanager
def _no_other_programs() -> Iterator[None]:
    """Keep the harness from asking git, the compiler and the driver about the machine, which ends in noise."""
    from lm_eval import evaluator

    before = {name: getattr(evaluator, name) for name in _ABOUT_THE_MACHINE if hasattr(evaluator, name)}
    for name in before:
        setattr(evaluator, name, lambda *args: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(evaluator, name, function)
