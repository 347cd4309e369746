"""Hostile files by the hundred, read under watch: `python -m tests.artifacts.hostile [--seed N] [--every N]`.

Each case is a copy of a sound checkpoint, export or run folder, damaged in one way. It is read by the code that reads
it for a user, in a child with limited memory and time. It must be refused by name, or be harmless where that is
possible; a traceback, a hang, a crash, or anything read, written, run or connected to elsewhere is a failure.
Prints the counts, and exits with 1 if there is a failure. Figures: docs/trust.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.artifacts.damage import Case
from tests.artifacts.hostile_cases import cases
from tests.artifacts.watch import CANARY, Outcome, watched

KINDS = ("the family '", "already linearized (")
"""A family is refused by its own name."""
IDENTITY = {"recipe": "a", "data": "b"}


class Stop(Exception):
    """Ends a run with its checkpoints kept."""


def bases(base: Path) -> dict[str, Path]:
    """The sound folders that are damaged: a teacher, the same in shards, an export, and an unfinished run."""
    from tests.artifacts.fault_artifacts import tiny
    from tests.conftest import _build_llama

    tiny(base)  # converts base/teacher into base/made
    sharded = _build_llama(base / "sharded", shards=40_000)
    run = base / "unfinished" / ".out.linearize-run"
    _unfinished(run)
    return {"teacher": base / "teacher", "sharded": sharded, "export": base / "made", "run": run}


def _unfinished(folder: Path) -> None:
    import torch

    from linearize.convert.checkpoint import open_run, save, write_record

    track = {"first": 1.0, "loss": 0.5, "nmse_first": 1.0, "nmse": 0.5, "recent": [[0.5, 0.5]]}
    try:
        with open_run(folder.parent / "out") as run:
            write_record(run, IDENTITY | {"micro": {"align": 1, "finetune": 1}, "kept": [0]})
            for step in (1, 2):
                tensors = {"parameter/w": torch.ones(4, 2), "optimizer/exp_avg/w": torch.zeros(4, 2)}
                state = {"step": step, "seconds": 1.0, "loss_first": None, "loss_last": None, "extra": {"0": track}}
                save(run, stage="align", step=step, tensors=tensors, state=state)
            raise Stop
    except Stop:
        pass


def run_all(chosen: Iterable[Case], sound: dict[str, Path], base: Path) -> tuple[list[Case], list[Outcome], Path]:
    """Damage, read and judge; the cases, how each ended, and the folder that nothing may have touched."""
    chosen = list(chosen)
    outside = base / "outside"
    _canaries(outside, sound["teacher"])
    outcomes: dict[str, Outcome] = {}
    for runs in (False, True):
        inside = base / ("runs" if runs else "read")
        jobs = []
        for number, case in enumerate(chosen):
            if (case.base == "run") is runs:
                job = _job(case, sound[case.base], inside / str(number), outside)
                jobs.append((f"{number}", job))
        found = watched(jobs, inside=inside, outside=outside, ours=(inside,) if runs else ())
        outcomes |= {outcome.name: outcome for outcome in found}
    return chosen, [outcomes[str(number)] for number in range(len(chosen))], outside


def _canaries(outside: Path, teacher: Path) -> None:
    """Files that must not be opened, and code that must not run."""
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(teacher / name, outside / name)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    token = {"id": 259, "content": CANARY, "special": True}
    token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append(token)
    (outside / "tokenizer.json").write_text(json.dumps(tokenizer))


def _job(case: Case, sound: Path, place: Path, outside: Path) -> Callable[[], Any]:
    """Reads the damaged copy, which is made here: making it is not under watch."""
    folder = place / sound.name
    shutil.copytree(sound, folder, symlinks=True)
    ran = outside / "ran"
    evil = f"open({str(ran)!r}, 'w').write('evil')\nclass Thing: ...\n"
    if case.base != "run":
        (place / "evil.py").write_text(evil)
        if case.base != "export":
            (folder / "evil.py").write_text(evil)
    case.damage(folder, outside)
    return {"run": _read_run, "export": _read_export}.get(case.base, _read_model)(folder)


def _read_model(folder: Path) -> Callable[[], Any]:
    def read() -> Any:
        from linearize.artifacts.load import check_checkpoint, load_model, load_tokenizer
        from linearize.convert.families import require_family

        require_family(folder)
        check_checkpoint(folder, finite=True)
        load_model(folder, device="cpu")
        tokenizer = load_tokenizer(folder)
        if CANARY in tokenizer.get_vocab():
            raise AssertionError("the tokenizer outside was read")

    return read


def _read_export(folder: Path) -> Callable[[], Any]:
    def read() -> Any:
        from linearize.artifacts.load import load_model, load_tokenizer
        from linearize.artifacts.verify import verify

        report = verify(folder)
        if not report["ok"]:
            return report["problems"][0]
        load_model(folder, device="cpu")
        load_tokenizer(folder)
        return None

    return read


def _read_run(folder: Path) -> Callable[[], Any]:
    """As a resumed alignment does."""

    def read() -> Any:
        import torch
        from torch import nn

        from linearize.convert.align import LayerTrack, match
        from linearize.convert.checkpoint import STAGES, find_start, open_run
        from linearize.convert.restore import restoring, settled, state_of, unpack_state
        from linearize.convert.stages import StageState

        try:
            with open_run(folder.parent / "out") as run:
                start = find_start(run, IDENTITY, resume=True)
                settled(run, STAGES)
                assert start is not None
                weight = nn.Parameter(torch.zeros(4, 2))
                with restoring(start):
                    unpack_state(start.tensors(), {"w": weight}, torch.optim.AdamW([weight]))
                    state = StageState(**state_of(start))
                    match(state)
                    LayerTrack(**state.extra.get("0", {}))
                raise Stop
        except Stop:
            pass

    return read


def judge(chosen: list[Case], outcomes: list[Outcome], outside: Path, base: Path) -> dict[str, Any]:
    """Counts, and one line for every case that did not end as it must."""
    failures = []
    for case, outcome in zip(chosen, outcomes, strict=True):
        label = f"{case.name} ({case.base})"
        if outcome.result in ("traceback", "hung", "crashed"):
            failures.append(f"{label}: {outcome.result} {outcome.message}")
        elif outcome.result == "refused" and not any(name in outcome.message for name in (str(base), *KINDS)):
            failures.append(f"{label}: refused without a name: {outcome.message}")
        elif outcome.result == "refused" and "\n" in outcome.message:
            failures.append(f"{label}: more than one line")
        elif outcome.result == "read" and case.must:
            failures.append(f"{label}: not refused")
        failures += [f"{label}: escaped: {escape}" for escape in outcome.escapes]
    if (outside / "ran").exists():
        failures.append("code of a checkpoint ran")
    results = Counter(outcome.result for outcome in outcomes)
    return {
        "files": len(chosen),
        "refused_by_name": results["refused"],
        "harmless": results["read"],
        "tracebacks": results["traceback"],
        "hung_or_crashed": results["hung"] + results["crashed"],
        "escapes": sum(len(outcome.escapes) for outcome in outcomes) + (outside / "ran").exists(),
        "most_megabytes": max(outcome.kilobytes for outcome in outcomes) // 1024,
        "by_kind": dict(Counter(case.kind for case in chosen)),
        "failures": failures,
    }


def main(argv: list[str] | None = None) -> int:
    """Make, read, print what was found, and say by the exit code whether anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.artifacts.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the damage (0)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th case (1: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(argv)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="linearize-hostile-") as place:
        base = Path(place).resolve()
        chosen, outcomes, outside = run_all(list(cases(given.seed))[:: max(1, given.every)], bases(base), base)
        result = judge(chosen, outcomes, outside, base)
    result["seconds"] = round(time.monotonic() - begin, 1)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"{name.replace('_', ' ')}: {line}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
