"""`linearize doctor`: what is missing is named with the command that installs it, and no secret is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from linearize_cli import doctor, machine
from linearize_cli.app import main

ROOT = Path(__file__).resolve().parents[2]
ROW = {"recipe": "pure", "device": "cpu", "difference": 1e-7, "passed": True, "seconds": 0.1}
CPU: dict[str, Any] = {"cpu_threads": 1, "cuda": None, "gpus": [], "triton": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No torch: the self-test has its own tests, and here every package is there unless a test takes it away."""
    monkeypatch.setattr(doctor, "SELF_TEST_RECIPES", ("pure",))
    monkeypatch.setattr(doctor, "_self_test", lambda name: ROW)
    monkeypatch.setattr(doctor, "_device", lambda: CPU)
    for module in (doctor, machine):
        monkeypatch.setattr(module, "version", lambda name: "1.0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def examined(capsys: pytest.CaptureFixture, code: int = 0) -> tuple[dict[str, Any], str]:
    """What --json prints, and what people read."""
    assert main(["doctor", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == code
    return report, capsys.readouterr().err


def test_every_extra_of_the_project_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = {name: re.findall(r'"([^"]+)"', rest) for name, rest in re.findall(r"^(\w+) = (\[.*\])", section, re.M)}
    ours = ("test", "dev", "browser")
    named = {(package.extra, package.name + package.least) for package in machine.OPTIONAL if package.extra}
    assert named == {(extra, item) for extra in extras if extra not in ours for item in extras[extra]}
    assert f'"triton{machine.OPTIONAL[-1].least};' in text
    required = re.findall(r'^    "([\w-]+)', text.partition("dependencies = [")[2].partition("]")[0], re.M)
    assert {name.lower() for name in doctor.REQUIRED} == {name.lower() for name in required} - {"triton"}


def test_what_is_optional_and_missing_is_named_and_stops_nothing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "version", lambda name: None)
    report, err = examined(capsys)
    assert report["problems"] == []
    for name in ("datasets>=3", "lm-eval>=0.4.12", "matplotlib>=3.8", "trackio>=0.2"):
        assert f"pip install '{name}'" in err and any(name in line for line in report["advice"])
    assert "datasets is not installed" in err and "All that a conversion needs is here." in err


def test_what_is_required_and_missing_stops(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "peft" else "1.0")
    report, err = examined(capsys, code=4)
    assert report["problems"] == ["peft is not installed: pip install peft"]
    assert err.splitlines()[-1] == "error: peft is not installed: pip install peft"


def test_a_token_is_told_and_never_shown(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    report, err = examined(capsys)
    assert report["hub"]["token"] is False and "no Hub token" in err
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    report, err = examined(capsys)
    assert report["hub"]["token"] is True and "no Hub token" not in err
    assert "sss" not in err + json.dumps(report)


def test_the_cache_the_disk_and_the_hub(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report, err = examined(capsys)
    assert report["hub"]["cache_writable"] is True and "set HF_HOME" not in err
    assert not (tmp_path / "hub").exists(), "looking makes nothing"
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(machine, "LITTLE_DISK", 2**62)
    report, err = examined(capsys)
    assert report["hub"]["cache_writable"] is False and "set HF_HOME" in err
    assert "unset it to use the Hub" in err and "little disk is free" in err


def test_gpus(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(machine, "gpu_files", lambda: seen)
    assert "no CUDA GPU" in examined(capsys)[1]
    seen.append(Path("/dev/nvidia0"))
    assert "built without CUDA" in examined(capsys)[1]
    monkeypatch.setattr(doctor, "_device", lambda: {**CPU, "cuda": "13.0"})
    assert "check nvidia-smi" in examined(capsys)[1]
    gpu = {"name": "G", "capability": "9.0", "memory_bytes": 2**36}
    monkeypatch.setattr(doctor, "_device", lambda: {**CPU, "cuda": "13.0", "gpus": [gpu]})
    assert "GPU:" not in examined(capsys)[1]
