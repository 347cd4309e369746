"""The figures of an audit in a model's card and manifest: what they are, how they were got, and how to check them.

The card says them twice: in words, between two marks, and in its metadata as the Hub's `model-index`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from linearize.artifacts.download import CARD, commit_of, display_name, origin, pinned
from linearize.artifacts.exports import require_export
from linearize.artifacts.manifest import EDITABLE, MANIFEST, read_manifest, versions
from linearize.artifacts.weights import digest_checkpoint
from linearize.errors import RefusedError, UsageError
from linearize.teacher_bits import KINDS

BEGIN, END = "<!-- linearize: quality -->", "<!-- linearize: end of quality -->"
TASK_NAME = "linearize audit"
"""The task name of our own entries of a `model-index`; others are left alone."""
_KEPT = (
    "R", "protocol", "context", "windows", "tokens", "words", "bytes", "bos", "eos", "dtype", "device", "nll",
    "ppl_teacher", "ppl_window", "ppl_student", "word_perplexity", "byte_perplexity", "bits_per_byte", "branches",
    "reference", "by_position", "notes", "teacher_bits", "beyond_trained",
)  # fmt: skip
_BRANCHES = {
    "window": "its window alone",
    "linear": "its linear branch alone",
    "none": "without any attention",
}


def require_savable(out: Any, against: Any) -> Path:
    """The folder of OUT if an audit against this teacher can be written into it; cheap but for hashing the teacher.

    UsageError unless OUT is a folder of the user's own with a manifest and a card that can be read, and `against` a
    model by name; RefusedError if it cannot be written to, or was made from another teacher.
    """
    from linearize.artifacts.load import resolve

    if isinstance(out, tuple) or isinstance(against, tuple):
        raise UsageError("saving an audit needs both models by name, not in memory", "Give folders or Hub ids.")
    folder, teacher = resolve(out), resolve(against)
    if commit_of(folder) is not None or not Path(out).expanduser().is_dir():
        raise UsageError(f"--save writes into OUT, and {os.fspath(out)} is not a folder of yours", "Save a copy first.")
    require_export(folder, os.fspath(out))
    manifest = read_manifest(folder)
    _parsed(_read_card(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RefusedError(f"{folder} cannot be written to", "Leave out --save.")
    stated = manifest.get("teacher")
    digest = stated.get("digest") if isinstance(stated, dict) else None
    if isinstance(digest, str) and digest != digest_checkpoint(teacher):
        raise RefusedError(
            f"{os.fspath(against)} is not the teacher that {folder} was made from ({MANIFEST} holds another digest)",
            "Its R would mean something else: give that teacher, or leave out --save.",
        )
    return folder


def save_audit(folder: Path, report: Mapping[str, Any], *, against: str) -> dict[str, Any]:
    """Write what `audit` returned into the manifest and the card of `folder`; returns the manifest's entry.

    Each file is replaced in one step, the manifest first, and it is valid before, between and after: it holds no hash
    of the card, which people edit. UsageError when the card's metadata cannot be read.
    """
    from linearize.artifacts.atomic import write_bytes, write_json
    from linearize.artifacts.load import resolve

    teacher = resolve(against)
    found = entry(report, teacher=origin(teacher, display_name(against, teacher)))
    manifest = read_manifest(folder)
    card = with_quality(_read_card(folder), found, name=str(manifest.get("name") or folder.name))
    files = {name: value for name, value in manifest["files"].items() if name not in EDITABLE}
    write_json(folder / MANIFEST, {**manifest, "audit": found, "files": files})
    write_bytes(folder / CARD, card.encode("utf-8"))
    return found


def entry(report: Mapping[str, Any], *, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest keeps of an audit: figures, protocol, text, versions and date; no path of this machine."""
    data = dict(report["data"])
    if data.get("kind") != "hub":
        place, options = _place(str(data["name"]))
        data["name"] = ":".join([Path(place).name, *(f"{key}={value}" for key, value in options.items())])
    return {
        **{key: report[key] for key in _KEPT if key in report},
        "against": dict(teacher),
        "data": data,
        "versions": versions(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def with_quality(card: str, audit: Mapping[str, Any], *, name: str) -> str:
    """`card` with the section and the metadata of `audit`, and everything else in it as it was."""
    section = f"{BEGIN}\n## Quality\n\n{_words(audit, name)}\n{END}"
    made = _parsed(card)
    text = made.text
    start, end = text.find(BEGIN), text.find(END)
    if 0 <= start < end:
        made.text = text[:start] + section + text[end + len(END) :]
    else:
        made.text = f"{text.rstrip()}\n\n{section}\n"
    others = [result for result in made.data.eval_results or [] if result.task_name != TASK_NAME]
    made.data.model_name = made.data.model_name or name
    made.data.eval_results = [*others, *eval_results(audit)]
    return str(made)


def _read_card(folder: Path) -> str:
    path = folder / CARD
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _parsed(card: str) -> Any:
    """A card as a huggingface_hub.ModelCard. UsageError when its metadata cannot be read."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard(card, ignore_metadata_errors=False)
    except Exception as error:  # YAML's own errors, and ValueError for what is no mapping or no model-index
        raise UsageError(
            f"the metadata of {CARD} cannot be read: {error}", "Mend the lines between its --- marks."
        ) from error


def eval_results(audit: Mapping[str, Any]) -> list[Any]:
    """The entries of a `model-index`: perplexity and bits per byte of the model, and its recovery."""
    from huggingface_hub import EvalResult

    data = audit["data"]
    place, options = _place(str(data["name"]))
    of_hub = data.get("kind") == "hub"
    common = {
        "task_type": "text-generation",
        "task_name": TASK_NAME,
        "dataset_type": place if of_hub else "text",
        "dataset_name": str(data["name"]),
        "dataset_config": options.get("config"),
        "dataset_split": options.get("split"),
        "dataset_revision": options.get("revision"),
        "dataset_args": {"sha256": data["sha256"], "documents": data["documents"], "bytes": data["bytes"]},
    }
    how = {
        "protocol": audit["protocol"],
        "windows": audit["windows"],
        "tokens": audit["tokens"],
        "dtype": audit["dtype"],
    }
    teacher = audit["against"]["name"]
    whose = {"against": teacher} | ({"teacher_bits": audit["teacher_bits"]} if audit.get("teacher_bits") else {})
    rows = (
        ("perplexity", f"perplexity per token, {audit['protocol']}", audit["ppl_student"], how),
        ("bits_per_byte", f"bits per byte, {audit['protocol']}", audit.get("bits_per_byte"), how),
        ("recovery", f"R in percent of {teacher}, {audit['protocol']}", audit.get("R"), how | whose),
    )
    return [
        EvalResult(**common, metric_type=kind, metric_name=title, metric_value=float(f"{value:.6g}"), metric_args=args)
        for kind, title, value, args in rows
        if value is not None and math.isfinite(value)
    ]


def unmeasured(name: str, against: str, *, masked: bool = False) -> str:
    """The card's section on quality before there are figures, marks included; `masked`: of a masked language model."""
    words = [name, "--against", against, "--data", "FILE"]
    if masked:
        command, what = ["eval", *words], "measures how many hidden tokens it and its teacher find."
    else:
        command = ["audit", *words, "--save"]
        what = "measures the recovery R and what each branch contributes, and writes them here."
    return (
        f"{BEGIN}\n## Quality\n\nNot measured yet. It is not the teacher, and how far it falls short depends on the "
        f"text:\n\n```\n{shlex.join(['linearize', *command])}\n```\n\n{what}\n{END}"
    )


def _words(audit: Mapping[str, Any], name: str) -> str:
    data, teacher, used = audit["data"], audit["against"], audit["versions"]
    cut = audit["reference"]
    sinks = f" and {cut['sinks']} sinks" if cut["sinks"] else ""
    bits = audit.get("teacher_bits")
    held = f", held in {KINDS[bits]}" if bits in KINDS else ""
    floor = "its window" if cut["own"] else "a window"
    rows = [
        (f"the teacher, `{teacher['name']}`{held}", audit["ppl_teacher"]),
        ("**this model**", audit["ppl_student"]),
        *((words, audit["branches"].get(key)) for key, words in _BRANCHES.items()),
        (
            f"the teacher cut to {floor} of {cut['window']} tokens, the block before{sinks}, untrained{held}",
            audit["ppl_window"],
        ),
    ]
    table = "\n".join(f"| {what} | {value:.4f} |" for what, value in rows if value is not None)
    if audit.get("R") is None:
        recovery = " ".join(audit.get("notes") or ["R is not defined here."])
    else:
        recovery = (
            f"**Recovery R = {audit['R']:.2f} %**: of what that cut loses, in nats a token, this much was won back "
            "(0 %: the cut teacher; 100 %: the teacher; below 0 %: worse than the cut)."
        )
    far = " These windows are longer than what the models were trained on." if audit.get("beyond_trained") else ""
    libraries = ", ".join(f"{key} {used[key]}" for key in ("linearize", "torch", "transformers") if key in used)
    words = ["audit", name, "--against", pinned(teacher), "--data", str(data["name"])]
    words += ["--context", str(audit["context"]), "--dtype", audit["dtype"]]
    command = shlex.join(["linearize", *words, *(["--teacher-bits", str(bits)] if held else [])])
    return (
        f"| perplexity per token | |\n|---|---|\n{table}\n\n{recovery}\n\n"
        f"Protocol `{audit['protocol']}`: {audit['windows']:,} windows, {audit['tokens']:,} scored tokens of "
        f"`{data['name']}` (sha256 `{data['sha256'][:12]}...` of {data['bytes']:,} bytes), {audit['dtype']} on "
        f"{_device(audit)}; {libraries}; {audit['date']}.{far} `{MANIFEST}` holds every digit. To check "
        f"them:\n\n```\n{command}\n```"
    )


def _place(data: str) -> tuple[str, dict[str, str]]:
    """The place of a --data and what stands behind it; see `linearize.data.load_source`."""
    match = re.fullmatch(r"(.+?)((?::[a-z_]+=[^:]+)*)", data, re.DOTALL)
    assert match is not None
    return match[1], dict(re.findall(r":([a-z_]+)=([^:]+)", match[2]))


def _device(audit: Mapping[str, Any]) -> str:
    return "a GPU" if str(audit["device"]).startswith("cuda") else "a CPU"
