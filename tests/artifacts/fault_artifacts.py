"""Everything that is written here, with what may be found of it after a crash."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Something that is written, and what may be found of it after a crash."""

    name: str
    prepare: Callable[[Path], None]
    """Makes the old state in an empty folder."""
    write: Callable[[Path], None]
    """What is to crash; and, run again, the following run."""
    state: Callable[[Path], str | None]
    """`old`, `new`, None (nothing there); any other answer or an exception: broken."""
    entries: Callable[[Path], list[str]]
    """What is in the folder after the following run that should not be."""
    allowed: tuple[str | None, ...] = ("old", "new")
    again: str = "new"
    """State after the following run."""


def only(*names: str) -> Callable[[Path], list[str]]:
    return lambda folder: sorted(path.name for path in folder.iterdir() if path.name not in names)


def _nothing(folder: Path) -> None: ...


def artifacts(base: Path) -> Iterator[Artifact]:
    """All that is written: an export, folders swapped in, checkpoints and the record of a run, single files, and all
    of a streamed run."""
    from tests.artifacts.fault_streams import streams

    yield from files()
    yield from folders()
    yield from runs()
    yield exports(base / "export")
    yield from streams(base / "streams")


def files() -> Iterator[Artifact]:
    from linearize.artifacts.atomic import write_bytes, write_json
    from linearize.errors import RefusedError
    from linearize_cli.app import main

    def mark(name: str) -> Callable[[Path], str | None]:
        def state(folder: Path) -> str | None:
            return json.loads((folder / name).read_text())["mark"] if (folder / name).exists() else None

        return state

    json_state = mark("x.json")
    yield Artifact(
        name="JSON file, new",
        prepare=_nothing,
        write=lambda folder: write_json(folder / "x.json", {"mark": "new"}),
        state=json_state,
        entries=only("x.json"),
        allowed=(None, "new"),
    )
    yield Artifact(
        name="file, replaced",
        prepare=lambda folder: write_bytes(folder / "x.json", b'{"mark": "old"}'),
        write=lambda folder: write_bytes(folder / "x.json", b'{"mark": "new"}'),
        state=json_state,
        entries=only("x.json"),
    )

    from linearize.recipe import load_recipe, recipe_path

    def copied(folder: Path) -> str | None:
        if not (folder / "my.yaml").exists():
            return None
        return "new" if load_recipe(folder / "my.yaml") == load_recipe(recipe_path("lolcats")) else "broken"

    def copy(folder: Path) -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as told:
            code = main(["recipes", "cp", "lolcats", str(folder / "my.yaml")])
        if code:
            raise (RefusedError if code == RefusedError.exit_code else OSError)(told.getvalue())

    yield Artifact(
        name="recipe, copied",
        prepare=_nothing,
        write=copy,
        state=copied,
        entries=lambda folder: [],  # where it had been put, a second copy is refused, and cleans nothing up
        allowed=(None, "new"),
    )


def folders() -> Iterator[Artifact]:
    from linearize.artifacts import atomic
    from linearize.artifacts.manifest import read_manifest, verify_manifest, write_manifest

    def write(folder: Path, mark: str, *, exchange: bool = True, replace: bool = True) -> None:
        real = atomic._exchange
        if not exchange:
            atomic._exchange = lambda one, other: False  # type: ignore[assignment]
        try:
            with atomic.atomic_directory(folder / "out", replace=replace) as work:
                (work / "model.safetensors").write_bytes(mark.encode() * 500)
                (work / "code").mkdir()
                (work / "code" / "model.py").write_text("pass\n")
                write_manifest(work, {"mark": mark})
        finally:
            atomic._exchange = real  # type: ignore[assignment]

    def state(folder: Path) -> str | None:
        if not (folder / "out").exists():
            return None
        problems = verify_manifest(folder / "out")
        return problems[0] if problems else str(read_manifest(folder / "out")["mark"])

    def mended(folder: Path) -> str | None:
        atomic.remove_leftovers(folder / "out")
        return state(folder)

    yield Artifact(
        name="folder, swapped in",
        prepare=lambda folder: write(folder, "old"),
        write=lambda folder: write(folder, "new"),
        state=state,
        entries=only("out"),
    )
    yield Artifact(
        name="folder, by two renames",
        prepare=lambda folder: write(folder, "old"),
        write=lambda folder: write(folder, "new", exchange=False),
        state=mended,
        entries=only("out"),
    )
    yield Artifact(
        name="manifest, updated",
        prepare=lambda folder: write(folder, "old"),
        write=lambda folder: _noted(folder / "out", write_manifest),
        state=state,
        entries=lambda folder: (
            only("out")(folder) + only("model.safetensors", "code", "linearize.json")(folder / "out")
        ),
    )


def _noted(out: Path, write_manifest: Callable[[Path, dict[str, Any]], Any]) -> None:
    write_manifest(out, {"mark": "new"})


