"""One job of the quality table in a process of its own: convert and measure, or measure the teacher and its cuts.

It reads a file of plain values, written by `benchmarks.quality`, and writes its rows into another. On SIGTERM it stops
with exit code 130: a conversion saves first and goes on from there in the next slice.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED = 130
SHOWN = 20
"""Lines of progress that a stage prints."""


class Lines:
    """Progress as a few lines of text (`linearize.progress.Progress`)."""

    def __init__(self) -> None:
        self.steps = 0
        self.parent = os.getppid()

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        """A stage begins."""
        self.steps = total_steps
        self.message(f"{stage}: {total_steps:,} steps of {tokens_per_step:,} tokens")

    def step(self, stage: str, step: int, loss: float | None, tokens: int, extra: Mapping[str, Any]) -> None:
        """One step is done."""
        if os.getppid() != self.parent:  # whoever would have read the result is gone: save, and stop
            os.kill(os.getpid(), signal.SIGTERM)
        every = max(1, self.steps // SHOWN)
        if step % every == 0 or step in (1, self.steps):
            lost = "" if loss is None else f", loss {loss:.4g}"
            self.message(f"{stage}: step {step:,} of {self.steps:,}{lost}")

    def layer_table(self, rows: Any) -> None:
        """Is in the report."""

    def message(self, text: str) -> None:
        """One line."""
        print(text, flush=True)

    def finish(self, stage: str) -> None:
        """Nothing."""


def main(path: Path) -> int:
    """Do the job described in `path`; the exit code."""
    job = json.loads(path.read_text())
    _on_signal(_stop)
    result = Path(job["result"])
    try:
        rows = convert_and_measure(job) if job["rows"][0]["recipe"] else measure_teacher(job)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return INTERRUPTED
    except Exception as error:  # a recipe that fails is a row of the table, with its reason
        traceback.print_exc()
        reason = {"kind": type(error).__name__, "message": str(error)[:500]}
        rows = [{"error": reason} for _ in job["rows"]]
    stamp = {"machine": machine(), "date": datetime.date.today().isoformat(), "code": job["code"]}
    _write(result, [{**wanted, **stamp, **row} for wanted, row in zip(job["rows"], rows, strict=True)])
    return 0


def convert_and_measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The row of a conversion; its model is removed unless it is to be kept."""
    out = Path(job["out"])
    report, spent = convert(job, out)
    _on_signal(signal.SIG_IGN)  # measuring is short: the slice ends behind it
    begin = time.monotonic()
    row = measure_student(job, out)
    report = {key: value for key, value in report.items() if key != "out"}  # no path of this machine
    row |= {"convert": report, "seconds": spent["seconds"], "slices": spent["slices"]}
    row["seconds_measure"] = time.monotonic() - begin
    if not job["keep"]:
        shutil.rmtree(out)
    return [row]


