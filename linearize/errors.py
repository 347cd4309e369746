"""Errors that a user can act on. Every one reads as one line: what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 2000  # characters of a message


class LinearizeError(Exception):
    """Base of every error raised on purpose.

    `message` says what is wrong and where, `hint` (optional) what to do; `exit_code` is the
    status that the command line ends with.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = _one_line(message)
        self.hint = _one_line(hint) if hint else None
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        if self.hint is None:
            return self.message
        end = "" if self.message.endswith((".", "!", "?")) else "."
        return f"{self.message}{end} {self.hint}"


class UsageError(LinearizeError):
    """Bad input: an unknown key, a wrong type, a missing or unreadable file, an unsupported family."""

    exit_code = 2


class RefusedError(LinearizeError):
    """Refused before any work: OUT is not empty, no disk space, NaN in the teacher, too little text."""

    exit_code = 3


class VerificationError(LinearizeError):
    """The work was done and its result does not hold: reload mismatch, divergence, a dead layer."""

    exit_code = 4


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate nearest to `word`, or `""` when none is near."""
    names = sorted({str(name) for name in candidates} - {str(word)})  # a link to nothing has its own name
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if not near:
        folded = {name.casefold(): name for name in names}
        near = [folded[name] for name in difflib.get_close_matches(str(word).casefold(), list(folded), n=1, cutoff=0.6)]
    return f" Did you mean {near[0]!r}?" if near else ""


def _one_line(text: str) -> str:
    # Paths and library messages may hold line ends and control characters: never let them reach a terminal. And a name
    # that a file gives may be megabytes long: both ends of a line say enough.
    line = str(text)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else " " for c in " ".join(line.split()))
