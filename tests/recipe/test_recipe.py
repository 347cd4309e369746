"""Recipes: the ones that ship, the strictness of the schema, overrides and digests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.errors import UsageError
from linearize.modeling.mixer_spec import AXES, MixerSpec
from linearize.recipe import (
    Align,
    Calibrate,
    Finetune,
    Lora,
    Recipe,
    list_recipes,
    load_recipe,
    measured,
    recipe_from_dict,
    recipe_path,
)

SHIPPED = [
    "based",
    "gated-deltanet",
    "hedgehog",
    "hedgehog-encoder",
    "hybrid",
    "liger-gla",
    "liger-hgrn2",
    "lolcats",
    "lolcats-hybrid",
    "mamba2",
    "pure",
    "retention",
    "sliding-window",
    "t2r",
]
SECTIONS = {"mixer": MixerSpec, "calibrate": Calibrate, "align": Align, "finetune": Finetune}


def values(name: str = "lolcats") -> dict:
    return load_recipe(name).as_dict()


def test_the_recipes_ship() -> None:
    assert list_recipes() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe(name: str) -> None:
    """It loads, is named like its file, cites its paper, fits the budget, and its header gives the command."""
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.paper.startswith("arXiv:")
    assert recipe.summary
    assert recipe.align.tokens + recipe.finetune.tokens <= 12_000_000
    header = recipe_path(name).read_text(encoding="utf-8").split("\n\n")[0]
    assert f"linearize convert MODEL OUT --recipe {name} --data DATA" in header
    for paper in recipe.paper.split(", "):
        assert paper.removeprefix("arXiv:") in header


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_writes_out_every_key_with_a_comment(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    assert set(written) == {f.name for f in dataclasses.fields(Recipe)}
    for section, cls in SECTIONS.items():
        assert set(written[section]) == {f.name for f in dataclasses.fields(cls)}, section
    if written["finetune"]["lora"] is not None:
        assert set(written["finetune"]["lora"]) == {f.name for f in dataclasses.fields(Lora)}
    for line in text.splitlines():
        if line.startswith(" ") and not line.rstrip().endswith(":"):
            assert "  # " in line, line
    assert all(len(line) <= 140 for line in text.splitlines())


def test_the_papers_mixers() -> None:
    """The points of mixer space that the recipes' names promise."""
    expected = {
        "hedgehog": {"feature_map": "hedgehog_exp", "normaliser": "own", "window": 0},
        "hedgehog-encoder": {"feature_map": "hedgehog_exp", "normaliser": "own", "window": 0, "decay": "none"},
        "t2r": {"feature_map": "relu", "normaliser": "own", "window": 0},
        "lolcats": {"feature_map": "hedgehog_softmax", "normaliser": "shared", "window": 64, "mix": "shared"},
        "lolcats-hybrid": {"feature_map": "hedgehog_softmax", "normaliser": "shared", "window": 64},
        "based": {
            "feature_map": "taylor",
            "feature_dim": 16,
            "normaliser": "own",
            "mix": "gate",
            "coverage": "all",
            "window_weight": 0.9,
        },
        "liger-gla": {"decay": "key", "decay_power": 1 / 16, "mix": "sum", "rope": False, "window_weight": 0.5},
        "liger-hgrn2": {"decay": "key", "decay_power": 1.0, "key_map": "forget", "mix": "sum"},
        "retention": {"decay": "fixed", "normaliser": "norm", "window": 0},
        "mamba2": {"decay": "scalar", "dt_gain": True, "window": 0},
        "pure": {"feature_map": "learned_softmax", "normaliser": "own", "mix": "mass", "coverage": "all", "sinks": 0},
        "hybrid": {"feature_map": "hedgehog_exp", "normaliser": "own", "mix": "mass", "state_heads": "kv"},
        "sliding-window": {"write": "none", "window": 64, "sinks": 4},
        "gated-deltanet": {"decay": "scalar", "write": "delta", "feature_map": "l2norm", "window": 0},
    }
    for name, axes in expected.items():
        spec = load_recipe(name).mixer
        assert {axis: getattr(spec, axis) for axis in axes} == axes, name
    assert load_recipe("lolcats-hybrid").keep_softmax == "every 4"
    assert {load_recipe(name).align.tokens for name in ("liger-gla", "liger-hgrn2")} == {0}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("keep", ["every 4", "[0, 3]"])
