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
        "pure": {"feature_map": "hedgehog_exp", "normaliser": "own", "mix": "mass", "coverage": "all", "sinks": 4},
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


@pytest.mark.parametrize(
    ("override", "says"),
    [
        # unknown at every depth, with the nearest right key
        ("contxt=5", ["contxt", "top level", "'context'"]),
        ("align.token=5", ["align.token", "'align'", "'tokens'"]),
        ("mixer.windw=5", ["mixer.windw", "'mixer'", "'window'"]),
        ("finetune.lora.rnk=5", ["finetune.lora.rnk", "'finetune.lora'"]),
        ("tokens=5", ["tokens", "'align.tokens'", "'finetune.tokens'"]),
        ("window=5", ["'mixer.window'"]),
        ("align.tokens.x=5", ["align.tokens", "not a section"]),
        ("x.y.z=5", ["x", "unknown key"]),
        # types
        ("context=true", ["context", "True"]),
        ("seed=1.0", ["seed", "1.0"]),
        ("seed=hello", ["seed", "'hello'"]),
        ("gradient_checkpointing=1", ["gradient_checkpointing", "true or false"]),
        ("align.lr=fast", ["align.lr", "number", "'fast'"]),
        ("align.lr=true", ["align.lr", "True"]),
        ("align.train=mixer", ["align.train", "list"]),
        ("align.train=[mixer, mixer]", ["align.train", "twice"]),
        ("align.train=[mixr]", ["align.train", "'mixer'"]),
        ("align=5", ["align", "section"]),
        ("mixer=null", ["mixer", "section"]),
        ("finetune.lora=5", ["finetune.lora", "section"]),
        ("mixer.window='64'", ["mixer.window", "'64'"]),
        ("mixer.rope=yes please", ["mixer.rope", "true or false"]),
        ("mixer.feature_map=hedgehog", ["mixer.feature_map", "hedgehog_exp"]),
        ("name=../evil", ["name"]),
        ("name=3", ["name"]),
        ("summary=[1]", ["summary", "text"]),
        # ranges
        ("align.tokens=-1", ["align.tokens"]),
        ("align.tokens=1.5", ["align.tokens", "whole"]),
        ("align.tokens=1e13", ["align.tokens", "above"]),
        ("align.tokens=1e99", ["align.tokens", "above"]),
        ("align.tokens=" + "9" * 4000, ["align.tokens", "enormous"]),
        ("align.tokens=.inf", ["align.tokens"]),
        ("align.lr=.nan", ["align.lr", "finite"]),
        ("align.lr=.inf", ["align.lr", "finite"]),
        ("align.lr=0", ["align.lr", "above 0"]),
        ("align.lr=-1e-3", ["align.lr"]),
        ("align.warmup=1.5", ["align.warmup"]),
        ("context=1", ["context"]),
        ("context=1B", ["context", "above"]),
        ("mixer.window=-64", ["mixer.window"]),
        ("mixer.window_weight=.nan", ["mixer.window_weight"]),
        ("mixer.decay_power=1e300", ["mixer.decay_power"]),
        ("device=gpu", ["device", "cuda"]),
        ("dtype=int8", ["dtype", "bfloat16"]),
        ("keep_softmax=every 0", ["keep_softmax"]),
        ("keep_softmax=every four", ["keep_softmax"]),
        ("keep_softmax=4", ["keep_softmax", "every N", "auto N"]),
        ("keep_softmax=auto 0", ["keep_softmax"]),
        ("keep_softmax=auto 1 2", ["keep_softmax"]),
        ("keep_softmax=auto -1", ["keep_softmax"]),
        ("keep_softmax=autos", ["keep_softmax"]),
        ("calibrate.tokens=-1", ["calibrate.tokens"]),
        ("calibrate.token=5", ["calibrate.token", "'tokens'"]),
        ("calibrate=null", ["calibrate", "section"]),
        ("align.optimizer=sgd", ["align.optimizer", "muon"]),
        ("finetune.optimizer=null", ["finetune.optimizer", "adamw"]),
        ("align.mixer_lr=0", ["align.mixer_lr", "above 0"]),
        ("finetune.window_dropout=1.1", ["finetune.window_dropout"]),
        ("keep_softmax=true", ["keep_softmax"]),
        ("keep_softmax=[1, 1]", ["keep_softmax", "twice"]),
        ("keep_softmax=[-1]", ["keep_softmax"]),
        ("keep_softmax=[true]", ["keep_softmax"]),
        # contradictions
        ("align.train=[]", ["align.train", "nothing to train"]),
        ("align.train=[o_proj]", ["o_proj", "gradient", "hidden"]),
        ("finetune.lora=null", ["finetune", "nothing to train"]),
        ("finetune.ce=0", ["ce and kl"]),
        ("finetune.full=[q_proj]", ["q_proj", "lora.targets"]),
        ("finetune.lora.targets=[]", ["finetune.lora.targets"]),
        ("mixer.normaliser=own", ["mixer.normaliser", "shared"]),
        ("mixer.window=0", ["window"]),
        # not key=value at all
        ("context", ["key=value"]),
        ("=5", ["key=value"]),
        ("context=[1", ["context"]),
        ("context=&a 5", ["anchors"]),
        ("context=!!python/object/apply:os.system [ls]", ["context"]),
    ],
)
def test_refusals_are_one_line_that_names_the_key(override: str, says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("lolcats", [override])
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    for word in says:
        assert word in text, text


def test_weights_objective_needs_weights() -> None:
    with pytest.raises(UsageError, match=r"align\.objective"):
        load_recipe("retention", ["align.objective=weights", "align.train=[mixer]"])


def test_window_options_need_a_window() -> None:
    for override in ("align.window_dropout=0.5", "finetune.window_dropout=0.5", "align.branch=linear"):
        with pytest.raises(UsageError, match=r"mixer\.window is 0"):
            load_recipe("hedgehog", [override])


def test_a_mixer_without_a_linear_branch_has_nothing_else_to_set() -> None:
    spec = load_recipe("sliding-window").mixer
    assert (spec.write, spec.window) == ("none", 64)
    for override, says in {
        "align.branch=both": "no linear branch",
        "align.branch=linear": "no linear branch",
        "align.window_dropout=0.5": "without the window this mixer has nothing",
        "finetune.window_dropout=0.5": "without the window this mixer has nothing",
        "mixer.feature_map=linear": r"mixer\.feature_map: write 'none' .* use identity",
        "mixer.decay=scalar": r"mixer\.decay: write 'none' .* use none",
        "mixer.normaliser=norm": r"mixer\.normaliser: write 'none' .* use none",
        "mixer.mix=gate": r"mixer\.mix: write 'none' .* use sum",
        "mixer.coverage=outside": r"mixer\.coverage: write 'none' .* use all",
        "mixer.own_qk=true": r"mixer\.own_qk: write 'none'",
    }.items():
        with pytest.raises(UsageError, match=says):
            load_recipe("sliding-window", [override])
    with pytest.raises(UsageError, match=r"mixer\.write: 'none' needs a window"):
        load_recipe("sliding-window", ["mixer.window=0", "mixer.sinks=0"])


def test_projections_of_its_own_need_keys_that_stay() -> None:
    with pytest.raises(UsageError, match=r"mixer\.own_qk: .* use coverage all"):
        load_recipe("lolcats", ["mixer.own_qk=true"])


def test_direct_construction_is_as_strict() -> None:
    with pytest.raises(UsageError, match=r"align\.tokens"):
        Align(tokens=True)
    with pytest.raises(UsageError, match=r"finetune\.lora\.r"):
        Lora(r=0)
    with pytest.raises(UsageError, match="mixer"):
        Recipe(name="x", mixer="lolcats")  # type: ignore[arg-type]
    assert isinstance(Lora(alpha=16).alpha, float)


def test_missing_and_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'lolcats'"):
        load_recipe("lolcat")
    with pytest.raises(UsageError, match="They are based"):
        load_recipe("zzzz")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe("lolcats.yaml")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe(tmp_path)
    for name in ("", "\0", "x" * 5000):
        with pytest.raises(UsageError):
            load_recipe(name)


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
