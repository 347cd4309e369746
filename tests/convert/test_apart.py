"""Packing that keeps documents apart: what is trained on a window is what each document alone would train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from linearize.artifacts.manifest import read_manifest
from linearize.convert.align import transfer_micro_batch
from linearize.convert.align_loss import student_layer
from linearize.convert.capture import captured
from linearize.convert.finetune_loss import backward_losses
from linearize.convert.inputs import gather, identity_of
from linearize.convert.optim import trainable
from linearize.convert.pipeline import convert
from linearize.convert.surgery import linearize_model, mixer_plan
from linearize.data import load_texts
from linearize.errors import RefusedError, UsageError
from linearize.masking import IGNORE
from linearize.modeling.family_table import body
from linearize.modeling.mixer_spec import MixerSpec
from linearize.modeling.modeling_linearized import attention_layers
from linearize.recipe import Align, load_recipe
from linearize.task import CAUSAL, Apart, shifted_labels, task_of

BOS, EOS = 256, 257
TASK = Apart(bos=BOS, eos=None)
SPECS = {
    "window and linear": MixerSpec(window=8),
    "gated, with sinks": MixerSpec(window=8, sinks=2, decay="channel", normaliser="norm", mix="sum"),
}


def documents(*lengths: int) -> list[torch.Tensor]:
    """Token ids [1, L], BOS first."""
    draw = torch.Generator().manual_seed(0)
    return [
        torch.cat((torch.tensor([BOS]), torch.randint(0, 256, (length - 1,), generator=draw)))[None]
        for length in lengths
    ]


def test_positions_and_labels_by_hand() -> None:
    rows = np.array([[7, BOS, 5, 6, BOS, 8], [BOS, 1, 2, 3, 4, 5]], dtype=np.int32)
    ids, labels = TASK.examples(rows)
    assert TASK.call(ids)["position_ids"].tolist() == [[0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert labels.tolist() == [[IGNORE, 5, 6, IGNORE, 8, IGNORE], [1, 2, 3, 4, 5, IGNORE]]
    assert TASK.whole(rows).tolist() == [rows[1].tolist()]
    # With EOS after each document and no BOS, the EOS belongs to the document that it ends.
    ended = Apart(bos=None, eos=EOS)
    ids, labels = ended.examples(np.array([[5, EOS, 6, 7, EOS, EOS]], dtype=np.int32))
    assert ended.positions(ids).tolist() == [[0, 1, 0, 1, 2, 0]]
    assert labels.tolist() == [[EOS, IGNORE, 7, EOS, IGNORE, IGNORE]]
    assert ended.layout(torch.tensor([[5, 6, 7, EOS]])) is None, "one document a row needs no layout"
    assert TASK.varied and not CAUSAL.varied


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("softmax", [set(), {1}])
def test_losses_and_gradients_are_those_of_each_document_alone(
    make_teacher: Callable[..., Any], spec: str, softmax: set[int]
) -> None:
    """Invariant 5 through finetuning: window, state, positions and loss, in linear layers and in kept softmax ones."""
    teacher = make_teacher("llama").requires_grad_(False)
    plan = mixer_plan(teacher.config.num_hidden_layers, softmax)
    student, _ = linearize_model(teacher, spec=SPECS[spec], layer_mixers=plan, seed=0)
    parameters = dict(student.named_parameters())
    alone = documents(5, 37, 1, 21)
    packed = torch.cat(alone, dim=1)

    def run(task: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return backward_losses(student, teacher, ids, labels, ce=1.0, kl=0.5, scale=1.0, task=task)

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for p in parameters.values():
            p.grad = None
        return found

    with trainable(parameters.values()):
        for p in parameters.values():
            p.grad = None
        # The KL of a token without a label counts for nothing, so that only labels decide what is summed.
        want = torch.stack([run(CAUSAL, ids, shifted_labels(ids)) for ids in alone]).sum(0)
        wanted = gradients()
        got = run(TASK, *TASK.examples(packed.numpy()))
        found = gradients()
        joined = run(CAUSAL, packed, TASK.examples(packed.numpy())[1])
        gradients()
    assert torch.allclose(got, want, rtol=1e-5)
    assert not torch.allclose(joined, want, rtol=1e-3), "run together, documents do see each other"
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-4, (name, float(error))


@pytest.mark.parametrize("branch", ["mix", "both"])
def test_alignment_is_that_of_each_document_alone(make_teacher: Callable[..., Any], branch: str) -> None:
    teacher = make_teacher("llama").requires_grad_(False)
    plan = mixer_plan(teacher.config.num_hidden_layers, set())
    student, _ = linearize_model(teacher, spec=SPECS["window and linear"], layer_mixers=plan, seed=0)
    attentions = dict(attention_layers(student))
    alone = documents(5, 37, 1, 21)
    ours: dict[tuple[int, str], list[torch.Tensor]] = {}
    theirs: dict[int, list[torch.Tensor]] = {}

    def look(layer: Any) -> None:
        theirs.setdefault(layer.index, []).append(layer.heads)
        for name in ("full", "linear"):
            heads = student_layer(attentions[layer.index], layer, name, weights=False)[0]
            ours.setdefault((layer.index, name), []).append(heads)

    with torch.no_grad(), captured(teacher, list(attentions), look):
        for ids in alone:
            body(teacher)(**CAUSAL.call(ids))
    align = Align(branch=branch, objective="output")
    table = transfer_micro_batch(teacher, attentions, torch.cat(alone, dim=1), align, task=TASK)
    for place, index in enumerate(attentions):
        target = torch.cat(theirs[index], dim=1)
        errors = {
            name: (torch.cat(ours[index, name], dim=1) - target).square().mean() / target.square().mean()
            for name in ("full", "linear")
        }
        loss = errors["full"] + (errors["linear"] if branch == "both" else 0.0)
        assert float(table[0, place]) == pytest.approx(float(loss), rel=1e-4)
        assert float(table[1, place]) == pytest.approx(float(errors["full"]), rel=1e-4)


SMALL = ["context=64", "mixer.window=16", "mixer.feature_dim=8", "device=cpu", "align.tokens=1k", "finetune.tokens=1k",
         "align.batch_tokens=256", "finetune.batch_tokens=256"]  # fmt: skip


@pytest.fixture
def short_documents(tmp_path: Path) -> str:
    """A data set of short documents, and one long one."""
    lines = [f'{{"text": "document {i} {"on and " * (i % 7)}"}}' for i in range(150)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, f'{{"text": "{"long " * 400}"}}']))
    return str(tmp_path / "text.jsonl")


@pytest.mark.slow
def test_a_conversion_that_keeps_documents_apart(teacher_folder: Path, short_documents: str, tmp_path: Path) -> None:
    recipe = load_recipe("lolcats", [*SMALL, "keep_softmax=[1]", "calibrate.tokens=200", "finetune.kl=1"])
    data = f"{short_documents}:documents=apart"
    report = convert(teacher_folder, tmp_path / "out", recipe=recipe, data=data)
    assert report["stages"]["finetune"]["steps"] and report["calibration"]["tokens"] == 192
    manifest = read_manifest(tmp_path / "out")
    assert manifest["data"]["name"].endswith(":documents=apart")


def test_what_cannot_be_kept_apart_is_refused(
    teacher_folder: Path, short_documents: str, tmp_path: Path, make_teacher: Callable[..., Any]
) -> None:
    data = f"{short_documents}:documents=apart"

    def inputs(*overrides: str, data: str = data) -> Any:
        recipe = load_recipe("lolcats", [*SMALL, *overrides])
        return gather(teacher_folder, tmp_path / "out", recipe, data, torch.device("cpu"))

    found = inputs("calibrate.tokens=0")
    assert found.task == TASK and identity_of(found)["documents"] == "apart"
    joined = inputs("calibrate.tokens=0", data=short_documents)
    assert joined.task == CAUSAL and identity_of(joined) == identity_of(found) | {"documents": "joined"}
    with pytest.raises(UsageError, match=r"align\.objective=weights is taken of whole windows"):
        inputs("align.objective=weights")
    brief = tmp_path / "brief.jsonl"
    brief.write_text("\n".join(f'{{"text": "document {i}"}}' for i in range(150)))
    with pytest.raises(RefusedError, match="no window of 64 tokens lies within one document"):
        inputs("calibrate.tokens=200", data=f"{brief}:documents=apart")
    config = make_teacher("llama").config
    with pytest.raises(UsageError, match="neither BOS nor EOS"):
        task_of(config, SimpleNamespace(bos_token_id=None, eos_token_id=None), apart=True)
    with pytest.raises(UsageError, match=r"documents=both is unknown\. Use joined or apart"):
        load_texts(f"{short_documents}:documents=both")
    with pytest.raises(UsageError, match="documents= says how a conversion packs its windows"):
        load_texts(data)
