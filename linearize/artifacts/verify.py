"""`linearize verify`: recompute what an export's manifest says, as far as it can be recomputed from what is at hand.

Files, weights, recipe and figures always; the teacher and the text where they are given. The code that wrote the export
and the versions of the libraries may differ from those installed: that is said, and is no fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from linearize.artifacts.config_reader import CONFIG, build_config, read_config
from linearize.artifacts.download import CARD, HUB_FILES, TERMS, brief, commit_of
from linearize.artifacts.exports import require_export
from linearize.artifacts.fit import key_problems
from linearize.artifacts.load import check_checkpoint, load_tokenizer, no_bars, resolve
from linearize.artifacts.manifest import EDITABLE, MANIFEST, code_digest, read_manifest, verify_manifest, versions
from linearize.artifacts.quality import BEGIN, END, with_quality
from linearize.artifacts.weights import digest_checkpoint, read_tensors, require_finite, require_inside
from linearize.errors import LinearizeError, RefusedError, UsageError
from linearize.modeling.family_table import auto_class

GOOD, BAD, UNKNOWN, NOTED = "ok", "differs", "not checked", "noted"


@dataclass(kw_only=True)
class _Findings:
    """What was checked, one row each, and what is wrong."""

    rows: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, problems: list[str], detail: str) -> None:
        """A check that was made: without problems it is good, and `detail` says what was compared."""
        self.problems += problems
        self.rows.append({"check": what, "result": BAD if problems else GOOD, "detail": _few(problems) or detail})

    def say(self, what: str, result: str, detail: str) -> None:
        """Something that is no fault, whatever it is."""
        self.rows.append({"check": what, "result": result, "detail": detail})
        if result == NOTED:
            self.notes.append(f"{what}: {detail}")


def verify(
    out: str | os.PathLike[str], *, against: str | os.PathLike[str] | None = None, data: str | None = None
) -> dict[str, Any]:
    """Compare an export with its manifest.

    Args:
        out: the export: a folder or a Hub id.
        against: its teacher; None: the teacher's digest is not checked.
        data: the text that it was trained on; None: the digest of the text is not checked.

    Returns:
        out, ok (no problem was found), problems and notes (one line each), checks (rows of check, result and detail;
        result: ok | differs | noted | not checked), and files: listed, bytes, unlisted.

    Raises:
        UsageError: there is no such folder, teacher or text, or OUT is no finished export.
    """
    folder = resolve(out)
    require_export(folder, os.fspath(out))
    teacher = None if against is None else resolve(against)
    found = _Findings()
    report: dict[str, Any] = {"out": os.fspath(out), "ok": False, "files": {"listed": 0, "bytes": 0, "unlisted": []}}
    try:
        manifest = read_manifest(folder)
    except UsageError as error:
        found.add("manifest", [str(error)], "")
    else:
        report["files"] = _files(folder, manifest, found, downloaded=commit_of(folder) is not None)
        _weights(folder, manifest, found)
        _recipe(folder, manifest, found)
        _figures(folder, manifest, found)
        _teacher(teacher, manifest, found)
        _data(folder, data, manifest, found)
        _environment(manifest, found)
    report |= {"ok": not found.problems, "checks": found.rows, "problems": found.problems, "notes": found.notes}
    return report


def _files(folder: Path, manifest: Mapping[str, Any], found: _Findings, *, downloaded: bool) -> dict[str, Any]:
    """Size and sha256 of every listed file, and the names of those that are not listed."""
    listed = manifest["files"]
    problems = verify_manifest(folder, without_code=downloaded)
    unlisted = sorted(set(_present(folder)) - set(listed) - {MANIFEST, *EDITABLE})
    for name in unlisted:  # of code and weights `verify_manifest` has said it
        path = folder / name
        if any(fnmatch(name, pattern) for pattern in HUB_FILES) and not any(fnmatch(name, p) for p in (CARD, *TERMS)):
            problem = f"{path} is not in {MANIFEST}: it was added later"
            problems += [] if problem in problems else [problem]
    sizes = [
        entry["size"] for entry in listed.values() if isinstance(entry, dict) and isinstance(entry.get("size"), int)
    ]
    found.add("files", problems, f"{len(listed)} files, {sum(sizes):,} bytes, each with its sha256")
    if unlisted and not problems:
        found.say("unlisted files", NOTED, _few(unlisted))
    return {"listed": len(listed), "bytes": sum(sizes), "unlisted": unlisted}


def _present(folder: Path) -> list[str]:
    """Names of what lies in `folder`, without hidden folders and Python's caches."""
    names = []
    for root, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        place = Path(root)
        links = [name for name in inner if (place / name).is_symlink()]
        names += [
            (place / name).relative_to(folder).as_posix() for name in (*files, *links) if not name.startswith(".")
        ]
    return names


