"""Renews the generated pages from the command line and the recipes themselves.

    python docs/renew.py            # write them
    python docs/renew.py --check    # say which are out of date; exit code 1 if one is

    commands.md, recipes.md         the two indexes
    commands/NAME.md                what a command prints with --help; below a mark the page is written by hand
    recipes/NAME.md                 the header of a recipe, and the keys that it changes

tests/docs checks them. Run it after a change to a command's help or to a recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.recipe import Recipe

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cli")]
COMMAND = "python docs/renew.py"
MADE = f"<!-- Made by {COMMAND}: do not edit. -->"
WIDTH = "100"
BY_HAND = "<!-- Written by hand from here on; what is above is made by python docs/renew.py. -->"
ABOUT_COMMANDS = (
    "One page a command: its `--help`, what it writes, exit codes, and examples whose output a test compares.",
    "Schemas of `--json`: [json.md](json.md). `out` and `heldout.txt` are those of the [tutorial](tutorial.md).",
    "",
    "The outputs were printed on 2026-11-22 after the tutorial's few seconds of training (CPU, 2 cores busy with other",
    "work, Python 3.11.7, torch 2.13.0, transformers 5.17.0): they show the form, not what a conversion is worth",
    "([quality.md](quality.md)) or how fast it is ([kernels.md](kernels.md)).",
)
ABOUT_RECIPES = (
    "A recipe is a YAML file: how the mixer is built, what is calibrated, aligned and finetuned.",
    "`linearize recipes show NAME` prints one with a comment on every key, `linearize recipes cp NAME FILE` copies it.",
    "The figures are those of the recipes' headers; R is the recovery (0 %: the teacher cut to the window, 100 %: the",
    "teacher), and [quality.md](quality.md) says how it is measured. An empty cell was not measured.",
)
FIGURES = {
    "R": "recovery: 0 % is the teacher cut to the window, 100 % the teacher",
    "state": "what one sequence keeps; KV: and the cache of the layers that stay softmax",
    "PPL": "perplexity of the converted model",
    "window-alone": "its perplexity with the window alone",
    "linear-alone": "its perplexity with the linear branch alone",
    "recall": "share of what the teacher can recall from beyond the window",
    "kept": "which layers stayed softmax",
    "tokens": "most that both stages read",
    "seed": "of this row",
    "seed-1": "the same with seed 1",
}
"""What the words of `# Measured:` lines mean; the others (teacher, date, on) say where."""
MORE = {
    "audit": "evaluation.md#audit-and-recall",
    "bench": "evaluation.md#speed-and-memory-bench",
    "convert": "tutorial.md",
    "eval": "evaluation.md",
    "import lolcats": "import.md",
    "inspect": "tutorial.md#look-before",
    "push": "hub.md#push",
    "recall": "evaluation.md#audit-and-recall",
    "recipes ls": "recipes.md",
    "report": "report.md",
    "verify": "trust.md",
}
"""Where more is said about a command."""
WHEN = {
    "based": "To study Based's Taylor maps; for results prefer a recipe with measured figures.",
    "gated-deltanet": "To study the delta rule, or where every byte of state counts: it has no window at all.",
    "hedgehog": "To study what exponential maps do by themselves, without a window.",
    "hedgehog-encoder": "For BERT and RoBERTa: the only recipe for masked language models.",
    "hybrid": "When quality matters most and a cache of a few layers is affordable. The first one to try on a GPU.",
    "liger-gla": "To change as little as possible: no new parameters, LoRA alone.",
    "liger-hgrn2": "As liger-gla, with HGRN2's tied gates.",
    "lolcats": "For a first look on a CPU, and to compare with the published method.",
    "lolcats-hybrid": "LoLCATs with every fourth layer kept; hybrid chooses its layers by measurement instead.",
    "mamba2": "To study scalar decays with a step size, as in Mamba-2.",
    "pure": "The default: no cache that grows, and a linear branch that does work of its own.",
    "retention": "To study fixed decays, as in RetNet.",
    "sliding-window": "As a baseline: what a linear branch is worth shows beside it.",
    "t2r": "To study ReLU maps, the oldest of these recipes.",
}
"""When to take each recipe; a word for every recipe that ships, no figures."""


def command_index() -> str:
    """The index of the commands."""
    from linearize_cli.app import app

    lines = ["# Commands", "", MADE, "", *ABOUT_COMMANDS, "", "| command | what it does |", "|---|---|"]
    for path in filter(None, command_paths(app)):
        lines.append(f"| [`linearize {' '.join(path)}`](commands/{page_of(path)}) | {first_line(help_of(path))} |")
    return "\n".join([*lines, "", "```text", help_of(()).strip(), "```", ""])


def command_page(path: tuple[str, ...]) -> str:
    """A command's page: its help, and what is written by hand below the mark."""
    name, text = " ".join(path), help_of(path).strip()
    lines = [f"# linearize {name}", "", first_line(text), "", "```text", text, "```", ""]
    schemas = [f"[{title}](../json.md#{slug(title)})" for title in json_sections() if is_of(title, name)]
    more = MORE.get(name)
    said = f" More: [{more.partition('#')[0]}](../{more})." if more else ""
    lines += [f"What `--json` prints: {', '.join(schemas)}.{said} [All commands](../commands.md).", "", BY_HAND]
    page = DOCS / "commands" / page_of(path)
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    tail = old.partition(BY_HAND)[2] or "\n\n## What it writes\n\n## Exit codes\n\n## Examples\n"
    return "\n".join(lines) + tail


