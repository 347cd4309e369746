"""Scheduling of the kernel benchmarks: warm-up, turns, limits, what is skipped, and Triton's tuner."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, kernels_rows, kernels_run, kernels_tuning

READY = "import json, sys, time\nkeys = json.loads(sys.argv[2])\n"
SCRIPTS = {
    "good": READY
    + """
print('{"ready": true, "seconds": 1}', flush=True)
input()
for op, implementation, shape, which in keys:
    row = {"op": op, "implementation": implementation, "shape": shape, "pass": which, "ms": 1.0, "status": "ok"}
    print(json.dumps(row), flush=True)
print('{"done": true}')
""",
    "dies": "import sys; print('{\"ready\": true}', flush=True); input(); sys.exit('out of luck')",
    "hangs": "import time; print('{\"ready\": true}', flush=True); input(); time.sleep(60)",
    "half": READY
    + """
print('{"ready": true}', flush=True)
input()
print(json.dumps(dict(zip(("op", "implementation", "shape", "pass"), keys[0])) | {"ms": 2.0}), flush=True)
time.sleep(60)
""",
    "silent": "print('{\"ready\": true}', flush=True); input(); print('{\"done\": true}')",
    "never warm": "import time; time.sleep(60)",
    "dies early": "import sys; sys.exit('no card')",
}
KEYS = [("layer", "peer", "1x8", "forward"), ("layer", "peer", "1x8", "both")]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are scripts that behave as their name says."""
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        name, keys = command[3], command[5]
        return start([sys.executable, "-c", SCRIPTS[name], name, keys], **options)

    monkeypatch.setattr(kernels_run.subprocess, "Popen", popen)


def ran(*names: str, minutes: float = 1.0, limit: float = 30.0, **options: Any) -> tuple[list[Any], list[str]]:
    rows: list[Any] = []
    lines: list[str] = []
    chosen = dict.fromkeys(names, KEYS)
    kernels_run.run(chosen, minutes=minutes, limit=lambda _: limit, heard=rows.append, said=lines.append, **options)
    return rows, lines


def test_every_measurement_has_a_row_whatever_its_worker_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels_run, "WARM_UP", 3.0)
    monkeypatch.setattr(kernels_run, "GRACE", 0.0)
    rows, lines = ran("good", "dies", "hangs", "half", "silent", "never warm", "dies early", limit=1.5, logs=tmp_path)
    found = [rows[n : n + 2] for n in range(0, len(rows), 2)]
    assert [[(r["pass"], r["ms"]) for r in pair] for pair in found] == [
        [("forward", 1.0), ("both", 1.0)],
        [("forward", None), ("both", None)],
        [("forward", None), ("both", None)],
        [("forward", 2.0), ("both", None)],
        [("forward", None), ("both", None)],
        [("forward", None), ("both", None)],
        [("forward", None), ("both", None)],
    ]
    said = [pair[1].get("status", "") + ": " + pair[1].get("note", "") for pair in found]
    assert said[1] == "failed: its process ended with code 1: out of luck"
    assert said[2] == said[3] == "unfinished: took longer than its limit"
    assert said[4] == "failed: its worker said nothing of it"
    assert said[5].startswith("unfinished: while compiling and tuning")
    assert said[6] == "failed: while compiling and tuning: its process ended with code 1: no card"
    assert found[2][1]["seconds"] >= 1.5
    assert any("5 of 7 processes" in line for line in lines)
    assert "out of luck" in (tmp_path / "dies.log").read_text()


def test_the_time_for_everything_is_kept() -> None:
    begun = time.monotonic()
    rows, _ = ran("hangs", "good", "half", minutes=2 / 60, last=("half",))
    assert time.monotonic() - begun < 20
    assert [r["note"] for r in rows[2:]] == [kernels_run.OVER] * 4
    assert {r["status"] for r in rows} == {"unfinished"}


def test_the_last_start_when_the_others_have_ended() -> None:
    rows, lines = ran("silent", "good", last=("silent",))
    assert [r["ms"] for r in rows] == [1.0, 1.0, None, None]
    assert lines.index("silent: warm after 0 s") > next(n for n, x in enumerate(lines) if x.startswith("[1/2] good"))


