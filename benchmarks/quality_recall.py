"""Recall in the quality table: every model answers the same pages once, and shares are made of the answers later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Mapping[str, dict[str, Any]]


def answers(model: Any, tokenizer: Any, job: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """How right a model is on every query, as plain values; or why nothing can be asked.

    Distances follow the window of 64 for every row, so that all rows answer the same pages.
    """
    from benchmarks.quality_rows import WINDOW
    from linearize.data import load_source
    from linearize.errors import RefusedError
    from linearize.evaluate.recall import choose_distances, recall_scores
    from linearize.evaluate.recall_tasks import make_tasks

    texts, _ = load_source(job["heldout"], split="heldout")
    try:
        far = choose_distances(tokenizer, window=WINDOW, context=job["context"])
        tasks = make_tasks(
            tokenizer, texts, distances=far, queries=job["recall_queries"], context=job["context"], seed=0
        )
    except RefusedError as error:
        return {"refused": str(error)}
    scores = recall_scores(model, tasks, name=name)
    return {
        "tasks": [
            {"task": task.form.name, "distance": task.distance, "right": right.round(4).tolist()}
            for task, right in zip(tasks, scores, strict=True)
        ]
    }


def shares(row: Mapping[str, Any], rows: Rows) -> dict[str, Any] | None:
    """What `recall.compare` says of a row beside the teacher and the cut with the row's own sinks; None: not yet."""
    from benchmarks.quality_table import floor_key
    from linearize.evaluate.recall import compare
    from linearize.evaluate.recall_tasks import FORMS, RecallTask

    found = [_tasks(one) for one in (row, rows.get("teacher", {}), rows.get(floor_key(row, sinks=True), {}))]
    if not all(found):
        return None
    forms = {form.name: form for form in FORMS}
    none = np.zeros((0, 0), dtype=np.int64)
    tasks = [
        RecallTask(form=forms[one["task"]], distance=one["distance"], tokens=none, places=none, candidates=None)
        for one in found[0]
    ]
    student, teacher, floor = ([np.asarray(one["right"]) for one in part] for part in found)
    return compare(tasks, student=student, teacher=teacher, floor=floor)


def cell(row: Mapping[str, Any], rows: Rows) -> str:
    """Share of all tasks together, with its standard error."""
    report = shares(row, rows)
    if report is None or report["share"] is None:
        return "-"
    return f"{report['share']:.0f} ±{report['share_se']:.0f}"


def lines(measured: Sequence[Mapping[str, Any]], rows: Rows, shown: Any) -> list[list[str]]:
    """The table of recall, its head first; empty where nothing was asked."""
    first = next((_tasks(row) for row in measured if _tasks(row)), [])
    if not first:
        return []
    names = list(dict.fromkeys(one["task"] for one in first))
    head = ["row", "share %", *(f"{name} %" for name in names)]
    table = [head + [f"{one['task']} {one['distance']}" for one in first]]
    for row in measured:
        report = shares(row, rows)
        parts = [cell(row, rows)]
        parts += ["-" if report is None else _percent(report["tasks"][name]["share"]) for name in names]
        scores = [f"{100 * np.mean(one['right']):.1f}" for one in _tasks(row)] or ["-"] * len(first)
        table.append([shown(row), *parts, *scores])
    return table


def remarks(rows: Rows) -> list[str]:
    """Why recall is missing, and what the teacher cannot do."""
    teacher = rows.get("teacher", {})
    refused = (teacher.get("recall") or {}).get("refused")
    if refused:
        return [f"recall is not asked for: {refused}"]
    report = shares(teacher, rows)
    return [] if report is None else [f"recall: {note}" for note in report["notes"]]


def _tasks(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return (row.get("recall") or {}).get("tasks") or []


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
