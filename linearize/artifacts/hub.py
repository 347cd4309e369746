"""`linearize push`: an export to the Hub, in one commit, with nothing sent that was not meant to be.

Everything that can be refused without a network is refused first: a damaged export, a file that a download would never
fetch, a secret, an unknown licence. Nothing on the Hub is ever deleted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from linearize.artifacts.atomic import sha256
from linearize.artifacts.download import CARD, HUB_FILES, HUB_ID, NEVER
from linearize.artifacts.exports import require_export
from linearize.artifacts.kind import is_masked
from linearize.artifacts.licence import COMMON, NAMELESS, OTHER, UNKNOWN, require_licence
from linearize.artifacts.manifest import EDITABLE, MANIFEST, read_manifest, verify_manifest
from linearize.artifacts.scan import CREDENTIAL, scan
from linearize.artifacts.upload import upload
from linearize.errors import RefusedError, UsageError, did_you_mean

SENT = (*HUB_FILES, "*.py")
"""What may be sent: what a download fetches, and the code of an export. A manifest must list it, too."""
_KINDS = ("datasets", "spaces", "kernels", "buckets")


@dataclass(frozen=True, kw_only=True)
class Package:
    """What a push sends."""

    folder: Path
    files: dict[str, dict[str, Any]]
    """{name: {"size", "sha256"}}, the card as it is sent."""
    card: bytes
    left: list[str]
    """Names of the files of OUT that stay here."""
    licence: str
    base_model: str | None
    notes: list[str]


def push(
    out: str | os.PathLike[str],
    repo: str,
    *,
    public: bool = False,
    license: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    accept: tuple[str, ...] | list[str] = (),
) -> dict[str, Any]:
    """Upload the export `out` to the Hub repository `repo`, in one commit.

    Args:
        out: a folder that linearize wrote.
        repo: `owner/name`; made, private, if it is not there.
        public: make a new repository public, and agree to send to a public one.
        license: a Hub licence id; None: what the card says, which is what the teacher's own files said.
        message: of the commit.
        create_pr: open a pull request on a repository that is there, instead of committing to its main branch.
        dry_run: say what would be sent, and send nothing; needs neither a token nor a network.
        accept: files that may hold the local paths that were found in them; no credential is ever accepted.

    Returns:
        repo, url, visibility, licence, base_model, message, files [{path, size, sha256}], bytes, left, notes, dry_run,
        and after an upload created, commit, commit_url, pr_url and changed.

    Raises:
        UsageError: bad input, a damaged export. RefusedError: a secret, an unknown licence, no token, no right,
            offline, a repository of another kind or visibility, or one that changed meanwhile. VerificationError: what
            arrived is not what was sent.
    """
    require_repo(repo)
    if license is not None:
        require_licence(license)
    title = (message or "").strip() or f"Add {repo.partition('/')[2]}, made with linearize"
    package = pack(out, repo, license=license, accept=accept)
    result: dict[str, Any] = {
        "repo": repo,
        "url": f"{_endpoint()}/{repo}",
        "visibility": "public" if public else "private",
        "licence": package.licence,
        "base_model": package.base_model,
        "message": title,
        "create_pr": create_pr,
        "dry_run": dry_run,
        "files": [{"path": name, **about} for name, about in package.files.items()],
        "bytes": sum(about["size"] for about in package.files.values()),
        "left": package.left,
        "notes": package.notes,
    }
    if dry_run:
        return result
    done = upload(
        package.folder, repo, files=package.files, replaced={CARD: package.card}, public=public, message=title,
        create_pr=create_pr,
    )  # fmt: skip
    return {**result, **done, "notes": [*package.notes, *done["notes"]]}


def require_repo(repo: str) -> None:
    """UsageError unless `repo` is the `owner/name` of a model."""
    if repo.partition("/")[0] in _KINDS:
        raise UsageError(f"{repo} is not the id of a model repository", "Give owner/name.")
    if HUB_ID.fullmatch(repo) is None or ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise UsageError(f"REPO {repo!r:.120} is not a Hub id", "Give owner/name.")


def pack(
    out: str | os.PathLike[str], repo: str, *, license: str | None = None, accept: tuple[str, ...] | list[str] = ()
) -> Package:
    """Check the export `out` and say what of it goes to `repo`. No network."""
    folder = Path(out).expanduser()
    if not folder.is_dir():
        raise UsageError(f"OUT {os.fspath(out)!r:.200} is no folder", "Give a folder that linearize convert made.")
    require_export(folder, os.fspath(out))
    if problems := verify_manifest(folder):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(problems[0] + more, "Only an export that is as it was written is sent.")
    manifest = read_manifest(folder)
    names = _sendable(folder, manifest)
    card, licence, notes = _card(folder, repo, manifest, license)
    _refuse_secrets(folder, names, card, accept)
    if not isinstance(manifest.get("audit"), dict) and not is_masked(folder):
        notes.append(
            "the card has no figures of quality: linearize audit "
            f"{shlex.quote(str(out))} --against TEACHER --data FILE --save writes them"
        )
    files = {
        name: {"size": entry["size"], "sha256": entry["sha256"]}
        for name, entry in manifest["files"].items()
        if name not in EDITABLE
    }
    files[MANIFEST] = {"size": (folder / MANIFEST).stat().st_size, "sha256": sha256(folder / MANIFEST)}
    files[CARD] = {"size": len(card), "sha256": _sha256(card)}
    left = sorted(
        name
        for path in folder.rglob("*")
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in files and "__pycache__" not in name
    )
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        notes.append(f"not sent, for {MANIFEST} does not list them: {', '.join(left[:8])}{more}")
    teacher = manifest.get("teacher")
    base = teacher.get("repo") if isinstance(teacher, dict) else None
    return Package(
        folder=folder,
        files=dict(sorted(files.items())),
        card=card,
        left=left,
        licence=licence,
        base_model=base,
        notes=notes,
    )


def _sendable(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The names that a manifest lists, and its own. UsageError for one that no download would fetch, or a link."""
    names = [name for name in manifest["files"] if name not in EDITABLE]
    for name in names:
        wanted = any(fnmatch(name, pattern) for pattern in SENT)
        if not wanted or any(fnmatch(name, never) for never in NEVER if never != "*.py"):
            raise UsageError(
                f"{MANIFEST} lists {name}, which is no file of an export: it is not sent, and without it the export "
                "would be incomplete", "Move it away and convert again.",
            )  # fmt: skip
    for name in (*names, MANIFEST, CARD):
        if (folder / name).is_symlink():
            raise UsageError(f"{folder / name} is a link", "Only files are sent: put the file itself there.")
    return [*names, MANIFEST]


