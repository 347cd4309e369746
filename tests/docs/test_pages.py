"""The pages: generated ones are up to date, every command on them parses, every link leads somewhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from linearize.recipe import list_recipes, load_recipe
from linearize_cli.app import app
from tests.docs.fences import Shown, pages, shown
from tests.docs.schema import complaints, tables

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PARTS = ("commands", "recipes")
COMMANDS = [command for page in pages(ROOT) for command in shown(page)]


@pytest.fixture(scope="module")
def renew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("renew", DOCS / "renew.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(renew: ModuleType) -> None:
    pinned = f"typer=={importlib.metadata.version('typer')}"
    other = pinned not in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pages = renew.made()
    assert len(pages) == 2 + len(list_recipes()) + len(renew.command_paths(app)) - 1
    for name, text in pages.items():
        if not (other and name.startswith("commands")):
            assert (DOCS / name).is_file() and (DOCS / name).read_text(encoding="utf-8") == text, (
                f"docs/{name} is out of date. Run: python docs/renew.py"
            )
    assert renew.left_over(pages) == [], "pages of nothing that there is"
    if other:
        pytest.skip(f"{pinned} is not the one that constraints.txt pins: its help may have other words")


def test_every_command_page_says_what_it_writes_its_exit_codes_and_examples(renew: ModuleType) -> None:
    for path in filter(None, renew.command_paths(app)):
        page = DOCS / "commands" / renew.page_of(path)
        by_hand = page.read_text(encoding="utf-8").partition(renew.BY_HAND)[2]
        parts = re.split(r"^## (.+)$", by_hand, flags=re.MULTILINE)
        assert parts[1::2] == ["What it writes", "Exit codes", "Examples"], page.name
        assert all(part.strip() for part in parts[2::2]), f"{page.name}: an empty part"
        assert re.search(rf"^\$ linearize {' '.join(path)}\b", by_hand, re.MULTILINE), page.name


def test_every_recipe_has_a_word_on_when_to_take_it(renew: ModuleType) -> None:
    assert sorted(renew.WHEN) == list_recipes()
    assert not [word for word in renew.WHEN.values() if re.search(r"\d\.\d|\d %", word)], (
        "figures come from the headers"
    )


def parse(command: Shown) -> Any:
    """The deepest context of a command line, parsed and not run."""
    from typer.main import get_command

    words = ["1" if word in ("N", "A") else word for word in command.words if word != "--help"]
    group: Any = get_command(app)
    # Of linearize itself only names are looked at: --install-completion would be obeyed.
    own = {name for param in group.params for name in param.opts}
    if words and words[0].startswith("-"):
        assert words[0] in own, f"no such option: {words[0]}"
    if not words or words[0].startswith("-"):
        return group.make_context("linearize", [], resilient_parsing=True)
    context = group.make_context("linearize", words)
    rest = [*getattr(context, "_protected_args", []), *context.args]
    while hasattr(group, "resolve_command") and rest:
        name, group, rest = group.resolve_command(context, rest)
        context = group.make_context(name, list(rest), parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
    return context


def test_there_are_commands_to_check() -> None:
    assert len([command for command in COMMANDS if command.whole]) > 60
    assert {"README.md", "tutorial.md", "pure.yaml"} <= {command.place.partition(":")[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place} {' '.join(command.words)[:50]}")
def test_every_command_on_a_page_parses(command: Shown) -> None:
    try:
        context = parse(command)
    except Exception as error:
        if not command.whole and type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError"):
            return  # a mention in a sentence leaves out what is not its point
        raise AssertionError(f"{command.place}: {getattr(error, 'message', None) or error}") from error
    recipe, overrides = context.params.get("recipe"), context.params.get("overrides")
    if recipe in list_recipes():
        load_recipe(recipe, [word for word in overrides or () if "=" in word])


def test_a_wrong_command_on_a_page_would_be_found() -> None:
    for words in (("frob",), ("convert", "demo"), ("convert", "a", "b", "--bogus"), ("select", "m", "--keep", "x")):
        with pytest.raises(AssertionError):
            test_every_command_on_a_page_parses(Shown(place="here", words=words, whole=True))


def test_every_page_is_in_an_index_and_every_link_leads_somewhere(renew: ModuleType) -> None:
    indexes = {folder: (DOCS / f"{folder or 'README'}.md").read_text(encoding="utf-8") for folder in ("", *PARTS)}
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        if DOCS in page.parents and page.name != "README.md":
            below = page.relative_to(DOCS).as_posix()
            index = indexes["" if page.parent == DOCS else page.parent.name]
            assert f"({below})" in index, f"no index lists docs/{below}"
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                path, _, part = target.partition("#")
                there = page.parent / path if path else page
                assert there.exists(), f"{page.name} links to {target}"
                assert not part or part in anchors(there, renew), f"{page.name} links to {target}"


def anchors(page: Path, renew: ModuleType) -> set[str]:
    """What a page's headings are called in a link."""
    return {renew.slug(title) for title in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def test_every_command_has_a_documented_json(renew: ModuleType) -> None:
    sections = tables(DOCS / "json.md")
    for path in filter(None, renew.command_paths(app)):
        assert any(section.split(" -")[0] == " ".join(path) for section in sections), path
    assert all(sections.values()), "a section without a table"


def test_the_schema_check_can_fail() -> None:
    table = tables(DOCS / "json.md")["recipes validate"]
    right = {"name": "a", "digest": "b", "valid": True, "tokens": 3}
    assert complaints(right, table) == []
    assert complaints({**right, "tokens": True}, table) and complaints({**right, "tokens": 1.5}, table)
    assert complaints({**right, "more": 1}, table) == ["more is not documented"]
    del right["valid"]
    assert complaints(right, table) == ["valid is missing"]
    ls = tables(DOCS / "json.md")["recipes ls"]
    assert complaints({"recipes": [{"name": "a", "paper": "b", "summary": 1, "measured": {}}]}, ls)
