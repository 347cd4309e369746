"""Peak memory of a conversion, on a checkpoint made for it: random weights, as large as you like.

    python -m benchmarks.streaming /tmp/big --tokens 1024                       # 40 layers, 6.2 GB in bfloat16
    python -m benchmarks.streaming /tmp/big --tokens 1024 --device cuda
    python -m benchmarks.streaming /tmp/quarter --tokens 1024 --size 1.6GB --device cuda
    python -m benchmarks.streaming /tmp/bits --size 0.8GB --way 4               # or 8, or whole, to compare

Writes FOLDER/teacher (a Llama, shard by shard, never held as a whole, with the demo's tokenizer), converts it in a
process of its own into FOLDER/out, and prints one row: sizes, times, the most resident memory of that process and all
that it started, as the kernel counts it, and with a GPU the most memory of it: all that was in use, by whomever, and
what the converting process allocated. What is in FOLDER afterwards is yours to remove. `--way`: `stream`, a layer at a
time and aligned alone; `whole`, the ordinary way; `8` and `4`, that way with frozen weights in so many bits. All but
`stream` finetune adapters on as many tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from linearize.artifacts.atomic import require_empty
from linearize.artifacts.load import resolve
from linearize.artifacts.manifest import versions
from linearize.artifacts.shards import ShardWriter, lay_out
from linearize.convert.checkpoint import STAGES
from linearize.errors import LinearizeError

SIZES = {
    "6.2GB": {"layers": 40, "hidden": 2560, "heads": 20, "kv_heads": 4, "intermediate": 7936},
    "1.6GB": {"layers": 40, "hidden": 1280, "heads": 10, "kv_heads": 2, "intermediate": 3968},
    "0.8GB": {"layers": 20, "hidden": 1280, "heads": 10, "kv_heads": 2, "intermediate": 3968},
}
"""Shapes by the bytes of their bfloat16 weights."""
WAYS = {
    "stream": ["--stream"],
    "whole": ["--no-stream"],
    "8": ["--teacher-bits", "8"],
    "4": ["--teacher-bits", "4"],
}
ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.2
COUNTED = """
import sys
from pathlib import Path
from linearize_cli.app import main

if sys.argv[2] == "unloaded":
    from linearize.convert import pipeline, stream_convert

    for module in (pipeline, stream_convert):
        module.verify_export = lambda *args, **kwargs: {}
code = main(sys.argv[3:])
import torch

