"""`linearize report`: read a conversion's folder, measure what needs its teacher and text, write one HTML file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize._version import __version__
from linearize.artifacts.exports import require_export
from linearize.artifacts.manifest import read_manifest
from linearize.errors import RefusedError, UsageError
from linearize.report import sections, sections_cost
from linearize.report.attention_section import attention
from linearize.report.bench import Curve, conditions, read_bench
from linearize.report.facts import Memory, mapping, memory_of, read_history, text, whole
from linearize.report.page import MARK, page
from linearize.teacher_bits import require_comparison_bits

TITLES = {
    "quality": "Quality",
    "training": "Training",
    "attention": "Attention",
    "cost": "Memory and speed",
    "recipe": "Recipe",
    "environment": "Environment",
}


def report(
    run: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    against: Any = None,
    data: str | None = None,
    bench: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Write the report of the export `run` into one self-contained HTML file.

    Args:
        run: the folder that `convert` made.
        out: the file; None: RUN-report.html beside RUN. Only a report is replaced.
        against, data: the teacher and some text, which the audit and the attention maps need; both or neither.
        bench: rows that `linearize bench` printed, as JSON or JSON lines.
        layer, head: of the attention maps that are shown first.
        context: tokens of one text of the audit; see `linearize.audit`.
        teacher_bits: 8 or 4: hold the teacher in so many bits; see `linearize.teacher_bits`.

    Returns:
        file, bytes, sections (those with content), left_out (of what lacks its facts, the line that says so), audit
        (what `linearize.audit` returned, or what the folder holds of an earlier one, or None), attention (entropy and
        monotonicity of each layer and head, or None).

    Raises:
        UsageError: bad input, such as a folder that no conversion made. RefusedError: `out` exists and is no report, or
            too little text.
    """
    from linearize.artifacts.kind import is_masked, require_causal
    from linearize.artifacts.load import resolve

    name = os.fspath(run)
    folder = resolve(name)
    require_export(folder, name)
    if (against is None) != (data is None):
        lacking = "--data" if data is None else "--against"
        raise UsageError(f"{lacking}: missing; the audit needs both the teacher and a text", "Give both, or neither.")
    if against is None and (layer is not None or head is not None):
        raise UsageError(
            "--layer and --head choose an attention map, which needs --against and --data", "Give them, too."
        )
    require_comparison_bits(teacher_bits, against)
    if against is not None:
        require_causal(folder, name, f"Leave out --against; measure it with: linearize eval {name} --against TEACHER")
    target = target_of(folder, name, out)
    manifest = read_manifest(folder)
    curves = read_bench(bench) if bench is not None else []
    from linearize.convert.plan import inspect

    found = inspect(folder)
    shown = None
    audit: Mapping[str, Any] | None = mapping(manifest, "audit") or None
    if against is not None and data is not None:
        from linearize.evaluate.recovery import audit as measure
        from linearize.report.measure import attention_facts

        require_choice(found, layer, head)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "teacher_bits": teacher_bits}
        audit = measure(folder, against=against, data=data, context=context, **how)
        shown = attention_facts(folder, against, data=data, layer=layer, head=head, **how)
    history = read_history(folder)
    made = render(name, folder, manifest, found=found, history=history, audit=audit, shown=shown, curves=curves,
                  measured_on="" if bench is None else conditions(bench), masked=is_masked(folder))  # fmt: skip
    return write(target, made) | {
        "sections": [key for key, body in made.items() if key and body],
        "left_out": left_out(history, audit, shown, curves, masked=is_masked(folder)),
        "audit": None if audit is None else dict(audit),
        "attention": None if shown is None else shown["rows"],
    }


