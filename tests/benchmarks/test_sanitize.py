"""Reading compute-sanitizer, its time limit, and what is said without it. No GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import sanitize

DONE = '{"kernels": ["scan_kernel"]}\n'
CLEAN = f"{DONE}========= ERROR SUMMARY: 0 errors\n"
INVALID = "========= Invalid __global__ write of size 2 bytes\n=========     at scan_kernel+0x80\n"
MORE = "========= ERROR SUMMARY: 108 errors were not printed. Use --print-limit option to adjust the number\n"
OWN = "========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.\n"
ENDED = "========= Error: process didn't terminate successfully\n"
ONE = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error)\n"
RACE = "========= Error: Race reported between Write access at a and Read access at b [128 hazards]\n"


@pytest.mark.parametrize(
    ("tool", "said", "code", "state", "words"),
    [
        ("memcheck", CLEAN, 0, "clean", ""),
        ("memcheck", f"{INVALID}{DONE}========= ERROR SUMMARY: 4 errors\n", 0, "errors", "4: Invalid __global__ write"),
        ("memcheck", f"{INVALID}========= ERROR SUMMARY: 128 errors\n{MORE}", 1, "errors", "128: Invalid __global__"),
        ("memcheck", f"Traceback\nValueError: no\n{CLEAN[len(DONE) :]}", 1, "failed", "ValueError: no"),
        ("memcheck", "cannot start", 127, "failed", "cannot start"),
        ("memcheck", "", None, "not finished", ""),
        ("memcheck", INVALID, None, "errors", "Invalid __global__ write"),
        ("racecheck", f"{DONE}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", 0, "clean", ""),
        ("racecheck", f"{OWN}RuntimeError: x\n{ENDED}{ONE}", 1, "failed", "Internal Sanitizer Error"),
        ("racecheck", f"{RACE}{OWN}{ENDED}{ONE}", 1, "errors", "1: Error: Race"),
        (
            "racecheck",
            f"{RACE}{DONE}========= RACECHECK SUMMARY: 1 hazard displayed (1 error)\n",
            0,
            "errors",
            "1: Error",
        ),
    ],
)
def test_what_a_tool_says(tool: str, said: str, code: int | None, state: str, words: str) -> None:
    found = sanitize.verdict(tool, said, code)
    assert found[0] == state and found[1].startswith(words) and bool(found[1]) == bool(words)


def test_only_our_kernels_are_looked_at() -> None:
    made = sanitize.command("/tool", "racecheck", "window", ["scan_kernel", "read_kernel"])
    assert made[:3] == ["/tool", "--tool", "racecheck"]
    assert [made[n + 1] for n, x in enumerate(made) if x == "--kernel-name"] == ["kns=scan_kernel", "kns=read_kernel"]
    assert made[-2:] == ["benchmarks.sanitize_cases", "window"]


def test_without_the_tool_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sanitize, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SystemExit) as raised:
        sanitize.main([])
    assert raised.value.code == 2 and "compute-sanitizer" in capsys.readouterr().err


def test_a_whole_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = {
        "fine": f"print({DONE!r})",
        "broken": "raise ValueError('not here')",
        "slow": "import time; time.sleep(60)",
        "slow later": f"print({DONE!r})",
    }
    summary = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed"}

    def command(path: str, tool: str, op: str, kernels: list[str]) -> list[str]:
        script = f"print({DONE!r}); print({summary[tool]!r})"
        if op.startswith("planted"):
            script = f"print({(INVALID if tool == 'memcheck' else RACE)!r}); print({summary[tool].replace('0', '3')!r})"
        elif op == "slow later":
            script = case["slow"]
        else:
            assert kernels == ["scan_kernel"]
        return [sys.executable, "-c", script]

    monkeypatch.setattr(sanitize, "command", command)
    monkeypatch.setattr(sanitize, "alone", lambda op: [sys.executable, "-c", case[op]])
    begun = time.monotonic()
    found = sanitize.check(list(case), "/tool", seconds=5.0, processes=8, logs=tmp_path)
    assert time.monotonic() - begun < 30
    states = {op: {found[op, tool][0] for tool in sanitize.TOOLS} for op in [*case, "planted fault"]}
    assert states == {
        "fine": {"clean"}, "broken": {"failed"}, "slow": {"not finished"}, "slow later": {"not finished"},
        "planted fault": {"errors"},
    }  # fmt: skip
    assert "not here" in found["broken", "memcheck"][1] and "not here" in (tmp_path / "broken.log").read_text()
    text = sanitize.table(found, [*case, "planted fault"])
    assert "clean" in text and "broken, racecheck: ValueError: not here" in text
