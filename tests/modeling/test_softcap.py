"""A bound on the window's scores, by the kernels: the torch path's outputs, gradients, cache and steps.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py sets it), in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.modeling import fused, mixer_decode
from linearize.modeling.cache_linearized import LinearStateLayer
from linearize.modeling.layout import packed_layout, padded_layout
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_decode import step_backend
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import attention_layers
from linearize_kernels.backend import HAS_TRITON, POISON, interpreting
from tests.modeling.families import teacher
from tests.modeling.test_decode import padded
from tests.modeling.test_fused import (
    EVERY,
    FEW,
    LIMIT,
    MORE,
    OTHERS,
    assert_same_cache,
    assert_same_gradients,
    build,
    relative,
    run,
    tokens,
)
from tests.modeling.test_model import SPECS, convert

interpreted = pytest.mark.skipif(not HAS_TRITON or not interpreting(), reason="needs Triton's interpreter")
BOUND = 0.4
"""On scores of about 1: some are within it, and some so far beyond that tanh has no slope left."""
ONE_OP, TWO_OPS, DELTA = "lolcats", "pure", "gated-deltanet"
GATED = "window and gate"
KINDS: dict[str, MixerSpec] = EVERY | {
    GATED: replace(OTHERS["softmax-beside"], mix="gate", coverage="outside"),
}
"""Windows that share a denominator, are weighed by mass, by a gate or by a sum, with sinks and without, and alone."""


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POISON, "1")


def both(name: str, heads: tuple[int, int] = FEW) -> tuple[Mixer, Mixer]:
    """The same mixer twice, by torch and by the kernels."""
    found = build(KINDS[name], "torch", heads), build(KINDS[name], "triton", heads)
    for mixer in found:
        mixer.softcap = BOUND
    return found


@interpreted
@pytest.mark.parametrize(
    "name", [ONE_OP, TWO_OPS, DELTA, "sliding-window", "window-alone", "softmax-lagged", "softmax-beside", GATED]
)
def test_outputs_and_gradients(name: str) -> None:
    assert_same_gradients(*both(name), tokens())


@interpreted
@pytest.mark.parametrize("branches", ["window", "linear"])
def test_one_branch_alone(branches: str) -> None:
    one, other = both(ONE_OP)
    one.branches = other.branches = branches
    assert_same_gradients(one, other, tokens())


@interpreted
@pytest.mark.parametrize("name", [ONE_OP, "softmax-lagged", "window-alone"])
def test_packed_documents(name: str) -> None:
    layout = packed_layout(torch.cat([torch.arange(n) for n in (34, 1, 19)])[None], 1)
    assert_same_gradients(*both(name), tokens(), layout=layout)


@interpreted
@pytest.mark.parametrize("name", [ONE_OP, TWO_OPS, "softmax-lagged"])
@torch.no_grad()
def test_padded_rows_and_their_cache(name: str) -> None:
    one, other = both(name, MORE)
    x, mask = tokens(40, batch=2, heads=MORE), torch.ones(2, 40)
    mask[1, :7] = 0
    caches, layout = [LinearStateLayer(), LinearStateLayer()], padded_layout(mask)
    want, got = (run(m, x, layout=layout, cache=c) for m, c in zip((one, other), caches, strict=True))
    assert relative(got, want) < LIMIT
    assert_same_cache(caches[1], caches[0])


@interpreted
@pytest.mark.parametrize("name", [ONE_OP, TWO_OPS, DELTA, "window-alone", "softmax-lagged", GATED])
@torch.no_grad()
def test_a_prefill_goes_on_and_steps_go_on_from_it(name: str) -> None:
    """All by the kernels, in parts: what torch makes of the whole text."""
    (one, other), x, cache = both(name, MORE), tokens(heads=MORE), LinearStateLayer()
    parts = [(0, 33), *((t, t + 1) for t in range(50, 54))]
    # Sinks that lie in a cache have no kernel, whatever the scores.
    parts[1:1] = [(t, t + 1) for t in range(33, 50)] if KINDS[name].sinks else [(33, 50)]
    got = [run(other, x, a, b, cache=cache) for a, b in parts]
    assert relative(torch.cat(got, 1), run(one, x)) < LIMIT


@interpreted
@torch.no_grad()
def test_gemma2_takes_the_kernels() -> None:
    """A whole model, whose scores its config bounds: prefill, padded prefill and what it generates."""
    spec = replace(SPECS["lolcats"], window=16, feature_dim=16)
    student = convert(teacher("gemma2"), spec, ["linear", "softmax", "linear"])
    mixers = [attention.mixer for _, attention in attention_layers(student) if hasattr(attention, "mixer")]
    assert [mixer.softcap for mixer in mixers] == [0.5, 0.5]
    x, mask = padded(2, 40)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}

    def everything(backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for mixer in mixers:
            mixer.backend = backend
        whole, rows = student(x, use_cache=False).logits, student(x, attention_mask=mask).logits
        return whole, rows, student.generate(x, attention_mask=mask, **options)

    want, got = everything("torch"), everything("triton")
    for found, expected in zip(got[:2], want[:2], strict=True):
        assert relative(found, expected) < LIMIT
    assert torch.equal(got[2], want[2])
    for mixer in mixers:
        mixer.softcap = None
    assert relative(everything("triton")[0], want[0]) > 1e-3  # it would be seen if it were dropped


@interpreted
def test_kernels_of_a_release_without_bounds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are called with what they do not know; without a bound, and without a window, they serve."""
    monkeypatch.setattr(fused, "BOUNDED", False)
    monkeypatch.setattr(mixer_decode, "BOUNDED", False)
    x, token = tokens(), torch.zeros(1, FEW[0], 1, 16)
    mixer = both(ONE_OP)[1]
    for call in (lambda: step_backend(mixer, token), lambda: run(mixer, x)):
        with pytest.raises(ValueError, match="a bound on attention scores has no kernel in this release"):
            call()
    mixer.backend = "auto"
    assert torch.equal(run(mixer, x), run(both(ONE_OP)[0], x))
    plain, alone = build(KINDS[ONE_OP], "triton"), both("softmax-alone")[1]
    run(plain, x)
    run(alone, x)
    assert step_backend(plain, token)[0] == step_backend(alone, token)[0] == "triton"