def render(
    name: str,
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    found: Mapping[str, Any],
    history: Mapping[str, Any],
    audit: Mapping[str, Any] | None,
    shown: Mapping[str, Any] | None,
    curves: list[Curve],
    measured_on: str,
    masked: bool = False,
) -> dict[str, str]:
    """The page's HTML by section; under "" the whole page. `masked`: the model predicts no next token."""
    memory: Memory | None = memory_of(found)
    teacher, recipe = text(mapping(manifest, "teacher").get("name")), mapping(manifest, "recipe")
    # By their names alone: a path of this machine would be in the way of whoever reads the report elsewhere.
    about = (shlex.quote(folder.name if Path(name).expanduser().is_dir() else name), shlex.quote(teacher or "TEACHER"))
    adds = f"linearize report {about[0]} --against {about[1]} --data TEXT"
    again = f"linearize convert {about[1]} OUT --recipe {shlex.quote(text(recipe.get('name')) or 'RECIPE')} --data TEXT"
    bench = f"linearize bench {about[0]} --against {about[1]} --out bench.jsonl; {adds} --bench bench.jsonl"
    layers = layers_of(found)
    if masked:
        adds = bench = f"linearize eval {about[0]} --against {about[1]} --data TEXT"
    made = {
        "quality": sections.quality(audit, adds, masked=masked),
        "training": sections.training(manifest, history, again),
        "attention": attention(shown, "" if audit is None else adds),
        "cost": sections_cost.cost(memory, curves, measured_on, "" if masked else bench),
        "recipe": sections_cost.recipe(manifest),
        "environment": sections_cost.environment(manifest),
    }
    paper, summary = text(recipe.get("paper") or ""), text(recipe.get("summary") or "").rstrip(".")
    title = f"{teacher or name}, linearized with {text(recipe.get('name')) or 'a recipe'}"
    lede = ". ".join(part for part in (summary, paper, f"Export: {text(manifest.get('name') or about[0])}") if part)
    made[""] = page(
        name=title,
        lede=f"{lede}.",
        cards=sections.cards(manifest, audit, memory, layers),
        sections=[(key, TITLES[key], body) for key, body in made.items()],
        footer=f"Made by linearize {__version__} from the export's own files. All of it is inside this one file.",
    )
    return made


def layers_of(found: Mapping[str, Any]) -> str:
    """`8`, or `6 of 8`."""
    kinds = [row.get("mixer") for row in found["layers"]] if isinstance(found.get("layers"), list) else []
    linear = kinds.count("linear")
    return str(linear) if linear == len(kinds) else f"{linear} of {len(kinds)}"


def left_out(
    history: Mapping[str, Any],
    audit: Mapping[str, Any] | None,
    shown: Mapping[str, Any] | None,
    curves: list[Curve],
    *,
    masked: bool,
) -> list[str]:
    """What the report does not hold, one line each."""
    lines = [
        (bool(history), "losses over time: the export has no history.json; converting again adds it"),
        *([] if masked else [
        (audit is not None, "recovery and branch audit: add --against TEACHER --data TEXT"),
        (shown is not None, "attention maps: add --against TEACHER --data TEXT"),
        (bool(curves), "measured speed and memory: add --bench FILE, the rows of linearize bench --json"),
        ]),
    ]  # fmt: skip
    return [line for there, line in lines if not there]


def require_choice(found: Mapping[str, Any], layer: int | None, head: int | None) -> None:
    """UsageError for a layer or head that the model does not have."""
    counts = {"--layer": (layer, len(found["layers"])), "--head": (head, whole(found.get("heads")) or 0)}
    for option, (wanted, count) in counts.items():
        if wanted is not None and not 0 <= wanted < count:
            raise UsageError(
                f"{option} {wanted}: the model has {count} of them, counted from 0", f"Use 0 to {count - 1}."
            )


def target_of(folder: Path, name: str, out: str | os.PathLike[str] | None) -> Path:
    """Where the report goes, checked before any work.

    Raises:
        UsageError: its folder is not there, or it is a folder. RefusedError: it is a file of another kind.
    """
    if out is None:
        from linearize.artifacts.download import display_name

        here = Path(name).expanduser().is_dir()
        called = folder.name if here else display_name(name, folder).rpartition("/")[2]  # a snapshot's name is a commit
        target = (Path(os.path.abspath(folder)).parent if here else Path.cwd()) / f"{called}-report.html"
    else:
        target = Path(os.path.abspath(Path(out).expanduser()))
    if target.is_dir():
        raise UsageError(f"--out {target}: is a folder", "Name a file, such as report.html.")
    if not target.parent.is_dir():
        raise UsageError(f"--out {target}: there is no folder {target.parent}", "Make it first.")
    if target.is_file():
        with open(target, "rb") as file:
            ours = MARK.encode() in file.read(200)
        if not ours:
            raise RefusedError(f"{target}: exists and is not a report", "Choose another --out.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise RefusedError(f"{target.parent} cannot be written to", "Choose another place with --out.")
    return target


def write(target: Path, made: Mapping[str, str]) -> dict[str, Any]:
    """Put the page in its place, whole or not at all."""
    from linearize.artifacts.atomic import write_bytes

    content = made[""].encode("utf-8", "replace")
    write_bytes(target, content)
    return {"file": str(target), "bytes": len(content)}
