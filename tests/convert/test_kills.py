"""Invariant 14, from outside: SIGKILL at random places of every stage, resume, and the same bytes. See `kills`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert import kills


@pytest.mark.slow
def test_killed_anywhere_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    result = kills.run_all(tmp_path, kills=len(kills.STAGES), seed=0)
    assert result["failures"] == []
    assert result["kills"] >= len(kills.STAGES) and len(result["by_stage"]) >= 4
    assert min(result["calls"].values()) > 100  # there are many places to die in each stage


@pytest.mark.slow
def test_killed_anywhere_in_a_streamed_conversion(tmp_path: Path) -> None:
    result = kills.run_all(tmp_path, kills=6, seed=0, streamed=True)
    assert result["failures"] == []
    assert result["kills"] >= 6 and len(result["by_stage"]) >= 5
    assert min(result["calls"].values()) > 100