Path(sys.argv[1]).write_text(str(torch.cuda.max_memory_allocated()))
sys.exit(code)
"""
"""The command line, with or without the fresh processes that load an export (the second argument); then the most bytes
that torch had allocated on the GPU, into the file of the first."""


def make_teacher(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int | None = None,
    device: str = "cpu",
) -> int:
    """Write a Llama of random bfloat16 weights into `folder`, a tensor at a time; its bytes.

    Scales are those of transformers' initialisation, so that activations stay finite through any number of layers.
    `device` draws the numbers: a GPU is done with billions of them in no time. `vocab`: rows of the embedding, no fewer
    than the demo's tokenizer has, whose they are by default.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    demo = resolve("demo")
    known = json.loads((demo / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=vocab or known["vocab_size"],
        **{key: known[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in known},
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    shards = lay_out({name: (torch.bfloat16, shape) for name, shape in shapes.items()}, 1_000_000_000)
    generator = torch.Generator(device).manual_seed(0)
    with ShardWriter(folder, shards) as writer:
        for name, shape in shapes.items():
            rows = [shape] if len(shape) == 1 else [(part, *shape[1:]) for part in _parts(shape[0])]
            pieces = (
                torch.ones(part) if len(part) == 1 else torch.randn(part, generator=generator, device=device) * 0.02
                for part in rows
            )
            writer.write(name, (piece.to(torch.bfloat16) for piece in pieces))
        writer.finish()
    config.save_pretrained(folder)
    for path in demo.glob("token*"):
        shutil.copyfile(path, folder / path.name)
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _parts(rows: int, most: int = 4096) -> list[int]:
    return [min(most, rows - begin) for begin in range(0, rows, most)]


def convert(
    teacher: Path, out: Path, options: list[str], *, recipe: str, limit: float, loaded: bool = True
) -> dict[str, Any]:
    """Convert in a process of its own; its report, with `seconds_all`, `peak_alone_bytes` of it, `peak_bytes` of it and
    its children, and of the GPU that `options` name `peak_gpu_bytes` in use and `peak_allocated_bytes` by it alone.
    `loaded`: whether fresh processes load the export.

    Raises:
        RuntimeError: it failed, or took longer than `limit` seconds.
    """
    gpu, counted = "device=cuda" in options, out.with_suffix(".gpu")
    command = [sys.executable, "-c", COUNTED, str(counted), "loaded" if loaded else "unloaded", "convert",
               str(teacher), str(out), "--recipe", recipe, "--data", "demo", "--json", *options]  # fmt: skip
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = os.pathsep.join([*(str(ROOT / part) for part in (".", "kernels", "cli")), *known])
    begin, peak, alone, gpu_peak = time.monotonic(), 0, 0, 0
    torch.cuda.empty_cache()
    before = gpu_bytes() if gpu else 0
    log = out.with_suffix(".log")
    with log.open("w") as errors, out.with_suffix(".json").open("w") as answer:
        child = subprocess.Popen(command, stdout=answer, stderr=errors, env={**os.environ, "PYTHONPATH": paths})
        try:
            while child.poll() is None:
                peak = max(peak, resident(child.pid))
                alone = max(alone, resident(child.pid, children=False))
                gpu_peak = max(gpu_peak, gpu_bytes() - before) if gpu else 0
                if time.monotonic() - begin > limit:
                    raise RuntimeError(f"not done after {limit:.0f} s; see {log}")
                time.sleep(SAMPLE_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode:
        raise RuntimeError(log.read_text().strip().splitlines()[-1] if log.stat().st_size else "it died")
    report: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    peaks = {"peak_bytes": peak, "peak_alone_bytes": alone, "peak_gpu_bytes": gpu_peak}
    peaks["peak_allocated_bytes"] = int(counted.read_text()) if gpu else 0
    return report | peaks | {"seconds_all": time.monotonic() - begin}


def gpu_bytes() -> int:
    """Memory of the first GPU that is in use, by whomever: all of it that no process can have, contexts included."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def resident(process: int, *, children: bool = True) -> int:
    """Most bytes that a process has held so far (VmHWM), and each of its children that live now, added up."""
    total = 0
    try:
        status = Path(f"/proc/{process}/status").read_text()
        total += next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        for task in Path(f"/proc/{process}/task").iterdir() if children else ():
            total += sum(resident(int(child)) for child in (task / "children").read_text().split())
    except (OSError, StopIteration):  # it has ended
        pass
    return total


def machine() -> str:
    """Processor, cores and memory."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB"


def main(arguments: list[str] | None = None) -> int:
    """Make, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="6.2GB", help="of the checkpoint")
    for name in SIZES["6.2GB"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the size's")
    parser.add_argument("--way", choices=WAYS, default="stream")
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--tokens", default="2048", help="of the alignment")
    parser.add_argument("--batch-tokens", default="1024", help="of one step: with more, activations outweigh weights")
    parser.add_argument("--context", default="256")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--teacher", type=Path, help="a checkpoint that was made by this before, instead of a new one")
    parser.add_argument("--unloaded", action="store_true", help="without the fresh processes that load the export")
    parser.add_argument("--limit", type=float, default=7200, help="seconds that the conversion may take")
    chosen = parser.parse_args(arguments)
    teacher, out = chosen.teacher or chosen.folder / "teacher", chosen.folder / "out"
    shape = {name: getattr(chosen, name) or value for name, value in SIZES[chosen.size].items()}
    try:
        if chosen.teacher is None:
            require_empty(teacher)
            make_teacher(teacher, **shape, device=chosen.device)
        chosen.folder.mkdir(parents=True, exist_ok=True)
        finetuned = 0 if chosen.way == "stream" else chosen.tokens
        options = [f"context={chosen.context}", f"device={chosen.device}", f"align.tokens={chosen.tokens}",
                   f"finetune.tokens={finetuned}"]  # fmt: skip
        options += [f"{stage}.batch_tokens={chosen.batch_tokens}" for stage in STAGES]
        how: dict[str, Any] = {"recipe": chosen.recipe, "limit": chosen.limit, "loaded": not chosen.unloaded}
        report = convert(teacher, out, [*options, *WAYS[chosen.way]], **how)
    except (LinearizeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    found = versions()
    row = {
        "way": chosen.way,
        "layers": len(report["layers"]),
        "checkpoint GB": round(sum(path.stat().st_size for path in teacher.glob("*.safetensors")) / 1e9, 2),
        "export GB": round(sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e9, 2),
        "peak GB": round(report["peak_bytes"] / 1e9, 2),
        "peak GB without its children": round(report["peak_alone_bytes"] / 1e9, 2),
        "peak GB of the GPU": round(report["peak_gpu_bytes"] / 1e9, 2) if report["peak_gpu_bytes"] else None,
        "of which allocated": round(report["peak_allocated_bytes"] / 1e9, 2) if report["peak_gpu_bytes"] else None,
        "seconds": round(report["seconds_all"]),
        "of which": {name: round(value) for name, value in report["seconds"].items()},
        "tokens": report["stages"]["align"]["tokens"],
        "recipe": chosen.recipe,
        "logit difference when read back": max(
            (way["max_abs_difference"] for way in report["verification"].values()), default=None
        ),
        "merge error": report["merge_error"],
        "machine": machine() + (f", {torch.cuda.get_device_name(0)}" if chosen.device.startswith("cuda") else ""),
        "versions": {name: found[name] for name in ("python", "torch", "transformers") if name in found},
        "date": date.today().isoformat(),
    }
    print(json.dumps(row, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
