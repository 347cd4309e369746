"""A push to a local server that speaks the Hub's protocol, and every way in which one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import linearize
from linearize.artifacts.licence import UNKNOWN
from linearize.artifacts.manifest import MANIFEST, write_manifest
from linearize.errors import LinearizeError, RefusedError, UsageError, VerificationError
from tests.artifacts.hub_server import READER, WRITER, Hub, Repo

SECRET = "hf_" + "aB3" * 12
CARD = """---
license: mit
library_name: transformers
---

# teacher, linearized

model = AutoModelForCausalLM.from_pretrained("made")

`linearize inspect made` and `linearize audit made --against teacher --data x`
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What looks like an export to a push: a few files and their manifest."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "linearized_llama"}\n')
    (folder / "model.safetensors").write_bytes(b"\0" * 5000)
    (folder / "modeling_linearized.py").write_text("pass\n")
    (folder / "LICENSE").write_text("terms\n")
    seal(folder)
    return folder


def seal(folder: Path, card: str | None = CARD, **extra: Any) -> None:
    """Write the manifest anew, and the card."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, {"name": "made", "teacher": {"name": "teacher", "repo": "owner/teacher"}, **extra})
    if card is not None:
        (folder / "README.md").write_text(card)


def refusal(kind: type[LinearizeError], run: Callable[[], Any]) -> str:
    """The one line of an error of this kind and no other."""
    with pytest.raises(LinearizeError) as caught:
        run()
    assert type(caught.value) is kind, caught.value
    line = str(caught.value)
    assert "\n" not in line and SECRET not in line
    return line


def test_a_push_is_private_one_commit_and_the_same_bytes(hub: Hub, out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    dry = linearize.push(out, "me/new", dry_run=True)
    assert hub.log == []
    result = linearize.push(out, "me/new", message="First")
    assert result["files"] == dry["files"] and result["visibility"] == dry["visibility"] == "private"
    repo = hub.repos["model", "me/new"]
    assert repo.private and list(repo.titles.values())[1:] == ["First"] and result["commit"] == repo.refs["main"]
    assert result["created"] and result["changed"] and result["pr_url"] is None
    sent = {"config.json", "model.safetensors", "modeling_linearized.py", "LICENSE", MANIFEST, "README.md"}
    assert {row["path"] for row in result["files"]} == sent and set(repo.files) == sent | {".gitattributes"}
    assert result["left"] == ["notes.txt"] and any("notes.txt" in note for note in result["notes"])
    for name in sent - {"README.md"}:
        assert repo.files[name] == before[name], name
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    card = repo.files["README.md"].decode()
    assert 'from_pretrained("me/new")' in card and "linearize inspect me/new`" in card
    assert "linearize audit me/new --against" in card and "license: mit" in card
    assert any("no figures of quality" in note for note in result["notes"])

    again = linearize.push(out, "me/new")
    assert not again["changed"] and not again["created"] and again["commit"] == result["commit"]


def test_nothing_that_is_there_is_deleted_or_made_public(hub: Hub, out: Path) -> None:
    repo = hub.make("me/there", {"theirs.txt": b"kept", "config.json": b"old"}, private=True)
    result = linearize.push(out, "me/there", public=True)
    assert repo.files["theirs.txt"] == b"kept" and repo.files["config.json"] == (out / "config.json").read_bytes()
    assert repo.private and result["visibility"] == "private"
    assert any("private, and stays so" in note for note in result["notes"])


def test_visibility_is_what_was_said(hub: Hub, out: Path) -> None:
    public = hub.make("me/open", {"config.json": b"old"})
    line = refusal(RefusedError, lambda: linearize.push(out, "me/open"))
    assert "me/open is there already and public" in line and "--public" in line
    assert public.files["config.json"] == b"old" and hub.writes() == []
    assert linearize.push(out, "me/open", public=True)["visibility"] == "public"
    assert linearize.push(out, "me/shown", public=True)["created"] and not hub.repos["model", "me/shown"].private


def test_a_server_that_makes_it_public_gets_nothing(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = hub.make
    monkeypatch.setattr(hub, "make", lambda name, **options: make(name, **{**options, "private": False}))
    assert "made private and is public; nothing was sent" in refusal(RefusedError, lambda: linearize.push(out, "me/a"))
    assert list(hub.repos["model", "me/a"].files) == [".gitattributes"]


def test_a_pull_request(hub: Hub, out: Path) -> None:
    line = refusal(RefusedError, lambda: linearize.push(out, "me/none", create_pr=True))
    assert "not there yet" in line and hub.writes() == []
    repo = hub.make("other/model")  # where this user may not commit
    result = linearize.push(out, "other/model", public=True, create_pr=True)
    assert result["pr_url"] and repo.refs["refs/pr/1"] == result["commit"] != repo.refs["main"]


def test_somebody_else_commits_meanwhile(hub: Hub, out: Path) -> None:
    repo = hub.make("me/model", private=True)

    def meanwhile(repo: Repo) -> None:
        hub.before_commit = None
        repo.commit({"config.json": b"theirs"}, "Theirs")

    hub.before_commit = meanwhile
    line = refusal(RefusedError, lambda: linearize.push(out, "me/model"))
    assert "changed while it was being pushed to (412); nothing was committed" in line
    assert repo.files["config.json"] == b"theirs"


@pytest.mark.parametrize(
    "fault, words",
    [
        (("POST /api/repos/create", (403, "no rights here")), "gives no right to make me/new (403): no rights here"),
        (("POST /api/repos/create", (409, "exists")), "made or changed by somebody else (409)"),
        (
            ("/commit/", (403, "no")),
            "no right to write to me/new (403): no (the repository was made and is empty)",
        ),
        (("/commit/", (413, "too large")), "could not write to me/new (413): too large"),
        (("/info/lfs/", (403, "storage is full")), "gives no right to write to me/new (403): storage is full"),
        (("PUT /lfs", (400, "broken")), "could not write to me/new (400): broken"),
        (("GET /api/models/me/new", (401, "Invalid credentials in Authorization header")), "the token (401)"),
    ],
)
def test_the_hubs_refusals(hub: Hub, out: Path, fault: tuple[str, tuple[int, str]], words: str) -> None:
    hub.faults = dict([fault])
    assert words in refusal(RefusedError, lambda: linearize.push(out, "me/new"))


def test_metadata_that_the_hub_does_not_take_is_bad_input(hub: Hub, out: Path) -> None:
    line = refusal(UsageError, lambda: linearize.push(out, "me/new", license="not-a-licence"))
    assert '"license" must be one of' in line and hub.lfs == {}


def test_what_arrived_is_compared(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Repo.commit
    monkeypatch.setattr(
        Repo, "commit", lambda self, changes, *a, **k: commit(self, {**changes, "LICENSE": b"x"}, *a, **k)
    )
    assert "LICENSE has other bytes there" in refusal(VerificationError, lambda: linearize.push(out, "me/new"))


def test_offline_no_token_no_right_and_no_connection(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    run = lambda: linearize.push(out, "me/new")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refusal(RefusedError, run)
        assert linearize.push(out, "me/new", dry_run=True)["visibility"] == "private"
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        assert "there is no token" in refusal(RefusedError, run)
        assert linearize.push(out, "me/new", dry_run=True)["dry_run"]
    assert hub.log == []
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "gives no right to make me/new (403)" in refusal(RefusedError, run)
    hub.make("me/model", private=False)
    line = refusal(RefusedError, lambda: linearize.push(out, "me/model", public=True))
    assert "gives no right to write to me/model (403)" in line
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 could not be reached" in refusal(RefusedError, run)


def test_another_kind_of_repository(hub: Hub, out: Path) -> None:
    hub.make("me/words", kind="dataset")
    assert "me/words is a dataset" in refusal(RefusedError, lambda: linearize.push(out, "me/words"))
    for repo in (
        "datasets/me",
        "spaces/me",
        "name",
        "a/b/c",
        "https://huggingface.co/a/b",
        "../x",
        "a/b@main",
        "a/-b",
        "",
    ):
        assert "owner/name" in refusal(UsageError, lambda: linearize.push(out, repo))  # noqa: B023
    assert ("model", "me/words") not in hub.repos and hub.writes() == []


def test_the_licence_is_never_guessed(hub: Hub, out: Path) -> None:
    seal(out, CARD.replace("license: mit\n", "") + UNKNOWN)
    line = refusal(RefusedError, lambda: linearize.push(out, "me/new", dry_run=True))
    assert "licence of the teacher teacher is unknown" in line and "--license ID" in line
    result = linearize.push(out, "me/new", license="apache-2.0")
    assert result["licence"] == "apache-2.0" and result["base_model"] == "owner/teacher"
    card = hub.repos["model", "me/new"].files["README.md"].decode()
    assert "license: apache-2.0\n" in card and "`apache-2.0`, as whoever uploaded" in card and UNKNOWN not in card
    assert "Did you mean 'apache-2.0'" in refusal(
        UsageError, lambda: linearize.push(out, "me/new", license="Apache 2.0")
    )
    seal(out)
    result = linearize.push(out, "me/new", license="other", dry_run=True)
    assert any("the card says licence mit, and --license other" in note for note in result["notes"])


@pytest.mark.parametrize(
    "name, text, line, kind",
    [
        ("config.json", f'{{"a": 1,\n "b": "{SECRET}"}}', 2, "a Hugging Face token"),
        ("tokenizer.json", f'{{"model": "{SECRET}"}}', 1, "a Hugging Face token"),
        ("chat_template.jinja", "x\n\nAKIA" + "Q7" * 8, 3, "an AWS access key"),
        ("LICENSE", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n", 1, "a private key"),
        ("modeling_linearized.py", 'api_key = "q8ZrT2mXw9LpV4nKb7Ys"\n', 1, "looks like a secret"),
        ("generation_config.json", '{"url": "https://me:hunter2@example.com"}', 1, "a password in a URL"),
        ("config.json", '{"x": 0,\n"_name_or_path": "/data/models/teacher"}', 2, "an absolute path"),
        ("tokenizer_config.json", '{"from": "C:\\\\Users\\\\joe\\\\model"}', 1, "a home path"),
        ("README.md", CARD + "\nsee /home/joe/models", CARD.count("\n") + 2, "a home path"),
    ],
)
def test_secrets_are_named_and_not_shown(hub: Hub, out: Path, name: str, text: str, line: int, kind: str) -> None:
    (out / name).write_text(text)
    seal(out, None)
    message = refusal(RefusedError, lambda: linearize.push(out, "me/new"))
    assert f"{name}, line {line}: " in message and kind in message and hub.log == []
    for part in ("aB3aB3", "Q7Q7", "b3Blb", "q8Zr", "hunter2", "/data/models", "joe"):
        assert part not in message
    accepted = lambda: linearize.push(out, "me/new", dry_run=True, accept=[name])  # noqa: E731
    if "path" in kind:
        assert accepted()["dry_run"]
    else:
        refusal(RefusedError, accepted)


def test_what_is_no_secret(out: Path) -> None:
    (out / "tokenizer.json").write_text('{"vocab": {"/home/ubuntu": 1, "token=x7Kq92LmPz04VbNw81Rt": 2}}')
    (out / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_token": "tool_call_begin_marker"}')
    (out / "config.json").write_text('{"_name_or_path": "owner/teacher", "sha256": "' + "0123456789abcdef" * 4 + '"}')
    seal(out)
    assert "unknown" not in str(linearize.push(out, "me/new", dry_run=True))
    assert "no such file is sent" in refusal(UsageError, lambda: linearize.push(out, "me/new", accept=["notes.txt"]))


def test_only_a_whole_export_is_sent(hub: Hub, out: Path, tmp_path: Path) -> None:
    (out / "model.safetensors").write_bytes(b"\0" * 4999)
    assert "model.safetensors has 4999 bytes" in refusal(UsageError, lambda: linearize.push(out, "me/new"))
    (out / "model.safetensors").write_bytes(b"\0" * 5000)
    (out / "added.py").write_text("import os")
    assert "added.py is not in linearize.json" in refusal(UsageError, lambda: linearize.push(out, "me/new"))
    (out / "added.py").unlink()
    for name in ("weights.bin", "sub/config.json", "model.pt", ".env"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
        seal(out)
        assert f"lists {name}, which is no file of an export" in refusal(
            UsageError, lambda: linearize.push(out, "me/new")
        )
        (out / name).unlink()
    seal(out)
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert "is a link" in refusal(UsageError, lambda: linearize.push(out, "me/new"))
    (out / "README.md").unlink()
    assert "has no README.md" in refusal(UsageError, lambda: linearize.push(out, "me/new"))
    assert "is no folder" in refusal(UsageError, lambda: linearize.push(tmp_path / "no", "me/new"))
    (tmp_path / "empty").mkdir()
    assert "empty is no model" in refusal(UsageError, lambda: linearize.push(tmp_path / "empty", "me/new"))
    (out / "README.md").write_text("---\n[\n---\n")
    assert "metadata of" in refusal(UsageError, lambda: linearize.push(out, "me/new"))
    assert hub.log == []


def test_the_command(hub: Hub, out: Path, tmp_path: Path, source_env: dict[str, str]) -> None:
    environment = {**source_env, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "linearize_cli", "push", str(out), *arguments]
        return subprocess.run(command, env={**environment, **changes}, capture_output=True, text=True, check=False)

    dry = run("me/new", "--dry-run", HF_TOKEN="", HF_ENDPOINT="https://example.invalid")
    assert dry.returncode == 0 and dry.stdout == "" and "Nothing was sent" in dry.stderr
    for words in (
        "model.safetensors",
        "4.9 KiB",
        "visibility: private",
        "licence: mit",
        "target: https://example.invalid/me/new",
    ):
        assert words in dry.stderr
    pushed = run("me/new", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["commit"] == hub.repos["model", "me/new"].refs["main"]
    refused = run("me/new", HF_HUB_OFFLINE="1")
    assert (
        refused.returncode == 3
        and refused.stderr.startswith("error: HF_HUB_OFFLINE")
        and refused.stderr.count("\n") == 1
    )
    assert run("name").returncode == 2
