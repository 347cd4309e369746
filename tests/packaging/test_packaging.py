"""What is installed and how it is found: the wheel's contents, the namespace folders, the declared versions."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = {
    "linearize": "linearize",
    "linearize_kernels": "kernels/linearize_kernels",
    "linearize_cli": "cli/linearize_cli",
}


def project(root: Path) -> dict:
    """pyproject.toml as a dict; Python 3.10 has no reader of its own."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest brings it there
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_no_package_directly_in_kernels_or_cli(root):
    """A root package `kernels` would hide Hugging Face's and break `import transformers`."""
    for name in ("kernels", "cli"):
        assert (root / name).is_dir()
        assert [p.name for p in (root / name).iterdir() if p.suffix == ".py"] == []


def test_the_name_kernels_is_not_ours(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or str(root) not in spec.origin


def test_transformers_next_to_hugging_face_kernels(root, tmp_path, source_env):
    """With the repository first on the path, a `kernels` package that comes later still wins."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("STUB = True\n")
    code = "import sys; sys.path.append(sys.argv[1]); import kernels; assert kernels.STUB; import linearize_kernels"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=source_env, check=True)
    code = "from transformers import LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], cwd=root, env=source_env, check=True)


def test_every_code_folder_is_a_package(root):
    """Discovery takes packages only: a folder of modules without __init__.py would be missing from the wheel."""
    for folder in PACKAGES.values():
        for path in (root / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_runs_from_the_source_tree(root, tmp_path, source_env):
    code = "import linearize as a, linearize_kernels as b, linearize_cli as c; print(*(m.__file__ for m in (a, b, c)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=source_env, check=True, capture_output=True)
    for name, folder in zip(done.stdout.decode().split(), PACKAGES.values()):
        assert Path(name) == root / folder / "__init__.py"


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built once from a copy of the sources and without a network."""
    pytest.importorskip("setuptools", minversion="77")
    import shutil

    source = tmp_path_factory.mktemp("wheel") / "source"
    ignore = shutil.ignore_patterns(".git", ".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "benchmarks")
    shutil.copytree(root, source, ignore=ignore)
    out = source.parent / "out"
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--quiet",
            "--wheel-dir",
            str(out),
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_code_the_recipes_and_the_teacher(wheel, root):
    names = set(wheel.namelist())
    for package, folder in PACKAGES.items():
        for path in (root / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(root / folder).as_posix()}" in names
    recipes = sorted((root / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert wheel.read(f"linearize/recipes/{path.name}") == path.read_bytes()
    for package in PACKAGES:
        assert f"{package}/py.typed" in names  # by which type checkers read the annotations of what is installed
    for path in (root / "linearize" / "demo" / "teacher").glob("*"):
        assert wheel.read(f"linearize/demo/teacher/{path.name}") == path.read_bytes()


def test_wheel_holds_nothing_else(wheel):
    for name in wheel.namelist():
        top = name.split("/")[0]
        assert top in PACKAGES or re.fullmatch(r"linearize-[\w.]+\.dist-info", top), name
        assert not name.endswith((".pyc", ".bin", ".pt", ".pkl")), name
    assert sum(info.file_size for info in wheel.infolist()) < 12 << 20


def test_wheel_metadata(wheel, root):
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "linearize = linearize_cli.app:main" in wheel.read(entry).decode()
    (meta,) = [name for name in wheel.namelist() if name.endswith("dist-info/METADATA")]
    text = wheel.read(meta).decode()
    from linearize._version import __version__

    assert f"\nVersion: {__version__}\n" in text
    assert "\nRequires-Python: >=3.10\n" in text and "\nLicense-Expression: Apache-2.0\n" in text
    assert re.search(r'Requires-Dist: triton.*; platform_system == "Linux"', text)
    assert [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]


def test_installed_package_finds_its_data(wheel, tmp_path):
    """The recipes and the teacher are found from the wheel's files alone."""
    wheel.extractall(tmp_path)
    code = (
        "import linearize.recipe as r, linearize; assert len(r.list_recipes()) >= 9; r.load_recipe(r.list_recipes()[0])"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path), "PATH": ""}
    )


def test_constraints_pin_every_requirement_exactly(root):
    pins: dict[str, list[str]] = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([\w.]+)(?:; (.+))?", line)
        assert match, f"not an exact public version: {line}"
        pins.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), []).append(match[2])
    assert pins["torch"] == ["2.13.0"]
    data = project(root)["project"]
    wanted = data["dependencies"] + [r for extra in data["optional-dependencies"].values() for r in extra]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name and re.sub(r"[-_.]+", "-", name[0]).lower() in pins, requirement


def test_floors_that_keep_users_safe(root):
    data = project(root)["project"]
    assert data["requires-python"] == ">=3.10"
    dependencies = {re.split(r"[<>=;]", line)[0]: line for line in data["dependencies"]}
    assert ">=5.14" in dependencies["transformers"] and ">=2.9" in dependencies["torch"]
    assert "platform_system == 'Linux'" in dependencies["triton"]
    assert not {"datasets", "lm-eval", "pydantic"} & set(dependencies)


def test_what_the_code_asks_for_is_what_is_installed(root):
    """Bounds that are said a second time: to a model without linearize, and to those who lack an extra."""
    from linearize.evaluate.tasks import INSTALL
    from linearize.modeling.configuration_linearized import OLDEST
    from linearize.teacher_bits import LEAST

    data = project(root)["project"]
    extras = data["optional-dependencies"]
    assert f"transformers>={OLDEST[0]}.{OLDEST[1]},<6" in data["dependencies"]
    assert extras["eval"] == [INSTALL.split("'")[1]] and extras["quantize"] == [f"bitsandbytes>={LEAST}"]


def test_every_lower_bound_is_listed(root):
    """What CONTRIBUTING installs to try them all at once."""
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    script = root / "tests" / "packaging" / "lower_bounds.py"
    said = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout.split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", one) for one in said) and len(said) == len(set(said))
    names = {one.partition("==")[0] for one in said}
    assert {"torch", "transformers", "triton", "datasets", "bitsandbytes", "wandb"} <= names
    assert not {"pytest", "ruff", "playwright"} & names


def test_ci_script(root):
    script = root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


def test_sources_parse_on_python_3_10(root):
    import ast

    for folder in (*PACKAGES.values(), "tests"):
        for path in (root / folder).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_nothing_is_pickled(root):
    """No pickle and no torch.load anywhere in what is shipped."""
    modules = "c?[pP]ickle|dill|joblib|shelve|marshal"
    pickling = re.compile(rf"^\s*(?:import|from)\s+(?:{modules})\b|torch\.(?:load|save)\(", re.MULTILINE)
    for folder in PACKAGES.values():
        for path in (root / folder).rglob("*.py"):
            found = pickling.findall(path.read_text(encoding="utf-8"))
            assert not found, (path, found)
