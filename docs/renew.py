"""Renews the generated pages, docs/commands.md and docs/recipes.md, from the command line and the recipes themselves.

    python docs/renew.py            # write them
    python docs/renew.py --check    # say which are out of date; exit code 1 if one is

tests/docs checks them. Run it after a change to a command's help or to a recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cli")]
COMMAND = "python docs/renew.py"
MADE = f"<!-- Made by {COMMAND}: do not edit. -->"
WIDTH = "100"
ABOUT_RECIPES = (
    "A recipe is a YAML file: how the mixer is built, what is calibrated, aligned and finetuned.",
    "`linearize recipes show NAME` prints one with a comment on every key, `linearize recipes cp NAME FILE` copies it.",
    "The figures are those of the recipes' headers; R is the recovery (0 %: the teacher cut to the window, 100 %: the",
    "teacher), and [quality.md](quality.md) says how it is measured.",
)
MORE = {
    "audit": "evaluation.md#audit-and-recall",
    "bench": "evaluation.md#speed-and-memory-bench",
    "convert": "tutorial.md",
    "eval": "evaluation.md",
    "import lolcats": "import.md",
    "push": "hub.md",
    "recall": "evaluation.md#audit-and-recall",
    "recipes ls": "recipes.md",
    "report": "report.md",
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


def commands() -> str:
    """The page of commands: what each prints with --help."""
    from linearize_cli.app import app

    lines = [
        "# Commands",
        "",
        MADE,
        "",
        "What every command prints with `--help`. Schemas of `--json`: [json.md](json.md).",
        "",
    ]
    found = [path for path in command_paths(app) if path]
    lines += ["| command | what it does |", "|---|---|"]
    for path in found:
        name = " ".join(path)
        lines.append(f"| [`linearize {name}`](#linearize-{name.replace(' ', '-')}) | {first_line(help_of(path))} |")
    for path in [(), *found]:
        name = " ".join(("linearize", *path))
        lines += ["", f"## {name}", "", "```text", help_of(path).strip(), "```"]
        more = MORE.get(" ".join(path))
        if more:
            lines += ["", f"More: [{more.partition('#')[0]}]({more})"]
    return "\n".join(lines) + "\n"


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


def recipes() -> str:
    """The page of recipes, from their headers and values."""
    from linearize.recipe import list_recipes, load_recipe, measured, recipe_path

    names = list_recipes()
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
    for name in names:
        figures = measured(name)
        lines.append(f"| [`{name}`](#{name}) | {WHEN[name]} | {figures.get('R', '')} | {figures.get('state', '')} |")
    for name in names:
        recipe, figures = load_recipe(name), measured(name)
        mixer, stages = recipe.mixer, (recipe.calibrate, recipe.align, recipe.finetune)
        lines += [
            "",
            f"## {name}",
            "",
            f"{recipe.summary}.",
            "",
            linked(prose(recipe_path(name).read_text(encoding="utf-8"))),
        ]
        lines += ["", f"**When:** {WHEN[name]}", "", f"Papers: {linked(recipe.paper)}", ""]
        rows = {
            "feature map": mixer.feature_map + (f", {mixer.feature_dim} outputs" if mixer.feature_dim else ""),
            "decay, write": f"{mixer.decay}, {mixer.write}",
            "normaliser": mixer.normaliser,
            "window, sinks": f"{mixer.window}, {mixer.sinks}" if mixer.window else "none",
            "mix": mixer.mix if mixer.window and mixer.write != "none" else "one branch",
            "softmax layers kept": str(recipe.keep_softmax),
            "tokens: calibrate, align, finetune": ", ".join(f"{stage.tokens:,}" for stage in stages),
        }
        lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
        told = "; ".join(f"{key} {value}" for key, value in figures.items())
        lines += ["", f"Measured: {told}." if told else "Measured: not yet."]
        lines += ["", "```", f"linearize convert MODEL OUT --recipe {name} --data DATA", "```"]
    return "\n".join(lines) + "\n"


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
    return " ".join(kept[:1]) + ("\n\n" + " ".join(kept[1:]) if kept[1:] else "")


def linked(text: str) -> str:
    """arXiv numbers as links, and what Markdown would read as marks as plain text."""
    text = text.replace("*", r"\*").replace("_", r"\_").replace("|", r"\|")
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


PAGES = {"commands.md": commands, "recipes.md": recipes}


def main() -> int:
    """Write the pages, or with --check compare them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old = []
    for name, make in PAGES.items():
        path, text = ROOT / "docs" / name, make()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(name)
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
                print(f"wrote docs/{name}")
    if arguments.check and old:
        print(f"out of date: {', '.join(old)}. Run: {COMMAND}", file=sys.stderr)
    return 1 if arguments.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
