"""Every command with the library behind it replaced: what is passed on, what is printed where, and the exit codes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.recipe import load_recipe
from linearize_cli.app import main

LAYER = {
    "from": "softmax",
    "to": "linear",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "feature_dim": 32,
    "state_bytes": 2048,
    "new_parameters": 24_582,
}
KEPT = {**LAYER, "to": "softmax", "feature_dim": None, "state_bytes": 0, "new_parameters": 0}
INSPECTION = {
    "model": "m",
    "family": "llama [bold]",
    "parameters": 1_000_000,
    "dtype": "float32",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "context": 256,
    "kv_bytes": {"2048": 3072, "32768": 5 * 1024**3},
    "layers": [{"index": 0, **LAYER}, {"index": 1, **LAYER}],
    "new_parameters": 49_164,
    "state_bytes": 2048,
    "softmax_kv_bytes": {"2048": 0, "32768": 0},
    "break_even_context": 525,
    "notes": ["a note"],
}
PLAN = {
    "family": "llama [bold]",
    "layers": [{"index": 0, **LAYER}, {"index": 1, **LAYER}, {"index": 2, **KEPT}, {"index": 3, **LAYER}],
    "parameters": 1_073_746,
    "new_parameters": 73_746,
    "trained": {"align": 73_746, "finetune": 0},
    "context": 256,
    "tokens": {"align": 256, "finetune": 0},
    "steps": {"align": 1, "finetune": 0},
    "skipped": {"finetune": "finetune.tokens is 0"},
    "notes": [],
    "dropped": [],
    "export_dtype": "float32",
    "state_bytes": 6144,
    "kv_bytes_at_context": 256 * 4 * 1024,
    "memory_bytes": 1024**2,
    "disk_bytes": 1024**3,
}
REPORT = {
    "out": "o",
    "dtype": "bfloat16",
    "stages": {
        "align": {"tokens": 8192, "steps": 4, "loss_first": 0.5, "loss_last": 0.25, "seconds": 0.078546},
        "finetune": {"skipped": "finetune.tokens is 0", "tokens": 0, "steps": 0},
    },
    "layers": [{"layer": 0, "loss": 0.123, "nmse": 0.123}],
    "keys": {"mapped": 12_345},
    "mean_match": 0.46381,
    "merge_error": {"merge": {"max": 2e-5, "mean": 1e-6}, "cast": {"max": 0.159, "mean": 0.01}},
    "verification": {"import": {"way": "import linearize", "max_abs_difference": 0.0, "same_text": True}},
    "notes": [],
    "seconds": {"total": 76.331},
}
FIGURES = {
    "model": "o",
    "protocol": "concat@64",
    "context": 64,
    "windows": 1,
    "tokens": 12,
    "bos": "none",
    "eos": "none",
    "dtype": "float32",
    "device": "cpu",
    "token_perplexity": 12.0,
    "tokenizer_sha256": "abcdef",
    "data": {"name": "/a/path"},
}
AUDIT = {
    **FIGURES,
    "against": "m",
    "R": 25.0,
    "ppl_teacher": 10.0,
    "ppl_window": 14.0,
    "ppl_student": 13.0,
    "branches": {"full": 13.0, "window": None, "linear": 15.5, "none": 99.5},
    "reference": {"window": 64, "sinks": 0, "own": True},
    "by_position": [{"from": 0, "to": 64, "tokens": 12, "teacher": 10.5, "window": 14.5, "student": 13.5}],
    "notes": ["a note"],
}

CALLS: list[tuple[str, tuple, dict]] = []


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the heavy modules. Set an entry to an exception to have it raised, else it is the result."""
    results: dict[str, Any] = {
        "inspect": INSPECTION,
        "plan": PLAN,
        "convert": REPORT,
        "evaluate": FIGURES,
        "audit": AUDIT,
    }
    CALLS.clear()

    def stand_in(name: str):
        def call(*args: Any, **kwargs: Any) -> Any:
            CALLS.append((name, args, kwargs))
            print("chatter of a library")
            result = results.get(name, {"ok": True})
            if isinstance(result, BaseException):
                raise result
            return result

        return call

    for module, functions in {
        "linearize.convert.plan": {"make_plan": "plan", "inspect": "inspect"},
        "linearize.convert.pipeline": {"convert": "convert"},
        "linearize.evaluate.perplexity": {"evaluate": "evaluate"},
        "linearize.evaluate.recovery": {"audit": "audit"},
    }.items():
        fake = types.ModuleType(module)
        for function, name in functions.items():
            setattr(fake, function, stand_in(name))
        monkeypatch.setitem(sys.modules, module, fake)
    import linearize.api
    import linearize.artifacts.kind
    import linearize.artifacts.load
    import linearize.convert.early

    # There is no model `m` to look at: it counts as a causal one.
    monkeypatch.setattr(linearize.artifacts.load, "resolve", lambda model: Path(model))
    monkeypatch.setattr(linearize.artifacts.kind, "is_masked", lambda model: False)
    monkeypatch.setattr(linearize.convert.early, "refuse_early", lambda *args, **kwargs: None)
    monkeypatch.setattr(linearize.api, "generate", stand_in("generate"))
    results["generate"] = {
        "text": "a b",
        "new_tokens": 1,
        "tokens_per_second": 2.0,
        "device": "cpu",
        "dtype": "float32",
    }
    return results


