"""One commit to a Hub repository, and every way in which the Hub turns one away, each as one line.

The commit names the parent that was seen (optimistic locking), so what somebody else commits meanwhile is not
overwritten; afterwards the Hub is asked which bytes it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.artifacts.atomic import sha256
from linearize.artifacts.download import brief
from linearize.errors import LinearizeError, RefusedError, UsageError, VerificationError

LOGIN = "Log in with: hf auth login (or set HF_TOKEN to a token that may write)."


def upload(
    folder: Path,
    repo: str,
    *,
    files: Mapping[str, Mapping[str, Any]],
    replaced: Mapping[str, bytes],
    public: bool,
    message: str,
    create_pr: bool,
) -> dict[str, Any]:
    """Commit `files` {name: {"size", "sha256"}} of `folder` to the model repository `repo`; make it if it is not there.

    `replaced` holds the bytes of the files that are sent otherwise than they lie there. Returns created, visibility,
    commit, commit_url, pr_url (None without `create_pr`), changed (whether the commit is a new one) and notes.

    Raises:
        RefusedError, UsageError, VerificationError: see `linearize.artifacts.hub.push`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RefusedError("HF_HUB_OFFLINE is set, so nothing is uploaded", "Unset it, or look with --dry-run.")
    if get_token() is None:
        raise RefusedError(f"there is no token for {constants.ENDPOINT}", LOGIN)
    api = HfApi(library_name="linearize")
    notes: list[str] = []
    with _one_line(repo, "read"):
        parent, private = _state(api, repo)
        created = parent is None
        if parent is None:
            _refuse_other_kind(api, repo)
            if create_pr:
                raise RefusedError(f"{repo} is not there yet, so there is nothing to open a pull request on",
                                   "Push without --create-pr.")  # fmt: skip
    if parent is None:
        with _one_line(repo, "make"):
            api.create_repo(repo, private=not public, repo_type="model", exist_ok=False)
        with _one_line(repo, "read"):
            parent, private = _state(api, repo)
        if parent is None or private is public:
            wanted, found = _visibility(not public), "absent" if parent is None else _visibility(private)
            raise RefusedError(f"{repo} was to be made {wanted} and is {found}; nothing was sent",
                               "Set it right on its settings page, or delete it there.")  # fmt: skip
    elif not private and not public:
        raise RefusedError(f"{repo} is there already and public, and a push is private unless you say otherwise",
                           "Add --public, or choose another name.")  # fmt: skip
    elif private and public:
        notes.append(f"{repo} is there already and private, and stays so: a push changes no visibility")
    additions = [CommitOperationAdd(name, replaced.get(name, str(folder / name))) for name in files]
    with _one_line(repo, "write to", empty=created):
        done = api.create_commit(
            repo, operations=additions, commit_message=message, parent_commit=parent, create_pr=create_pr
        )
    with _one_line(repo, "read"):
        _require_arrived(api, repo, done.oid, folder, files, replaced)
    return {
        "created": created,
        "visibility": _visibility(private),
        "commit": done.oid,
        "commit_url": str(done.commit_url),
        "pr_url": done.pr_url,
        "changed": done.oid != parent,
        "notes": notes,
    }


def _visibility(private: bool) -> str:
    return "private" if private else "public"


def _state(api: Any, repo: str) -> tuple[str | None, bool]:
    """(head commit, private?) of a model repository; (None, False) when there is none."""
    from huggingface_hub import errors

    try:
        info = api.repo_info(repo, repo_type="model")
    except (errors.GatedRepoError, errors.DisabledRepoError):
        raise
    except errors.RepositoryNotFoundError:
        return None, False
    return info.sha, bool(info.private)


def _refuse_other_kind(api: Any, repo: str) -> None:
    """RefusedError if what `repo` names is a dataset or a Space: then a new model of that name was hardly meant."""
    for kind in ("dataset", "space"):
        if api.repo_exists(repo, repo_type=kind):
            raise RefusedError(f"{repo} is a {kind}, not a model repository", "Choose another name.")


def _require_arrived(
    api: Any,
    repo: str,
    commit: str,
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    replaced: Mapping[str, bytes],
) -> None:
    """VerificationError unless the Hub has every file with the bytes that were meant."""
    there = {item.path: item for item in api.get_paths_info(repo, list(files), revision=commit)}
    for name, about in files.items():
        item = there.get(name)
        if item is None:
            raise VerificationError(f"{name} did not arrive in {repo}, commit {commit[:12]}", "Look at its .gitignore.")
        if item.lfs is not None:
            same = item.lfs.sha256 == about["sha256"]
        else:
            data = replaced[name] if name in replaced else (folder / name).read_bytes()
            same = item.blob_id == git_digest(data) and hashlib.sha256(data).hexdigest() == about["sha256"]
        if not same:
            changed = name not in replaced and sha256(folder / name) != about["sha256"]
            what = "changed while it was sent" if changed else "has other bytes there than here"
            raise VerificationError(f"{name} {what} ({repo}, commit {commit[:12]})", "Push again.")


def git_digest(data: bytes) -> str:
    """The id that git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def _one_line(repo: str, verb: str, *, empty: bool = False) -> Iterator[None]:
    """Whatever the Hub's client raises, as one line of ours. `empty`: the repository was made just now."""
    try:
        yield
    except LinearizeError:
        raise
    except Exception as error:  # the Hub's client has dozens of errors
        turned = _translated(error, repo, verb)
        if empty:
            turned = type(turned)(f"{turned.message} (the repository was made and is empty)", turned.hint)
        raise turned from error


def _translated(error: Exception, repo: str, verb: str) -> LinearizeError:
    import httpx
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return RefusedError("HF_HUB_OFFLINE is set, so nothing is uploaded", "Unset it, or look with --dry-run.")
    if isinstance(error, httpx.TransportError):
        return RefusedError(f"{constants.ENDPOINT} could not be reached", "Check the connection and push again.")
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # wrapped by an upload thread
        return _translated(error.__cause__, repo, verb)
    response = error.response if isinstance(error, errors.HfHubHTTPError) else None
    if response is None:
        # ValueError: metadata that the Hub does not accept, among them a licence that it does not know.
        text = " ".join(str(error).split())
        return UsageError(f"the Hub does not take this push: {text if len(text) <= 300 else text[:297] + '...'}")
    status = response.status_code
    told = getattr(error, "server_message", None)
    said = f": {brief(Exception(told))}" if told else ""
    if status == 401:
        return RefusedError(f"{constants.ENDPOINT} does not accept the token (401)", LOGIN)
    if status == 403:
        return RefusedError(f"the token gives no right to {verb} {repo} (403){said}", LOGIN)
    if status == 404:
        return RefusedError(
            f"there is no {repo} that you may {verb} (404){said}", "Check the owner's name and the token."
        )
    if status == 409:
        return RefusedError(f"{repo} is being made or changed by somebody else (409){said}", "Push again.")
    if status == 412:
        return RefusedError(f"{repo} changed while it was being pushed to (412); nothing was committed", "Push again.")
    if status == 429:
        return RefusedError("the Hub asks to wait: too many requests (429)", "Push again later.")
    return RefusedError(f"the Hub could not {verb} {repo} ({status}){said}", "Push again later.")
