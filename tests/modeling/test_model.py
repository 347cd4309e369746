"""Converted models of every family: logits, padding, generation, saving, training."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import linearize.modeling
from linearize.modeling.cache_linearized import LinearizedCache
from linearize.modeling.configuration_linearized import kv_bytes, linearized_config, require_transformers, state_bytes
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import MODELS, attention_layers, set_branches
from tests.modeling.families import FAMILIES, teacher
from tests.specs import recipe_specs

SPECS = recipe_specs()
PLANS = (["linear"] * 3, ["linear", "softmax", "linear"])
linearize.modeling.register()


def convert(native: Any, spec: MixerSpec, layer_mixers: list[str] | None = None) -> Any:
    """A student with the teacher's weights and fresh, shaken mixers."""
    plan = layer_mixers or ["linear"] * native.config.num_hidden_layers
    student = MODELS[native.config.model_type](linearized_config(native.config, layer_mixers=plan, spec=spec)).eval()
    missing, unexpected = student.load_state_dict(native.state_dict(), strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    torch.manual_seed(5)
    for name, p in student.named_parameters():
        if ".mixer." in name:
            p.data += 0.1 * torch.randn_like(p)
    return student


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_softmax_is_the_teacher_bit_for_bit(family: str) -> None:
    """Invariant 10, with and without padding and a cache."""
    native = teacher(family)
    student = convert(native, SPECS["lolcats"], ["softmax"] * 3)
    x, mask = ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[1, :40] = 0
    assert torch.equal(student(x).logits, native(x).logits)
    assert torch.equal(student(x, attention_mask=mask).logits, native(x, attention_mask=mask).logits)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(student.generate(x, **options), native.generate(x, **options))


@pytest.mark.parametrize("recipe", ["lolcats", "liger-gla", "gated-deltanet"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_steps_and_padding(family: str, recipe: str) -> None:
    student = convert(teacher(family), SPECS[recipe])
    x, mask = ids(2, 150), torch.ones(2, 150, dtype=torch.long)
    want = student(x, use_cache=False).logits
    cache = LinearizedCache(student.config)
    out = [student(x[:, :70], past_key_values=cache).logits, student(x[:, 70:131], past_key_values=cache).logits]
    out += [student(x[:, t : t + 1], past_key_values=cache).logits for t in range(131, 150)]
    assert relative(torch.cat(out, 1), want) < 1e-5
    mask[1, :37] = 0
    got = student(x, attention_mask=mask).logits
    assert relative(got[0], want[0]) < 1e-5
    assert relative(got[1, 37:], student(x[1:, 37:]).logits[0]) < 1e-5


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents(family: str, plan: list[str]) -> None:
    """In linear and softmax layers, told by positions alone, with the cache that models have unless told otherwise."""
    student = convert(teacher(family), SPECS["lolcats"], plan)
    x, positions = ids(1, 150), torch.cat((torch.arange(67), torch.arange(83)))[None]
    for options in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(x)}):
        got = student(x, position_ids=positions, **options)
        assert relative(got.logits[:, :67], student(x[:, :67]).logits) < 1e-5
        assert relative(got.logits[:, 67:], student(x[:, 67:]).logits) < 1e-5
        assert got.past_key_values is None


@torch.no_grad()
def test_packed_documents_have_no_cache() -> None:
    student, x = convert(teacher("llama"), SPECS["lolcats"]), ids(1, 150)
    positions = torch.cat((torch.arange(67), torch.arange(83)))[None]
    for options in ({"use_cache": True}, {"past_key_values": LinearizedCache(student.config)}):
        with pytest.raises(ValueError, match="use_cache=False and no past_key_values"):
            student(x, position_ids=positions, **options)
    cache = student(x).past_key_values
    with pytest.raises(ValueError, match="batch_repeat_interleave"):
        student(x[:, :1].repeat(3, 1), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert student(x[:, :1].repeat(3, 1), past_key_values=cache).logits.shape[0] == 3


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_masks_wider_than_the_text(plan: list[str]) -> None:
    """What lies beyond the text counts nowhere, as in transformers, which reads masks from their beginning."""
    student, x = convert(teacher("llama"), SPECS["lolcats"], plan), ids(2, 150)
    mask = torch.zeros(2, 300, dtype=torch.long)
    mask[0, :150], mask[1, 37:150] = 1, 1
    want = student(x, attention_mask=mask[:, :150], use_cache=False).logits
    cache, parts = LinearizedCache(student.config), []
    for first, last in ((0, 60), (60, 149), (149, 150)):
        parts.append(student(x[:, first:last], attention_mask=mask, past_key_values=cache).logits)
    got = torch.cat(parts, 1)
    assert relative(got[0], want[0]) < 1e-5 and relative(got[1, 37:], want[1, 37:]) < 1e-5
    with pytest.raises(ValueError, match=r"needs \[2, 151 or more\] .* the tokens in the cache first; got \[2, 90\]"):
        student(x[:, :1], attention_mask=mask[:, :90], past_key_values=cache)
    with pytest.raises(ValueError, match=r"needs \[1, 150 or more\] with 0 at padding; got \[2, 150\]"):
        student(x[:1], attention_mask=mask[:, :150])
    alone = student(x, attention_mask=mask[1:, :150], use_cache=False).logits  # one row for all
    assert relative(alone[1, 37:], want[1, 37:]) < 1e-5
    assert relative(alone[0, 37:], student(x[:1, 37:]).logits[0]) < 1e-5


@torch.no_grad()
def test_a_mask_of_the_new_tokens_alone() -> None:
    """Enough for linear layers, which keep no tokens; softmax layers need to know which of theirs were padding."""
    x, mask = ids(2, 150), torch.ones(2, 50, dtype=torch.long)
    mask[1, 40:] = 0
    for plan in PLANS:
        student = convert(teacher("llama"), SPECS["lolcats"], plan)
        want = student(x, attention_mask=torch.cat((torch.ones(2, 100, dtype=torch.long), mask), 1)).logits
        cache = student(x[:, :100]).past_key_values
        if "softmax" in plan:
            with pytest.raises(ValueError, match=r"\[2, 150 or more\]"):
                student(x[:, 100:], attention_mask=mask, past_key_values=cache)
        else:
            got = student(x[:, 100:], attention_mask=mask, past_key_values=cache).logits
            assert relative(got[0], want[0, 100:]) < 1e-5 and relative(got[1, :40], want[1, 100:140]) < 1e-5


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("recipe", SPECS)
@torch.no_grad()
def test_generate(recipe: str, plan: list[str]) -> None:
    """Greedy with a cache is greedy without; beams, samples, padding, chunked prefill and continuation agree."""
    student = convert(teacher("llama"), SPECS[recipe], plan)
    x = ids(2, 90)
    greedy: dict[str, Any] = {"max_new_tokens": 45, "do_sample": False, "eos_token_id": None}
    want = student.generate(x, **greedy)
    assert torch.equal(student.generate(x, use_cache=False, **greedy), want)
    assert torch.equal(student.generate(x, prefill_chunk_size=32, **greedy), want)

    padded = torch.cat((torch.zeros(2, 20, dtype=torch.long), x), 1)
    mask = (padded != 0).long()
    padded[0], mask[0] = torch.cat((ids(1, 20, 9)[0], x[0])), 1
    got = student.generate(padded, attention_mask=mask, **greedy)
    assert torch.equal(got[1, 20:], want[1])
    assert torch.equal(got[0], student.generate(padded[:1], **greedy)[0])

    first = student.generate(x, return_dict_in_generate=True, **{**greedy, "max_new_tokens": 20})
    rest = student.generate(first.sequences, past_key_values=first.past_key_values, **{**greedy, "max_new_tokens": 25})
    assert torch.equal(rest, want)

    beams: dict[str, Any] = {"max_new_tokens": 20, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": None}
    assert torch.equal(student.generate(x, **beams), student.generate(x, use_cache=False, **beams))
    sample: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True, "top_k": 20, "num_return_sequences": 2}
    torch.manual_seed(3)
    one = student.generate(x, **sample)
    torch.manual_seed(3)
    assert torch.equal(student.generate(x, **sample), one)


@torch.no_grad()
def test_generate_takes_any_cache_implementation_and_refuses_assistants() -> None:
    student = convert(teacher("llama"), SPECS["lolcats"])
    x = ids(1, 30)
    want = student.generate(x, max_new_tokens=5, do_sample=False)
    for implementation in ("static", "offloaded", "dynamic"):
        got = student.generate(x, max_new_tokens=5, do_sample=False, cache_implementation=implementation)
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"assisted generation|[Aa]ssisted"):
        student.generate(x, max_new_tokens=5, assistant_model=teacher("llama"))


@torch.no_grad()
def test_cache_bytes_are_constant_and_as_told() -> None:
    student = convert(teacher("llama"), SPECS["lolcats"])
    cache = LinearizedCache(student.config)
    sizes = []
    for length in (1, 99, 100, 100):
        student(ids(1, length), past_key_values=cache)
        sizes.append(cache.state_bytes)
    assert set(sizes) == {state_bytes(student.config, dtype_bytes=4)}
    assert cache.get_seq_length() == 300
    assert kv_bytes(student.config, 300, dtype_bytes=4) == 2 * 3 * 2 * 16 * 300 * 4


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_told_state_bytes_are_the_real_ones(name: str) -> None:
    student = convert(teacher("qwen3"), SPECS[name])
    cache = LinearizedCache(student.config)
    student(ids(1, 5), past_key_values=cache)
    assert cache.state_bytes == state_bytes(student.config, dtype_bytes=4)


def test_an_older_transformers_is_refused_by_name() -> None:
    """From 5.14 on a GPT-NeoX's head goes by the name in our files; before, it would come back random."""
    for fine in ("5.14.0", "5.23.0", "5.14.0.dev0", "6.0"):
        require_transformers(fine)
    for old in ("5.13.1", "4.57.6"):
        with pytest.raises(ImportError, match=rf"need transformers 5\.14 or newer, and this is {old}"):
            require_transformers(old)


@pytest.mark.parametrize("plan", PLANS, ids=["linear", "hybrid"])
@pytest.mark.parametrize("kind", ["dynamic", "bare", "static"])
@torch.no_grad()
def test_the_callers_own_cache_is_filled(kind: str, plan: list[str]) -> None:
    """Whoever made it goes on with it, and with none that the model made instead."""
    student, x = convert(teacher("llama"), SPECS["lolcats"], plan), ids(2, 150)
    make = {
        "dynamic": lambda: DynamicCache(config=student.config),
        "bare": DynamicCache,
        "static": lambda: StaticCache(config=student.config, max_cache_len=200),
    }[kind]
    cache, whole = make(), student(x, use_cache=False).logits
    for first, last in ((0, 99), (99, 100), (100, 150)):
        out = student(x[:, first:last], past_key_values=cache)
        assert out.past_key_values is cache and cache.get_seq_length() == last
        assert relative(out.logits, whole[:, first:last]) < 1e-5
    cache, options = make(), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for length in (30, 10):
        x = student.generate(x, past_key_values=cache, max_new_tokens=length, **options)
        assert cache.get_seq_length() == x.shape[1] - 1
    assert torch.equal(x, student.generate(x[:, :150], use_cache=False, max_new_tokens=40, **options))


@pytest.mark.parametrize("recipe", SPECS)
@torch.no_grad()
def test_a_cache_outlives_inference_mode(recipe: str) -> None:
    """Its tensors are written to in place: those that were made in inference mode may not be, outside it."""
    student, x = convert(teacher("llama"), SPECS[recipe], PLANS[1]), ids(2, 150)
    want = student(x, use_cache=False).logits[:, 100:]
    with torch.inference_mode():
        kept, moved = (student(x[:, :100], use_cache=True).past_key_values for _ in range(2))
        moved.batch_repeat_interleave(2)
        moved.reorder_cache(torch.tensor([0, 2, 1, 3]))
    parts = [student(x[:, t : t + 1], past_key_values=kept).logits for t in (100, 101)]
    parts.append(student(x[:, 102:], past_key_values=kept).logits)
    assert relative(torch.cat(parts, 1), want) < 1e-5
    got = student(x[[0, 1, 0, 1], 100:], past_key_values=moved).logits
    assert relative(got, want[[0, 1, 0, 1]]) < 1e-5


@pytest.mark.parametrize("recipe", SPECS)
@torch.no_grad()
def test_a_whole_model_is_pickled(recipe: str) -> None:
    """By classes that are found by name, whatever was made of the native ones."""
    for family in ("llama", "stablelm"):
        student, x = convert(teacher(family), SPECS[recipe], PLANS[1]), ids(1, 70)
        again = pickle.loads(pickle.dumps(student))
        assert type(again) is type(student) and torch.equal(again(x).logits, student(x).logits)


@torch.no_grad()
def test_threads_share_a_model() -> None:
    """One that waits between a layer's norm and its attention, where the other one's padding could come in."""
    student = convert(teacher("stablelm"), SPECS["lolcats"])
    x, masks = ids(2, 100), [torch.ones(2, 100, dtype=torch.long) for _ in range(2)]
    masks[0][0, :30] = 0
    masks[1][1, :77] = 0
    want = [student(x, attention_mask=mask, use_cache=False).logits for mask in masks]
    meet = threading.Barrier(2, timeout=60)

    def wait(*_: Any) -> None:
        meet.wait()

    for layer in student.model.layers:
        layer.input_layernorm.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        runs = [pool.submit(torch.no_grad()(student), x, attention_mask=mask, use_cache=False) for mask in masks]
        for run, wanted in zip(runs, want, strict=True):
            assert torch.equal(run.result().logits, wanted)


@torch.no_grad()
def test_ways_of_generation_that_need_keys_are_refused_at_once() -> None:
    native = teacher("llama")
    student, x = convert(native, SPECS["lolcats"]), ids(1, 20)
    with pytest.raises(ValueError, match="assistant_model: a converted model cannot draft"):
        native.generate(x, assistant_model=student, max_new_tokens=5, do_sample=False)
    with pytest.raises(NotImplementedError, match="call generate on a left-padded batch"):
        student.generate_batch([x[0].tolist()])


def test_a_plan_of_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    """Also where from_pretrained sets the number after the config was made."""
    student = convert(teacher("llama"), SPECS["lolcats"])
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer_mixers: needs 2 entries"):
        type(student).from_pretrained(tmp_path, num_hidden_layers=2)
    fewer = type(student).from_pretrained(tmp_path, num_hidden_layers=2, layer_mixers=["linear", "softmax"])
    assert fewer(ids(1, 9)).logits.isfinite().all()


@torch.no_grad()
def test_foreign_caches_and_masks_are_refused_clearly() -> None:
    native = teacher("llama")
    student = convert(native, SPECS["lolcats"])
    used = native(ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="got a DynamicCache that has read 5 tokens"):
        student(ids(1, 5), past_key_values=used)
    with pytest.raises(ValueError, match="got a EncoderDecoderCache"):
        student(ids(1, 5), past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(ValueError, match="attention_mask"):
        student(ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="not croppable"):
        student(ids(1, 5), use_cache=True).past_key_values.crop(-1)
    with pytest.raises(ValueError, match="exactly one"):
        student()
    with pytest.raises(ValueError, match="branches"):
        set_branches(student, "both")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_save_and_load(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    student = convert(teacher(family), SPECS["mamba2"], ["linear", "softmax", "linear"])
    x = ids(2, 70)
    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.mixer_spec() == SPECS["mamba2"]
    assert config.layer_mixers == ["linear", "softmax", "linear"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(loaded(x).logits, student(x).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(x).logits.isfinite().all()


def test_saving_an_export_again_keeps_its_code(tmp_path: Path) -> None:
    """Trained further and saved, it still loads where linearize is not: its config names code, which must be there."""
    from transformers import AutoModelForCausalLM

    from linearize.convert.export import write_model

    native, first, again = teacher("llama"), tmp_path / "first", tmp_path / "again"
    native.save_pretrained(tmp_path / "teacher")
    student = convert(native, SPECS["lolcats"])
    student.save_pretrained(tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("*.py"))  # its config names none
    write_model(first, student, teacher_folder=tmp_path / "teacher")
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["auto_map"]
    code = {path.name: path.read_bytes() for path in first.glob("*.py")}
    assert code and {path.name: path.read_bytes() for path in again.glob("*.py")} == code
    script = (
        "import pickle, sys, torch; sys.modules['linearize'] = sys.modules['linearize_kernels'] = None\n"
        "from transformers import AutoModelForCausalLM as auto\n"
        "model = auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model.save_pretrained(sys.argv[2]); model = auto.from_pretrained(sys.argv[2], trust_remote_code=True)\n"
        "model = pickle.loads(pickle.dumps(model))\n"
        "print(model(torch.arange(9)[None]).logits.double().sum().item().hex())"
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    places = [str(again), str(tmp_path / "third")]
    done = subprocess.run([sys.executable, "-c", script, *places], env=env, capture_output=True, text=True, check=False)
    with torch.no_grad():
        want = student(torch.arange(9)[None]).logits.double().sum().item()
    assert done.stdout.strip() == want.hex(), done.stderr


def require_start_values(mixer: Any, names: Iterable[str]) -> None:
    """Equal to the start values, or where those are drawn, of their size."""
    found, once, again = mixer.state_dict(), mixer.initial_values(), mixer.initial_values()
    for name in names:
        if torch.equal(once[name], again[name]):
            assert torch.equal(found[name], once[name]), name
        else:
            assert 0.5 < found[name].std() / once[name].std() < 2, name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("recipe", SPECS)
def test_missing_mixers_start_at_their_own_values(recipe: str, tmp_path: Path) -> None:
    """A teacher's checkpoint loaded as a student: no random and no uninitialised mixer, whatever else is wrong."""
    native = teacher("llama")
    config = linearized_config(native.config, layer_mixers=["linear"] * 3, spec=SPECS[recipe])
    native.save_pretrained(tmp_path)
    student = MODELS["llama"].from_pretrained(tmp_path, config=config)
    for _, attention in attention_layers(student):
        require_start_values(attention.mixer, attention.mixer.state_dict())
        assert torch.equal(attention.q_proj.weight, native.model.layers[attention.layer_idx].self_attn.q_proj.weight)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("recipe", SPECS)
def test_a_missing_tensor_starts_at_its_own_value(recipe: str, tmp_path: Path) -> None:
    """And what is there stays, the rest of its module too."""
    student = convert(teacher("llama"), SPECS[recipe])
    student.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    path = "model.layers.1.self_attn.mixer."
    for name in student.get_submodule(path[:-1]).state_dict():
        rest = {key: x for key, x in whole.items() if key != path + name}
        assert len(rest) == len(whole) - 1
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = type(student).from_pretrained(tmp_path)
        require_start_values(loaded.get_submodule(path[:-1]), [name])
        assert all(torch.equal(loaded.state_dict()[key], x) for key, x in rest.items())


@pytest.mark.parametrize("recipe", SPECS)
@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere(recipe: str, tmp_path: Path) -> None:
    """Mixers read weights of their parts without calling them, for which accelerate would bring them."""
    from accelerate import cpu_offload

    student, x = convert(teacher("llama"), SPECS[recipe], ["linear", "softmax", "linear"]), ids(2, 90)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    logits, text = student(x).logits, student.generate(x, **options)
    student.save_pretrained(tmp_path / "saved")
    places = {"model.layers.1": "cpu", "model.layers.2": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head"), "cpu"
    )
    on_disk = type(student).from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "disk")
    cpu_offload(student, execution_device=torch.device("cpu"))
    for moved, layers in ((student, (0, 2)), (on_disk, (2,))):
        assert torch.equal(moved(x).logits, logits)
        assert torch.equal(moved.generate(x, **options), text)
        for layer in layers:  # and they are gone again
            assert all(p.is_meta for p in moved.model.layers[layer].self_attn.mixer.parameters())


@pytest.mark.parametrize("recipe", SPECS)
def test_gradient_checkpointing_changes_nothing(recipe: str) -> None:
    """Invariant 12, and loss with labels."""
    student = convert(teacher("llama"), SPECS[recipe], ["linear", "softmax", "linear"]).train()
    x = ids(2, 100)

    def gradients() -> list[torch.Tensor]:
        student.zero_grad()
        loss = student(x, labels=x).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]

    plain = gradients()
    student.gradient_checkpointing_enable()
    checked = gradients()
    assert len(plain) == len(checked) > 20
    for one, other in zip(plain, checked):
        assert torch.equal(one, other)


def test_loss_is_the_mean_over_tokens() -> None:
    student = convert(teacher("llama"), SPECS["lolcats"])
    x = ids(2, 40)
    labels = x.clone()
    labels[0, :25] = -100
    with torch.no_grad():
        out = student(x, labels=labels)
    log_p = out.logits[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None]).squeeze(2)
    by_hand = -log_p[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(out.loss, by_hand)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward(tmp_path: Path) -> None:
    student = convert(teacher("llama"), SPECS["lolcats"])
    x = ids(2, 100)
    want = student(x, use_cache=False).logits
    compiled = torch.compile(student, backend="aot_eager")
    assert relative(compiled(x, use_cache=False).logits, want) < 1e-5


def test_exported_files_close_over_their_imports(tmp_path: Path) -> None:
    """The flat files run from a folder of their own, without linearize."""
    for path in linearize.modeling.export_files():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    package = tmp_path / "bundle"
    package.mkdir()
    for path in list(tmp_path.glob("*.py")):
        path.rename(package / path.name)
    (package / "__init__.py").touch()
    code = (
        "import sys; sys.modules['linearize'] = sys.modules['linearize_kernels'] = None; "
        "import bundle.modeling_linearized as m; print(sorted(m.MODELS))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(sorted(MODELS)), done.stderr
