from __future__ import annotations

import pytest

from linearize.errors import LinearizeError, RefusedError, UsageError, VerificationError, did_you_mean


def test_exit_codes():
    kinds = (LinearizeError, UsageError, RefusedError, VerificationError)
    assert [kind("x").exit_code for kind in kinds] == [2, 2, 3, 4]


@pytest.mark.parametrize(
    "message, hint, line",
    [
        ("OUT is not empty", "Choose another.", "OUT is not empty. Choose another."),
        ("What?", "That.", "What? That."),
        ("alone", None, "alone"),
        ("two\nlines\tand  spaces", "a\r\nb", "two lines and spaces. a b"),
        ("escape \x1b[31m", None, "escape  [31m"),
    ],
)
def test_one_line(message, hint, line):
    error = UsageError(message, hint)
    assert str(error) == line
    assert "\n" not in error.message


def test_did_you_mean():
    assert did_you_mean("lolcat", ["lolcats", "based"]) == " Did you mean 'lolcats'?"
    assert did_you_mean("LOLCATS", ["lolcats"]) == " Did you mean 'lolcats'?"
    assert did_you_mean("mine.txt", ["mine.txt", "mine.text"]) == " Did you mean 'mine.text'?"
    assert did_you_mean("lolcats", ["lolcats"]) == ""
    assert did_you_mean("zzz", ["lolcats"]) == did_you_mean("x", []) == ""
