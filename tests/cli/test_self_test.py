"""`linearize doctor` runs the mixers of this machine, and says what is wrong with them."""

from __future__ import annotations

import json

import pytest

from linearize_cli.app import main


def test_doctor_says_what_is_wrong(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize_cli import doctor

    bad = {"recipe": "x", "device": "cpu", "difference": 1.0, "passed": False, "seconds": 0.1}
    monkeypatch.setattr(doctor, "_self_test", lambda name: {**bad, "recipe": name})
    monkeypatch.setattr(doctor, "_device", lambda: {"cuda": None, "gpus": []})
    assert main(["doctor", "--json"]) == 4
    out, err = capsys.readouterr()
    assert len(json.loads(out)["problems"]) == 4 and "lolcats" in err
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "peft" else "1")
    assert main(["doctor"]) == 4
    assert "peft is not installed" in capsys.readouterr().err


def test_doctor_tests_the_mixers_of_this_machine(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["packages"]["torch"]
    assert [row["recipe"] for row in report["self_test"]] == ["pure", "lolcats", "liger-gla", "gated-deltanet"]

    from linearize_cli import doctor

    monkeypatch.setattr(doctor, "TOLERANCE", 0.0)
    assert main(["doctor"]) == 4, "a difference above the tolerance is a problem"
