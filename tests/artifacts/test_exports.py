"""What a folder is that is no finished export: said in one line, with the next step, before anything heavy is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linearize.artifacts.exports import require_export, run_folder, unfinished_out
from linearize.errors import UsageError
from linearize_cli.app import main

COMMANDS = (
    "verify {}",
    "report {}",
    "push {} me/it --dry-run",
    "audit {} --against demo --data demo --save",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, files in {
        "plain": {"config.json": '{"model_type": "llama"}'},
        "nameless": {"config.json": "{}"},
        "bare": {"config.json": '{"model_type": "linearized_llama"}'},
        "broken": {"config.json": "{"},
        "adapter": {"adapter_config.json": "{}"},
        "empty": {},
        "notes": {"todo.txt": "words"},
        "above/out": {"linearize.json": "{}"},
        "half": {},
        ".half.linearize-run": {"lock": ""},
        ".killed.linearize-run": {"lock": ""},
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plain", "plain is an ordinary checkpoint (model_type 'llama'), not a converted model"),
        ("nameless", "nameless is an ordinary checkpoint (model_type None)"),
        ("bare", "bare has no linearize.json: it is a converted model that was copied, downloaded or saved again"),
        ("broken", "config.json is not valid JSON"),
        ("adapter", "adapter is an adapter, not a converted model. Give the OUT"),
        ("empty", "empty is no model: it holds neither linearize.json nor config.json. Give the OUT"),
        ("notes", "notes is no model: it holds neither"),
        ("above", "above is no model: it holds neither linearize.json nor config.json. Did you mean 'above/out'?"),
        ("half", "did not finish, so there is no export yet. Give its convert command again, with --resume."),
        (".killed.linearize-run", "killed did not finish, so there is no export yet. Give its convert command again"),
    ],
)
def test_what_it_is_and_what_to_do(name: str, says: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        require_export(place / name, name)
    assert says in str(caught.value)
    for command in COMMANDS:
        assert main(command.format(name).split()) == 2
        out, err = capsys.readouterr()
        assert out == "" and says in err and len(err.splitlines()) == 1, command


def test_out_of_a_run_that_did_not_finish(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify killed", "eval killed --data demo", "generate killed --prompt x", "inspect killed"):
        assert main(command.split()) == 2
        line = capsys.readouterr().err
        assert "there is no model 'killed' yet: its conversion did not finish. Give its convert command again" in line
    assert unfinished_out(place / "killed") == unfinished_out(run_folder(place / "killed")) == place / "killed"
    assert unfinished_out(place / "plain") is unfinished_out(place / "nowhere") is None


def test_a_damaged_manifest_is_for_verify_to_say(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_export(place / "above" / "out", "above/out")
    assert main(["verify", "above/out", "--json"]) == 4
    out, err = capsys.readouterr()
    assert not json.loads(out)["ok"] and "is not a manifest" in err
