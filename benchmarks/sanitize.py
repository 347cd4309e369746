"""Every op under NVIDIA's compute-sanitizer: no access outside of a tensor, no race in shared memory.

    python -m benchmarks.sanitize [--only WORD ...] [--seconds 120] [--processes N] [--logs FOLDER]

Each op runs forward and backward on a small shape (benchmarks/sanitize_cases.py), once alone, which compiles it and
tells its kernels, then under memcheck and under racecheck, a process each, side by side. Only our kernels are looked
at; tensors are allocated one by one, so that what lies behind one is nobody's. Two planted faults show that the tools
see on this machine what they are to see.

Prints a table of op x tool: clean, errors, not finished (in the time there was), or failed, with the first words of
what was found. Exits 0 if all is clean, 1 if not, 2 without compute-sanitizer or a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
CONTROL = {"memcheck": "planted_overrun", "racecheck": "planted_race"}
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
"""Where CUDA is installed by default."""
FLAGS = ("--print-limit", "20", "--show-backtrace", "no", "--report-api-errors", "no")
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) errors?$", re.MULTILINE),  # another line counts those not printed
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed"),
}
OWN_FAILURE = re.compile(r"^=+ (Internal Sanitizer Error.*)$", re.MULTILINE)
"""What a tool says of itself; the case then ends in an error that it would not have had, which is no finding."""
FINDING = re.compile(r"^=+ ((?:Invalid|Misaligned|Error|Warning|Race|Out-of|Fatal|Program hit).*)$", re.MULTILINE)
ENDED = "Error: process didn't terminate successfully"
SHARE = 0.5
"""Of the time, that the first runs, without a tool, may take."""


def sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("PATH", ""), *([f"{home}/bin"] if home else []), *PLACES]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def verdict(tool: str, said: str, code: int | None) -> tuple[str, str]:
    """State and first words of what a tool said; `code` is None where it was stopped."""
    finding = FINDING.search(said)
    words = finding.group(1).strip()[:110] if finding else ""
    summary = SUMMARY[tool].search(said)
    own = OWN_FAILURE.search(said)
    if own is not None and all(other.startswith(ENDED) for other in FINDING.findall(said)):
        return "failed", own.group(1).strip()[:110]
    if code is None:
        return ("errors", words) if words else ("not finished", "")
    if summary is None:
        last = [line for line in said.splitlines() if line.strip()]
        return "failed", (words or (last[-1].strip() if last else f"exit code {code}"))[:110]
    if int(summary.group(1)):
        return "errors", f"{summary.group(1)}: {words}"
    if '"kernels"' not in said:  # nothing was found in a case that did not come to its end
        last = [line for line in said.splitlines() if line.strip() and not line.startswith("=")]
        return "failed", (last[-1].strip() if last else f"exit code {code}")[:110]
    return "clean", ""


def command(path: str, tool: str, case: str, kernels: Sequence[str]) -> list[str]:
    """A case under a tool, looking at `kernels` alone."""
    chosen = [x for name in kernels for x in ("--kernel-name", f"kns={name}")]
    return [path, "--tool", tool, *FLAGS, *chosen, *alone(case)]


def alone(case: str) -> list[str]:
    """A case without a tool."""
    return [sys.executable, "-m", "benchmarks.sanitize_cases", case]


def output_of(words: Sequence[str], until: float) -> tuple[str, int | None]:
    """What a command said, standard error included, and its exit code, None where `until` (monotonic) came first."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as file:
        begun = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                                 start_new_session=True)  # fmt: skip
        try:
            code: int | None = begun.wait(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(begun.pid, signal.SIGKILL)  # the case is a child of the tool
            begun.wait()
            code = None
        file.seek(0)
        return file.read(), code


def kernels_in(said: str) -> list[str]:
    """The kernels that a case names; none where it did not come to its end."""
    for line in reversed(said.splitlines()):
        if line.startswith('{"kernels"'):
            return list(json.loads(line)["kernels"])
    return []


def table(found: Mapping[tuple[str, str], tuple[str, str, float]], ops: Sequence[str]) -> str:
    """Ops down, tools across, then the words of what is not clean."""
    wide = max(len(op) for op in ops) + 2
    lines = [" " * wide + "".join(f"{tool:<22}" for tool in TOOLS)]
    for op in ops:
        cells = [found.get((op, tool), ("not run", "", 0.0)) for tool in TOOLS]
        lines.append(f"{op:<{wide}}" + "".join(f"{f'{state} ({spent:.0f} s)':<22}" for state, _, spent in cells))
    lines += [f"{op}, {tool}: {words}" for (op, tool), (_, words, _) in found.items() if words]
    return "\n".join(lines)


def check(
    ops: Sequence[str],
    path: str,
    *,
    seconds: float,
    processes: int,
    logs: Path | None = None,
    said: Callable[[str], None] = print,
) -> dict[tuple[str, str], tuple[str, str, float]]:
    """State, words and seconds by op and tool, planted faults included under "planted fault"; `said` gets each."""
    begun = time.monotonic()
    found: dict[tuple[str, str], tuple[str, str, float]] = {}

    def keep(name: str, text: str) -> None:
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            (logs / f"{name.replace(' ', '-').replace(',', '')}.log").write_text(text)

    def note(op: str, tool: str, state: str, words: str, spent: float) -> None:
        found[op, tool] = state, words, spent
        said(f"{op}, {tool}: {state} after {spent:.0f} s{': ' if words else ''}{words}")

    def under(op: str, tool: str, case: str, kernels: Sequence[str]) -> None:
        start = time.monotonic()
        text, code = output_of(command(path, tool, case, kernels), begun + seconds)
        keep(f"{case} {tool}", text)
        note(op, tool, *verdict(tool, text, code), time.monotonic() - start)

    def both(op: str) -> None:
        start = time.monotonic()
        text, code = output_of(alone(op), begun + SHARE * seconds)
        kernels = kernels_in(text)
        if not kernels:
            keep(op, text)
            words = "" if code is None else text.strip().rpartition("\n")[2][:110]
            state = "not finished" if code is None else "failed"
            for tool in TOOLS:
                note(op, tool, state, words, time.monotonic() - start)
            return
        list(inner.map(lambda tool: under(op, tool, op, kernels), TOOLS))

    with ThreadPoolExecutor(processes) as inner, ThreadPoolExecutor(max(len(ops), 1)) as outer:
        control = [inner.submit(under, "planted fault", tool, CONTROL[tool], ["planted"]) for tool in TOOLS]
        list(outer.map(both, ops))
        for one in control:
            one.result()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Every op under compute-sanitizer.")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="ops that contain one of these words")
    parser.add_argument("--seconds", type=float, default=120.0, help="for everything")
    parser.add_argument("--processes", type=int, default=2 * (os.cpu_count() or 4), help="at once, under a tool")
    parser.add_argument("--logs", type=Path, help="folder for what the tools said")
    asked = parser.parse_args(argv)
    path = sanitizer()
    if path is None:
        parser.error("compute-sanitizer, which comes with the CUDA toolkit, is neither on PATH nor in CUDA_HOME")
    import torch

    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    from benchmarks.sanitize_cases import cases

    ops = [op for op in cases() if not asked.only or any(word in op for word in asked.only)]
    if not ops:
        parser.error(f"no op contains {' or '.join(asked.only)}: there are {', '.join(cases())}")
    found = check(ops, path, seconds=asked.seconds, processes=max(asked.processes, 1), logs=asked.logs,
                  said=lambda words: print(words, flush=True))  # fmt: skip
    print(table(found, [*ops, "planted fault"]))
    clean = all(found[op, tool][0] == "clean" for op in ops for tool in TOOLS)
    seen = all(found["planted fault", tool][0] == "errors" for tool in TOOLS)
    if not seen:
        print("a planted fault was not found: what is clean above says little")
    sys.exit(0 if clean and seen else 1)


if __name__ == "__main__":
    main()
