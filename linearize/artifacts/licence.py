"""The licence of a model, as far as its own files say it. Nothing is guessed: what is not written there is unknown."""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from linearize.artifacts.download import CARD, NEVER, TERMS
from linearize.artifacts.weights import require_inside
from linearize.errors import UsageError, did_you_mean
from linearize.strict import read_yaml

OTHER = "other"
NAMELESS = "base-model-licence"
"""The `license_name` of terms that lie beside the weights and give themselves no id."""
UNKNOWN = (
    "Unknown: neither a card nor a file of terms beside the teacher's weights says it. Whatever its licence and terms "
    "of use say holds for these weights too; ask where you got it."
)
"""What a card says of a licence that is not known."""
COMMON = (
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "cc0-1.0", "cc-by-4.0",
    "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "bigscience-openrail-m", "bigcode-openrail-m",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "unlicense", OTHER,
)  # fmt: skip
"""Ids of https://huggingface.co/docs/hub/repositories-licenses for did-you-mean; the Hub itself knows more."""

_CAP = 1 << 20
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,95}")
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LINKED = ("LICENSE", "LICENSE.md")  # the files that the Hub lets license_link name
# Whole texts, white space apart: of Apache-2.0 the terms proper, of MIT all that follows the line of copyright.
_APACHE = "09ae9bf1886f530f7338889ef805f37b288ec6adedd1e1e32058921acf05a782"
_MIT_HEAD = re.compile(r"(?:the )?mit licen[sc]e\W*(?:\(mit\))?$|copyright\b|\(c\)|all rights reserved\W*$", re.I)
_MIT = "fe2a9817987f862eaced948f0468c7f51d2fedfc48c5c505b246a49a3870e9a5"


def read_licence(folder: Path, *, repo: str | None = None) -> dict[str, Any] | None:
    """{"id", "name", "link", "source"} of the model in `folder`; None when its files do not say.

    First the `license` of its card's metadata, then a file of terms: Apache-2.0 and MIT are known by their whole text,
    any other is `other`, with the file as its link. `repo` is the model's Hub id, to which a link within it leads.
    """
    files = terms_files(folder)
    stated = _stated(card_metadata(folder), files, repo)
    if stated is not None:
        return stated
    for name in files:
        if name.upper().startswith(("LICENSE", "LICENCE")):
            known = _recognised(_text(folder / name))
            if known is not None:
                return {"id": known, "name": None, "link": None, "source": name}
    if not files:
        return None
    link = next((name for name in _LINKED if name in files), None)
    return {"id": OTHER, "name": NAMELESS, "link": link, "source": files[0]}


def card_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a card, read without trust; empty where there is none or it cannot be read."""
    match = _FRONT.match(_text(folder / CARD))
    if match is None:
        return {}
    try:
        found = read_yaml(match[1], CARD, recipe=False)
    except UsageError:
        return {}
    return found if isinstance(found, dict) else {}


def terms_files(folder: Path) -> list[str]:
    """The names of the files beside a model's weights that hold its licence and terms of use."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [
        name
        for pattern in TERMS
        for name in names
        if fnmatch(name, pattern) and not any(fnmatch(name, never) for never in NEVER)
    ]


def require_licence(licence: str) -> str:
    """`licence` if it has the form of a Hub licence id, else UsageError with the nearest common one."""
    if _ID.fullmatch(licence) is None:
        near = did_you_mean(licence, COMMON)
        raise UsageError(f"--license {licence!r:.60} is not the form of a licence id.{near}",
                         "See https://huggingface.co/docs/hub/repositories-licenses.")  # fmt: skip
    return licence


def as_metadata(licence: dict[str, Any] | None) -> dict[str, str]:
    """The `license`, `license_name` and `license_link` of a card."""
    if licence is None:
        return {}
    found = {"license": licence["id"], "license_name": licence["name"], "license_link": licence["link"]}
    return {key: value for key, value in found.items() if value}


def _stated(metadata: dict[str, Any], files: list[str], repo: str | None) -> dict[str, Any] | None:
    licence = metadata.get("license")
    if not isinstance(licence, str) or _ID.fullmatch(licence.lower()) is None or licence.lower() == "unknown":
        return None
    found = {"id": licence.lower(), "name": None, "link": None, "source": CARD}
    if found["id"] == OTHER:
        name, link = metadata.get("license_name"), metadata.get("license_link")
        found["name"] = name if isinstance(name, str) and _NAME.fullmatch(name) else NAMELESS
        found["link"] = _link(link, files, repo)
    return found


def _link(link: Any, files: list[str], repo: str | None) -> str | None:
    """Where the terms can be read, from the model's repository or another one."""
    if isinstance(link, str) and re.fullmatch(r"https://[\w./%#?=&~+-]{3,300}", link):
        return link
    if isinstance(link, str) and link in files and link in _LINKED:
        return link
    if isinstance(link, str) and repo is not None and re.fullmatch(r"[\w][\w .-]{0,95}", link):
        return f"https://huggingface.co/{repo}/blob/main/{link.replace(' ', '%20')}"
    return next((name for name in _LINKED if name in files), None)


def _recognised(text: str) -> str | None:
    apache, end, appendix = text.partition("END OF TERMS AND CONDITIONS")
    if end and _digest(apache) == _APACHE and len(appendix) < 2000 and "clause" not in appendix.lower():
        return "apache-2.0"
    head, begin, rest = text.partition("Permission is hereby granted, free of charge")
    plain = all(_MIT_HEAD.match(line.strip()) for line in head.splitlines() if line.strip())
    if begin and plain and _digest(begin + rest) == _MIT:
        return "mit"
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def _text(path: Path) -> str:
    """A text file of a sane size; empty for anything else."""
    try:
        require_inside(path.parent, path)
        if not path.is_file() or path.stat().st_size > _CAP:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, UsageError):
        return ""
