"""Every command with the library behind it replaced: what is passed on, what is printed where, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.recipe import load_recipe
from linearize_cli.app import main
from tests.cli.stand_ins import AUDIT, CALLS, INSPECTION, REPORT, RUNS


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