OLDER = """
import dataclasses, importlib, linearize_kernels


def older(call):
    def refuse(*given, **options):
        assert "softcap" not in options
        return call(*given, **options)
    return refuse


for name, function in (
    ("quadratic", "window_weights"), ("step", "step_window"), ("window", "chunk_window"),
    ("window_attention", "window_attention"), ("window_linear", "window_linear"),
):
    module = importlib.import_module("linearize_kernels." + name)
    made = older(getattr(module, function))
    setattr(module, function, made)
    setattr(linearize_kernels, function, made)
decode = importlib.import_module("linearize_kernels.decode")
fields = [(f.name, f.type) for f in dataclasses.fields(decode.StepRule) if f.name != "softcap"]
decode.StepRule = dataclasses.make_dataclass("StepRule", fields, frozen=True)
del importlib.import_module("linearize_kernels.window").bounded
"""
"""Makes of linearize_kernels what it was before it knew a bound."""
NONE = "sys.modules['linearize_kernels'] = None"


@pytest.mark.parametrize("kernels", [NONE, OLDER], ids=["no kernels", "older kernels"])
@torch.no_grad()
def test_an_export_has_its_bound_without_linearize(kernels: str, root: Path, tmp_path: Path) -> None:
    """From its flat files, alone or beside a linearize_kernels that knows no bound: logits and what it generates."""
    from linearize.convert.export import write_model

    native = teacher("gemma2")
    native.save_pretrained(tmp_path / "teacher")
    student = convert(native, replace(SPECS["lolcats"], window=16, sinks=2))
    write_model(tmp_path / "export", student, teacher_folder=tmp_path / "teacher")
    script = (
        f"import sys, torch; sys.modules['linearize'] = None\n{kernels}\n"
        "from transformers import AutoModelForCausalLM as auto\n"
        "model = auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "x = torch.arange(3, 73)[None]\n"
        "print(model(x).logits.double().sum().item())\n"
        "print(model.generate(x[:, :40], do_sample=False, max_new_tokens=6, eos_token_id=None)[0].tolist())\n"
        "mixer = next(m for m in model.modules() if type(m).__name__ == 'Mixer')\n"
        "mixer.execution = 'quadratic'\n"
        "print(model(x, use_cache=False).logits.double().sum().item())\n"
        "print(next(m for name, m in sys.modules.items() if name.endswith('.softcap')).BOUNDED)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(root / "kernels")
    command = [sys.executable, "-c", script, str(tmp_path / "export")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, text, quadratic, served = done.stdout.splitlines()
    assert served == "False"
    x = torch.arange(3, 73)[None]
    want = student(x).logits
    scale = float(want.double().abs().sum())
    assert abs(float(whole) - float(want.double().sum())) < 1e-6 * scale
    assert abs(float(quadratic) - float(want.double().sum())) < 1e-5 * scale
    greedy = student.generate(x[:, :40], do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert text == str(greedy[0].tolist())
    for _, attention in attention_layers(student):
        attention.mixer.softcap = None
    assert abs(float(student(x).logits.double().sum()) - float(whole)) > 1e-4 * scale