def _card(folder: Path, repo: str, manifest: Mapping[str, Any], license: str | None) -> tuple[bytes, str, list[str]]:
    """The card as it is sent: with the licence, and with `repo` where it names the folder. OUT's own stays as it is."""
    from huggingface_hub import ModelCard

    if not (folder / CARD).is_file():
        raise UsageError(f"{folder} has no {CARD}: a model without a card is not sent", "Write one, or convert again.")
    try:
        card = ModelCard((folder / CARD).read_text(encoding="utf-8"))
    except Exception as error:  # YAML's own errors, ValueError, UnicodeDecodeError
        raise UsageError(
            f"the metadata of {folder / CARD} cannot be read: {error}", "Mend it and push again."
        ) from error
    notes = []
    stated = card.data.license
    if license is not None:
        if license not in COMMON and (near := did_you_mean(license, COMMON)):
            notes.append(f"--license {license} is none of the common ids of the Hub.{near}")
        if stated and stated != license:
            notes.append(f"the card says licence {stated}, and --license {license} is what is sent")
            card.data.license_name = card.data.license_link = None
        card.data.license = license
        card.text = card.text.replace(UNKNOWN, f"`{license}`, as whoever uploaded these weights says.")
        if license == OTHER:
            card.data.license_name = card.data.license_name or NAMELESS
    elif not isinstance(stated, str) or not stated:
        raise RefusedError(
            f"the licence of {_teacher(manifest)} is unknown: neither its card nor a file of terms beside it says one",
            "Find it out, then push with --license ID (ids: https://huggingface.co/docs/hub/repositories-licenses).",
        )
    name = manifest.get("name")
    if isinstance(name, str) and name:
        card.text = _renamed(card.text, name, repo)
    if card.data.eval_results:
        card.data.model_name = repo.partition("/")[2]
    return str(card).encode("utf-8"), str(card.data.license), notes


def _renamed(text: str, name: str, repo: str) -> str:
    """The commands and the Python of our own card with the Hub id instead of the folder's name."""
    text = text.replace(
        f"from_pretrained({json.dumps(name, ensure_ascii=False)}", f"from_pretrained({json.dumps(repo)}"
    )
    words = "|".join(re.escape(quoted) for quoted in (shlex.quote(name), json.dumps(name, ensure_ascii=False)))
    command = rf"\blinearize (audit|eval|inspect|verify) (?:{words})(?=[\s`])"
    return re.sub(command, rf"linearize \1 {repo}", text)


def _refuse_secrets(folder: Path, names: list[str], card: bytes, accept: tuple[str, ...] | list[str]) -> None:
    unknown = sorted(set(accept) - {*names, CARD})
    if unknown:
        raise UsageError(f"--accept {unknown[0]}: no such file is sent", "Name a file of OUT as the refusal does.")
    found = [finding for name in names for finding in scan(name, _bytes(folder / name))] + scan(CARD, card)
    found = [finding for finding in found if finding.kind == CREDENTIAL or finding.file not in accept]
    if not found:
        return
    shown = "; ".join(map(str, found[:5])) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    if any(finding.kind == CREDENTIAL for finding in found):
        hint = "Remove it where it came from, revoke it, and convert again."
    else:
        hint = f"Remove it, or send it all the same with --accept {shlex.quote(found[0].file)}."
    raise RefusedError(f"{folder} holds what is not for others: {shown}", hint)


def _bytes(path: Path) -> bytes:
    return b"" if path.name.endswith((".safetensors", ".model")) else path.read_bytes()


def _teacher(manifest: Mapping[str, Any]) -> str:
    teacher = manifest.get("teacher")
    name = teacher.get("name") if isinstance(teacher, dict) else None
    return f"the teacher {name}" if isinstance(name, str) else "the teacher"


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