def _weights(folder: Path, manifest: Mapping[str, Any], found: _Findings) -> None:
    """Every weight finite, none missing, none left over, as many numbers as the manifest says."""
    try:
        read_config(folder)
        require_finite(folder)
        problems = _incomplete(folder)
        numbers = sum(info.elements for _, info in read_tensors(folder).values())
    except (UsageError, RefusedError) as error:
        problems, numbers = [str(error)], 0
    stated = _at(manifest, "figures", "parameters", "model")
    if not problems and isinstance(stated, int) and stated != numbers:
        problems.append(f"the weights in {folder} hold {numbers:,} numbers, and {MANIFEST} says {stated:,}")
    # A damaged file has been named by its hash: once is enough.
    found.add(
        "weights", [p for p in problems if p not in found.problems], f"{numbers:,} numbers, all finite, no key lost"
    )


def _incomplete(folder: Path) -> list[str]:
    """Weights that the model of the config lacks or does not know. Nothing is allocated."""
    config = build_config(folder)
    try:
        with no_bars():
            _, info = auto_class(config).from_pretrained(
                folder,
                config=config,
                device_map="meta",
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except LinearizeError:
        raise
    except Exception as error:
        return [f"{folder} cannot be loaded: {type(error).__name__}: {brief(error)}"]
    return key_problems(folder, config, info)


def _recipe(folder: Path, manifest: Mapping[str, Any], found: _Findings) -> None:
    """The recipe's digest, and that the config describes the mixer of the recipe."""
    recipe = manifest.get("recipe")
    if recipe is None and "recipe_digest" not in manifest:
        found.say("recipe", UNKNOWN, "it was made without one")  # imported weights
        return
    if not isinstance(recipe, dict):
        found.add("recipe", [f"{folder / MANIFEST} holds no recipe"], "")
        return
    # As in Recipe.digest, but of the values as they were: a later schema may have keys that this recipe has not.
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    problems = []
    if hashlib.sha256(canonical.encode()).hexdigest() != manifest.get("recipe_digest"):
        problems.append(f"the recipe in {folder / MANIFEST} is not the one of its recipe_digest")
    mixer = recipe.get("mixer")
    try:
        config = read_config(folder)
    except UsageError:
        config = {}  # the weights say it
    for key, value in (mixer if isinstance(mixer, dict) else {}).items():
        if f"mixer_{key}" in config and config[f"mixer_{key}"] != value:
            problems.append(f"{folder / CONFIG} has mixer_{key} {config[f'mixer_{key}']!r}, the recipe {value!r:.60}")
    found.add("recipe", problems, f"{recipe.get('name')}, digest {str(manifest.get('recipe_digest'))[:12]}")


# What the card says, where, and where the manifest says it. A card may be edited: what it no longer says is no fault.
_CARD = (
    (r"^\| parameters \| ([\d,]+) \|", ("figures", "parameters", "model"), "{:,}"),
    (r"^\| memory of the linear layers for one sequence \| ([\d,]+) bytes", ("figures", "state_bytes"), "{:,}"),
    (r"^\| trained on \| ([\d,]+) tokens of alignment", ("figures", "stages", "align", "tokens"), "{:,}"),
    (r"^\| trained on \| .* and ([\d,]+) of finetuning", ("figures", "stages", "finetune", "tokens"), "{:,}"),
    (r"sha256 `([0-9a-f]{12})\.\.\.`", ("data", "sha256"), "{:.12}"),
    (r"^- align: running mean of the training loss (\S+) at", ("figures", "stages", "align", "loss_first"), "{:.4g}"),
    (r"^- align: .* and (\S+) at the end", ("figures", "stages", "align", "loss_last"), "{:.4g}"),
    (r"^- align: training loss (\S+) in its only", ("figures", "stages", "align", "loss_first"), "{:.4g}"),
    (r"^- finetune: running mean of the .* loss (\S+) at", ("figures", "stages", "finetune", "loss_first"), "{:.4g}"),
    (r"^- finetune: .* and (\S+) at the end", ("figures", "stages", "finetune", "loss_last"), "{:.4g}"),
    (r"^- finetune: training loss (\S+) in its only", ("figures", "stages", "finetune", "loss_first"), "{:.4g}"),
    (r"moved a logit by (\S+) at most", ("figures", "merge_error", "cast", "max"), "{:.2g}"),
    (r"a logit differs by at most (\S+) from training's", ("figures", "merge_error", "quantised", "max"), "{:.2g}"),
)  # fmt: skip


def _figures(folder: Path, manifest: Mapping[str, Any], found: _Findings) -> None:
    """The card's figures against the manifest's, and the manifest's against each other."""
    problems = []
    layers = _at(manifest, "figures", "layers")
    for row in layers if isinstance(layers, list) else ():
        nmse, explained = _at(row, "nmse"), _at(row, "explained")
        numbers = isinstance(nmse, float) and isinstance(explained, float)
        if numbers and abs(1.0 - nmse - explained) > 1e-9:
            problems.append(
                f"{folder / MANIFEST}: layer {_at(row, 'layer')} explains {explained:.4g} at an error of {nmse:.4g}"
            )
    ways = _at(manifest, "figures", "verification")
    for way, figures in ways.items() if isinstance(ways, dict) else ():
        if _at(figures, "same_text") is not True:
            problems.append(f"{folder / MANIFEST}: the export was not verified ({way})")
    card, compared = _read_card(folder), 0
    for pattern, place, form in _CARD:
        stated, match = _at(manifest, *place), re.search(pattern, card, re.MULTILINE)
        if match is None or not isinstance(stated, (int, float, str)):
            continue
        compared += 1
        if form.format(stated) != match[1]:
            problems.append(f"{folder / CARD} says {match[1]} for {'.'.join(place)}, {MANIFEST} {form.format(stated)}")
    problems += _audit(folder, manifest, card)
    found.add("figures", problems, f"{compared} figures of the card are those of {MANIFEST}")


def _audit(folder: Path, manifest: Mapping[str, Any], card: str) -> list[str]:
    """The section of a saved audit, as the manifest's figures would write it today."""
    audit = manifest.get("audit")
    if audit is None or BEGIN not in card:
        return []
    try:
        written = with_quality(card, audit, name=str(manifest.get("name") or folder.name))
    except LinearizeError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"the audit in {folder / MANIFEST} cannot be read: {type(error).__name__}: {error}"]
    # People may have worded it otherwise: only the numbers are compared.
    ours, theirs = (re.findall(r"\d[\d.,]*", text.partition(BEGIN)[2].partition(END)[0]) for text in (card, written))
    return [] if ours == theirs else [f"the audit in {folder / CARD} has other figures than {MANIFEST}"]


