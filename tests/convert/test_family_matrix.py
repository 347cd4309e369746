"""Every decoder family of the table against representative recipes, on small random teachers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linearize.artifacts.load import load_model
from linearize.convert import pipeline
from linearize.convert.capture import TeacherLayer, captured
from linearize.convert.finetune import training_mode
from linearize.convert.observe import mixer_call
from linearize.convert.pipeline import convert
from linearize.convert.surgery import linearize_model
from linearize.convert.teacher import checked_tensors
from linearize.evaluate.truncation import truncated
from linearize.modeling.cache_linearized import LinearizedCache
from linearize.modeling.configuration_linearized import state_bytes
from linearize.modeling.family_table import FAMILIES, body, logits
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import MODELS, attention_layers, set_branches
from linearize.progress import NullProgress
from tests.conftest import save_byte_tokenizer
from tests.modeling.families import DECODERS, TEACHERS
from tests.modeling.families import teacher as make_teacher
from tests.specs import recipe_specs

SPECS = recipe_specs()
SPECS["pure"] = replace(SPECS["pure"], feature_dim=8)
RECIPES = ("lolcats", "pure", "gated-deltanet", "liger-gla", "hedgehog")
LENGTH = 140
TOLERANCE = 1e-5


@functools.cache
def teacher(family: str) -> Any:
    """One for all tests: nobody changes it."""
    return make_teacher(family)


def convert_all(native: Any, spec: MixerSpec, kinds: list[str] | None = None) -> Any:
    """A student, its mixers away from where they start."""
    plan = kinds or ["linear"] * native.config.num_hidden_layers
    student, _ = linearize_model(native, spec=spec, layer_mixers=plan, seed=0)
    torch.manual_seed(5)
    for name, p in student.named_parameters():
        if ".mixer." in name:
            p.data += 0.1 * torch.randn_like(p)
    return student.eval()


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_every_decoder_of_the_table_is_tried() -> None:
    assert set(DECODERS) == {kind for kind, family in FAMILIES.items() if not family.bidirectional}


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_nothing_converted_is_the_teacher_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Invariants 9 and 10: through both checkpoints, padded, and in generation."""
    native = teacher(family)
    student, _ = linearize_model(native, spec=SPECS["lolcats"], layer_mixers=["softmax"] * 3, seed=0)
    x, mask = ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[1, :40] = 0
    want = native(x).logits
    assert torch.equal(logits(native, body(native)(input_ids=x, use_cache=False).last_hidden_state), want)
    for name, model in (("teacher", native), ("student", student)):
        model.save_pretrained(tmp_path / name)
    checked_tensors(tmp_path / "teacher", native.config)
    original, loaded = (load_model(tmp_path / name, device="cpu") for name in ("teacher", "student"))
    assert type(loaded) is MODELS[family]
    for model in (original, student, loaded):
        assert torch.equal(model(x).logits, want)
    assert torch.equal(loaded(x, attention_mask=mask).logits, native(x, attention_mask=mask).logits)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    assert torch.equal(loaded.generate(x, **options), native.generate(x, **options))


def check_invariants(student: Any) -> None:
    """Invariants 1, 2, 4, 5, 7 and the quadratic definition, in float32."""
    x = ids(2, LENGTH)
    want = student(x, use_cache=False).logits
    cache = LinearizedCache(student.config)
    parts, sizes = [], set()
    for a, b in [(0, 70), (70, 125), *((t, t + 1) for t in range(125, 131)), (131, LENGTH)]:
        parts.append(student(x[:, a:b], past_key_values=cache).logits)
        sizes.add(cache.state_bytes)
    assert relative(torch.cat(parts, 1), want) < TOLERANCE
    assert sizes == {2 * state_bytes(student.config, dtype_bytes=4)}
    assert {t.dtype for layer in cache.linear for n, t in layer.tensors.items() if n in ("state", "z")} == {
        torch.float32
    }

    changed = torch.cat((x[:1, :97], ids(1, 30, 1)), dim=1)
    assert relative(student(changed, use_cache=False).logits[:, :97], want[:1, :97]) < TOLERANCE

    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :37] = 0
    got = student(x, attention_mask=mask, use_cache=False).logits
    alone = student(x[1:, 37:], use_cache=False).logits
    assert relative(got[0], want[0]) < TOLERANCE
    assert relative(got[1, 37:], alone[0]) < TOLERANCE

    positions = torch.cat((torch.arange(37), torch.arange(LENGTH - 37)))[None]
    got = student(x[1:], position_ids=positions, use_cache=False).logits
    assert relative(got[:, :37], want[1:, :37]) < TOLERANCE
    assert relative(got[:, 37:], alone) < TOLERANCE

    for _, attention in attention_layers(student):
        attention.mixer.execution = "quadratic"
    assert relative(student(x[:1], use_cache=False).logits, want[:1]) < TOLERANCE


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_all_converted(family: str, recipe: str) -> None:
    check_invariants(convert_all(teacher(family), SPECS[recipe]))


