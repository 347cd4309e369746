"""`linearize doctor`: what is installed, what the machine has, and whether the mixers compute rightly on it."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from typing import Any

from linearize.errors import VerificationError
from linearize_cli.machine import advice, disk, hub, optional_packages, version
from linearize_cli.output import console, print_report, print_table, say

REQUIRED = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "typer",
    "rich",
    "pyyaml",
)
SELF_TEST_RECIPES = ("pure", "lolcats", "liger-gla", "gated-deltanet")
"""One recipe for each kind of recurrence: with a window and a shared denominator, gated by its keys, delta rule."""

PREFILL, DECODE = 130, 12
"""Tokens of the self-test: the prefill ends inside the third block of the window."""

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, in float32."""


def examine() -> dict[str, Any]:
    """Everything that `linearize doctor` prints.

    Returns:
        linearize, python, platform, packages, optional, disk, hub, device, self_test, advice (what is missing or short,
        and what to do) and problems (what must be mended first); device and self_test only where a required package is
        not missing and torch works.
    """
    from linearize import __version__

    report: dict[str, Any] = {
        "linearize": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in REQUIRED},
        "optional": optional_packages(),
        "disk": disk(),
    }
    missing = [name for name in REQUIRED if report["packages"][name] is None]
    if missing:
        return report | {"problems": [f"{name} is not installed: pip install {name}" for name in missing]}
    report["hub"] = hub()
    try:
        report["device"] = _device()
        report["self_test"] = [_self_test(name) for name in SELF_TEST_RECIPES]
    except Exception as error:  # a broken torch or driver is what this command is there to find
        problems = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        return report | {"advice": advice(report), "problems": problems}
    failed = [row for row in report["self_test"] if not row["passed"]]
    problems = [f"{row['recipe']}: prefill and decode differ, see self_test" for row in failed]
    return report | {"advice": advice(report), "problems": problems}


def print_examination(report: Mapping[str, Any]) -> None:
    """What `examine` returns, for people: versions, what is optional, the machine, and last what to do."""
    listed = ("optional", "self_test", "advice", "problems")
    print_report("linearize doctor", {key: value for key, value in report.items() if key not in listed})
    rows = [
        {"package": row["name"], "version": row["version"] or "missing", "for": row["purpose"]}
        for row in report["optional"]
    ]
    print_table(rows, title="optional")
    if "self_test" in report:
        print_table(report["self_test"], title="self test: prefill and decode must agree")
    for line in report.get("advice", ()):
        say(f"note: {line}")
    if not report["problems"]:
        console().print("All that a conversion needs is here.", style="bold")


def verdict(report: dict[str, Any]) -> None:
    """Raise what an examination found.

    Raises:
        VerificationError: a required package is missing or the self-test failed.
    """
    if report["problems"]:
        raise VerificationError("; ".join(report["problems"]))


def _device() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cpu_threads": torch.get_num_threads(), "cuda": torch.version.cuda, "gpus": []}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            found["gpus"].append(
                {"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory}
            )
    found["triton"] = importlib.util.find_spec("triton") is not None
    return found


def _self_test(name: str) -> dict[str, Any]:
    """Prefill of a few tokens and decoding them one by one must give the same logits, on a tiny random model."""
    import time

    import torch
    from transformers import LlamaConfig

    from linearize.artifacts.load import select_device
    from linearize.modeling.configuration_linearized import linearized_config
    from linearize.modeling.modeling_linearized import MODELS
    from linearize.recipe import load_recipe

    native = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    began = time.perf_counter()
    device = select_device("auto")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        config = linearized_config(native, layer_mixers=["linear"] * 2, spec=load_recipe(name).mixer)
        model = MODELS["llama"](config).to(device=device, dtype=torch.float32).eval()
        ids = torch.randint(0, native.vocab_size, (2, PREFILL + DECODE)).to(device)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, PREFILL - 1 :]
        read = model(ids[:, :PREFILL], use_cache=True)
        steps, cache = [read.logits[:, -1:]], read.past_key_values
        for place in range(PREFILL, PREFILL + DECODE):
            step = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
            cache = step.past_key_values
    difference = ((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max()).item()
    return {
        "recipe": name,
        "device": str(device),
        "difference": difference,
        "passed": difference <= TOLERANCE,  # False for nan
        "seconds": time.perf_counter() - began,
    }