def test_any_recipe_is_a_hybrid(name: str, keep: str) -> None:
    kept = load_recipe(name, [f"keep_softmax={keep}"]).softmax_layers(8)
    assert kept == ((3, 7) if keep == "every 4" else (0, 3))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_survives_its_own_dict_and_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(recipe.as_dict()) == recipe
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(recipe.as_dict()), encoding="utf-8")
    again = load_recipe(file)
    assert again == recipe and again.digest() == recipe.digest()


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("context=512", lambda r: r.context, 512),
        ("context=2k", lambda r: r.context, 2000),
        ("seed=7", lambda r: r.seed, 7),
        ("align.tokens=2M", lambda r: r.align.tokens, 2_000_000),
        ("align.tokens=2000000", lambda r: r.align.tokens, 2_000_000),
        ("align.tokens=2_000_000", lambda r: r.align.tokens, 2_000_000),
        ("align.tokens=500k", lambda r: r.align.tokens, 500_000),
        ("align.tokens='1.5M'", lambda r: r.align.tokens, 1_500_000),
        ("align.tokens=2e6", lambda r: r.align.tokens, 2_000_000),
        ("finetune.tokens=0", lambda r: r.finetune.tokens, 0),
        ("keep_softmax=[3, 0]", lambda r: r.keep_softmax, (0, 3)),
        ("keep_softmax=[0,3]", lambda r: r.keep_softmax, (0, 3)),
        ('keep_softmax="every 4"', lambda r: r.keep_softmax, "every 4"),
        ("keep_softmax=every 2", lambda r: r.keep_softmax, "every 2"),
        ("keep_softmax=none", lambda r: r.keep_softmax, "none"),
        ("keep_softmax=auto", lambda r: r.keep_softmax, "auto"),
        ("keep_softmax=' auto   3 '", lambda r: r.keep_softmax, "auto 3"),
        ("keep_softmax=[]", lambda r: r.keep_softmax, "none"),
        ("device=cuda:1", lambda r: r.device, "cuda:1"),
        ("dtype=bfloat16", lambda r: r.dtype, "bfloat16"),
        ("align.lr=1e-3", lambda r: r.align.lr, 1e-3),
        ("finetune.lora.r=16", lambda r: r.finetune.lora.r, 16),
        ("mixer.window=32", lambda r: r.mixer.window, 32),
        ("finetune.full_lr=null", lambda r: r.finetune.full_lr, None),
        ("finetune.mixer_lr=3e-3", lambda r: r.finetune.mixer_lr, 3e-3),
        ("align.mixer_lr=null", lambda r: r.align.mixer_lr, None),
        ("align.optimizer=muon", lambda r: r.align.optimizer, "muon"),
        ("finetune.window_dropout=1", lambda r: r.finetune.window_dropout, 1.0),
        ("calibrate.tokens=32k", lambda r: r.calibrate.tokens, 32_000),
        ("calibrate.tokens=0", lambda r: r.calibrate.tokens, 0),
    ],
)
def test_overrides(override: str, get, expected) -> None:
    got = get(load_recipe("lolcats", [override]))
    assert got == expected and type(got) is type(expected)


def test_overrides_as_a_mapping_dotted_or_nested() -> None:
    dotted = load_recipe("lolcats", {"align.tokens": "2M", "keep_softmax": (1, 2)})
    nested = load_recipe("lolcats", {"align": {"tokens": 2_000_000}, "keep_softmax": [2, 1]})
    assert dotted == nested
    assert nested.align.lr == load_recipe("lolcats").align.lr, "the rest of the section stays"


def test_the_last_override_wins_and_the_recipe_itself_can_be_overridden() -> None:
    recipe = load_recipe("lolcats", ["seed=1", "seed=2"])
    assert recipe.seed == 2
    assert load_recipe(recipe, ["context=64"]) == dataclasses.replace(recipe, context=64)


def test_a_section_that_is_off_comes_back_by_override(tmp_path: Path) -> None:
    off = values() | {"finetune": values()["finetune"] | {"lora": None, "full": ["mixer"]}}
    assert recipe_from_dict(off).finetune.lora is None
    file = tmp_path / "off.yaml"
    file.write_text(yaml.safe_dump(off), encoding="utf-8")
    assert load_recipe(file, ["finetune.lora.r=4"]).finetune.lora == Lora(r=4)


