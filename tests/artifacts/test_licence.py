"""A licence is what a model's own files say, or unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from linearize.artifacts.licence import as_metadata, read_licence, require_licence
from linearize.errors import UsageError

MIT = """MIT License

Copyright (c) 2026 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def front(text: str) -> str:
    return f"---\n{text}\n---\n\n# A model, licensed under MIT\n"


def test_the_card_says_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(front("license: Apache-2.0\ntags: [a]"))
    (tmp_path / "LICENSE").write_text(MIT)
    found = read_licence(tmp_path)
    assert found == {"id": "apache-2.0", "name": None, "link": None, "source": "README.md"}
    assert as_metadata(found) == {"license": "apache-2.0"} and as_metadata(None) == {}


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# MIT licensed",
        front("tags: [license, mit]"),
        front("license: unknown"),
        front("license: [mit, apache-2.0]"),
        front("license: 'all rights reserved'"),
        front("license: ''"),
        front("a: &a [x]\nlicense: mit\nb: *a"),
        front("- license: mit"),
        front("license: mit\nlicense: gpl-3.0"),
        front("{"),
        "text\n---\nlicense: mit\n---\n",
    ],
)
def test_what_does_not_say_it(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) is None


def test_other_terms(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(front("license: other\nlicense_name: my-terms-1.0\nlicense_link: LICENSE.md"))
    assert read_licence(tmp_path) == {"id": "other", "name": "my-terms-1.0", "link": None, "source": "README.md"}
    linked = read_licence(tmp_path, repo="owner/name")
    assert linked is not None and linked["link"] == "https://huggingface.co/owner/name/blob/main/LICENSE.md"
    (tmp_path / "LICENSE.md").write_text("terms")
    assert as_metadata(read_licence(tmp_path, repo="owner/name")) == {
        "license": "other",
        "license_name": "my-terms-1.0",
        "license_link": "LICENSE.md",
    }
    (tmp_path / "README.md").write_text(front("license: other\nlicense_link: javascript:alert(1)"))
    found = read_licence(tmp_path)
    assert found is not None and (found["name"], found["link"]) == ("base-model-licence", "LICENSE.md")


def test_a_file_of_terms_is_known_by_its_whole_text(tmp_path: Path, root: Path) -> None:
    apache = (root / "LICENSE").read_text()
    for text, licence in (
        (MIT, "mit"),
        (MIT.replace("\n", " "), "other"),  # its heading is no longer one
        (MIT.replace("\n\n", "\n \n"), "mit"),
        (apache, "apache-2.0"),
        ("Not for sale.\n" + MIT, "other"),
        (MIT + "\nNot for sale.\n", "other"),
        (MIT.replace("sublicense, and/or sell", "and sublicense"), "other"),
        (apache + "\nCommons Clause: not for sale.\n", "other"),
        (apache.replace("worldwide, ", ""), "other"),
        ("Apache License, Version 2.0", "other"),
    ):
        (tmp_path / "LICENSE").write_text(text)
        found = read_licence(tmp_path)
        assert found is not None and found["id"] == licence, text[:60]
    assert as_metadata(found) == {"license": "other", "license_name": "base-model-licence", "license_link": "LICENSE"}


@pytest.mark.parametrize("number", ["1:30", "010"])
def test_a_number_of_another_base_in_a_card_does_not_hide_its_licence(number: str, tmp_path: Path) -> None:
    """It is refused in recipes; whoever wrote a card meant nothing by it."""
    (tmp_path / "README.md").write_text(front(f"license: mit\ntraining_time: {number}"))
    found = read_licence(tmp_path)
    assert found is not None and found["id"] == "mit"


def test_files_out_of_the_folder_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(front("license: mit"))
    (folder := tmp_path / "model").mkdir()
    (folder / "README.md").symlink_to(tmp_path / "elsewhere")
    assert read_licence(folder) is None
    (folder / "LICENSE.py").write_text(MIT)  # not carried over, so not terms
    assert read_licence(folder) is None


def test_the_form_of_an_id() -> None:
    assert require_licence("llama3.1") == "llama3.1"
    for wrong in ("MIT", "apache 2", "", "a\nb", "x" * 100):
        with pytest.raises(UsageError, match="not the form of a licence id"):
            require_licence(wrong)