def runs() -> Iterator[Artifact]:
    import torch

    from linearize.convert.checkpoint import find_start, latest, open_run, save, write_record
    from linearize.convert.early import run_folder

    identity = {"recipe": "a", "data": "b"}

    class Stop(Exception):
        """Ends a run with its checkpoints kept."""

    def run(folder: Path, steps: range) -> None:
        try:
            with open_run(folder / "out") as opened:
                start = find_start(opened, identity, resume=True)
                write_record(opened, identity | {"micro": {"align": 1, "finetune": 1}, "kept": []})
                for step in steps:
                    if start is None or step > start.step:
                        tensors = {"x": torch.full((300,), float(step))}
                        save(opened, stage="align", step=step, tensors=tensors, state={"step": step, "extra": {}})
                raise Stop
        except Stop:
            pass

    def state(folder: Path) -> str | None:
        class Seen:
            path = run_folder(folder / "out")

        found = latest(Seen)  # type: ignore[arg-type]
        if found is None:
            return None
        if found.tensors()["x"].tolist() != [float(found.step)] * 300 or found.state["step"] != found.step:
            return "broken"
        return {2: "old", 3: "old", 4: "new"}.get(found.step, f"step {found.step}")

    def left(folder: Path) -> list[str]:
        kept = ("lock", "run.json", "00-align-00000003", "00-align-00000004")
        return only(".out.linearize-run")(folder) + only(*kept)(run_folder(folder / "out"))

    yield Artifact(
        name="checkpoints, saved and rotated",
        prepare=lambda folder: run(folder, range(1, 3)),
        write=lambda folder: run(folder, range(3, 5)),
        state=state,
        entries=left,
    )
    yield Artifact(
        name="first checkpoint",
        prepare=_nothing,
        write=lambda folder: run(folder, range(4, 5)),
        state=state,
        entries=lambda folder: [name for name in left(folder) if name != "00-align-00000003"],
        allowed=(None, "new"),
    )

    def finished(folder: Path) -> None:
        with open_run(folder / "out"):
            pass

    yield Artifact(
        name="run folder, removed at the end",
        prepare=lambda folder: run(folder, range(1, 3)),
        write=finished,
        state=lambda folder: "new" if state(folder) in (None, "old") else state(folder),
        entries=only(),
        allowed=("new",),
    )


def exports(base: Path) -> Artifact:
    """A whole export of a tiny student, with the model that transformers writes, in a run folder with its lock."""
    from linearize.artifacts.atomic import atomic_directory
    from linearize.artifacts.load import check_checkpoint, no_bars
    from linearize.artifacts.verify import verify
    from linearize.convert import export
    from linearize.convert.checkpoint import open_run
    from linearize.convert.early import run_folder

    student, teacher, facts, extra = tiny(base)

    def write(folder: Path) -> None:
        if (folder / "out").exists() and any((folder / "out").iterdir()):
            return  # it is there: a convert would be refused
        with no_bars(), open_run(folder / "out") as run, atomic_directory(folder / "out") as work:
            export.write_export(work, student, teacher_folder=teacher, facts=facts)
            shutil.copytree(work, run.room / "copied", copy_function=os.link)
            export.finish_export(work, extra)

    def state(folder: Path) -> str | None:
        if not (folder / "out").exists():
            return None
        check_checkpoint(folder / "out", finite=True)
        report = verify(folder / "out")
        return "new" if report["ok"] else report["problems"][0]

    def left(folder: Path) -> list[str]:
        # A finished export is never touched again, so a run folder beside it stays until somebody removes it.
        found = only("out")(folder)
        return [name for name in found if name != run_folder(folder / "out").name]

    return Artifact(name="export", prepare=_nothing, write=write, state=state, entries=left, allowed=(None, "new"))


def tiny(base: Path) -> tuple[Any, Path, dict[str, Any], dict[str, Any]]:
    """A converted model in memory, the folder of its teacher, and what its card and manifest say."""
    import torch

    from linearize.convert import export, pipeline
    from tests.conftest import _build_llama

    teacher = _build_llama(base / "teacher", initializer_range=0.2, max_position_embeddings=256)
    text = base / "text.txt"
    text.write_text("Nothing is lost when a writer dies. " * 600)
    kept: dict[str, Any] = {}
    write_export, finish_export, verify_export = export.write_export, export.finish_export, pipeline.verify_export

    def keep_facts(folder: Path, student: Any, *, teacher_folder: Path, facts: Any, **more: Any) -> None:
        kept.update(student=student, facts=facts)
        write_export(folder, student, teacher_folder=teacher_folder, facts=facts, **more)

    def keep_extra(folder: Path, extra: Any) -> None:
        kept["extra"] = extra
        finish_export(folder, extra)

    export.write_export, export.finish_export = keep_facts, keep_extra  # type: ignore[assignment]
    pipeline.verify_export = lambda folder, expected, **places: {}  # type: ignore[assignment]
    options = ["context=32", "mixer.window=8", "mixer.feature_dim=8", "device=cpu", "align.tokens=256"]
    options += ["align.batch_tokens=128", "finetune.tokens=256", "finetune.batch_tokens=128"]
    try:
        torch.set_num_threads(1)  # this process forks
        pipeline.convert(teacher, base / "made", recipe="lolcats", data=str(text), overrides=options)
    finally:
        export.write_export, export.finish_export = write_export, finish_export
        pipeline.verify_export = verify_export
    return kept["student"], teacher, kept["facts"], kept["extra"]
