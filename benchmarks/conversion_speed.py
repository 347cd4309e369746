"""How fast a conversion trains, beside the softmax model: alignment against its forward pass, finetuning against LoRA.

    python -m benchmarks.conversion_speed FOLDER                              # needs a GPU
    python -m benchmarks.conversion_speed FOLDER --recipe pure --steps 12

By default a quarter of Llama-3-8B with random weights, 8 of its 32 layers over a quarter of its vocabulary, so that the
head takes the share that it has in the whole. Written to FOLDER/teacher, or found there; FOLDER/out holds what was
converted, and is yours to remove.

The softmax model is transformers' own in bfloat16 with SDPA, without autocast or anything deterministic: one forward
pass with logits, without gradients; and one step of LoRA by peft at the recipe's rank and targets, with cross-entropy
and AdamW. Both take as many windows at a time as the conversion's step, or as many as fit. The conversion is
`linearize.convert` itself: what lies between the ends of its steps, without those that compile and record. Medians.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf

from benchmarks.streaming import machine, make_teacher
from linearize.artifacts.manifest import versions
from linearize.convert import pipeline
from linearize.errors import LinearizeError
from linearize.progress import NullProgress
from linearize.recipe import Recipe, load_recipe

SHAPE = {"layers": 8, "hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "vocab": 32064}
"""A quarter of Llama-3-8B."""
WARM = 4
"""First steps of a stage that are not counted: kernels are compiled and steps recorded in them."""
STAGES = ("align", "finetune")


class Clock(NullProgress):
    """Notes when each step of a stage ended."""

    def __init__(self) -> None:
        self.ends: dict[str, list[float]] = {}
        self.tokens: dict[str, int] = {}

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        """As `Progress`."""
        self.ends[stage], self.tokens[stage] = [], tokens_per_step

    def step(self, stage: str, step: int, loss: float | None, tokens: int, extra: Mapping[str, Any]) -> None:
        """As `Progress`; every step has waited for the figures of the one before."""
        self.ends[stage].append(time.monotonic())

    def rate(self, stage: str) -> float | None:
        """Tokens a second between the ends of warm steps; None where there were not two."""
        ends = self.ends.get(stage, [])[WARM:]
        if len(ends) < 2:
            return None
        return self.tokens[stage] / statistics.median(b - a for a, b in itertools.pairwise(ends))


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds of a run, after one that is not counted."""
    spent = []
    for _ in range(repeats + 1):
        begin = time.monotonic()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.monotonic() - begin)
    return statistics.median(spent[1:])


def fitting(
    make: Callable[[int], Callable[[], Any]], batch: int, repeats: int, device: torch.device
) -> tuple[int, float]:
    """Windows at a time, `batch` or the nearest half that fits, and the seconds of one run of so many."""
    while True:
        try:
            return batch, timed(make(batch), repeats, device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def softmax_rates(
    teacher: Path, recipe: Recipe, batches: Mapping[str, int], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Of the softmax model: windows at a time and tokens a second of a forward pass and of a LoRA step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).requires_grad_(False)
    context, found = recipe.context, {}

    def ids(batch: int) -> torch.Tensor:
        return torch.randint(0, 250, (batch, context), device=device)

    def forward(batch: int) -> Callable[[], Any]:
        tokens = ids(batch)

        def run() -> None:
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False)

        return run

    batch, seconds = fitting(forward, batches["align"], repeats, device)
    found["forward"] = {"windows": batch, "tokens_per_s": batch * context / seconds}
    lora = recipe.finetune.lora
    if lora is not None:
        adapted: Any = get_peft_model(
            model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets))
        )
        adapted.train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

        def learn(batch: int) -> Callable[[], Any]:
            tokens = ids(batch)

            def run() -> None:
                logits = adapted(input_ids=tokens, use_cache=False).logits
                nnf.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()

            return run

        batch, seconds = fitting(learn, batches["finetune"], repeats, device)
        found["lora"] = {"windows": batch, "tokens_per_s": batch * context / seconds}
    return found


def conversion_rates(teacher: Path, out: Path, recipe: Recipe) -> tuple[dict[str, float | None], dict[str, float]]:
    """Tokens a second of each stage of a conversion that is not verified, and the seconds of all it did."""
    clock = Clock()
    verify = pipeline.verify_export
    pipeline.verify_export = lambda *args, **kwargs: {}  # fresh processes that load the export: not what is timed
    try:
        report = pipeline.convert(teacher, out, recipe=recipe, data="demo", progress=clock, stream=False)
    finally:
        pipeline.verify_export = verify
    return {stage: clock.rate(stage) for stage in STAGES}, report["seconds"]


def main(arguments: list[str] | None = None) -> int:
    """Make, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--steps", type=int, default=16, help=f"of each stage; the first {WARM} are not counted")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of one step")
    parser.add_argument("--repeats", type=int, default=8, help="of the softmax model's forward pass and LoRA step")
    parser.add_argument("--device", default="cuda")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    chosen = parser.parse_args(arguments)
    if chosen.steps < WARM + 2:
        parser.error(f"--steps must be {WARM + 2} at least")
    teacher, out, device = chosen.folder / "teacher", chosen.folder / "out", torch.device(chosen.device)
    tokens = chosen.steps * chosen.batch_tokens
    try:
        recipe = load_recipe(
            chosen.recipe,
            [f"context={chosen.context}", f"device={chosen.device}", "calibrate.tokens=0", "repeats=0"]
            + [f"{stage}.{key}={value}" for stage in STAGES
               for key, value in (("tokens", tokens), ("batch_tokens", chosen.batch_tokens))],
        )  # fmt: skip
        if not (teacher / "config.json").is_file():
            make_teacher(teacher, **{name: getattr(chosen, name) for name in SHAPE}, device=chosen.device)
        shutil.rmtree(out, ignore_errors=True)
        converted, seconds = conversion_rates(teacher, out, recipe)
    except LinearizeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    windows = max(1, chosen.batch_tokens // chosen.context)
    softmax = softmax_rates(teacher, recipe, dict.fromkeys(STAGES, windows), chosen.repeats, device)
    against = {"align": "forward", "finetune": "lora"}
    found = versions()
    row = {
        "recipe": chosen.recipe,
        "shape": {name: getattr(chosen, name) for name in SHAPE},
        "context": chosen.context,
        "batch_tokens": chosen.batch_tokens,
        "conversion tokens/s": {stage: rate and round(rate) for stage, rate in converted.items()},
        "softmax": {name: {key: round(value) for key, value in row.items()} for name, row in softmax.items()},
        "percent": {
            stage: round(100 * rate / softmax[other]["tokens_per_s"], 1)
            for stage, other in against.items()
            if (rate := converted[stage]) is not None and other in softmax
        },
        "seconds of the conversion": {name: round(value, 1) for name, value in seconds.items()},
        "machine": machine() + (f", {torch.cuda.get_device_name(0)}" if device.type == "cuda" else ""),
        "versions": {name: found[name] for name in ("python", "torch", "transformers", "peft") if name in found},
        "date": date.today().isoformat(),
    }
    print(json.dumps(row, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
