"""What must not be published by accident: credentials, and paths that tell of the machine and its user.

A finding says the file, the line and the kind, never the secret itself.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CREDENTIAL, PATH = "credential", "path"
BINARY = (".safetensors", ".model")
"""Files that are no text."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
"""Made of the text of the whole Internet, in pieces: a path or a random word in one of them is nobody's."""
ENTROPY = 3.5
"""Bits a character from which a value is taken for random; English words have about 3."""

# Each pattern's whole match or, where it has one, its group is the secret.
_KNOWN = (
    ("a Hugging Face token", re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}")),
    ("an AWS access key", re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])")),
    ("a GitHub token", re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,})")),
    ("an API key", re.compile(r"(?<![A-Za-z0-9])(?:sk-|xox[abpr]-|glpat-|wandb_v1_)[\w-]{20,}")),
    ("a private key", re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:\\[rn]|\s)+[A-Za-z0-9+/=]{16}")),
    ("a password in a URL", re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{1,64}:[^\s/:@\"'<>]{3,}@[\w.-]")),
)  # fmt: skip
_NAMED = re.compile(
    r"(?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|credentials?)[\"']?[ \t]*[:=][ \t]*"
    r"[\"']?([A-Za-z0-9_+/=.~-]{20,})",
    re.IGNORECASE,
)
_PATHS = (
    ("a home path", re.compile(r"(?<![\w.~-])/(?:home|Users)/[\w.-]+")),
    ("a home path", re.compile(r"(?<![\w./~-])/root/[\w.-]+")),
    ("a home path", re.compile(r"\b[A-Za-z]:\\{1,2}Users\\{1,2}[\w.-]+")),
    ("an absolute path", re.compile(
        r"\"\w*(?:name_or_path|_file|_path|_dir|_folder)\"\s*:\s*\"(?:/|~|[A-Za-z]:\\)[^\"]*\"")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something in a file that is not for others. `kind` is credential or path; `what` says it in words."""

    file: str
    line: int
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.what}"


def scan(name: str, data: bytes) -> list[Finding]:
    """Findings in one file, in the order of its lines; [] for a file that is no text.

    In a vocabulary only credentials of a known form are looked for.
    """
    if name.endswith(BINARY):
        return []
    text = data.decode("utf-8", errors="replace")
    whole = Path(name).name not in VOCABULARIES
    found = {(place, kind, what) for place, kind, what in _matches(text, whole)}
    lines: dict[tuple[int, str, str], None] = {}
    for place, kind, what in sorted(found):
        lines[text.count("\n", 0, place) + 1, kind, what] = None
    return [Finding(file=name, line=line, kind=kind, what=what) for line, kind, what in lines]


def _matches(text: str, whole: bool) -> Iterator[tuple[int, str, str]]:
    for what, pattern in _KNOWN:
        for match in pattern.finditer(text):
            yield match.start(), CREDENTIAL, what
    if not whole:
        return
    for match in _NAMED.finditer(text):
        if _random(match[1]):
            yield match.start(), CREDENTIAL, "a value that looks like a secret"
    for what, pattern in (*_PATHS, *_own_home()):
        for match in pattern.finditer(text):
            yield match.start(), PATH, what


def _own_home() -> list[tuple[str, re.Pattern[str]]]:
    """The home of whoever runs this, wherever it lies."""
    home = os.path.expanduser("~").rstrip("/\\")
    if len(home) < 4 or not os.path.isabs(home) or home == "/root":
        return []  # no home, or one that the patterns above know
    return [("a home path", re.compile(re.escape(home) + r"(?![\w.-])"))]


def _random(value: str) -> bool:
    """Whether a value is more likely drawn than written: digits and letters, and few of them alike."""
    if not (re.search(r"\d", value) and re.search(r"[A-Za-z]", value)):
        return False
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return bits >= ENTROPY
