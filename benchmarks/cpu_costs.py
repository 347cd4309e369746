"""What conversion is for, on a CPU: cost of prefill against length, cost of a step against position, time of --help.

    python -m benchmarks.cpu_costs [MODEL ...]

MODEL are converted models; without one, `demo` shapes with random weights are used, one for each recipe named by
`--recipes`. Every figure is the median of `--repeats` runs in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

SHORT, LONG = 4096, 16384
EARLY, LATE = 100, 10_000


def model_of(name: str) -> Any:
    """A converted model from a folder, or the demo's shape under a recipe."""
    import torch
    from transformers import AutoConfig

    import linearize
    from linearize.artifacts.load import resolve
    from linearize.modeling.configuration_linearized import linearized_config
    from linearize.modeling.modeling_linearized import MODELS
    from linearize.recipe import list_recipes, load_recipe

    if name not in list_recipes():
        return linearize.load(name, device="cpu", dtype="float32")[0]
    recipe = load_recipe(name)
    native = AutoConfig.from_pretrained(resolve("demo"), trust_remote_code=False)
    kept = recipe.softmax_layers(native.num_hidden_layers)
    plan = ["softmax" if i in kept else "linear" for i in range(native.num_hidden_layers)]
    torch.manual_seed(0)
    return MODELS[native.model_type](linearized_config(native, layer_mixers=plan, spec=recipe.mixer)).eval()


def peak_bytes() -> int:
    """Most memory that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prefill(name: str, length: int) -> dict[str, float]:
    """Seconds and bytes that reading `length` tokens takes, the logits of the last one kept."""
    import torch

    model = model_of(name)
    ids = torch.randint(3, model.config.vocab_size, (1, length))
    with torch.no_grad():
        model(ids[:, :64], logits_to_keep=1)
        before, begin = peak_bytes(), time.perf_counter()
        model(ids, logits_to_keep=1)
        return {"seconds": time.perf_counter() - begin, "bytes": peak_bytes() - before}


def step(name: str, position: int) -> dict[str, float]:
    """Median seconds of a step at `position`, and the bytes of the cache there."""
    import torch

    from linearize.modeling.cache_linearized import LinearizedCache

    model = model_of(name)
    ids = torch.randint(3, model.config.vocab_size, (1, position + 64))
    cache, times = LinearizedCache(model.config), []
    with torch.no_grad():
        model(ids[:, :position], past_key_values=cache, logits_to_keep=1)
        for t in range(position, position + 64):
            begin = time.perf_counter()
            model(ids[:, t : t + 1], past_key_values=cache)
            times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times), "bytes": cache.state_bytes}


def child(kind: str, name: str, number: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu_costs", "--child", kind, name, str(number)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def paired(kind: str, name: str, first: int, second: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians at two sizes, measured in turn so that a busy machine slows both."""
    runs = [(child(kind, name, first), child(kind, name, second)) for _ in range(repeats)]
    one, two = ({key: statistics.median(r[i][key] for r in runs) for key in runs[0][i]} for i in (0, 1))
    return one, two


def help_seconds(repeats: int) -> float:
    """Median seconds of `linearize --help`."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "linearize_cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Parse, measure, print."""
    if sys.argv[1:2] == ["--child"]:
        kind, name, number = sys.argv[2:]
        print(json.dumps({"prefill": prefill, "step": step}[kind](name, int(number))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--recipes", default="lolcats,liger-gla,gated-deltanet")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"linearize --help: {help_seconds(5):.2f} s (median of 5)\n")
    head = ("model", f"{SHORT} s", f"{LONG} s", "ratio", f"{SHORT} MB", f"{LONG} MB", "ratio")
    head += (f"step {EARLY} ms", f"step {LATE} ms", "cache bytes", "same")
    print("  ".join(f"{cell:>14}" for cell in head))
    for name in arguments.models or arguments.recipes.split(","):
        short, long = paired("prefill", name, SHORT, LONG, arguments.repeats)
        early, late = paired("step", name, EARLY, LATE, arguments.repeats)
        cells = (name, f"{short['seconds']:.2f}", f"{long['seconds']:.2f}")
        cells += (f"{long['seconds'] / short['seconds']:.2f}",)
        cells += (f"{short['bytes'] / 1e6:.0f}", f"{long['bytes'] / 1e6:.0f}", f"{long['bytes'] / short['bytes']:.2f}")
        cells += (f"{1e3 * early['seconds']:.2f}", f"{1e3 * late['seconds']:.2f}", f"{late['bytes']:.0f}")
        cells += ("yes" if early["bytes"] == late["bytes"] else "NO",)
        print("  ".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
