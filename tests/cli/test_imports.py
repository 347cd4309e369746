"""What importing costs, and that importing linearize is all that a converted model needs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "safetensors")

CHECK = f"""
import sys
{{body}}
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
"""


def python(code: str, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "body",
    [
        "import linearize; linearize.load, linearize.audit, linearize.convert",
        "import linearize.errors, linearize.progress, linearize.api",
        "import linearize.recipe; linearize.recipe.load_recipe('based')",
        "from linearize_cli.app import main; assert main(['--help']) == 0",
        "from linearize_cli.app import main; assert main(['convert', '--help']) == 0",
        "from linearize_cli.app import main; assert main(['recipes', 'ls']) == 0",
        "from linearize_cli.app import main; assert main(['convert', 'm', 'o', '--data', 'd', 'sed=1']) == 2",
    ],
)
def test_nothing_heavy_is_imported(body: str, source_env: dict[str, str], tmp_path: Path) -> None:
    python(CHECK.format(body=body), source_env, tmp_path)


def test_help_does_not_import_rich_or_yaml_either(source_env: dict[str, str], tmp_path: Path) -> None:
    body = "from linearize_cli.app import main; main(['--help']); assert not {'rich', 'yaml'} & set(sys.modules)"
    python(CHECK.format(body=body), source_env, tmp_path)


def test_the_command_line_runs_as_a_module(source_env: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "linearize_cli", "recipes", "show", "nope"],
        env=source_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_reader_that_leaves_is_no_traceback(source_env: dict[str, str], tmp_path: Path) -> None:
    command = f"{sys.executable} -m linearize_cli recipes show lolcats | true"
    done = subprocess.run(
        command, shell=True, env=source_env, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


def test_click_is_never_imported(root: Path) -> None:
    """Typer carries its own copy; the real one may be absent or another."""
    for path in (root / "cli").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) click\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model's folder with weights and config, and no code beside them."""
    import torch
    from transformers import LlamaConfig

    from linearize.modeling.configuration_linearized import linearized_config
    from linearize.modeling.modeling_linearized import MODELS
    from linearize.recipe import load_recipe

    native = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    config = linearized_config(native, layer_mixers=["linear"], spec=load_recipe("lolcats").mixer)
    with torch.random.fork_rng():
        model = MODELS["llama"](config)
    folder = tmp_path_factory.mktemp("export")
    model.save_pretrained(folder)
    return folder


AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"
ORDERS = {
    "linearize first": f"import linearize\n{AUTO}",
    "transformers first": f"{AUTO}\nimport linearize",
    "bare transformers first": f"import transformers\nimport linearize\n{AUTO}",
    "a room first": f"from linearize.modeling.configuration_linearized import CONFIGS\n{AUTO}",
    "the room of models first": f"from linearize.modeling.modeling_linearized import MODELS\n{AUTO}",
}

LOAD = """
import sys
{imports}
path = sys.argv[1] if len(sys.argv) > 1 else {path!r}
config = AutoConfig.from_pretrained(path, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
assert type(model).__module__ == "linearize.modeling.modeling_linearized", type(model)
assert type(model.config) is type(config)
assert not [f for f in sys.meta_path if "linearize" in type(f).__module__], "the hook takes itself out"
"""


@pytest.mark.parametrize("order", ORDERS)
def test_from_pretrained_works_in_any_import_order(
    order: str, export: Path, source_env: dict[str, str], tmp_path: Path
) -> None:
    code = "import warnings; warnings.simplefilter('error', UserWarning)\n"
    python(code + LOAD.format(imports=ORDERS[order], path=str(export)), source_env, tmp_path)


def test_importing_linearize_then_transformers_stays_light(source_env: dict[str, str], tmp_path: Path) -> None:
    """Registration waits for the Auto classes; transformers by itself does not bring torch in."""
    alone = python("import sys, transformers; print('torch' in sys.modules)", source_env, tmp_path)
    both = python("import sys, linearize, transformers; print('torch' in sys.modules)", source_env, tmp_path)
    assert both == alone


def test_a_registration_that_fails_warns_and_lets_transformers_be(source_env: dict[str, str], tmp_path: Path) -> None:
    code = """
import sys, types, warnings
import linearize
broken = types.ModuleType("linearize.modeling")
broken.__path__ = []
sys.modules["linearize.modeling"] = broken
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoConfig
assert any("not registered" in str(w.message) for w in caught), caught
"""
    python(code, source_env, tmp_path)


def test_rooms_are_functions_however_they_are_imported(root: Path) -> None:
    """`linearize.convert` is a subpackage and the function; importing the one must not lose the other."""
    import linearize
    import linearize.api
    import linearize.convert
    from linearize.convert import families

    assert inspect.ismodule(families)
    for name in ("convert", "evaluate"):
        function: Callable = getattr(linearize, name)
        assert callable(function)
        assert inspect.signature(function) == inspect.signature(getattr(linearize.api, name))
    with pytest.raises(AttributeError, match="nothing_here"):
        linearize.nothing_here  # noqa: B018
    assert {"audit", "convert", "evaluate", "load"} <= set(dir(linearize))