def test_softmax_layers() -> None:
    def kept(keep: object, layers: int) -> tuple[int, ...]:
        return dataclasses.replace(load_recipe("lolcats"), keep_softmax=keep).softmax_layers(layers)

    assert kept("none", 8) == ()
    assert kept("every 1", 3) == (0, 1, 2)
    assert kept("every 4", 8) == (3, 7)
    assert kept("every 4", 5) == (3,)
    assert kept([7, 0], 8) == (0, 7)
    with pytest.raises(UsageError, match="no layer 8"):
        kept([8], 8)
    with pytest.raises(UsageError, match="keeps no layer"):
        kept("every 4", 3)


def test_auto_is_a_number_of_layers_until_the_teacher_is_measured() -> None:
    def with_keep(keep: str) -> Recipe:
        return dataclasses.replace(load_recipe("lolcats"), keep_softmax=keep)

    auto = with_keep("auto")
    assert auto.automatic and not with_keep("every 4").automatic and not with_keep("none").automatic
    assert not with_keep([1, 2]).automatic
    assert {n: auto.automatic_keep(n) for n in (2, 3, 4, 7, 8, 22, 32)} == {2: 1, 3: 1, 4: 1, 7: 2, 8: 2, 22: 6, 32: 8}
    assert with_keep("auto 3").automatic_keep(8) == with_keep("auto 3").automatic_keep(4) == 3
    for keep, layers in (("auto", 1), ("auto 3", 3), ("auto 9", 8)):
        with pytest.raises(UsageError, match=f"keep_softmax: '{keep}' leaves none of {layers} layers to convert"):
            with_keep(keep).softmax_layers(layers)
    # As many stand in for them, evenly: what `every N` keeps, where N divides the layers.
    assert auto.softmax_layers(8) == with_keep("every 4").softmax_layers(8) == (3, 7)
    assert with_keep("auto 4").softmax_layers(8) == with_keep("every 2").softmax_layers(8)
    assert with_keep("auto 3").softmax_layers(8) == (1, 4, 7)
    for keep in ("auto", "auto 3"):
        assert recipe_from_dict(with_keep(keep).as_dict()).keep_softmax == keep


def test_measured_figures_are_read_from_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.recipe._folder", lambda: tmp_path)
    line = "# Measured: R 16.3 %; state 2.3 MB; teacher llama-25m; tokens 10.0M; date 2026-11-22; on H200, torch 2.11"
    found = {
        "R": "16.3 %",
        "state": "2.3 MB",
        "teacher": "llama-25m",
        "tokens": "10.0M",
        "date": "2026-11-22",
        "on": "H200, torch 2.11",
    }
    more = "\n#   Measured: seeds 3;"
    for text, expected in {
        f"# A recipe.\n{line}\n\nname: x\n": found,
        f"# A recipe.\n{line}{more}\nname: x\n": found | {"seeds": "3"},
        "# Measured by nobody.\n# Run: R 5 %\nname: x\n": {},
        f"name: x\n{line}\n": {},  # below the header
        "": {},
    }.items():
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        assert measured("x") == expected, text
    with pytest.raises(UsageError, match="no recipe of that name"):
        measured("y")


def test_digest_depends_on_values_alone() -> None:
    base = load_recipe("lolcats")
    assert load_recipe("lolcats", ["align.tokens=4000000", "align.lr=0.01", "context=1024"]).digest() == base.digest()
    digests = {
        load_recipe("lolcats", [o]).digest() for o in ("seed=1", "align.lr=1e-3", "keep_softmax=[0]", "dtype=float32")
    }
    assert len(digests | {base.digest()}) == 5
    assert len({load_recipe(name).digest() for name in SHIPPED}) == len(SHIPPED)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(
        [
            "context",
            "mixer",
            "mixer.window",
            "align.tokens",
            "align.lr",
            "align.train",
            "finetune.lora",
            "finetune.lora.targets",
            "calibrate",
            "keep_softmax",
            "device",
            "name",
        ]
    ),
)
def test_no_value_gets_past_as_anything_but_a_recipe_or_a_usage_error(value: object, key: str) -> None:
    try:
        recipe = load_recipe("lolcats", {key: value})
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert tuple(recipe.as_dict()["mixer"]) == AXES
        assert recipe_from_dict(recipe.as_dict()).digest() == recipe.digest()