@pytest.mark.parametrize("recipe", [name for name in SPECS if name not in RECIPES])
@torch.no_grad()
def test_all_other_recipes_with_a_bound_on_scores(recipe: str) -> None:
    check_invariants(convert_all(teacher("gemma2"), SPECS[recipe]))


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_softmax_layers_between_linear_ones(family: str) -> None:
    """Prefill is steps, and padding is nothing, where layers of both kinds read the same positions."""
    student = convert_all(teacher(family), SPECS["gated-deltanet"], ["linear", "softmax", "linear"])
    x, mask = ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    want = student(x, use_cache=False).logits
    cache = LinearizedCache(student.config)
    parts = [student(x[:, a:b], past_key_values=cache).logits for a, b in ((0, 120), (120, 139), (139, 140))]
    assert relative(torch.cat(parts, 1), want) < TOLERANCE
    mask[1, :37] = 0
    got, alone = student(x, attention_mask=mask).logits, student(x[1:, 37:]).logits
    assert relative(got[0], want[0]) < TOLERANCE and relative(got[1, 37:], alone[0]) < TOLERANCE


@pytest.mark.parametrize("family", ["stablelm", "gemma3_text", "gpt2", "qwen3_moe"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    """Invariant 12, with padding: recomputation is told where it lies, also where a layer would not hand that on."""
    student = convert_all(make_teacher(family), SPECS["lolcats"], ["linear", "softmax", "linear"])
    student.requires_grad_(True)
    x, mask = ids(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[1, :37] = 0

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        student.zero_grad()
        with training_mode(student, checkpointing=checkpointing):
            loss = student(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss
            student(ids(1, 30, 3))  # another forward in between, without padding
            loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]

    plain, checked = gradients(False), gradients(True)
    assert len(plain) == len(checked) > 20
    assert all(torch.equal(one, other) for one, other in zip(plain, checked, strict=True))


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_window_that_sees_everything_is_the_teachers_attention(family: str) -> None:
    """Invariant 6: scaling, norms, biases, rotations, groups of heads and bounds on scores are the teacher's."""
    native = teacher(family)
    student = convert_all(native, MixerSpec(window=64))
    set_branches(student, "window")
    for length in (100, 128):
        x = ids(2, length)
        assert relative(student(x, use_cache=False).logits, native(x).logits) < TOLERANCE


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_rope_is_undone_where_the_linear_branch_wants_none(family: str) -> None:
    """Un-rotated queries and keys are those of position zero, in every layer, whatever part of a head is rotated."""
    native = teacher(family)
    student = convert_all(native, SPECS["liger-gla"])
    assert not student.config.mixer_rope
    attentions, moved = dict(attention_layers(student)), []

    def look(layer: TeacherLayer) -> None:
        attention = attentions[layer.index]
        here = mixer_call(attention, layer)
        q, k = attention.mixer.linear_qk(here.q, here.k, here.inputs, here.rotation)
        if "position_embeddings" in layer.kwargs:
            cos, sin = layer.kwargs["position_embeddings"]
            unturned = {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
            layer = replace(layer, kwargs=layer.kwargs | unturned)
        plain = mixer_call(attention, layer)
        repeats = attention.mixer.state_heads // attention.mixer.num_kv_heads
        assert relative(q, plain.q) < TOLERANCE
        assert relative(k, plain.k.repeat_interleave(repeats, dim=1)) < TOLERANCE
        moved.append(relative(here.q, plain.q) > 0.1)

    with captured(native, range(3), look):
        body(native)(input_ids=ids(1, 40), use_cache=False)
    assert moved == [FAMILIES[family].rotates(native.config, layer) for layer in range(3)]


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_the_teacher_is_watched_as_it_is(family: str) -> None:
    """What alignment learns from, and the floor of an evaluation, are made of the teacher's own attention."""
    native, seen, x = teacher(family), [], ids(1, LENGTH)
    want = native(x).logits

    def look(layer: TeacherLayer) -> None:
        projected = FAMILIES[family].project_heads(FAMILIES[family].attention_of(native, layer.index), layer.heads)
        assert relative(projected, layer.output) < TOLERANCE
        seen.append(layer.index)
        assert relative(layer.weights.sum(-1), torch.ones(1, 4, LENGTH)) < TOLERANCE

    with captured(native, [0, 2], look, weights=True):
        assert relative(native(x).logits, want) < TOLERANCE
    assert seen == [0, 2]
    with truncated(native, LENGTH):
        assert relative(native(x).logits, want) < TOLERANCE
    assert torch.equal(native(x).logits, want)


@pytest.mark.parametrize("branches", ["full", "window"])
@torch.no_grad()
def test_scores_are_bounded_as_in_the_teacher(branches: str) -> None:
    """Without the bound the small Gemma 2 computes something else: the tests above would see it dropped."""
    native = teacher("gemma2")
    bounded = convert_all(native, MixerSpec(window=64, sinks=3))
    set_branches(bounded, branches)
    x = ids(2, LENGTH)
    want = bounded(x, use_cache=False).logits
    for _, attention in attention_layers(bounded):
        attention.mixer.softcap = None
    assert relative(bounded(x, use_cache=False).logits, want) > 1e-2


# ------------------------------------------------------------------------------------- conversion, and fresh processes


QUICK = [
    "context=64",
    "mixer.window=8",
    "mixer.feature_dim=8",
    "device=cpu",
    "align.batch_tokens=512",
    "align.tokens=6k",
    "finetune.batch_tokens=512",
    "finetune.tokens=6k",
    "finetune.lr=0.01",
]


@dataclass(frozen=True)
class Conversion:
    """An export, and the losses of its training."""

    folder: Path
    report: dict[str, Any]
    losses: dict[str, list[float]]


class Losses(NullProgress):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def step(self, stage: str, step: int, loss: float, tokens: int, extra: Mapping[str, Any]) -> None:
        self.found.setdefault(stage, []).append(extra.get("ce", loss))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Conversion]:
    """A conversion of every decoder, without the fresh processes that each would start."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
        for family in DECODERS:
            folder, watch = root / f"{family}-teacher", Losses()
            sharp = {"init_std" if family == "opt" else "initializer_range": 0.2}
            changes = {"vocab_size": 259, "num_hidden_layers": 2, **sharp, **short_lists(family)}
            make_teacher(family, **changes).save_pretrained(folder)
            save_byte_tokenizer(folder)
            report = convert(
                folder, root / family, recipe="lolcats", data=str(text_file), overrides=QUICK, progress=watch
            )
            found[family] = Conversion(root / family, report, watch.found)
    return found


def short_lists(family: str) -> dict[str, Any]:
    """What a config says layer by layer, for two layers."""
    lists = {key: value[:2] for key, value in TEACHERS[family].items() if isinstance(value, list) and len(value) == 3}
    return lists | ({"max_window_layers": 1} if family == "qwen2" else {})


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_a_short_conversion_lowers_the_loss(family: str, converted: dict[str, Conversion]) -> None:
    losses, report = converted[family].losses, converted[family].report
    for stage in ("align", "finetune"):
        assert len(losses[stage]) == 12
        assert sum(losses[stage][-3:]) < sum(losses[stage][:3])
    heads = report["layers"][0]
    assert heads["explained"] > 0


CHILD = """
import importlib.abc, json, sys
request = json.loads(open(sys.argv[1]).read())
if request["remote"]:
    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("linearize", "linearize_kernels"):
                raise ImportError(name)
    sys.meta_path.insert(0, Refuse())
else:
    sys.path[:0] = request["roots"]
    import linearize
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
out = {}
for family, folder in request["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=request["remote"], local_files_only=True)
    ids = torch.tensor(request["ids"])
    with torch.no_grad():
        out[family] = model.eval()(input_ids=ids, use_cache=False).logits.float().contiguous()
        out[family + " greedy"] = model.generate(ids[:1, :20], do_sample=False, max_new_tokens=5, eos_token_id=None)
    if request["remote"] and family == "gemma3_text":  # a loaded export saves its code with it
        model.save_pretrained("again")
        model = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True, local_files_only=True)
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, out[family])
save_file(out, request["out"])
"""


@pytest.mark.slow
@torch.no_grad()
def test_fresh_processes_load_every_family(converted: dict[str, Conversion], root: Path, tmp_path: Path) -> None:
    """Invariant 15: both ways, from exports alone; all families in one process each."""
    x = ids(2, 40, 7)
    request = {
        "roots": [str(root), str(root / "kernels")],
        "folders": {family: str(done.folder) for family, done in converted.items()},
        "ids": x.tolist(),
    }
    (tmp_path / "child.py").write_text(CHILD)
    environment = os.environ | {"LINEARIZE_KERNELS": "torch", "HF_HUB_OFFLINE": "1"}
    children = {}
    for mode in ("import", "remote"):
        given = request | {"remote": mode == "remote", "out": str(tmp_path / f"{mode}.safetensors")}
        (tmp_path / f"{mode}.json").write_text(json.dumps(given))
        children[mode] = subprocess.Popen(
            [sys.executable, "-I", str(tmp_path / "child.py"), str(tmp_path / f"{mode}.json")],
            cwd=tmp_path, env=environment | {"HF_MODULES_CACHE": str(tmp_path / mode)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    want = {}
    for family, done in converted.items():
        model = load_model(done.folder, device="cpu", finite=False)
        want[family] = model(x, use_cache=False).logits
        want[f"{family} greedy"] = model.generate(x[:1, :20], do_sample=False, max_new_tokens=5, eos_token_id=None)
    for mode, child in children.items():
        said, _ = child.communicate()
        assert child.returncode == 0, said[-2000:]
        got = load_file(tmp_path / f"{mode}.safetensors")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5, msg=f"{mode}: {name}")
