"""Invariant 19 for whatever hypothesis makes up: recipes, overrides and configs end in a value or in one clear line.

Each property runs in a watched child (tests/artifacts/watch.py): little memory, little time, and nothing opened for
writing but below the folder that is named.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.configuration
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some

from linearize.errors import LinearizeError, UsageError
from linearize.recipe import Recipe, list_recipes, load_recipe, recipe_from_dict, recipe_path
from linearize.recipe_schema import dotted_keys
from linearize.strict import MAX_YAML_BYTES

GOOD = [recipe_path(name).read_text(encoding="utf-8") for name in list_recipes()]
KEYS = list(dotted_keys())
ODD = [
    "nan",
    ".inf",
    "1e400",
    "0x7f",
    "2M",
    "-5",
    "on",
    "~",
    "!!python/name:os.system",
    "*a",
    "&a 1",
    "2001-99-99",
    "🜏",
    "none",
]
HUGE = ["9" * 5000, "[" * 4000, "{a: " * 300, "a" * (MAX_YAML_BYTES + 1), "- " * 20_000, "1" + "_" * 9999]

leaf = some.one_of(
    some.none(), some.booleans(), some.integers(), some.floats(), some.text(max_size=12), some.sampled_from(ODD),
    some.sampled_from(["none", "every 4", "auto", "mixer", "q_proj", "adamw", "hedgehog_softmax", 10**400, -(2**63)]),
)  # fmt: skip
value = some.recursive(
    leaf,
    lambda inner: (
        some.lists(inner, max_size=4)
        | some.dictionaries(some.sampled_from(KEYS) | some.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
key = (
    some.sampled_from(KEYS)
    | some.text(max_size=20)
    | some.sampled_from(["", ".", "a.b.c.d", "mixer.", ".mixer", "__class__"])
)
fixed = settings(
    max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)  # fmt: skip


def one_line(error: LinearizeError) -> None:
    text = str(error)
    assert text and "\n" not in text and text.isprintable() and len(text) < 4500, text


def clear(read: Callable[[], Any]) -> Any:
    """What `read` gives, or None after an error of ours; anything else fails the test."""
    try:
        return read()
    except LinearizeError as error:
        one_line(error)
        return None


def sound(recipe: Recipe | None) -> None:
    """A recipe that was read is the same after it was written out."""
    if recipe is not None:
        again = recipe_from_dict(json.loads(json.dumps(recipe.as_dict(), allow_nan=False)))
        assert again == recipe and again.digest() == recipe.digest()


def mutated(text: str, edits: list[tuple[float, str]]) -> str:
    """`text` with pieces put in the place of as many letters."""
    for place, piece in edits:
        at = int(place * len(text))
        text = text[:at] + piece + text[at + len(piece) :]
    return text


piece = some.text(max_size=6) | some.sampled_from(
    [*ODD, "\n", "\t", ":", ": ", "  ", "\x00", "\ufeff", "---\n", "<<: *a", "#", "\u2028"]
)
edits = some.lists(some.tuples(some.floats(0, 0.999), piece), min_size=1, max_size=5)


def yaml_files(place: Path) -> None:
    """Damaged recipes, made-up ones, and plain noise, as files."""
    file = place / "r.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        sound(clear(lambda: load_recipe(file)))

    @fixed
    @given(good=some.sampled_from(GOOD), edits=edits)
    def damaged(good: str, edits: list[tuple[float, str]]) -> None:
        read(mutated(good, edits).encode("utf-8", "surrogatepass"))

    @fixed
    @given(
        values=some.dictionaries(
            some.sampled_from([k for k in KEYS if "." not in k]) | some.text(max_size=8), value, max_size=8
        )
    )
    def made_up(values: dict[str, Any]) -> None:
        base = yaml.safe_load(GOOD[0])
        with contextlib.suppress(UnicodeEncodeError, ValueError):  # the dumper's own trouble
            read(yaml.safe_dump({**base, **values}, allow_unicode=True).encode())

    @fixed
    @given(
        data=some.binary(max_size=400) | some.text(max_size=400).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
    def noise(data: bytes) -> None:
        read(data)

    damaged()
    made_up()
    noise()
    for text in HUGE:
        for form in (text, f"name: {text}", f"{GOOD[0]}\nsummary: {text}", f"{GOOD[0]}\nmixer: {text}"):
            read(form.encode())


def overrides(place: Path) -> None:
    """Overrides as strings and as mappings."""

    @fixed
    @given(
        items=some.lists(some.tuples(key, leaf | some.sampled_from(HUGE)), max_size=4),
        joint=some.sampled_from(["=", "==", ":", " = ", ""]),
    )
    def strings(items: list[tuple[str, Any]], joint: str) -> None:
        with contextlib.suppress(ValueError):  # Python itself writes no integer of 5000 digits
            words = [f"{name}{joint}{what}" for name, what in items]
            sound(clear(lambda: load_recipe("lolcats", words)))

    @fixed
    @given(values=some.dictionaries(key, value, max_size=5))
    def mappings(values: dict[str, Any]) -> None:
        sound(clear(lambda: load_recipe("lolcats", values)))
        sound(clear(lambda: recipe_from_dict(values)))

    strings()
    mappings()


def command_line(place: Path) -> None:
    """The command that checks recipes: exit code 0 or 2, one line of error, nothing on stdout, no traceback."""
    from linearize_cli.app import main

    @settings(parent=fixed, max_examples=60)
    @given(
        words=some.lists(
            some.text(min_size=1, max_size=12) | some.builds("{}={}".format, key, some.sampled_from(ODD)), max_size=4
        )
    )
    def check(words: list[str]) -> None:
        words = [word for word in words if not word.startswith("-")]  # those are options
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(["recipes", "validate", "lolcats", *words])
        told = err.getvalue()
        assert code in (0, 2) and not out.getvalue() and "Traceback" not in told
        assert code == 0 or (told.startswith("error: ") and told.count("\n") == 1), told

    check()


def configs(place: Path) -> None:
    """config.json: any value under any key, several at once."""
    from linearize.artifacts.config_reader import build_config, read_config
    from linearize.convert.plan import Layout

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 259,
        "num_attention_heads": 4,
    }
    base = {
        "model_type": "llama",
        **sizes,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
    }
    base |= {"rope_theta": 1e4, "hidden_act": "silu", "dtype": "float32", "tie_word_embeddings": False, "head_dim": 8}
    names = some.sampled_from(
        [*base, "rope_parameters", "rope_scaling", "layer_types", "auto_map", "sliding_window", "pad_token_id"]
    )
    number = some.sampled_from([0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**18, 10**30, 0.5, -0.0, 1e308])

    @settings(parent=fixed, max_examples=200)
    @given(
        kind=some.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
        changes=some.dictionaries(names | some.text(max_size=8), number | value, max_size=3),
    )
    def check(kind: str, changes: dict[str, Any]) -> None:
        try:
            text = json.dumps({**base, "model_type": kind, **changes})
        except ValueError:
            return
        (place / "config.json").write_text(text)
        clear(lambda: read_config(place))
        config = clear(lambda: build_config(place))
        if config is not None and config.model_type == kind:
            clear(lambda: Layout.of(config, load_recipe("lolcats")))

    check()


@pytest.mark.parametrize("work", [yaml_files, overrides, command_line, configs], ids=lambda work: work.__name__)
def test_only_clear_errors(work: Callable[[Path], None], tmp_path: Path) -> None:
    from tests.artifacts.watch import watched

    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    hypothesis.configuration.set_hypothesis_home_dir(inside)
    try:
        _warm_up(work)

        (outcome,) = watched([(work.__name__, lambda: work(inside))], inside=inside, outside=outside, ours=(inside,))
    finally:
        hypothesis.configuration.set_hypothesis_home_dir(None)
    assert outcome.result == "read", outcome.message
    assert outcome.escapes == []


def _warm_up(work: Callable[[Path], None]) -> None:
    """What is imported, and made by imports, before the watch begins."""
    import linearize_cli.app  # noqa: F401

    if work is configs:
        from transformers import LlamaConfig

        from linearize.convert.plan import Layout

        Layout.of(LlamaConfig(num_hidden_layers=1), load_recipe("lolcats"))


def test_the_fuzz_reaches_what_is_good_too() -> None:
    """Or it would test nothing but the first check."""
    recipe = load_recipe("lolcats", ["context=64", "keep_softmax=[1]"])
    sound(recipe)
    assert clear(lambda: recipe) is recipe
    with pytest.raises(ZeroDivisionError):
        clear(lambda: 1 // 0)
    assert clear(lambda: (_ for _ in ()).throw(UsageError("x"))) is None
