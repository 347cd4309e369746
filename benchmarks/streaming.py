"""Peak memory of a streamed conversion, on a checkpoint made for it: random weights, as large as you like.

    python -m benchmarks.streaming /tmp/big                                  # 40 layers, 6.1 GB in bfloat16
    python -m benchmarks.streaming /tmp/small --layers 4 --hidden 256 --heads 4 --kv-heads 2 --intermediate 512

Writes FOLDER/teacher (a Llama, shard by shard, never held as a whole, with the demo's tokenizer), converts it with
--stream in a process of its own into FOLDER/out, and prints one row: sizes, times and the most resident memory of that
process and all that it started, as the kernel counts it. What is in FOLDER afterwards is yours to remove.
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
from linearize.errors import LinearizeError

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.2


def make_teacher(folder: Path, *, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> int:
    """Write a Llama of random bfloat16 weights into `folder`, a tensor at a time; its bytes.

    Scales are those of transformers' initialisation, so that activations stay finite through any number of layers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    demo = resolve("demo")
    known = json.loads((demo / "config.json").read_text())
    config = LlamaConfig(
        **{key: known[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if key in known},
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
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, shards) as writer:
        for name, shape in shapes.items():
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            writer.write(name, [value.to(torch.bfloat16)])
        writer.finish()
    config.save_pretrained(folder)
    for path in demo.glob("token*"):
        shutil.copyfile(path, folder / path.name)
    return sum(2 * math.prod(shape) for shape in shapes.values())


def convert(teacher: Path, out: Path, overrides: list[str], *, recipe: str, limit: float) -> dict[str, Any]:
    """Convert in a process of its own; its report, with `seconds_all`, and `peak_bytes` of it and its children.

    Raises:
        RuntimeError: it failed, or took longer than `limit` seconds.
    """
    command = [sys.executable, "-m", "linearize_cli", "convert", str(teacher), str(out), "--recipe", recipe,
               "--data", "demo", "--stream", "--json", *overrides]  # fmt: skip
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "cli"))
    begin, peak = time.monotonic(), 0
    log = out.with_suffix(".log")
    with log.open("w") as errors, out.with_suffix(".json").open("w") as answer:
        child = subprocess.Popen(command, stdout=answer, stderr=errors, env={**os.environ, "PYTHONPATH": paths})
        try:
            while child.poll() is None:
                peak = max(peak, resident(child.pid))
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
    return report | {"seconds_all": time.monotonic() - begin, "peak_bytes": peak}


def resident(process: int) -> int:
    """Most bytes that a process has held (VmHWM), and those of all its children, now."""
    total = 0
    try:
        status = Path(f"/proc/{process}/status").read_text()
        total += next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        for task in Path(f"/proc/{process}/task").iterdir():
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
    for name, value in (("layers", 40), ("hidden", 2560), ("heads", 20), ("kv-heads", 4), ("intermediate", 7936)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--tokens", default="2048", help="of the alignment")
    parser.add_argument("--context", default="256")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=7200, help="seconds that the conversion may take")
    chosen = parser.parse_args(arguments)
    teacher, out = chosen.folder / "teacher", chosen.folder / "out"
    try:
        require_empty(teacher)
        size = make_teacher(
            teacher,
            layers=chosen.layers,
            hidden=chosen.hidden,
            heads=chosen.heads,
            kv_heads=chosen.kv_heads,
            intermediate=chosen.intermediate,
        )
        overrides = [f"context={chosen.context}", f"align.tokens={chosen.tokens}", "align.batch_tokens=1024",
                     "finetune.tokens=0", f"device={chosen.device}"]  # fmt: skip
        report = convert(teacher, out, overrides, recipe=chosen.recipe, limit=chosen.limit)
    except (LinearizeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    found = versions()
    row = {
        "layers": chosen.layers,
        "checkpoint GB": round(size / 1e9, 2),
        "export GB": round(sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e9, 2),
        "peak GB": round(report["peak_bytes"] / 1e9, 2),
        "peak GB of the GPU": round((report["streamed"]["peak_device_bytes"] or 0) / 1e9, 2),
        "seconds": round(report["seconds_all"]),
        "of which": {name: round(value) for name, value in report["seconds"].items()},
        "tokens": report["stages"]["align"]["tokens"],
        "recipe": chosen.recipe,
        "logit difference when read back": report["verification"]["streamed"]["max_abs_difference"],
        "machine": machine(),
        "versions": {name: found[name] for name in ("python", "torch", "transformers") if name in found},
        "date": date.today().isoformat(),
    }
    print(json.dumps(row, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