def page_of(path: tuple[str, ...]) -> str:
    """The file of a command's page: `recipes-ls.md`."""
    return f"{'-'.join(path)}.md"


def json_sections() -> list[str]:
    """Headings of docs/json.md."""
    text = (DOCS / "json.md").read_text(encoding="utf-8")
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def is_of(title: str, name: str) -> bool:
    """Whether a section of docs/json.md is about a command: `eval --data` is about `eval`."""
    return title == name or title.startswith((f"{name} -", f"{name} of "))


def slug(title: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def command_paths(app: object) -> list[tuple[str, ...]]:
    """Every command that does something, as words: `("recipes", "ls")`; `()` is linearize itself."""
    from typer.main import get_command

    def walk(command: object, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [path]
        return [found for name in inner for found in walk(inner[name], (*path, name))]

    return [(), *sorted(walk(get_command(app), ()))]  # type: ignore[arg-type]


def help_of(path: tuple[str, ...]) -> str:
    """What a command prints with --help, at a fixed width, whatever the terminal."""
    from linearize_cli.app import main

    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS=WIDTH, NO_COLOR="1")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([*path, "--help"]) == 0
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def first_line(text: str) -> str:
    """The first paragraph under Usage of a help text."""
    body = text.split("\n\n")[1]
    return " ".join(body.split())


def recipe_index() -> str:
    """The index of the recipes."""
    from linearize.recipe import list_recipes, measured

    lines = [
        "# Recipes",
        "",
        MADE,
        "",
        *ABOUT_RECIPES,
        "",
        "| recipe | when to take it | R | state |",
        "|---|---|---|---|",
    ]
    for name in list_recipes():
        figures = measured(name)
        row = (f"[`{name}`](recipes/{name}.md)", WHEN[name], figures.get("R", ""), figures.get("state", ""))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def recipe_page(name: str) -> str:
    """A recipe's page, from its header and its values."""
    from linearize.recipe import load_recipe, measured, recipe_path

    recipe, text = load_recipe(name), recipe_path(name).read_text(encoding="utf-8")
    lines = [f"# {name}", "", MADE, "", f"{recipe.summary}.", "", linked(prose(text)), ""]
    lines += [f"**When:** {WHEN[name]}", "", f"**Papers:** {linked(recipe.paper)}", "", "## Run it", "", "```"]
    lines += [*re.findall(r"^# (?:Run|Try): +(.+)$", text, re.MULTILINE), "```", ""]
    if "# Try:" in text:
        lines += ["The second line is a first look: minutes on a CPU, and far too few tokens for a good model.", ""]
    lines += ["## Measured", ""]
    figures = measured(name)
    if figures:
        lines += ["| | | |", "|---|---|---|"]
        lines += [f"| {word} | {value} | {FIGURES[word]} |" for word, value in figures.items() if word in FIGURES]
        where = "; ".join(f"{word} {value}" for word, value in figures.items() if word not in FIGURES)
        table = table_of(name, figures["R"])
        lines += ["", f"{where[:1].upper()}{where[1:]}. Command, whole table and limits: [{table}](../{table})."]
    else:
        lines += ["Not yet. `linearize audit` says what a conversion of yours is worth."]
    mixer, stages = recipe.mixer, (recipe.calibrate, recipe.align, recipe.finetune)
    rows = {
        "feature map": mixer.feature_map + (f", {mixer.feature_dim} outputs" if mixer.feature_dim else ""),
        "decay, write": f"{mixer.decay}, {mixer.write}",
        "normaliser": mixer.normaliser,
        "window, sinks": f"{mixer.window}, {mixer.sinks}" if mixer.window else "none",
        "mix": mixer.mix if mixer.window and mixer.write != "none" else "one branch",
        "softmax layers kept": str(recipe.keep_softmax),
        "tokens: calibrate, align, finetune": ", ".join(f"{stage.tokens:,}" for stage in stages),
    }
    lines += ["", "## In short", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    lines += ["", "## Keys that differ from the defaults", ""]
    lines += [
        "The default holds where a recipe does not name the key. Any key can be given to `convert`: `key=value`.",
        "",
    ]
    lines += ["| key | here | default | what it is |", "|---|---|---|---|"]
    about = comments(text)
    for key, value, default in differences(recipe):
        cells = [f"`{word}`" if word else "" for word in (key, value, default)]
        lines.append(f"| {' | '.join([*cells, linked(about.get(key, ''))])} |")
    return "\n".join([*lines, "", "[All recipes](../recipes.md)"]) + "\n"


def table_of(name: str, figure: str) -> str:
    """The page that has this recipe's row: quality.md, or results.md for the older ones."""
    rows = (DOCS / "quality.md").read_text(encoding="utf-8").replace("*", "").splitlines()
    return "quality.md" if any(name in row and figure in row for row in rows) else "results.md"


def differences(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(key, value, default) of every key that has another value than in a recipe that names none."""
    from linearize.recipe import MixerSpec, Recipe

    plain = flat(Recipe(name=recipe.name, mixer=MixerSpec()).as_dict())
    mine = flat(recipe.as_dict())
    told = {"name", "paper", "summary"}
    keys = [key for key in mine if key not in told and mine[key] != plain.get(key)]
    return [(key, yaml_of(mine[key]), yaml_of(plain[key]) if key in plain else "") for key in keys]


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{`align.lr`: 0.001, ...} of nested sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def yaml_of(value: Any) -> str:
    """A value as one writes it in YAML, or behind `key=`."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_of, value))}]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value >= 1000 and value % 1000 == 0:
        return f"{value // 10**6}M" if value % 10**6 == 0 else f"{value // 1000}k"
    return str(value)


def comments(text: str) -> dict[str, str]:
    """{`mixer.window`: what its line in the YAML says of it}."""
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in text.splitlines():
        match = re.match(r"^( *)(\w+):(.*?)(?: +# (.+))?$", line)
        if match:
            parents = [*parents[: len(match[1]) // 2], match[2]]
            if match[4]:
                found[".".join(parents)] = match[4]
    return found


def prose(text: str) -> str:
    """The sentences of a recipe's header: its first comment lines, less those that begin with a known word."""
    kept: list[str] = []
    skipping = False
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("# ").strip()
        if re.match(r"(Paper|Measured|Run|Try):|Not measured", words):
            skipping = True
        elif skipping and re.match(r"arXiv:", words):
            continue  # the papers' second line
        else:
            skipping = False
            kept.append(words)
    first = next((n for n, words in enumerate(kept, 1) if words.endswith(".")), len(kept))
    return "\n\n".join(" ".join(part) for part in (kept[:first], kept[first:]) if part)


def linked(text: str) -> str:
    """arXiv numbers as links, and what Markdown would read as marks as plain text."""
    text = text.replace("*", r"\*").replace("_", r"\_").replace("|", r"\|")
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def made() -> dict[str, str]:
    """{path below docs/: text} of every generated page."""
    from linearize.recipe import list_recipes
    from linearize_cli.app import app

    pages = {"commands.md": command_index(), "recipes.md": recipe_index()}
    pages |= {f"commands/{page_of(path)}": command_page(path) for path in filter(None, command_paths(app))}
    return pages | {f"recipes/{name}.md": recipe_page(name) for name in list_recipes()}


def left_over(pages: Iterable[str]) -> list[str]:
    """Pages of commands and recipes that there are no more."""
    there = [path.relative_to(DOCS).as_posix() for name in ("commands", "recipes") for path in (DOCS / name).glob("*")]
    return sorted(set(there) - set(pages))


def main() -> int:
    """Write the pages, or with --check compare them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old, pages = [], made()
    for name, text in pages.items():
        path = DOCS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(name)
            if not arguments.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
                print(f"wrote docs/{name}")
    for name in left_over(pages):
        print(f"docs/{name} is of nothing that there is: remove it", file=sys.stderr)
    if arguments.check and old:
        print(f"out of date: {', '.join(old)}. Run: {COMMAND}", file=sys.stderr)
    return 1 if left_over(pages) or (arguments.check and old) else 0


if __name__ == "__main__":
    sys.exit(main())
