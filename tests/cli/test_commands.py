"""Every command with the library behind it replaced: what is passed on, what is printed where, and the exit codes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import RefusedError, UsageError, VerificationError
from linearize.recipe import list_recipes, load_recipe, recipe_path
from linearize_cli.app import main

CALLS: list[tuple[str, tuple, dict]] = []


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the heavy modules. Set an entry to an exception to have it raised, else it is the result."""
    results: dict[str, Any] = {}
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


@pytest.mark.parametrize("name", ["inspect", "plan", "convert", "audit"])
def test_people_read_stderr(name: str, library: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    library[name] = {
        "family": "llama [bold]",
        "state_bytes": 2048,
        "kv_bytes": {"2048": 3072, "32768": 5 * 1024**3},
        "layers": [{"index": 0, "to": "linear"}],
    }
    assert main(RUNS[name]) == 0
    _, err = capsys.readouterr()
    for part in ("llama [bold]", "2.0 KiB", "3.0 KiB", "5.0 GiB", "linear"):
        assert part in err, err
    assert "\x1b[" not in err, "no colours without a terminal"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("the key is wrong", "Use the other."), 2),
        (RefusedError("the disk is full"), 3),
        (VerificationError("layer 3 died"), 4),
        (RuntimeError("boom\nin two lines"), 1),
        (OSError(28, "No space left on device", "x"), 1),
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
    assert "linearize audit o --against m --data d" in capsys.readouterr().err


def test_plan_starts_nothing_and_needs_no_data(library: dict[str, Any]) -> None:
    assert main(["convert", "m", "o", "--plan", "context=64"]) == 0
    ((name, args, kwargs),) = CALLS
    assert (name, args, kwargs["data"], kwargs["out"]) == ("plan", ("m",), None, "o")
    assert kwargs["recipe"].context == 64


def test_eval_audit_inspect_and_generate_pass_everything_on(library: dict[str, Any]) -> None:
    run = ["--context", "128", "--device", "cpu", "--dtype", "float32"]
    assert main(["eval", "m", "--data", "d", "--against", "t", "--protocol", "concat@128", *run]) == 0
    assert main(["audit", "o", "--data", "d", "--against", "t", *run]) == 0
    assert main(["inspect", "m", "--recipe", "based"]) == 0
    assert main(["generate", "m", "-p", "hi", "--max-new-tokens", "7", "--temperature", "0.5", "--seed", "9"]) == 0
    common = {"context": 128, "device": "cpu", "dtype": "float32", "data": "d", "against": "t"}
    assert CALLS[0] == ("evaluate", ("m",), {**common, "protocol": "concat@128", "max_windows": None})
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
    go_on = f"linearize convert m '{out}' --recipe lolcats --data d 'keep_softmax=every 4' --resume"
    assert (go_on in err) == saved, err
    assert ("Nothing was saved" in err) == (not saved)


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


def test_recipes_ls(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes", "ls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert [row["name"] for row in rows] == list_recipes() and all(row["paper"] for row in rows)
    assert main(["recipes", "ls"]) == 0
    err = capsys.readouterr().err
    assert all(name in err for name in list_recipes())


def test_recipes_show(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes", "show", "based"]) == 0
    assert capsys.readouterr().out == recipe_path("based").read_text(encoding="utf-8")
    assert main(["recipes", "show", "based", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"] == load_recipe("based").as_dict() and shown["digest"] == load_recipe("based").digest()


def test_recipes_cp_then_validate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "own.yaml"
    assert main(["recipes", "cp", "mamba2", str(file)]) == 0
    assert file.read_bytes() == recipe_path("mamba2").read_bytes()
    assert main(["recipes", "cp", "mamba2", str(file)]) == 3, "an existing file is refused"
    assert main(["recipes", "cp", "mamba2", str(tmp_path)]) == 0 and (tmp_path / "mamba2.yaml").exists()
    assert main(["recipes", "cp", "mamba2", str(tmp_path / "no" / "x.yaml")]) == 2
    capsys.readouterr()
    assert main(["recipes", "validate", str(file), "align.tokens=1M", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 7_000_000
    file.write_text(file.read_text(encoding="utf-8") + "\nsed: 1\n", encoding="utf-8")
    assert main(["recipes", "validate", str(file)]) == 2
    assert "own.yaml" in capsys.readouterr().err


def test_doctor_says_what_is_wrong(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize_cli import doctor

    bad = {"recipe": "x", "device": "cpu", "difference": 1.0, "passed": False, "seconds": 0.1}
    monkeypatch.setattr(doctor, "_self_test", lambda name: {**bad, "recipe": name})
    monkeypatch.setattr(doctor, "_device", lambda: {"cuda": None})
    assert main(["doctor", "--json"]) == 4
    out, err = capsys.readouterr()
    assert len(json.loads(out)["problems"]) == 3 and "lolcats" in err
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else "1")
    assert main(["doctor"]) == 4
    assert "peft is not installed" in capsys.readouterr().err


def test_doctor_tests_the_mixers_of_this_machine(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["packages"]["torch"]
    assert [row["recipe"] for row in report["self_test"]] == ["lolcats", "liger-gla", "gated-deltanet"]

    from linearize_cli import doctor

    monkeypatch.setattr(doctor, "TOLERANCE", 0.0)
    assert main(["doctor"]) == 4, "a difference above the tolerance is a problem"