def convert(job: dict[str, Any], out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report of the conversion and {seconds, slices} of all slices it took; finished ones are not run again."""
    import linearize
    from linearize.convert.early import begun
    from linearize.recipe import recipe_from_dict

    done, book = out.with_name(out.name + ".convert.json"), out.with_name(out.name + ".spent.json")
    spent = json.loads(book.read_text()) if book.is_file() else {"seconds": 0.0, "slices": 0}
    if out.exists() and done.is_file():
        return json.loads(done.read_text()), spent
    shutil.rmtree(out, ignore_errors=True)  # an export without its report: stopped in the blink between the two
    recipe = recipe_from_dict(job["rows"][0]["recipe"], source=job["rows"][0]["name"])
    begin = time.monotonic()
    try:
        given = {"recipe": recipe, "data": job["data"], "resume": begun(out), "progress": Lines()}
        report = linearize.convert(job["teacher"], out, **given)
        _write(done, report)
        return report, spent
    finally:
        spent |= {"seconds": spent["seconds"] + time.monotonic() - begin, "slices": spent["slices"] + 1}
        _write(book, spent)


def measure_student(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Perplexities of the branches, recall and LAMBADA of a converted model."""
    from linearize.evaluate.perplexity import figures
    from linearize.evaluate.recovery import BRANCHES, branch_scores

    subject, task, read = _opened(job, str(out))
    model = subject.load()
    spec = model.config.mixer_spec()
    scores = branch_scores(model, task, windowed=spec.window > 0, name=job["rows"][0]["name"])
    full = scores["full"]
    assert full is not None
    row = figures(subject, model, task, full, data=read)
    row["model"] = job["rows"][0]["key"]
    row["branches"] = {b: None if s is None else {"nll": s.mean, "perplexity": s.perplexity} for b, s in scores.items()}
    assert set(row["branches"]) == set(BRANCHES)
    row |= {"window": spec.window, "sinks": spec.sinks, "softmax_layers": _softmax_layers(model.config)}
    row["cache_bytes"] = _cache(model, job["context"], layers=len(row["softmax_layers"]))
    return row | _tasks(job, model, subject.tokenizer, name=row["model"])


def measure_teacher(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The teacher, and each cut of it that is wanted."""
    from linearize.evaluate.perplexity import figures, score
    from linearize.evaluate.truncation import truncated

    subject, task, read = _opened(job, job["teacher"])
    model = subject.load()
    rows = []
    for wanted in job["rows"]:
        with _state(truncated, model, wanted):
            row = figures(subject, model, task, score(model, task.rows, name=wanted["name"]), data=read)
            row["model"] = wanted["key"]
            seen = job["context"]
            if wanted["kind"] == "cut":
                seen = min(seen, 2 * wanted["window"] + wanted["sinks"])
            row["cache_bytes"] = _cache(model, seen, layers=model.config.num_hidden_layers)
            rows.append(row | _tasks(job, model, subject.tokenizer, name=wanted["key"]))
    return rows


@contextmanager
def _state(truncated: Any, model: Any, row: Mapping[str, Any]) -> Iterator[None]:
    """The teacher as it is, or cut."""
    if row["kind"] == "teacher":
        yield
        return
    with truncated(model, row["window"], row["sinks"]):
        yield


def _opened(job: dict[str, Any], model: str) -> tuple[Any, Any, dict[str, Any]]:
    """A subject and the windows that it is judged on."""
    from linearize.data import load_source
    from linearize.evaluate.perplexity import open_subject
    from linearize.evaluate.protocols import make_task, parse_protocol

    subject = open_subject(model)
    texts, read = load_source(job["heldout"], split="heldout")
    protocol = parse_protocol(None, context=job["context"], default_context=job["context"])
    described = read.describe() | {"name": Path(read.name).name}  # no path of this machine
    return subject, make_task(protocol, texts, subject.tokenizer, max_windows=job["windows"]), described


def _tasks(job: dict[str, Any], model: Any, tokenizer: Any, *, name: str) -> dict[str, Any]:
    """What is asked beside perplexity, of the model as it now is."""
    found: dict[str, Any] = {}
    if job["recall_queries"]:
        from benchmarks.quality_recall import answers

        found["recall"] = answers(model, tokenizer, job, name=name)
    if job["lambada"]:
        from linearize.evaluate.lambada import lambada

        report = lambada((model, tokenizer), data=job["lambada"], limit=job["lambada_rows"])
        found["lambada"] = {key: value for key, value in report.items() if key != "model"}
    return found


def _softmax_layers(config: Any) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if i not in set(config.linear_layers)]


def _cache(model: Any, tokens: int, *, layers: int) -> int:
    """Bytes of the key/value cache of `layers` layers for one sequence, in the dtype of the weights."""
    from linearize.modeling.configuration_linearized import kv_bytes

    return kv_bytes(model.config, tokens, dtype_bytes=model.dtype.itemsize, layers=layers)


def machine() -> str:
    """The device and the versions that a figure needs."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}; Python {platform.python_version()}, {versions}"


def _write(path: Path, value: Any) -> None:
    """Whole or not at all."""
    from linearize.artifacts.atomic import write_json

    write_json(path, json.loads(json.dumps(value, default=str)))


def _on_signal(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