RUNS = {
    "inspect": ["inspect", "m"],
    "plan": ["convert", "m", "o", "--plan"],
    "convert": ["convert", "m", "o", "--data", "d"],
    "evaluate": ["eval", "m", "--data", "d"],
    "audit": ["audit", "o", "--against", "m", "--data", "d"],
    "generate": ["generate", "m", "--prompt", "a"],
}


@pytest.mark.parametrize("name", RUNS)
def test_json_is_the_only_thing_on_stdout(name: str, library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    library[name] = {"ppl": 1.5, "bad": float("nan"), "path": Path("x"), "rows": [{"a": (1, 2)}], "none": None}
    assert main([*RUNS[name], "--json"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out) == {"ppl": 1.5, "bad": None, "path": "x", "rows": [{"a": [1, 2]}], "none": None}


def shown(name: str, capsys: pytest.CaptureFixture) -> str:
    """What people read of a command, one space between words."""
    assert main(RUNS[name]) == 0
    err = capsys.readouterr().err
    assert "\x1b[" not in err, "no colours without a terminal"
    return "\n".join(" ".join(line.split()) for line in err.splitlines())


def test_an_inspection_for_people(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    text = shown("inspect", capsys)
    for part in ("llama [bold], 2 layers", "teacher 1,000,000, added 49,164", "note: a note", "from 525 tokens"):
        assert part in text, text
    assert "0-1 linear 4/2 16 32 2.0 KiB 24,582" in text, "layers that are alike share a row"
    assert "2k 3.0 KiB 2.0 KiB 1.5x" in text and "32k 5.0 GiB 2.0 KiB 2,621,440x" in text
    assert "kept" not in text
    library["inspect"] = {k: INSPECTION[k] for k in INSPECTION if "state" not in k and "new" not in k} | {"layers": 2}
    text = shown("inspect", capsys)
    assert "parameters: 1,000,000" in text and "32k 5.0 GiB" in text and "student" not in text


def test_a_plan_for_people(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    text = shown("plan", capsys)
    assert "teacher 1,000,000, added 73,746, trained 73,746 in align" in text
    assert "256 tokens in 1 step, windows" in text and "finetune: skipped (finetune.tokens is 0)" in text
    assert "0-1 linear" in text and "2 softmax (kept) 4/2 16 - - 0" in text
    # 4 KiB of cache a token, a quarter of it in the layer that is kept.
    assert "2k 8.0 MiB 2.0 MiB 4.0x" in text and "student (state + kept KV)" in text
    assert "from 2 tokens on" in text


def test_a_conversion_for_people(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    text = shown("convert", capsys)
    assert "align 8192 4 0.08 s 0.5 0.25" in text and "which read different batches" in text
    assert "explain 46.4 %" in text and "Loads with import linearize: same logits, same text." in text
    assert "merge error (fp32) 2e-05, rounding to bfloat16 0.16 (max |logit|)" in text
    assert "0.123" not in text and "12,345" not in text, "said before, or for programs"
    verification = {"import": {"way": "import linearize", "max_abs_difference": 1e-6, "same_text": True}}
    library["convert"] = {**REPORT, "verification": verification}
    assert "logits within 1e-06, same text" in shown("convert", capsys)


def test_an_audit_for_people(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    text = shown("audit", capsys)
    assert "teacher teacher cut to the window (64 + the block before, no training) student" in text
    assert "perplexity 10 14 13" in text and "Recovery R: 25.0 %" in text and "note: a note" in text
    assert "linear branch alone 15.5" in text and "window alone" not in text and "no attention at all 99.5" in text
    assert "0 to 63 10.5 14.5 13.5" in text and "1 window, 12 tokens" in text
    assert "abcdef" not in text and "/a/path" not in text
    library["audit"] = {**AUDIT, "R": None}
    assert "Recovery R: not defined" in shown("audit", capsys)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("the key is wrong", "Use the other."), 2),
        (RefusedError("the disk is full"), 3),
        (VerificationError("layer 3 died"), 4),
        (RuntimeError("boom\nin two lines"), 1),
        (OSError(28, "No space left on device", "x"), 3),
        (OSError(5, "Input/output error", "x"), 1),
        (PermissionError(13, "Permission denied", "x"), 2),
        (MemoryError(), 1),
    ],
)
def test_errors_are_one_line_and_a_code(
    name: str, error: Exception, code: int, library: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    library[name] = error
    assert main([*RUNS[name], "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line != "chatter of a library"]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    if code == 1 and isinstance(error, RuntimeError):
        assert "LINEARIZE_DEBUG=1" in lines[0]


def test_debug_shows_the_traceback(
    library: dict[str, Any], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARIZE_DEBUG", "1")
    library["inspect"] = RuntimeError("boom")
    assert main(RUNS["inspect"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_convert_passes_everything_on(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    argv = ["convert", "m", "o", "align.tokens=2M", "-r", "gated-deltanet", "keep_softmax=every 4", "--data", "d"]
    assert main([*argv, "--resume", "seed=3"]) == 0
    ((name, args, kwargs),) = CALLS
    assert (name, args) == ("convert", ("m", "o"))
    assert kwargs["recipe"] == load_recipe("gated-deltanet", ["align.tokens=2M", "keep_softmax=every 4", "seed=3"])
    assert kwargs["data"] == "d" and kwargs["resume"] is True
    for method in ("start", "step", "layer_table", "message", "finish"):
        assert callable(getattr(kwargs["progress"], method))
    assert " audit o --against m --data d" in capsys.readouterr().err


def test_plan_starts_nothing_and_needs_no_data(library: dict[str, Any]) -> None:
    assert main(["convert", "m", "o", "--plan", "context=64"]) == 0
    ((name, args, kwargs),) = CALLS
    assert (name, args, kwargs["data"], kwargs["out"], kwargs["resume"]) == ("plan", ("m",), None, "o", False)
    assert kwargs["recipe"].context == 64
    assert main(["convert", "m", "o", "--plan", "--resume"]) == 0 and CALLS[-1][2]["resume"] is True


def test_eval_audit_inspect_and_generate_pass_everything_on(library: dict[str, Any]) -> None:
    run = ["--context", "128", "--device", "cpu", "--dtype", "float32"]
    few = ["--max-windows", "3"]
    assert main(["eval", "m", "--data", "d", "--against", "t", "--protocol", "concat@128", *few, *run]) == 0
    assert main(["audit", "o", "--data", "d", "--against", "t", *run]) == 0
    assert main(["inspect", "m", "--recipe", "based"]) == 0
    assert main(["generate", "m", "-p", "hi", "--max-new-tokens", "7", "--temperature", "0.5", "--seed", "9"]) == 0
    common = {"context": 128, "device": "cpu", "dtype": "float32", "data": "d", "against": "t", "teacher_bits": None}
    assert CALLS[0] == ("evaluate", ("m",), {**common, "protocol": "concat@128", "max_windows": 3})
    assert CALLS[1] == ("audit", ("o",), {**common, "max_windows": 64})
    assert CALLS[2] == ("inspect", ("m", load_recipe("based")), {})
    sampling = {"max_new_tokens": 7, "temperature": 0.5, "seed": 9, "device": "auto", "dtype": "auto"}
    assert CALLS[3] == ("generate", ("m", "hi"), sampling)


def test_generated_text_goes_to_stdout(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    assert main(RUNS["generate"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("a b\n") and "2.0 a second" in err


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_gives_the_command_that_goes_on(
    saved: bool,
    library: dict[str, Any],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fake = types.ModuleType("linearize.convert.checkpoint")
    fake.run_folder = lambda out: out.parent / f".{out.name}.linearize-run"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "linearize.convert.checkpoint", fake)
    out = tmp_path / "my out"
    if saved:
        fake.run_folder(out).mkdir()
    library["convert"] = KeyboardInterrupt()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/linearize"])
    argv = ["convert", "m", str(out), "--data", "d", "keep_softmax=every 4"]
    assert main(argv) == 130
    err = capsys.readouterr().err
    assert "interrupted" in err
    go_on = f"linearize convert m '{out}' --recipe pure --data d 'keep_softmax=every 4' --resume"
    assert (go_on in err) == saved, err
    assert ("Nothing was saved" in err) == (not saved)


@pytest.mark.parametrize(("saved", "number"), [(True, 28), (False, 28), (True, 13)])
def test_a_disk_that_fills_up_says_how_to_go_on(
    saved: bool,
    number: int,
    library: dict[str, Any],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fake = types.ModuleType("linearize.convert.checkpoint")
    fake.run_folder = lambda out: out.parent / f".{out.name}.run"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "linearize.convert.checkpoint", fake)
    if saved:
        fake.run_folder(tmp_path / "out").mkdir()
    error = RefusedError("no space left on the disk")
    error.__cause__ = OSError(number, "told by the system")
    library["convert"] = error
    assert main(["convert", "m", str(tmp_path / "out"), "--data", "d", "--teacher-bits", "4"]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "chatter of a library"]
    assert lines[-1] == "error: no space left on the disk"
    told = saved and number == 28
    assert len(lines) == 1 + told and (not told or "--data d --teacher-bits 4 --resume" in lines[0]), lines


def test_ctrl_c_elsewhere(library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    library["evaluate"] = KeyboardInterrupt()
    assert main(RUNS["evaluate"]) == 130
    assert "--resume" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["frob"], "frob"),
        (["convert", "m"], "OUT"),
        (["convert", "m", "o"], "--data"),
        (["convert", "m", "seed=1", "--data", "d"], "OUT is missing"),
        (["convert", "m", "o", "--data", "d", "--bogus"], "--bogus"),
        (["convert", "m", "o", "--data", "d", "--recipe", "lolcat"], "'lolcats'"),
        (["convert", "m", "o", "--data", "d", "align.tokns=1"], "'tokens'"),
        (["convert", "m", "o", "--data", "d", "stray"], "key=value"),
        (["convert", "m", "o", "--data", "d", "-r", "none.yaml"], "no such file"),
        (["inspect", "m", "--recipe", "x"], "no recipe"),
        (["eval", "m"], "--data"),
        (["eval", "m", "--data", "d", "--context", "many"], "--context"),
        (["eval", "m", "--data", "d", "--context", "0"], "--context"),
        (["audit", "o", "--data", "d"], "--against"),
        (["generate", "m"], "--prompt"),
        (["generate", "m", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["recipes", "frob"], "frob"),
        (["recipes", "show", "lolcat"], "'lolcats'"),
        (["recipes", "validate", "lolcats", "sed=1"], "'seed'"),
    ],
)
def test_usage_errors_are_one_line_before_any_work(
    argv: list[str], says: str, library: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and not CALLS
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and says in err, err


def test_generated_text_cannot_steer_a_terminal(
    library: dict[str, Any], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library["generate"]["text"] = "a\tb\n\x1b]52;c;eA==\x07\x1b[2J\x9b\rc"
    assert main(RUNS["generate"]) == 0
    assert capsys.readouterr().out.endswith(library["generate"]["text"] + "\n"), "to a file or a pipe every byte"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(RUNS["generate"]) == 0
    out = capsys.readouterr().out.removeprefix("chatter of a library\n")
    assert out == "a\tb\n\\x1b]52;c;eA==\\x07\\x1b[2J\\x9b\\x0dc\n"


@pytest.mark.parametrize("argv", [[], ["recipes"]])
def test_no_command_shows_help_on_stderr(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Usage:" in err


COMMANDS = [["inspect"], ["convert"], ["eval"], ["audit"], ["generate"], ["doctor"]]
COMMANDS += [["recipes", name] for name in ("ls", "show", "cp", "validate")]


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_shows_examples(command: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out and " ".join(["linearize", *command]) in out
    assert not command or "--json" in out


def test_version(capsys: pytest.CaptureFixture) -> None:
    import linearize

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"linearize {linearize.__version__}\n"


@pytest.mark.parametrize("group", [[], ["recipes"], ["import"]])
def test_no_summary_is_cut_short(
    group: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of commands on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*group, "--help"]) == 0
    shown = capsys.readouterr().out.partition("Commands:\n")[2]
    assert shown.strip() and "..." not in shown, shown
