"""What each command found, for people: one number once, in the order in which one asks. --json holds all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from linearize_cli.output import console, figure, human_bytes, plural, print_table, seconds, unsaid

if TYPE_CHECKING:
    from rich.console import Console

CONTEXTS = (2_048, 32_768, 131_072)
BRANCHES = {
    "full": "all of it",
    "window": "window alone",
    "linear": "linear branch alone",
    "none": "no attention at all",
}


def print_inspection(result: Mapping[str, Any], title: str) -> None:
    """What `linearize.convert.plan.inspect` returns."""
    target = console()
    target.print(title, style="bold")
    heads = f"{result['heads']} heads ({result['kv_heads']} for keys and values) of {result['head_dim']}"
    layers = result["layers"]
    count = layers if isinstance(layers, int) else len(layers)
    _line(target, f"{result['family']}, {plural(count, 'layer')}, {heads}, {result['dtype']}")
    _line(target, f"trained on a context of {result['context']:,} tokens")
    added = result.get("new_parameters")
    more = "" if added is None else f", added {added:,}"
    whose = "" if added is None else "teacher "
    _line(target, f"parameters: {whose}{result['parameters']:,}{more}")
    if not isinstance(layers, int):
        _print_layers(layers, target)
    kv = {int(n): size for n, size in result["kv_bytes"].items()}
    kept = {int(n): size for n, size in result.get("softmax_kv_bytes", {}).items()}
    _print_memory(kv, result.get("state_bytes"), kept, result.get("break_even_context"), target)
    _print_notes(result, target)


def print_plan(result: Mapping[str, Any], title: str) -> None:
    """What `linearize.convert.plan.make_plan` returns."""
    target = console()
    target.print(title, style="bold")
    added = result["new_parameters"]
    trained = ", ".join(f"{count:,} in {stage}" for stage, count in result["trained"].items())
    _line(target, f"{result['family']}, {plural(len(result['layers']), 'layer')}")
    _line(target, f"parameters: teacher {result['parameters'] - added:,}, added {added:,}, trained {trained}")
    for stage, tokens in result["tokens"].items():
        skipped = result["skipped"].get(stage)
        work = f"{tokens:,} tokens in {plural(result['steps'][stage], 'step')}, windows of {result['context']:,}"
        _line(target, f"{stage}: " + (f"skipped ({skipped})" if skipped else work))
    _line(target, f"needs about {human_bytes(result['memory_bytes'])} of memory, {human_bytes(result['disk_bytes'])} "
                  f"of disk; exports {result['export_dtype']}")  # fmt: skip
    if result.get("streamed"):
        hidden = human_bytes(result["hidden_bytes"])
        _line(target, f"streamed, one layer at a time; of the disk, {hidden} are hidden states while it runs")
    if result.get("teacher_bits"):
        _line(target, f"frozen weights are held in {result['teacher_bits']} bit while it trains; the export is exact")
    if (again := result.get("resumes")) is not None:
        where = f"layer {again['step']}" if result["streamed"] else f"step {again['step']}"
        _line(target, f"goes on from {where} of {again['stage']}, if model and text are those that it was begun with")
    if result["dropped"]:
        _line(target, f"dropped keys: {figure('', list(result['dropped']))}")
    _print_layers(result["layers"], target)
    a_token = result["kv_bytes_at_context"] / result["context"]  # a cache grows by as much with every token
    linear = sum(row["to"] != "softmax" for row in result["layers"]) / len(result["layers"])
    kv = {n: round(a_token * n) for n in CONTEXTS}
    kept = {n: round(a_token * n * (1 - linear)) for n in CONTEXTS}
    even = math.ceil(result["state_bytes"] / (a_token * linear)) if a_token and linear else None
    _print_memory(kv, result["state_bytes"], kept, even, target)
    _print_notes(result, target)


def print_conversion(result: Mapping[str, Any], title: str, out: str) -> None:
    """What `linearize.convert` returns; its layers have been shown when the alignment ended."""
    target = console()
    target.print(title, style="bold")
    rows = []
    for stage, found in result["stages"].items():
        if found.get("skipped"):
            _line(target, f"{stage} was skipped: {found['skipped']}")
            continue
        rows.append({
            "stage": stage, "tokens": found["tokens"], "steps": found["steps"], "time": seconds(found["seconds"]),
            "loss first": found["loss_first"], "last": found["loss_last"],
        })  # fmt: skip
    if rows:
        print_table(rows, to=target)
        _line(target, "Losses are means over the first and over the last steps, which read different batches.")
    if result["mean_match"] is not None:
        share = figure("match", result["mean_match"])
        _line(target, f"After alignment the layers explain {share} of the teacher's attention outputs on average.")
    elif result["stages"].get("align", {}).get("steps"):
        _line(target, "How well the layers match was not measured: every step hid the window (align.window_dropout).")
    for way in result["verification"].values():
        if "same_text" not in way:  # the check of a streamed conversion
            _line(target, f"Read back {way['way']}: {way['tensors']:,} tensors as written, a logit differs by "
                          f"{way['max_abs_difference']:.2g} at most.")  # fmt: skip
            continue
        same = "same text" if way["same_text"] else "another text"
        worst = way["max_abs_difference"]
        logits = "same logits" if worst == 0 else f"logits within {worst:.2g}"
        _line(target, f"Loads with {way['way']}: {logits}, {same}.")
    error = result["merge_error"]
    _line(target, f"merge error (fp32) {error['merge']['max']:.2g}, rounding to {result['dtype']} "
                  f"{error['cast']['max']:.2g} (max |logit|)")  # fmt: skip
    if (quantised := error.get("quantised")) is not None:
        bits, far, mean = result["teacher_bits"], quantised["max"], quantised["mean"]
        _line(target, f"Frozen weights were in {bits} bit while it trained; with the teacher's own, as written, a "
                      f"logit differs by {far:.2g} at most, {mean:.2g} in mean.")  # fmt: skip
    if "streamed" in result:
        peak = human_bytes(result["streamed"]["peak_memory_bytes"])
        _line(target, f"Streamed, one layer at a time: {peak} of memory at most.")
    _print_notes(result, target)
    _line(target, f"Took {seconds(result['seconds']['total'])}. The model is in {out}")


def print_evaluation(result: Mapping[str, Any]) -> None:
    """What `linearize.evaluate` returns: under what conditions, and the figures, two models side by side."""
    if "masking" in result:
        return print_masked(result)
    target = console()
    against = result.get("against")
    shown = [result, *([against] if against else [])]
    _print_conditions(result, target)
    names = [str(subject["model"]) for subject in shown]
    if len(set(names)) < len(names):
        names[1] += " (against)"
    ratios = result.get("ratio") or {}
    rows = []
    for key in ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "nll"):
        row = {"": key.replace("_", " ") if key != "nll" else "nats per token"}
        row |= {name: figure("", subject.get(key)) for name, subject in zip(names, shown, strict=True)}
        rows.append(row | ({"ratio": figure("", ratios.get(key))} if against else {}))
    print_table(rows, to=target)
    _print_positions({name: subject.get("by_position") or [] for name, subject in zip(names, shown, strict=True)},
                     target)  # fmt: skip
    for subject in shown:
        _print_notes(subject, target)


def print_masked(result: Mapping[str, Any]) -> None:
    """What `linearize.evaluate` returns for a masked language model."""
    target = console()
    masking, against = result["masking"], result["against"]
    read = f"{result['protocol']}: {plural(result['windows'], 'window')}"
    hidden = f"{masking['hidden']:,} tokens hidden at once ({masking['rate']:.0%}), {masking['alone']:,} alone"
    how = f"each by {masking['replaced_by']}, seed {masking['seed']}, {result['dtype']} on {result['device']}"
    _line(target, f"{read}, {hidden}, {how}")
    shown = [result, *([against] if against else [])]
    names = [str(subject["model"]) for subject in shown]
    if len(set(names)) < len(names):
        names[1] += " (against)"
    rows = []
    for key, label in (
        ("accuracy", "hidden tokens found"),
        ("masked_perplexity", "perplexity of hidden tokens"),
        ("pseudo_perplexity", "pseudo-perplexity"),
    ):
        row = {"": label}
        for name, subject in zip(names, shown, strict=True):
            row[name] = f"{subject[key]:.1%}" if key == "accuracy" else figure("", subject[key])
        if against:
            row["ratio"] = figure("", result["ratio"].get(key))
        rows.append(row)
    print_table(rows, to=target)
    for subject in shown:
        _print_notes(subject, target)


def print_audit(result: Mapping[str, Any]) -> None:
    """What `linearize.audit` returns: the three perplexities, what they come to, and where they come from."""
    target = console()
    _print_conditions(result, target)
    _line(target, f"student {result['model']}, teacher {result['against']}")
    cut = _cut(result["reference"])
    row = {"": "perplexity", "teacher": result["ppl_teacher"], cut: result["ppl_window"],
           "student": result["ppl_student"]}  # fmt: skip
    print_table([row], to=target)
    recovery = result["R"]
    verdict = "not defined" if recovery is None else f"{recovery:.1f} %"
    target.print(f"Recovery R: {verdict} (0 %: the teacher cut to its window, 100 %: the teacher)", style="bold")
    _print_notes(result, target)
    branches = {name: value for name, value in result["branches"].items() if value is not None}
    rows = [{"what the student attends with": BRANCHES[n], "perplexity": value} for n, value in branches.items()]
    print_table(rows, to=target)
    names = {"teacher": "teacher", "window": "cut teacher", "student": "student"}
    places = [{"tokens seen": _span(row), **{new: row[old] for old, new in names.items()}}
              for row in result["by_position"]]  # fmt: skip
    print_table(places, title="perplexity by position", to=target)


def _cut(reference: Mapping[str, Any]) -> str:
    """The heading of the floor, in words."""
    window, sinks = reference["window"], reference["sinks"]
    seen = f"{window} + the block before" + (f", {plural(sinks, 'sink')}" if sinks else "")
    return f"teacher cut to the window ({seen}, no training)"


def _print_conditions(result: Mapping[str, Any], target: Console) -> None:
    marks = f"BOS {result['bos']}, EOS {result['eos']}"
    read = f"{plural(result['windows'], 'window')}, {result['tokens']:,} tokens"
    _line(target, f"{result['protocol']}: {read}, {result['dtype']} on {result['device']}, {marks}")


def _print_positions(tables: Mapping[str, Sequence[Mapping[str, Any]]], target: Console) -> None:
    first = next(iter(tables.values()))
    found = {name: {row["from"]: row["perplexity"] for row in table} for name, table in tables.items()}
    rows = [{"tokens seen": _span(row), **{name: at.get(row["from"]) for name, at in found.items()}} for row in first]
    if len(rows) > 1:
        print_table(rows, title="perplexity by position", to=target)


def _span(row: Mapping[str, Any]) -> str:
    return f"{row['from']:,} to {row['to'] - 1:,}"


def _print_layers(layers: Sequence[Mapping[str, Any]], target: Console) -> None:
    """One row for each run of layers that are alike."""
    rows = []
    for _, group in groupby(layers, key=lambda row: [(k, v) for k, v in row.items() if k != "index"]):
        alike = list(group)
        first, last = alike[0], alike[-1]["index"]
        span = str(last) if len(alike) == 1 else f"{first['index']}-{last}"
        rows.append({"layers": span, **_layer(first)})
    print_table(rows, to=target)


def _layer(row: Mapping[str, Any]) -> dict[str, Any]:
    kind = row.get("to", row.get("mixer"))
    what = {"mixer": "softmax (kept)" if kind == "softmax" else str(kind)}
    if "heads" not in row:
        return what
    return what | {
        "heads/kv": f"{row['heads']}/{row['kv_heads']}",
        "dim": row["head_dim"],
        "feat": row["feature_dim"],
        "state": human_bytes(row["state_bytes"]) if row["state_bytes"] else "-",
        "new": row["new_parameters"],
    }


def _print_memory(
    kv: Mapping[int, int], state: int | None, kept: Mapping[int, int], even: int | None, target: Console
) -> None:
    """The cache of one sequence before and after, in bytes; `kept`: of the layers that stay softmax."""
    if not any(kv.values()):  # an encoder: the notes say that it keeps none
        return
    softmax = any(kept.values())
    student = "student (state + kept KV)" if softmax else "student state"
    rows = []
    for context, teacher in kv.items():
        row = {"context": f"{context // 1024}k", "teacher KV cache" if state is not None else "KV cache":
               human_bytes(teacher)}  # fmt: skip
        if state is not None:
            ours = state + kept.get(context, 0)
            row |= {student: human_bytes(ours), "teacher / student": _times(teacher / max(ours, 1))}
        rows.append(row)
    print_table(rows, title="Memory of one sequence", to=target)
    if even is not None:
        _line(target, f"The state is smaller than the cache it replaces from {even:,} tokens on (break-even context).")


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.1f}x"


def _print_notes(result: Mapping[str, Any], target: Console) -> None:
    for note in unsaid(result.get("notes") or ()):
        _line(target, f"note: {note}")


def _line(target: Console, text: str) -> None:
    """A line for people, wrapped only where there is a terminal."""
    target.print(text, soft_wrap=not target.is_terminal)
