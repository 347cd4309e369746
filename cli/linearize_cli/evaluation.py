"""`linearize eval`: perplexity under a named protocol, or tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.errors import UsageError
from linearize_cli.commands import Context, Device, Dtype, Json, Model, Revision, TeacherBits, Windows, app
from linearize_cli.output import only_json, print_json, print_table, say, unsaid, watching
from linearize_cli.results import print_evaluation


@app.command(name="eval", short_help="Measure perplexity, or the tasks that everyone quotes.")
def evaluate(
    model: Model,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH|HUB_ID|demo", help="Text to measure perplexity on.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="A,B", help="Tasks of lm-eval instead of --data, as in piqa,arc_easy."),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="TEACHER", help="Measure this model in the same run.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", metavar="P", help="lm-eval/wikitext, concat@N, documents@N; BERT: masked@N."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N questions of a task.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", metavar="N", min=0, help="Solved examples before a question of a task.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="B", min=1, help="Questions at once (8).")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="A folder with task files of your own.")
    ] = None,
    max_windows: Windows = None,
    teacher_bits: TeacherBits = None,
    revision: Revision = None,
    context: Context = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity (--data) or the tasks that everyone quotes (--tasks), with the teacher beside it.

    Perplexity is per word, byte and token, and the protocol is named with every number. Tasks are those of
    lm-evaluation-harness, which has to be installed; `lm-eval ls tasks` lists them. A masked language model (BERT) is
    asked for hidden tokens instead: accuracy, and pseudo-perplexity.

    \b
    Examples:
      linearize eval out --against demo --data demo
      linearize eval ./my-llama --data wikitext2-raw-test.txt --protocol lm-eval/wikitext --context 2048
      linearize eval out --against ./my-llama --tasks piqa,arc_easy --limit 200
      linearize eval out --tasks my_task --include-path ./my-tasks --batch-size 16 --json
    """
    from linearize.artifacts.download import pin

    model = pin(model, revision)
    where: dict[str, Any] = {"against": against, "context": context, "device": device, "dtype": dtype,
                             "teacher_bits": teacher_bits}  # fmt: skip
    if tasks is not None:
        if data is not None:
            raise UsageError("--tasks and --data are two measurements", "Take them one by one.")
        _refuse("--tasks", "--data", {"--protocol": protocol, "--max-windows": max_windows})
        found = _tasks(model, tasks, as_json, limit, fewshot, batch_size, include_path, where)
        return print_json(found) if as_json else print_tasks(found)
    if data is None:
        raise UsageError("--data: missing", "Name a text file, a folder, a Hub data set or demo; or tasks by --tasks.")
    only_tasks = {"--limit": limit, "--fewshot": fewshot, "--batch-size": batch_size, "--include-path": include_path}
    _refuse("--data", "--tasks", only_tasks)
    with only_json(as_json), watching():
        from linearize.api import evaluate as run

        result = run(model, data=data, protocol=protocol, max_windows=max_windows, **where)
    if as_json:
        return print_json(result)
    print_evaluation(result)


def _tasks(
    model: str,
    tasks: str,
    as_json: bool,
    limit: int | None,
    fewshot: int | None,
    batch_size: int | None,
    include_path: Path | None,
    where: dict[str, Any],
) -> dict[str, Any]:
    # The harness draws bars of its own on a terminal: a line of ours would break into them.
    with only_json(as_json), watching(doings=False):
        from linearize.evaluate.tasks import evaluate_tasks as run

        return run(
            model,
            tasks=tasks.split(","),
            limit=limit,
            fewshot=fewshot,
            batch_size=batch_size or 8,
            include_path=include_path,
            bars=sys.stderr.isatty(),
            **where,
        )


def _refuse(one: str, other: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} goes with {other}, not with {one}", "Leave it out.")


def print_tasks(result: Mapping[str, Any]) -> None:
    """What `linearize.evaluate_tasks` returns: a row a task and metric, teacher beside student."""
    against = result["against"]
    versions = result["versions"]
    who = f"student {result['model']}, teacher {against}" if against else str(result["model"])
    say(f"lm-eval {versions['lm_eval']}: {who}; {result['dtype']} on {result['device']}, context {result['context']}")
    for title, rows in (("Tasks, with standard errors", result["rows"]), ("Groups of tasks", result["groups"])):
        if rows:
            print_table([_task_row(row, with_teacher=bool(against)) for row in rows], title=title)
    if result["limit"]:
        say(f"note: only the first {result['limit']} questions of a task; such a score is for looking, not for quoting")
    for note in unsaid(result["notes"]):
        say(f"note: {note}")


def _task_row(row: Mapping[str, Any], *, with_teacher: bool) -> dict[str, Any]:
    arrow = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
    chosen = "" if row["filter"] in ("none", "") else f" ({row['filter']})"
    cells = {
        "task": row["task"],
        "metric": f"{row['metric']}{chosen}{arrow}",
        "shots": row["fewshot"],
        "questions": row["questions"],
        "student" if with_teacher else "score": _score(row["student"], row["student_se"]),
    }
    if with_teacher:
        cells["teacher"] = _score(row["teacher"], row["teacher_se"])
        cells["difference"] = _score(row["difference"], row["difference_se"], sign="+")
    return cells


def _score(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4g}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"
