"""Every command and every Python block of every page runs, in a small setting (settings.py says what is not run)."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts.conftest import hub  # noqa: F401 - a fixture
from tests.artifacts.hub_server import Hub
from tests.docs import runner, settings, world
from tests.docs.fences import blocks, mentions, pages, shell_lines

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
PAGES = [
    path
    for path in pages(ROOT)
    if path.suffix == ".md" and (*shell_lines(path), *mentions(path), *blocks(path, "python"))
]
RELOADED = {
    name: {"way": way, "max_abs_difference": 0.0, "same_text": True}
    for name, way in (("import", "import linearize"), ("remote", "trust_remote_code=True"))
}
"""An export is loaded in two fresh processes, 15 seconds: that is left to the tutorial's test."""


@pytest.fixture(scope="module")
def quick() -> Iterator[pytest.MonkeyPatch]:
    """What holds for all pages: a short `demo` text, no fresh processes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pipeline", "stream_convert", "lolcats_import"):
            patch.setattr(f"linearize.convert.{module}.verify_export", lambda *args, **kwargs: dict(RELOADED))
        patch.setenv("NO_COLOR", "1")
        patch.setattr(sys, "argv", ["linearize"])  # so it prints its own name in the commands that it proposes
        gc.freeze()  # a conversion collects garbage twice, and a test process holds a million objects that are none
        yield patch
        gc.unfreeze()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick: pytest.MonkeyPatch) -> runner.Made:
    """The world, and the model that stands for `out` where a page makes none."""
    from linearize_cli.app import main

    room = tmp_path_factory.mktemp("docs")
    (room / "world").mkdir()
    here = world.build(room / "world")
    quick.setattr("linearize.demo.text.stdlib_folder", lambda: world.stdlib(here))
    words = ["convert", str(here / world.DEFAULT), str(room / "out"), "--recipe", "lolcats", "--data", "demo"]
    bench = ["bench", str(room / "out"), "--against", "demo", *settings.SHORTER["bench"].split(), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([*words, *settings.SHORTER["convert"].split()]) == 0, err.getvalue()
        assert main(bench) == 0, err.getvalue()
    (here / "bench.json").write_text(out.getvalue())
    return runner.Made(room=room, default=room / "out")


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_every_command_of_a_page_runs(
    page: Path,
    made: runner.Made,
    hub: Hub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    world.enter(made.room / "world", tmp_path)
    world.fill(hub, made.room / "world")
    if "--tasks" in page.read_text(encoding="utf-8") and importlib.util.find_spec("lm_eval"):
        local_tasks_alone(monkeypatch, tmp_path / "my-tasks")
    skipped = settings.ELSEWHERE.get(page.name, ())
    wrong, lacking = [], set()
    for line in shell_lines(page):
        if line.language not in skipped:
            ran = runner.run(line.text, made)
            lacking |= {ran.how} & {f"lacks {package}" for package in settings.NEEDS.values()}
            fails = any(said.startswith("error:") for said in line.said)
            if bool(ran.code) != fails or "Traceback" in ran.err or "\x1b[" in ran.err:
                wrong.append(f"{line.place}: {line.text}\n    exit code {ran.code}: {ran.err[-1000:]}")
            elif ran.how == "ran" and (unlike := runner.unlike(line.said, ran)):
                wrong.append(f"{line.place}: {line.text}\n    does not print {unlike}, but\n{ran.err}{ran.out}")
    for line in mentions(page):
        ran = runner.run(line.text, made)
        if ran.code and not re.search("Missing (option|argument)|Usage: |arguments are required", ran.err + ran.out):
            wrong.append(f"{line.place}: {line.text}\n    exit code {ran.code}: {ran.err[-1000:]}")
    for code in blocks(page, "python") if "python" not in skipped else ():
        wrong += run_python(code, page, made)
    assert not wrong, "\n".join(wrong)
    if lacking:
        pytest.skip(f"all ran but lines for which this machine {', '.join(sorted(lacking))}")


def local_tasks_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The harness reads the task files of the world, not its own thousands; and keeps its cache here."""
    import datasets
    from lm_eval import tasks

    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda *args, **kwargs: manager)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "cache")


def run_python(code: str, page: Path, made: runner.Made) -> list[str]:
    """What is wrong with a block; the folder `out` is there for it, unless it makes one."""
    runner.prepare(made, makes="out" if "import_lolcats(" in code or "convert(" in code else "")
    names: dict[str, Any] = {}
    exec(settings.NAMESPACE.get(page.name, ""), names)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, page.name, "exec"), names)
    except Exception:
        return [f"{page.name}: {code}\n{traceback.format_exc()[-2000:]}"]
    return []


def test_what_is_not_run_is_on_a_page_and_what_is_new_is_noticed(
    made: runner.Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [line.text for page in PAGES for line in shell_lines(page)]
    for begin in (*settings.NOT_RUN, *settings.ARGUMENTS_ONLY, *settings.PATHS_ONLY, *settings.INSTEAD):
        assert any(begin in f"{text} " for text in texts), f"settings.py: no page has {begin!r} any more"
    for new in ("frobnicate --all", "curl example.org", "x = linearize()"):
        with pytest.raises(AssertionError, match="neither one of ours nor in"):
            runner.run(new, made)
    for wrong in ("python -m benchmarks.quality --frob", "pytest tests/nothing.py", "linearize recipes show nothing"):
        assert runner.run(wrong, made).code
    shown = (" files      ok   31 files, 4,560 bytes", "...", "")
    assert not runner.unlike(shown, runner.Ran(how="ran", err=" files  ok  2 files, 1.5 MiB\n"))
    assert runner.unlike(shown, runner.Ran(how="ran", err=" files  differs  2 files, 1.5 MiB\n"))
