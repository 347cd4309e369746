"""Hub ids: what they look like, which files of a repository are fetched, and which commit was read.

A model is named `owner/name` or `owner/name@REVISION` (a commit, a tag or a branch). Only data files are fetched: JSON,
safetensors, tokenizer, and the card and terms, which say what the licence is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.artifacts.manifest import MANIFEST
from linearize.errors import RefusedError, UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CARD = "README.md"
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files of licence and terms of use: they go where the weights go."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer may consist of: fetched with a checkpoint, and carried over to its conversion."""
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
    MANIFEST,
    "history.json",
    CARD,
    *TERMS,
)
"""All that is ever fetched of a repository."""
NEVER = ("*/*", "*.py", "*.so", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz", "*.h5")
"""Not even under a name that one of `HUB_FILES` allows."""

# Used as a file name in the cache: no way up, no absolute path.
_REVISION = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_][\w./+-]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(name: str) -> tuple[str, str | None] | None:
    """(`owner/name`, revision or None) of a Hub id; None for anything that is not the form of one.

    UsageError for a Hub id with something behind its @ that can be no revision.
    """
    repo, at, revision = name.partition("@")
    if HUB_ID.fullmatch(repo) is None:
        return None
    if at and _REVISION.fullmatch(revision) is None:
        raise UsageError(f"{name!r:.120}: what follows the @ is no revision", "Give a commit, a tag or a branch.")
    return repo, revision if at else None


def pin(model: str | os.PathLike[str], revision: str | None) -> str:
    """`MODEL@REVISION`; MODEL as it is without a revision.

    UsageError when MODEL has another revision already, or is no Hub id.
    """
    name = os.fspath(model)
    if revision is None:
        return name
    parts = None if Path(name).expanduser().exists() else split_revision(name)
    if parts is None:
        raise UsageError(f"--revision {revision}: {name} is not a Hub id", "Only models of the Hub have revisions.")
    if parts[1] not in (None, revision):
        raise UsageError(f"{name} names a revision, and --revision {revision} another", "Give one of them.")
    pinned = f"{parts[0]}@{revision}"
    split_revision(pinned)
    return pinned


def download(name: str) -> Path:
    """The cached snapshot of a Hub id, fetched where it is not there yet. With HF_HUB_OFFLINE only the cache is read.

    Raises:
        UsageError: no such repository, revision or right to read it. RefusedError: offline, or no connection, and not
            in the cache.
    """
    parts = split_revision(name)
    assert parts is not None, name
    repo, revision = parts
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(NEVER)
        )
    except Exception as error:  # the Hub's client has dozens of errors
        raise _not_had(error, name, repo, revision) from error
    return Path(path)


def commit_of(folder: str | os.PathLike[str]) -> str | None:
    """The commit whose snapshot `folder` is, where it lies in the Hub's cache."""
    path = Path(os.path.abspath(folder))
    return path.name if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) else None


def display_name(model: str | os.PathLike[str], folder: Path) -> str:
    """What people call MODEL, which resolved to `folder`: its Hub id, `demo`, or the last part of its path."""
    given = os.fspath(model)
    cached = _cached(folder)
    if cached is not None:
        return cached[0]
    if Path(given).expanduser().is_dir():
        return Path(os.path.abspath(folder)).name
    parts = split_revision(given)
    return given if parts is None else parts[0]


def origin(folder: Path, name: str) -> dict[str, Any]:
    """{"name", "repo", "revision"} of the model `name` in `folder`, without any path of this machine.

    `repo` and `revision` (a commit) are those of the Hub, None where it did not come from there; the `repo` of a local
    folder is the Hub id that its config gives as its own name, if it does.
    """
    cached = _cached(folder)
    if cached is not None:
        return {"name": name, "repo": cached[0], "revision": cached[1]}
    return {"name": name, "repo": _own_name(folder), "revision": None}


def pinned(origin: Mapping[str, Any]) -> str:
    """What to write as MODEL to get this one again: `owner/name@COMMIT` of the Hub, else its name."""
    return f"{origin['repo']}@{origin['revision']}" if origin.get("revision") else str(origin["name"])


def _cached(folder: Path) -> tuple[str, str] | None:
    """(Hub id, commit) of a snapshot in the Hub's cache."""
    commit = commit_of(folder)
    match = re.fullmatch(r"models--(.+?)--(.+)", Path(os.path.abspath(folder)).parent.parent.name)
    return None if commit is None or match is None else (f"{match[1]}/{match[2]}", commit)


def _own_name(folder: Path) -> str | None:
    """The Hub id that a config.json gives as `_name_or_path`."""
    from linearize.artifacts.weights import read_json

    try:
        name = read_json(folder / "config.json", cap=8 << 20).get("_name_or_path")
    except UsageError:
        return None
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def brief(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return line if len(line) <= 200 else line[:197] + "..."


def _not_had(error: Exception, name: str, repo: str, revision: str | None) -> UsageError | RefusedError:
    """One line for whatever kept a repository from being read."""
    import httpx
    from huggingface_hub import constants, errors

    kind = type(error).__name__
    what = f"the Hub model {name}"
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo} has no revision {revision}", "Give a commit, a tag or a branch of it.")
    if isinstance(error, errors.GatedRepoError):
        return UsageError(f"{what} asks for an agreement first", "Accept it on the model's page, then: hf auth login.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"there is no folder {name!r}, and no Hub model {repo} that you may read",
            "Check the name; a private one needs: hf auth login.",
        )
    missing = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    if isinstance(error, missing) and constants.HF_HUB_OFFLINE:
        part = "only in part " if kind == "IncompleteSnapshotError" else "not "
        return RefusedError(
            f"HF_HUB_OFFLINE is set, and {what} is {part}in the cache", "Unset it, or fetch the model while online."
        )
    if isinstance(error.__cause__ if isinstance(error, missing) else error, httpx.TransportError):
        return RefusedError(
            f"there is no folder {name!r}, and {what} is not in the cache: {constants.ENDPOINT} could not be reached",
            "Check the name and the connection.",
        )
    return UsageError(
        f"there is no folder {name!r}, and the Hub model of that name could not be had: {kind}: {brief(error)}",
        "Check the name and the connection.",
    )
