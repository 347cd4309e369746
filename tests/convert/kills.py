"""Conversions killed with SIGKILL at random places of every stage: `python -m tests.convert.kills [--streamed]`.

A child converts a tiny model and is killed at a random call of a Python function within a stage: in the middle of a
step, of an optimiser, of a checkpoint, of a file. It is resumed, often killed once more, and resumed to its end. Every
file of the export must then be the one, bit for bit, of a conversion that nothing disturbed. Figures: docs/trust.md.
"""

from __future__ import annotations

import argparse
import gc
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
STREAMED = ("embed", "calibrate", "align", "states", "shards", "progress", "export", "verify")
"""Of a streamed conversion: hidden states, weights of a layer, and what says how far it is, are written in turn."""
COMMON = ("context=32", "mixer.window=8", "device=cpu", "seed=7", "align.tokens=768", "align.batch_tokens=128")
OPTIONS = (
    *COMMON, "calibrate.tokens=256", "finetune.tokens=768", "finetune.batch_tokens=128", "finetune.lora.dropout=0.1",
)  # fmt: skip
STREAMED_OPTIONS = (*COMMON, "calibrate.tokens=64", "finetune.tokens=0")
RECIPE = "lolcats"
SHARD_BYTES = 50_000
"""Of a streamed export: more than one file."""


def reference(base: Path, *, streamed: bool = False) -> tuple[dict[str, Any], dict[str, int]]:
    """What an undisturbed conversion makes, and how many calls each stage takes."""
    counts = base / "counts.json"

    def undisturbed() -> None:
        calls = dict.fromkeys(STREAMED if streamed else STAGES, 0)
        out = base / "reference" / "out"
        _convert(base, out, lambda stage: _counting(calls, stage), checkpoints=random.Random(0), streamed=streamed)
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


def run_chain(
    base: Path, number: int, seed: int, whole: dict[str, Any], calls: dict[str, int], *, streamed: bool = False
) -> dict[str, Any]:
    """One conversion, killed up to twice, and its end: {killed: stages, differing: names, failed: what went wrong}."""
    rng = random.Random(f"{seed}:{number}")
    out = base / str(number) / "out"  # its name is in the card
    stages = tuple(calls)
    first = stages[number % len(stages)]
    later = [stage for stage in stages if stages.index(stage) >= stages.index(first)]
    plan = [(first, rng.randrange(calls[first]))]
    if rng.random() < 0.5:
        stage = rng.choice(later)
        plan.append((stage, rng.randrange(calls[stage])))
    killed, failed = [], ""
    for stage, at in plan:

        def dying(stage: str = stage, at: int = at) -> None:
            profile = _dying(at)  # one for all calls of the stage: a streamed conversion has some a layer
            _convert(base, out, lambda name: profile if name == stage else None, checkpoints=rng, streamed=streamed)

        code = _child(dying)
        if code == -signal.SIGKILL:
            killed.append(stage)
            continue
        failed = f"{stage} at call {at}: ended with {code}" if code else ""
        break  # it is over: a resumed stage is shorter

    def ending() -> None:
        _convert(base, out, lambda name: None, checkpoints=rng, streamed=streamed)

    if not failed and not out.exists() and _child(ending) != 0:
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


def _convert(
    base: Path, out: Path, hook: Callable[[str], Any], *, checkpoints: random.Random, streamed: bool = False
) -> None:
    """A conversion that goes on where the last one stopped; `hook(stage)` gives a profiler for the stage, or None."""
    from linearize.artifacts.shards import ShardWriter
    from linearize.convert import checkpoint, export, pipeline, stream_convert, stream_run, verify
    from linearize.convert.early import run_folder

    def watched(stage: str, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def run(*args: Any, **more: Any) -> Any:
            sys.setprofile(hook(stage))
            try:
                return real(*args, **more)
            finally:
                sys.setprofile(None)

        setattr(owner, name, run)

    if streamed:
        stream_convert.SHARD_BYTES = SHARD_BYTES
        watched("embed", stream_convert, "begin")
        watched("calibrate", stream_run, "calibrate")
        watched("align", stream_run, "align_layers")
        watched("states", stream_run, "_advance")
        watched("shards", ShardWriter, "write")
        watched("shards", ShardWriter, "finish")
        watched("progress", stream_run, "_save")
        watched("export", export, "write_beside")
        watched("verify", stream_convert, "verify_streamed")
    else:
        watched("calibrate", pipeline, "calibrate")
        watched("align", pipeline, "align_layers")
        watched("finetune", pipeline, "finetune_model")
        watched("merge", export, "merge")
        watched("export", export, "write_export")
        watched("verify", pipeline, "verify_export")
    watched("export", export, "finish_export")
    # The fresh processes are another test's matter; what is copied for them is not.
    verify._ask = lambda mode, copy, room, expected, device: (  # type: ignore[assignment]
        expected.logits,
        {"tokens": expected.tokens, "text": expected.text},
    )
    checkpoint.Run.due = lambda self: checkpoints.random() < 0.5  # type: ignore[method-assign]
    options = list(STREAMED_OPTIONS if streamed else OPTIONS)
    places: dict[str, Any] = {"recipe": RECIPE, "data": str(base / "text.txt"), "overrides": options}
    pipeline.convert(base / "teacher", out, resume=run_folder(out).exists(), stream=streamed, **places)


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


def run_all(base: Path, *, kills: int, seed: int = 0, streamed: bool = False) -> dict[str, Any]:
    """Chains of kills until there were `kills`; counts, and one line for everything that went wrong."""
    import torch

    from tests.conftest import _build_llama

    torch.set_num_threads(1)  # this process forks
    _build_llama(base / "teacher", initializer_range=0.2, max_position_embeddings=256)
    (base / "text.txt").write_text("Nothing is lost when a writer dies. " * 600)
    gc.freeze()  # children that collect garbage need not look through all of this process
    whole, calls = reference(base, streamed=streamed)
    killed: Counter[str] = Counter()
    failures: list[str] = []
    chains = 0
    while killed.total() < kills and chains < 2 * kills:
        found = run_chain(base, chains, seed, whole, calls, streamed=streamed)
        killed.update(found["killed"])
        label = f"chain {chains} {found['plan']}"
        failures += [f"{label}: {found['failed']}"] if found["failed"] else []
        failures += [f"{label}: another {name}" for name in found["differing"]]
        failures += [f"{label}: left {name}" for name in found["left"]]
        chains += 1
    gc.unfreeze()
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
    parser.add_argument("--streamed", action="store_true", help="a conversion that streams its layers")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(argv)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="linearize-kills-") as place:
        result = run_all(Path(place), kills=given.kills, seed=given.seed, streamed=given.streamed)
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
