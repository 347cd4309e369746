"""What a recipe refuses: unknown keys, wrong types and values, and combinations without meaning, each by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from linearize.errors import UsageError
from linearize.recipe import Align, Lora, Recipe, load_recipe


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
    with pytest.raises(UsageError, match="is a folder; a recipe is a YAML file"):
        load_recipe(tmp_path)
    for name in ("", "\0", "x" * 5000):
        with pytest.raises(UsageError):
            load_recipe(name)
    for other in (None, 3, {"name": "lolcats"}):
        with pytest.raises(UsageError, match="neither a name nor a file"):
            load_recipe(other)  # type: ignore[arg-type]
