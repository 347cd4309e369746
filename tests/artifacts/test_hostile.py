"""Invariants 17 and 18 for files that somebody else made: refused by name, no traceback, no escape. See `hostile`."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

import pytest

from tests.artifacts import hostile
from tests.artifacts.hostile_cases import cases
from tests.artifacts.watch import watched


def test_there_are_at_least_five_hundred_of_every_kind_of_damage() -> None:
    kinds = Counter(case.kind for case in cases())
    assert kinds.total() >= 500 and min(kinds.values()) >= 50 and len(kinds) == 9
    assert [case.name for case in cases(1)] == [case.name for case in cases(1)] != [case.name for case in cases(2)]


@pytest.mark.slow
def test_hostile_files_are_refused_by_name(tmp_path: Path) -> None:
    """Every seventeenth: the command tries them all."""
    base = tmp_path.resolve()
    chosen, outcomes, outside = hostile.run_all(list(cases())[::17], hostile.bases(base), base)
    result = hostile.judge(chosen, outcomes, outside, base)
    assert result["failures"] == []
    assert result["tracebacks"] == result["escapes"] == result["hung_or_crashed"] == 0
    assert result["refused_by_name"] > result["files"] / 2 and result["most_megabytes"] < 3000


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    """An escape of each kind, a hang, a crash, a traceback and a bomb: none goes unseen."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("x")
    (inside / "evil.py").write_text("x = 1\n")

    def connect() -> None:
        with socket.socket() as one:
            one.connect_ex(("127.0.0.1", 9))

    def crash() -> None:
        import os

        os._exit(3)

    found = watched(
        [
            ("read outside", lambda: (outside / "secret").read_text()[:0] or None),
            ("wrote", lambda: (inside / "new").write_text("x") and None),
            ("connected", connect),
            ("ran", lambda: exec(compile("x = 1", str(inside / "evil.py"), "exec"))),
            ("bomb", lambda: bytearray(3 << 30) and None),
            ("traceback", lambda: 1 // 0),
            ("crash", crash),
            ("harmless", lambda: (inside / "evil.py").read_text()[:0] or None),
        ],
        inside=inside,
        outside=outside,
    )
    by_name = {outcome.name: outcome for outcome in found}
    for name in ("read outside", "wrote", "connected", "ran"):
        assert by_name[name].escapes, name
    assert by_name["bomb"].message.startswith("MemoryError") and by_name["traceback"].result == "traceback"
    assert by_name["crash"].result == "crashed"
    assert by_name["harmless"].result == "read" and not by_name["harmless"].escapes