def test_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"machine": "card", "driver": "", "versions": {}, "commit": "c", "sources": "s"}
    asked: list[dict[str, Any]] = []

    def run(chosen: dict[str, Any], *, heard: Any, **options: Any) -> None:
        asked.append(chosen)
        for key in [key for keys in chosen.values() for key in keys][:3]:
            heard(dict(zip(kernels_rows.KEY, key, strict=True)) | {"ms": 1.0, "status": "ok"})

    for module in (kernels, kernels_rows):
        monkeypatch.setattr(module, "environment", lambda: here)
    monkeypatch.setattr(kernels_run, "run", run)
    out = tmp_path / "rows.jsonl"
    for again in (False, False, True):
        kernels.measure(["SDPA flash", "tfla"], out=out, minutes=1, again=again)
    first, second, third = ({key for keys in x.values() for key in keys} for x in asked)
    assert len(first) == len(second) + 3 and second < first and third == first
    assert set(asked[0]) == {"sdpa", "tfla"} and len(kernels_rows.read(out)) == 9


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--table", "nowhere"], ["--plot", "nowhere"]])
def test_bad_arguments_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        kernels.main(arguments)
    assert raised.value.code == 2


def test_the_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    row = dict(zip(kernels_rows.KEY, KEYS[0], strict=True)) | {"ms": 2.0, "machine": "card"}
    path.write_text(json.dumps(row) + "\n")
    kernels.main(["--table", str(path)])
    assert "peer" in capsys.readouterr().out


def test_a_lock_is_held_by_one_and_waited_for_in_vain(tmp_path: Path) -> None:
    path, order = tmp_path / "card.lock", []

    def second() -> None:
        with kernels_tuning.held(path):
            order.append("second")

    with kernels_tuning.held(path):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(kernels_tuning.OutOfTime), kernels_tuning.held(path, time.monotonic() + 0.05):
            pass
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


class Tuner:
    """As much of Triton's Autotuner as is changed."""

    do_bench: Any = None
    _do_bench: Any = None

    def __init__(self) -> None:
        self.base_fn, self.fn, self.timed = Tuner, "kernel", []

    def _bench(self, *args: Any, config: Any, **meta: Any) -> Any:
        self.timed.append(config)
        return self.do_bench(lambda: None, quantiles=(0.5,))

    def check_disk_cache(self, key: Any, configs: Any, bench: Any) -> Any:
        return bench()


def test_a_kernel_is_compiled_in_all_configurations_then_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(kernels_tuning, "compile_all", lambda *given: compiled.append(given))
    monkeypatch.setattr(kernels_tuning, "brief", lambda call, quantiles: [1.0])
    end = time.monotonic() + 60
    kernels_tuning.tune_briefly(tmp_path, until=lambda: end, tuner=Tuner)
    tuner = Tuner()

    def tune() -> list[Any]:
        return [tuner._bench(7, config=config, grid=1) for config in "ab"]

    assert tuner.check_disk_cache("key", ["a", "b"], tune) == [[1.0], [1.0]]
    assert tuner.timed == ["a", "b"] and compiled == [("kernel", (7,), {"grid": 1}, ["a", "b"])]
    end = 0.0
    with pytest.raises(kernels_tuning.OutOfTime):
        tuner.check_disk_cache("key", ["a", "b"], tune)


def test_a_lock_is_for_a_kernel_and_what_it_is_compiled_for() -> None:
    key = (64, True, False, 128, "torch.bfloat16")
    name = kernels_tuning.variant("scan", key)
    assert name.startswith("scan-") and name == kernels_tuning.variant("scan", (16, True, False, 8, "torch.bfloat16"))
    assert name != kernels_tuning.variant("scan", (64, False, False, 128, "torch.bfloat16"))
    assert name != kernels_tuning.variant("scan", (*key, "torch.float32"))


def test_a_tuner_of_another_make_is_left_alone(tmp_path: Path) -> None:
    class Other:
        run = None

    kernels_tuning.tune_briefly(tmp_path, until=lambda: 0.0, tuner=Other)
    assert not hasattr(Other, "_bench")
