"""A recipe file is untrusted text: nothing in it runs, expands or is quietly merged."""

from __future__ import annotations

from pathlib import Path

import pytest

from linearize.errors import UsageError
from linearize.recipe import load_recipe, recipe_path
from linearize.strict import MAX_YAML_BYTES, read_yaml

GOOD = recipe_path("lolcats").read_text(encoding="utf-8")


def load(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    load_recipe(file)


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bomb(), "anchors and aliases"),
        ("a: &a {b: 1}\nc: *a\n", "anchors and aliases"),
        (GOOD + "\nseed: 1\n", "'seed' is given twice"),
        (GOOD.replace("  window: 64 ", "  window: 64\n  window: 32 "), "'window' is given twice"),
        (GOOD + "\n1: 2\n", "not plain text"),
        (GOOD + "\n<<: {seed: 1}\n", "not plain text"),
        (GOOD + "\n? [a, b]\n: 2\n", "not plain text"),
        (GOOD + "\nx: !!python/object/apply:os.system ['true']\n", "line "),
        (GOOD + "\n---\nname: other\n", "document"),
        ("[" * 5000, "nested deeper"),
        ("a: " * 1 + "{a: " * 200, "nested deeper"),
        ("name: [unclosed", "line "),
        ("name: 2001-99-99\n", "not valid YAML"),
        ("", "no key: value lines"),
        ("- just\n- a list\n", "no key: value lines"),
        ("just text", "no key: value lines"),
        (b"name: \xff\xfe\n", "not UTF-8"),
        (b"name: a\x00b\n", "not valid YAML"),
        ("name: x\n", "mixer: missing"),
        ("mixer: {}\n", "name: missing"),
        ("#" * (MAX_YAML_BYTES + 1), "longer than"),
        (GOOD.replace("seed: 0 ", "seed: 010 "), "'010' would be 8, in base 8: write the decimal number (line "),
        (GOOD.replace("seed: 0 ", "seed: 1:30 "), "'1:30' would be 90, in base 60: write the decimal number (line "),
    ],
)
def test_refused_in_one_line_that_names_the_file(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, content)
    text = str(caught.value)
    assert says in text and "r.yaml" in text and "\n" not in text, text


def test_errors_say_the_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 3, column 1"):
        load(tmp_path, "name: a\nseed: 1\nseed: 2\n")


def test_words_stay_words() -> None:
    assert read_yaml("none", "x") == "none"
    assert read_yaml("[q_proj, k_proj]", "x") == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("007", 7),
        ("-12", -12),
        ("+5", 5),
        ("1_000", 1000),
        ("0x10", 16),
        ("0b11", 3),
        ("0.5", 0.5),
        ("012.5", 12.5),
    ],
)
def test_numbers_are_what_they_look_like(text: str, value: float) -> None:
    assert read_yaml(text, "here") == value


@pytest.mark.parametrize("text", ["010", "-010", "0_17", "1:30", "190:20:30", "1:30.5", "[1, 010]"])
def test_numbers_of_other_bases_without_a_sign_of_it_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^here: '.*' would be .*, in base (8|60): write the decimal number \(line 1"):
        read_yaml(text, "here")
