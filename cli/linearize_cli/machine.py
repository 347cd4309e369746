"""What `linearize doctor` finds without computing anything: packages, disk, the Hub's cache and token, and advice."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LITTLE_DISK = 5 * 2**30
"""Free bytes below which doctor says so: a conversion keeps its export, and while it runs also checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Optional:
    """A package that linearize can use and does not need."""

    name: str
    """What pip calls it."""
    least: str
    """The versions that work, as pip writes them."""
    extra: str
    """The extra of linearize that brings it; empty: none does."""
    purpose: str


OPTIONAL = (
    Optional(name="bitsandbytes", least=">=0.49.2", extra="quantize", purpose="teachers in few bits (--teacher-bits)"),
    Optional(name="datasets", least=">=3", extra="data", purpose="text from the Hub, .parquet and .csv (--data)"),
    Optional(name="lm-eval", least=">=0.4.12", extra="eval", purpose="tasks of lm-evaluation-harness (eval --tasks)"),
    Optional(name="matplotlib", least=">=3.8", extra="plots", purpose="plots of speed and memory (bench --plots)"),
    Optional(name="tensorboard", least=">=2.17", extra="tracking", purpose="convert --report-to tensorboard"),
    Optional(name="trackio", least=">=0.2", extra="tracking", purpose="convert --report-to trackio"),
    Optional(name="wandb", least=">=0.17", extra="tracking", purpose="convert --report-to wandb"),
    Optional(name="triton", least=">=3.5", extra="", purpose="fused kernels on NVIDIA GPUs"),
)


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional_packages() -> list[dict[str, Any]]:
    """One row for each of OPTIONAL: name, least, extra, purpose, version (None: not installed), install."""
    return [
        asdict(package) | {"version": version(package.name), "install": install_command(package)}
        for package in OPTIONAL
    ]


def install_command(package: Optional) -> str:
    """How to install it, wherever linearize itself came from."""
    return f"pip install '{package.name}{package.least}'"


def disk() -> dict[str, Any]:
    """Where this process stands, and the bytes that are free there."""
    place = Path.cwd()
    return {"folder": str(place), "free_bytes": shutil.disk_usage(place).free}


def hub() -> dict[str, Any]:
    """The Hub's cache, whether it can be written to, whether there is a token (never which), and whether it is used.

    Nothing is asked of a network.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    variables = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    token = any(os.environ.get(name) for name in variables) or Path(constants.HF_TOKEN_PATH).is_file()
    return {
        "cache": str(cache),
        "cache_writable": _writable(cache),
        "token": token,
        "offline": bool(constants.HF_HUB_OFFLINE),
    }


def advice(report: Mapping[str, Any]) -> list[str]:
    """One line for everything that is missing or short, with what to do about it; none of them stops a conversion."""
    lines = [f"{row['name']} is not installed ({row['purpose']}): {row['install']}" for row in _missing(report)]
    device = report.get("device", {})
    if device and not device["gpus"]:
        lines.append(_without_gpu(device))
    if report["disk"]["free_bytes"] < LITTLE_DISK:
        lines.append("little disk is free here: convert --plan says how much a conversion needs")
    if not report["hub"]["cache_writable"]:
        lines.append(f"{report['hub']['cache']} cannot be written to, so no Hub model can be fetched: set HF_HOME")
    if report["hub"]["offline"]:
        lines.append("HF_HUB_OFFLINE is set, so only what is in the cache can be read: unset it to use the Hub")
    if not report["hub"]["token"]:
        lines.append("no Hub token, which push and gated models need: hf auth login, or set HF_TOKEN")
    return lines


def _missing(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    # Triton has no use and no wheel where there is no Linux.
    wanted = [row for row in report["optional"] if row["name"] != "triton" or sys.platform == "linux"]
    return [row for row in wanted if row["version"] is None]


def _without_gpu(device: Mapping[str, Any]) -> str:
    if not gpu_files():
        return "no CUDA GPU: everything runs on the CPU, where small models are practical"
    if device["cuda"] is None:
        return "there is a GPU, and this torch was built without CUDA: see https://pytorch.org/get-started/locally"
    return "there is a GPU, and torch cannot use it: check nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES"


def gpu_files() -> list[Path]:
    """What the system shows of NVIDIA GPUs, also to a torch that cannot use them."""
    return [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder or, where it is not there yet, in the nearest one above it."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
