"""Conversions killed with SIGKILL at random places of every stage: `python -m tests.convert.kills [--kills N]`.

A child converts a tiny model and is killed at a random call of a Python function within a stage: in the middle of a
step, of an optimiser, of a checkpoint, of a file. It is resumed, often killed once more, and resumed to its end. Every
file of the export must then be the one, bit for bit, of a conversion that nothing disturbed. Figures: docs/trust.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("calibrate", "align", "finetune", "merge", "export", "verify")
OPTIONS = (
    "context=32", "mixer.window=8", "device=cpu", "seed=7", "calibrate.tokens=256",
    "align.tokens=768", "align.batch_tokens=128", "finetune.tokens=768", "finetune.batch_tokens=128",
    "finetune.lora.dropout=0.1",
)  # fmt: skip
RECIPE = "lolcats"


def reference(base: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What an undisturbed conversion makes, and how many calls each stage takes."""
    counts = base / "counts.json"

    def undisturbed() -> None:
        calls = dict.fromkeys(STAGES, 0)
        _convert(base, base / "reference" / "out", lambda stage: _counting(calls, stage), checkpoints=random.Random(0))
        counts.write_text(json.dumps(calls))

    if _child(undisturbed) != 0:
        raise RuntimeError("the conversion fails even undisturbed")
    return contents(base / "reference" / "out"), json.loads(counts.read_text())


def contents(out: Path) -> dict[str, Any]:
    """All of an export that must be the same again: the digest of every file, and every figure that is no duration."""
    from linearize.artifacts.atomic import sha256
    from linearize.artifacts.manifest import MANIFEST, read_manifest

    manifest = read_manifest(out)
    for stage in manifest["figures"]["stages"].values():
        stage.pop("seconds", None)
    return {path.name: sha256(path) for path in out.iterdir() if path.name != MANIFEST} | {
        "figures": manifest["figures"]
    }


def run_chain(base: Path, number: int, seed: int, whole: dict[str, Any], calls: dict[str, int]) -> dict[str, Any]:
    """One conversion, killed up to twice, and its end: {killed: stages, differing: names, failed: what went wrong}."""
    rng = random.Random(f"{seed}:{number}")
    out = base / str(number) / "out"  # its name is in the card
    first = STAGES[number % len(STAGES)]
    later = [stage for stage in STAGES if STAGES.index(stage) >= STAGES.index(first)]
    plan = [(first, rng.randrange(calls[first]))]
    if rng.random() < 0.5:
        stage = rng.choice(later)
        plan.append((stage, rng.randrange(calls[stage])))
    killed, failed = [], ""
    for stage, at in plan:

        def dying(stage: str = stage, at: int = at) -> None:
            _convert(base, out, lambda name: _dying(at) if name == stage else None, checkpoints=rng)

        code = _child(dying)
        if code == -signal.SIGKILL:
            killed.append(stage)
            continue
        failed = f"{stage} at call {at}: ended with {code}" if code else ""
        break  # it is over: a resumed stage is shorter
    if not failed and not out.exists() and _child(lambda: _convert(base, out, lambda name: None, checkpoints=rng)) != 0:
        failed = f"killed in {', '.join(killed)}: cannot be resumed"
    found = contents(out) if out.exists() else {}
    differing = sorted(name for name in {**whole, **found} if whole.get(name) != found.get(name))
    left = sorted(path.name for path in out.parent.iterdir() if path != out)
    # Killed between the last rename and its own end, a conversion leaves its run folder beside the finished export.
    allowed = {".out.linearize-run"} if killed and killed[-1] == "export" else set()
    return {
        "killed": killed,
        "plan": plan,
        "differing": differing,
        "failed": failed,
        "left": sorted(set(left) - allowed),
    }


def _convert(base: Path, out: Path, hook: Callable[[str], Any], *, checkpoints: random.Random) -> None:
    """A conversion that goes on where the last one stopped; `hook(stage)` gives a profiler for the stage, or None."""
    from linearize.convert import checkpoint, export, pipeline, verify

    def watched(stage: str, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def run(*args: Any, **more: Any) -> Any:
            sys.setprofile(hook(stage))
            try:
                return real(*args, **more)
            finally:
                sys.setprofile(None)

        setattr(owner, name, run)

    watched("calibrate", pipeline, "calibrate")
    watched("align", pipeline, "align_layers")
    watched("finetune", pipeline, "finetune_model")
    watched("merge", export, "merge")
    watched("export", export, "write_export")
    watched("export", export, "finish_export")
    watched("verify", pipeline, "verify_export")
    # The fresh processes are another test's matter; what is copied for them is not.
    verify._ask = lambda mode, copy, room, expected, device: (  # type: ignore[assignment]
        expected.logits,
        {"tokens": expected.tokens, "text": expected.text},
    )
    checkpoint.Run.due = lambda self: checkpoints.random() < 0.5  # type: ignore[method-assign]
    pipeline.convert(
        base / "teacher", out, recipe=RECIPE, data=str(base / "text.txt"), overrides=list(OPTIONS), resume=True
    )


def _counting(calls: dict[str, int], stage: str) -> Callable[..., None]:
    def profile(frame: Any, event: str, value: Any) -> None:
        calls[stage] += event == "call"

    return profile


def _dying(at: int) -> Callable[..., None]:
    left = [at]

    def profile(frame: Any, event: str, value: Any) -> None:
        if event == "call":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return profile


def _child(work: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_all(base: Path, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """Chains of kills until there were `kills`; counts, and one line for everything that went wrong."""
    import torch

    from tests.conftest import _build_llama

    torch.set_num_threads(1)  # this process forks
    _build_llama(base / "teacher", initializer_range=0.2, max_position_embeddings=256)
    (base / "text.txt").write_text("Nothing is lost when a writer dies. " * 600)
    whole, calls = reference(base)
    killed: Counter[str] = Counter()
    failures: list[str] = []
    chains = 0
    while killed.total() < kills and chains < 2 * kills:
        found = run_chain(base, chains, seed, whole, calls)
        killed.update(found["killed"])
        label = f"chain {chains} {found['plan']}"
        failures += [f"{label}: {found['failed']}"] if found["failed"] else []
        failures += [f"{label}: another {name}" for name in found["differing"]]
        failures += [f"{label}: left {name}" for name in found["left"]]
        chains += 1
    return {
        "kills": killed.total(),
        "conversions": chains,
        "not_bit_for_bit": len({line.split(":")[0] for line in failures}),
        "by_stage": dict(killed),
        "calls": calls,
        "failures": failures,
    }


def main(argv: list[str] | None = None) -> int:
    """Kill, resume, compare, print, and say by the exit code whether anything differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.convert.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the places (0)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(argv)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="linearize-kills-") as place:
        result = run_all(Path(place), kills=given.kills, seed=given.seed)
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
