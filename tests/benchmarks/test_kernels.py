"""The kernel benchmarks without a GPU: references, rows, the table, the plots, and workers that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels, kernels_jobs, kernels_rows, kernels_worker
from benchmarks import kernels_reference as reference
from benchmarks.kernels_shapes import Shape, Subject, check, check_prefix, inputs
from linearize.modeling.mixer import Mixer
from linearize.modeling.mixer_spec import MixerSpec

TINY = Shape(batch=2, length=512, heads=4, kv_heads=2, head_dim=8, feature_dim=4, window=64)


def exact_inputs(shape: Shape) -> dict[str, torch.Tensor]:
    return {name: x.detach().double() for name, x in inputs(shape, "cpu").items()}


def test_the_layer_reference_is_the_mixer() -> None:
    mixer = Mixer(
        MixerSpec(feature_dim=4), hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=8, scaling=8**-0.5
    ).double()
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    mixer.execution = "quadratic"
    x = exact_inputs(TINY)
    want = mixer(x["q"], x["k"], x["v"], inputs=torch.zeros(2, 512, 8).double(), rotation=None).transpose(1, 2)
    x |= {"wq": mixer.q_map.weight, "wk": mixer.k_map.weight, "logit": mixer.window_logit}
    got = reference.window_and_linear(TINY, "block")(x)
    assert (got - want).norm() < 1e-9 * want.norm()


@pytest.mark.parametrize(("kind", "seen"), [("causal", 200), ("sliding", 64), ("block", 64 + 200 % 64)])
def test_what_a_query_sees(kind: str, seen: int) -> None:
    mask = reference.seen_by(kind, 512, 64, torch.device("cpu"))
    assert int(mask[199].sum()) == seen
    x = exact_inputs(TINY)
    want = torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], attn_mask=mask, enable_gqa=True)
    assert torch.allclose(reference.softmax_attention(TINY, kind)(x), want)


def subject(shape: Shape, device: str, *, factor: float = 1.0) -> Subject:
    x = inputs(shape, device)
    exact = reference.softmax_attention(shape, "causal")
    return Subject(forward=lambda: exact({k: v.float() for k, v in x.items()}) * factor, leaves=x, reference=exact)


def test_a_wrong_op_is_found() -> None:
    assert check(subject, TINY, "cpu") is None
    assert "output off" in str(check(lambda s, d: subject(s, d, factor=1.1), TINY, "cpu"))
    right = subject(TINY, "cpu").forward()
    assert check_prefix(subject, TINY, right, "cpu") is None
    assert "timed run off" in str(check_prefix(subject, TINY, right * 1.1, "cpu"))
    assert "not finite" in str(check_prefix(subject, TINY, right / 0, "cpu"))


def test_a_wrong_gradient_is_found() -> None:
    def build(shape: Shape, device: str) -> Subject:
        made = subject(shape, device)
        plain = made.forward
        made.forward = lambda: plain() + made.leaves["v"].sum() - made.leaves["v"].sum().detach()
        return made

    assert "gradient of v off" in str(check(build, TINY, "cpu"))


def row(**values: Any) -> dict[str, Any]:
    plain = {"op": "layer", "implementation": "linearize", "shape": "4x8192", "pass": "forward", "ms": 2.0}
    return plain | {"machine": "card", "sources": "s", "versions": {"torch": "2"}, "note": ""} | values


def test_rows_are_added_and_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"machine": "card", "driver": "", "versions": {}, "commit": "c", "sources": "s"}
    monkeypatch.setattr(kernels_rows, "environment", lambda: here)
    path = tmp_path / "deep/rows.jsonl"
    kernels_rows.append(path, row(ms=None, note="no such package"))
    kernels_rows.append(path, row(implementation="composed"))
    with path.open("a") as file:
        file.write('{"op": "cut sho')
    found = kernels_rows.read(path)
    assert [r["implementation"] for r in found] == ["linearize", "composed"]
    assert found[0]["date"] and found[0]["commit"] == "c"
    assert kernels_rows.measured(path) == {("layer", "composed", "4x8192", "forward")}
    here["sources"] = "changed"
    assert kernels_rows.measured(path) == set()


def test_the_latest_figure_counts_and_peers_are_ratios() -> None:
    rows = [row(ms=3.0), row(ms=2.0), row(ms=None, note="died"), row(implementation="SDPA cuDNN", ms=9.0)]
    chosen = list(kernels_rows.latest(rows).values())
    assert [r["ms"] for r in chosen] == [2.0, 9.0]
    text = kernels_rows.table(chosen)
    assert "4.50x" in text and text.index("linearize") < text.index("SDPA")
    assert "died" in kernels_rows.table([row(ms=None, note="died")])


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.kernels_plots import draw

    rows = [
        row(implementation=name, shape=f"1x{context}", ns_per_token_head=cost, peak_bytes=2**30, **{"pass": which})
        for name, cost in (("linearize", 1.0), ("SDPA cuDNN", 4.0), ("an unknown peer", 5.0))
        for context in (2048, 8192)
        for which in ("forward", "both")
    ]
    model = {"op": "model", "pass": "decode", "context": 2048, "tokens_per_s": 10.0, "sequence_bytes": 2**20}
    rows += [row(shape=f"{batch}x2048", batch=batch, **model) for batch in (1, 16)]
    paths = draw(rows, tmp_path, "svg")
    assert [p.name for p in paths] == ["kernels-time.svg", "kernels-memory.svg", "kernels-decode.svg"]
    assert all("SDPA cuDNN" in p.read_text() or "SDPA" in p.read_text() for p in paths[:2])
    with pytest.raises(SystemExit, match="no plot can be drawn"):
        draw([row(op="window")], tmp_path, "svg")


def test_jobs_have_a_name_each_and_can_be_chosen() -> None:
    names = [(job.op, job.implementation, job.shapes) for job in kernels_jobs.JOBS]
    assert len(names) == len(set(names))
    assert set(kernels_jobs.workers(["SDPA"])) == {"sdpa"}
    assert set(kernels_jobs.LIMITS) <= set(kernels_jobs.workers())


def test_a_failing_implementation_is_a_row() -> None:
    def missing(shape: Shape, device: str) -> Subject:
        raise ModuleNotFoundError("No module named 'fla'\nmore")

    job = kernels_jobs.Job(op="layer", implementation="peer", worker="w", build=missing, shapes=(TINY,))
    assert kernels_worker.checked(job, "cpu") == "ModuleNotFoundError: No module named 'fla'"
    (found,) = kernels_worker.layer_rows(job, TINY, set(), "cpu")
    assert found["ms"] is None and "'fla'" in found["note"]


def test_passes_differentiate_what_they_say() -> None:
    made = subject(TINY, "cpu")
    made.passes, made.maps = ("forward", "both", "maps"), ("v",)
    runs = dict(kernels_worker.passes(made, "cpu"))
    assert not runs["forward"]().requires_grad
    assert [x is None for x in runs["both"]()] == [False] * 3
    assert len(runs["maps"]()) == 1 and not made.leaves["q"].requires_grad


SCRIPTS = {
    "good": 'print(\'{"ready": true}\', flush=True); input(); print(\'{"op": "a"}\'); print(\'{"done": true}\')',
    "dies": "import sys; print('{\"ready\": true}', flush=True); input(); sys.exit('out of luck')",
    "hangs": "import time; print('{\"ready\": true}', flush=True); input(); time.sleep(60)",
}


@pytest.mark.parametrize(
    ("script", "said"), [("good", None), ("dies", "ended with code 1: out of luck"), ("hangs", "took too long")]
)
def test_a_worker_that_dies_or_hangs_costs_its_own_rows(
    monkeypatch: pytest.MonkeyPatch, script: str, said: str | None
) -> None:
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", SCRIPTS[script]], **options)

    monkeypatch.setattr(kernels.subprocess, "Popen", popen)
    worker = kernels.Worker("w", [], set())
    try:
        assert worker.next(time.monotonic() + 30) == {"ready": True}
        limit = 1.0 if script == "hangs" else 30.0
        (found,) = kernels.rows_of(worker, limit=limit, deadline=time.monotonic() + 60)
    finally:
        worker.end()
    if said is None:
        assert found == {"op": "a"}
    else:
        assert said in found["note"] and found["ms"] is None and found["implementation"] == "w"
    assert json.dumps(found)
