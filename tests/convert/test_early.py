"""Refusals come before the imports that take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from linearize.api import convert
from linearize.errors import LinearizeError

model, out, data = sys.argv[1:]
try:
    convert(model, out, data=data)
except LinearizeError as error:
    print(error.exit_code, error)
heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("model", "out", "data", "line"),
    [
        ("nosuchmodel", "out", "demo", "2 there is no model 'nosuchmodel'"),
        ("demo", "out", "absent.txt", "2 absent.txt: no such file or folder"),
        ("demo", "full", "demo", "3 "),
        ("t5", "out", "demo", "2 the family 't5' cannot be converted"),
    ],
)
def test_nothing_heavy_is_imported_to_refuse(
    tmp_path: Path, source_env: dict[str, str], model: str, out: str, data: str, line: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    command = [sys.executable, "-c", CODE, model, out, data]
    done = subprocess.run(command, env=source_env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(line)
