"""The manifest of an artifact: what every file is, and what made it. Written last, so it also marks completeness."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from linearize._version import __version__
from linearize.artifacts.atomic import remove_leftovers, sha256, write_json
from linearize.artifacts.weights import require_inside, require_regular
from linearize.errors import UsageError

MANIFEST = "linearize.json"
FORMAT = 1
_SIZE_CAP = 16 << 20
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "triton")
_OURS = frozenset({"format", "files", "versions", "code_digest"})
# A file of these kinds that the manifest does not list could change what is loaded.
_LOADED = (".py", ".safetensors", ".safetensors.index.json")
EDITABLE = ("README.md",)
"""For people: they and the Hub's pages may edit it, and nothing reads it to run a model. It has no hash."""


def write_manifest(directory: str | os.PathLike[str], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Hash every file below `directory` and write linearize.json there, last. Returns what was written.

    `extra` holds what the caller knows (recipe, recipe_digest, teacher, data, figures); it may not name the keys that
    are computed here: format, files {path: {sha256, size}}, versions, code_digest.
    """
    folder = Path(directory)
    clash = sorted(_OURS & set(extra))
    if clash:
        raise ValueError(f"manifest keys computed here cannot be given: {', '.join(clash)}")
    remove_leftovers(folder / MANIFEST)  # of a writer that was killed: no part of the artifact
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"an artifact holds no links: {path}")
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and name not in EDITABLE:
            files[name] = {"sha256": sha256(path), "size": path.stat().st_size}
    manifest = {"format": FORMAT, **extra, "versions": versions(), "code_digest": code_digest(), "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of `directory` as a dict; UsageError when it is absent or not one."""
    path = Path(directory) / MANIFEST
    require_inside(path.parent, path)
    require_regular(path)
    try:
        if path.stat().st_size > _SIZE_CAP:
            raise UsageError(f"{path} is larger than {_SIZE_CAP >> 20} MB, so it is no manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UsageError(f"{path} is not a manifest: it lists no files")
    if manifest.get("format") != FORMAT:
        raise UsageError(
            f"{path} has format {manifest.get('format')!r}, and this version reads format {FORMAT}", "Update linearize."
        )
    return manifest


def verify_manifest(directory: str | os.PathLike[str], *, without_code: bool = False) -> list[str]:
    """Compare `directory` with its manifest. One line a problem, in the order of the files; [] when all is as written.

    Sizes come before hashes, so a truncated file is named without reading it. Files that nobody loads (a README, notes)
    may be added; code and weights may not. `without_code`: Python files may be absent, as in a download from the Hub,
    which never fetches them; one that is there must be as written.
    """
    folder = Path(directory)
    try:
        manifest = read_manifest(folder)
    except UsageError as error:
        return [str(error)]
    problems = []
    for name, entry in manifest["files"].items():
        if name in EDITABLE or (without_code and name.endswith(".py") and not os.path.lexists(folder / name)):
            continue
        if problem := _check(folder, name, entry):
            problems.append(problem)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if name.endswith(_LOADED) and not hidden and "__pycache__" not in name and name not in manifest["files"]:
            problems.append(f"{path} is not in {MANIFEST}: it was added later")
    return problems


def versions() -> dict[str, str]:
    """Versions of Python, of linearize and of the libraries that shape a result; no import is needed."""
    found = {"python": platform.python_version(), "platform": platform.system(), "linearize": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """sha256 over the sources of linearize and linearize_kernels: paths and contents, independent of where they lie."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    beside = (package.parent / "linearize_kernels", package.parent / "kernels" / "linearize_kernels")
    roots = [package, *(path for path in beside if path.is_dir())]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _check(folder: Path, name: str, entry: Any) -> str | None:
    if not is_plain_relative(name):
        return f"{folder / MANIFEST} names a file outside its folder: {name!r}"
    known = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("size"), int)
    if not known:
        return f"{folder / MANIFEST} has no size and sha256 for {name!r}"
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    try:
        require_inside(folder, path)
    except UsageError as error:
        return str(error)
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path} has {size} bytes, {MANIFEST} says {entry['size']}: it is truncated or was replaced"
    if sha256(path) != entry["sha256"]:
        return f"{path} differs from its sha256 in {MANIFEST}: it is damaged or was replaced"
    return None


def is_plain_relative(name: Any) -> bool:
    """Whether `name` is a relative POSIX path that stays in its folder: no `..`, no drive, no backslash, no NUL."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name or ":" in name:
        return False
    path = PurePosixPath(name)
    short = all(len(part.encode("utf-8", "replace")) <= 255 for part in path.parts)
    return short and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name
