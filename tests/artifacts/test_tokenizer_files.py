"""A tokenizer's files choose neither code nor other files, and an export does not pass such wishes on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linearize.artifacts.download import TOKENIZER_FILES
from linearize.artifacts.load import check_checkpoint, load_tokenizer
from linearize.artifacts.tokenizer_files import carry, check_tokenizer_files, cleaned, readable
from linearize.errors import UsageError

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture
def folder(tmp_path: Path, build_llama: Callable[..., Path]) -> Path:
    return build_llama(tmp_path / "teacher")


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def test_a_clean_tokenizer_is_read_where_it_lies(folder: Path) -> None:
    with readable(folder, TOKENIZER_FILES) as place:
        assert place == folder
    assert load_tokenizer(folder).name_or_path == str(folder)


@pytest.mark.parametrize("name", [CONFIG, SPECIAL])
@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file"])
def test_no_tokenizer_outside_is_read(
    folder: Path, tmp_path: Path, name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers opens what special_tokens_map.json names as tokenizer_file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = json.loads((folder / "tokenizer.json").read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    other["added_tokens"].append({"id": 259, "content": "<canary>", **token})
    (tmp_path / "outside.json").write_text(json.dumps(other))
    edit(folder / name, **{key: str(tmp_path / "outside.json")})
    tokenizer = load_tokenizer(folder)
    assert "<canary>" not in tokenizer.get_vocab() and tokenizer.decode(tokenizer("def x")["input_ids"]) == "def x"
    assert tokenizer.name_or_path == str(folder)
    assert not list(tmp_path.glob("linearize-tokenizer-*"))


def test_an_export_does_not_pass_on_what_would_run_code(folder: Path, tmp_path: Path) -> None:
    edit(folder / CONFIG, auto_map={"AutoTokenizer": ["attacker/repo--evil.Tok", None]}, chat_template="{{ x }}")
    edit(folder / SPECIAL, bos_token="<s>", tokenizer_file="/etc/passwd", evil=1)
    for name in (CONFIG, SPECIAL, "tokenizer.json"):
        carry(folder / name, tmp_path / name)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert "auto_map" not in written and written["chat_template"] == "{{ x }}" and written["bos_token"] == "<s>"
    assert json.loads((tmp_path / SPECIAL).read_text()) == {"bos_token": "<s>"}
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_is_clean_is_carried_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    odd = b'{ "bos_token":"<s>" ,\n\n"eos_token": "</s>"}'
    (folder / SPECIAL).write_bytes(odd)
    for name in (CONFIG, SPECIAL):
        carry(folder / name, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert cleaned(CONFIG, {"model_max_length": 7, "init_inputs": [], "_x": 1, "merges_file": "x"}) == {
        "model_max_length": 7
    }


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG, SPECIAL, "added_tokens.json", "chat_template.jinja"])
def test_pipes_and_huge_files_are_refused_before_they_are_opened(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for read in (
        lambda: check_tokenizer_files(folder, TOKENIZER_FILES),
        lambda: check_checkpoint(folder, finite=False),
    ):
        with pytest.raises(UsageError, match=f"{name} is not a file"):
            read()
    (folder / name).unlink()
    with open(folder / name, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UsageError, match=f"{name} is larger than"):
        check_checkpoint(folder, finite=False)