def _read_card(folder: Path) -> str:
    try:
        require_inside(folder, folder / CARD)
        if not (folder / CARD).is_file():
            return ""
        with open(folder / CARD, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except (OSError, UsageError):
        return ""


def _teacher(teacher: Path | None, manifest: Mapping[str, Any], found: _Findings) -> None:
    stated = _at(manifest, "teacher", "digest")
    name = _at(manifest, "teacher", "name")
    if teacher is None:
        found.say("teacher", UNKNOWN, f"{name}: give it with --against")
        return
    check_checkpoint(teacher, finite=False)
    same = digest_checkpoint(teacher) == stated
    found.add("teacher", [] if same else [f"{teacher} is not the teacher {name!r}: its digest is another"], f"{name}")


def _data(folder: Path, data: str | None, manifest: Mapping[str, Any], found: _Findings) -> None:
    """The text that was read, and the windows of tokens that were made of it."""
    stated = manifest.get("data")
    if stated is None:
        found.say("data", UNKNOWN, "it was made without any")
        return
    name, size = _at(stated, "name"), _at(stated, "bytes")
    if data is None:
        found.say("data", UNKNOWN, f"{name}: give it with --data")
        return
    if not isinstance(size, int) or size < 1:
        found.add("data", [f"{folder / MANIFEST} does not say how much text was read"], "")
        return
    from linearize.data import load_source

    # Reading stops with the document that reaches the limit: the one with which the conversion stopped.
    texts, source = load_source(data, split="train" if data == "demo" else None, limit_bytes=size, packed=True)
    problems = []
    if source.sha256 != _at(stated, "sha256"):
        problems.append(f"{data} is not the text {name!r}: its first {source.bytes:,} bytes have another sha256")
    recipe, digest = manifest.get("recipe"), _at(stated, "windows_digest")
    if not problems and isinstance(recipe, dict) and isinstance(digest, str):
        try:
            same = _windows_digest(folder, texts, recipe, name=str(name)) == digest
        except (UsageError, RefusedError) as error:
            problems.append(str(error))
        else:
            problems += [] if same else [
                f"{data} gives other windows than those that were trained on: the tokenizer is another, or the recipe"
            ]  # fmt: skip
    found.add("data", problems, f"{name}, {size:,} bytes, and the windows of tokens made of them")


def _windows_digest(folder: Path, texts: list[str], recipe: Mapping[str, Any], *, name: str) -> str:
    """sha256 of the windows that a conversion by `recipe` makes of `texts`, as its task cuts and changes them.

    Raises:
        UsageError, RefusedError: it would make none.
    """
    from linearize.data import documents_apart
    from linearize.task import task_of

    context, share, seed = (recipe.get(key, 0) for key in ("context", "repeats", "seed"))
    numbers = all(isinstance(value, (int, float)) for value in (context, share, seed))
    if not (numbers and isinstance(context, int) and isinstance(seed, int) and context > 1):
        raise UsageError(f"{folder / MANIFEST} does not say how the text was cut into windows")
    tokenizer = load_tokenizer(folder)
    task = task_of(build_config(folder), tokenizer, apart=documents_apart(name))
    windows = task.windows(texts, tokenizer, context)
    if share:
        windows = task.repeated(windows, tokenizer, share, seed=seed)
    return hashlib.sha256(windows.tobytes()).hexdigest()


def _environment(manifest: Mapping[str, Any], found: _Findings) -> None:
    """The code and the versions: they may differ, and then figures may not come out the same."""
    if manifest.get("code_digest") == code_digest():
        found.say("code", GOOD, "the installed linearize is the one that wrote it")
    else:
        found.say("code", NOTED, "the installed linearize is not the one that wrote it")
    then, now = manifest.get("versions"), versions()
    then = then if isinstance(then, dict) else {}
    other = [f"{name} {then[name]} (now {now.get(name, 'absent')})" for name in then if then[name] != now.get(name)]
    found.say("versions", NOTED if other else GOOD, ", ".join(other) or f"{len(then)} as installed")


def _at(values: Any, *path: str) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _few(lines: list[str]) -> str:
    return "; ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else "")
