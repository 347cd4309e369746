"""The kernel benchmarks without a GPU: references, rows, the table, the plots, warming up and what fails there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels_decode, kernels_jobs, kernels_model, kernels_rows, kernels_shapes, kernels_worker
from benchmarks import kernels_reference as reference
from benchmarks.kernels_shapes import Shape, Subject, check, inputs
from benchmarks.kernels_tuning import OutOfTime
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
    forward = lambda: exact({k: v.float() for k, v in x.items()}) * factor  # noqa: E731
    return Subject(forward=forward, leaves=x, reference=exact, maps=("v",))


@pytest.mark.parametrize("checked", [128, 512])
def test_a_wrong_output_is_found_in_what_a_timed_run_begins_with(monkeypatch: pytest.MonkeyPatch, checked: int) -> None:
    monkeypatch.setattr(kernels_shapes, "CHECKED", checked)
    for which in ("forward", "both", "maps"):
        assert check(subject, TINY, "cpu", which) is None
        assert "output off" in str(check(lambda s, d: subject(s, d, factor=1.1), TINY, "cpu", which))
        assert check(lambda s, d: subject(s, d, factor=float("inf")), TINY, "cpu", which) == "output is not finite"


def test_a_wrong_gradient_is_found() -> None:
    def build(shape: Shape, device: str) -> Subject:
        made = subject(shape, device)
        plain = made.forward
        made.forward = lambda: plain() + made.leaves["q"].sum() - made.leaves["q"].sum().detach()
        return made

    assert "gradient of q off" in str(check(build, TINY, "cpu", "both"))
    assert check(build, TINY, "cpu", "forward") is None and check(build, TINY, "cpu", "maps") is None


def test_a_missing_gradient_is_found() -> None:
    def build(shape: Shape, device: str) -> Subject:
        made = subject(shape, device)
        exact = made.reference
        made.forward = lambda: exact({**made.leaves, "k": made.leaves["k"].detach()})
        return made

    assert check(build, TINY, "cpu", "both") == "gradient of k: only one side has one"


def row(**values: Any) -> dict[str, Any]:
    plain = {"op": "layer", "implementation": "linearize", "shape": "4x8192", "pass": "forward", "ms": 2.0}
    return plain | {"machine": "card", "sources": "s", "versions": {"torch": "2"}, "note": ""} | values


def test_rows_are_added_and_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"machine": "card", "driver": "", "versions": {"torch": "2"}, "commit": "c", "sources": "s"}
    monkeypatch.setattr(kernels_rows, "environment", lambda: here)
    path = tmp_path / "deep/rows.jsonl"
    for implementation, ms, status in (
        ("linearize", None, "failed"), ("composed", 2.0, "ok"), ("fla", None, "refused"), ("TFLA", None, "unfinished"),
    ):  # fmt: skip
        kernels_rows.append(path, row(implementation=implementation, ms=ms, status=status))
    with path.open("a") as file:
        file.write('{"op": "cut sho')
    found = kernels_rows.read(path)
    assert [r["implementation"] for r in found] == ["linearize", "composed", "fla", "TFLA"]
    assert found[0]["date"] and found[0]["commit"] == "c"
    assert {key[1] for key in kernels_rows.settled(path)} == {"composed", "fla"}
    for name, value in (("sources", "changed"), ("machine", "another"), ("versions", {"torch": "3"})):
        with monkeypatch.context() as patch:
            patch.setitem(here, name, value)
            assert kernels_rows.settled(path) == set()
    here["versions"] = {"torch": "2", "fla-core": "1"}  # installed since: its rows are to be tried, figures stay
    assert {key[1] for key in kernels_rows.settled(path)} == {"composed"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModuleNotFoundError("No module named 'fla'"), "missing"),
        (
            RuntimeError("Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results for this\nmore"),
            "refused",
        ),
        (NotImplementedError("heads"), "refused"),
        (RuntimeError("an illegal memory access"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed"),
    ],
)
def test_why_there_is_no_figure(error: Exception, status: str) -> None:
    found = kernels_rows.failure(("a", "b", "c", "d"), error, 3.21)
    assert (found["status"], found["ms"], found["seconds"]) == (status, None, 3.2)
    assert str(error).split("\n")[0] in found["note"] and "more" not in found["note"]


def test_the_latest_figure_counts_and_peers_are_ratios() -> None:
    refused = {"ms": None, "status": "refused", "seconds": 7.0, "note": "not on this card"}
    rows = [
        row(ms=3.0),
        row(ms=2.0, peak_bytes=2**30),
        row(ms=None, note="died"),
        row(implementation="SDPA cuDNN", ms=9.0, peak_bytes=2**31),
        *(row(implementation="fla", **{"pass": which}, **refused) for which in ("forward", "both")),
    ]
    chosen = list(kernels_rows.latest(rows).values())
    assert [r["ms"] for r in chosen] == [2.0, 9.0, None, None]
    text = kernels_rows.table(chosen)
    assert "4.50x (memory 2.00x)" in text and text.index("linearize") < text.index("SDPA")
    assert "layer, fla (4x8192 forward; 4x8192 both): refused after 7 s: not on this card" in text
    answers = [
        row(ms=1000.0, tokens_per_s=900.0),
        row(ms=50.0, tokens_per_s=300.0, implementation="softmax"),
    ]  # a smaller batch, sooner answered
    assert "300 tokens/s  3.00x" in kernels_rows.table(answers)
    later = row(ms=None, sources="new", status="failed", note="died")
    assert kernels_rows.latest([*rows, later])["card", "layer", "linearize", "4x8192", "forward"] is later


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.kernels_plots import draw

    rows = [
        row(implementation=name, shape=f"1x{context}", ns_per_token_head=cost, peak_bytes=2**30, **{"pass": which})
        for name, cost in (("linearize", 1.0), ("SDPA cuDNN", 4.0), ("an unknown peer", 5.0))
        for context in (2048, 8192)
        for which in ("forward", "both", "maps")
    ]
    model = {"op": "model", "pass": "decode", "context": 2048, "tokens_per_s": 10.0, "sequence_bytes": 2**20}
    rows += [row(shape=f"{batch}x2048", batch=batch, **model) for batch in (1, 16)]
    paths = draw(rows, tmp_path, "svg")
    assert [p.name for p in paths] == ["kernels-time.svg", "kernels-memory.svg", "kernels-decode.svg"]
    assert all("SDPA" in p.read_text() for p in paths[:2])
    with pytest.raises(SystemExit, match="no plot can be drawn"):
        draw([row(op="window")], tmp_path, "svg")


def test_a_panel_without_peers_is_left_out() -> None:
    from benchmarks.kernels_plots import panels

    def rows(*names: str) -> list[dict[str, Any]]:
        found = [(name, which) for name in names for which in ("forward", "maps")]
        return [row(implementation=n, ns_per_token_head=1.0, peak_bytes=1, **{"pass": w}) for n, w in found]

    assert len(panels(rows("linearize"))["kernels-time"]) == 1
    assert len(panels(rows("linearize", "composed"))["kernels-time"]) == 2


def test_the_plot_of_decode() -> None:
    from benchmarks.kernels_plots import panels

    rows = [
        row(op="decode", implementation=name, batch=batch, context=context, ms=ms * batch, **{"pass": which})
        for name, which, ms in (
            ("linearize", "step", 0.01), ("linearize", "block end", 0.03), ("SDPA", "step", 0.5),
        )
        for batch in (1, 16)
        for context in (2048, 131072)
    ]  # fmt: skip
    (panel,) = panels([*rows, row(op="decode", implementation="fla", ms=None)])["kernels-decode"]
    assert set(panel["lines"]) == {"linearize", "linearize, block end", "SDPA after 2k", "SDPA after 128k"}
    assert panel["lines"]["linearize"] == [(1, 10.0), (16, 160.0)]


def test_jobs_have_a_name_each_and_can_be_chosen() -> None:
    keys = [key for job in kernels_jobs.JOBS for key in job.measurements()]
    assert len(keys) == len(set(keys)) > 100
    assert set(kernels_jobs.workers(["SDPA"])) == {"sdpa"}
    everyone = kernels_jobs.workers()
    assert {*kernels_jobs.LIMITS, *kernels_jobs.LAST} <= set(everyone)
    assert [len(everyone[f"composed {s}"]) for s in ("16x2048", "4x8192", "1x32768", "1x8192")] == [1, 1, 1, 1]
    assert sorted(key for jobs in everyone.values() for key in kernels_jobs.wanted(jobs, ())) == sorted(keys)
    known = set(keys) - {("layer", "composed", "1x32768", "both")}
    left = {name: kernels_jobs.wanted(jobs, known) for name, jobs in everyone.items()}
    assert {name for name, found in left.items() if found} == {"composed 1x32768"}


def job(build: Any, **options: Any) -> kernels_jobs.Job:
    return kernels_jobs.Job(op="layer", implementation="peer", worker="w", build=build, shapes=(TINY,), **options)


def keys(*passes: str) -> list[tuple[str, ...]]:
    return [("layer", "peer", TINY.name, which) for which in passes]


def test_a_failing_implementation_is_a_row_for_every_pass() -> None:
    def missing(shape: Shape, device: str) -> Subject:
        raise ModuleNotFoundError("No module named 'fla'\nmore")

    found = kernels_worker.warmed([job(missing)], keys("forward", "both"), 60, "cpu").refused
    assert {key[3]: (r["status"], r["pass"]) for key, r in found.items()} == {
        which: ("missing", which) for which in ("forward", "both")
    }
    assert "'fla'" in found[keys("both")[0]]["note"]


class OneWay(torch.autograd.Function):
    """A library that refuses to go back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError("this card produces incorrect results: please upgrade")


def test_a_refused_backward_leaves_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(shape: Shape, device: str) -> Subject:
        made = subject(shape, device)
        plain = made.forward
        made.forward = lambda: OneWay.apply(plain())  # type: ignore[no-untyped-call]
        return made

    class Graph:
        def __init__(self, run: Any) -> None:
            self.replay = "a graph"

    passes = ("forward", "both", "forward graph", "both graph")
    wanted = keys(*passes)
    peer = job(build, passes=passes)
    state = kernels_worker.warmed([peer], wanted, 60, "cpu")
    assert {key[3]: r["status"] for key, r in state.refused.items()} == {"both": "refused", "both graph": "refused"}
    monkeypatch.setattr(kernels_worker, "peak_bytes", lambda run: run() is None or 5)
    monkeypatch.setattr(kernels_worker, "times", lambda run: (1.0 if run == "a graph" else 2.0, 1.0, 3.0))
    monkeypatch.setattr(kernels_worker, "captured", Graph)
    left = [key for key in wanted if key not in state.refused]
    row, graph = kernels_worker.layer_rows(peer, TINY, left, state.warm, "cpu")
    assert (row["pass"], row["ms"], row["status"], row["peak_bytes"]) == ("forward", 2.0, "ok", 5)
    assert (graph["pass"], graph["ms"]) == ("forward graph", 1.0)
    assert row["ns_per_token_head"] == pytest.approx(2e6 / (2 * 512 * 4))


def test_a_wrong_forward_is_not_timed() -> None:
    wrong = job(lambda s, d: subject(s, d, factor=1.1))
    found = kernels_worker.warmed([wrong], keys("forward", "both"), 60, "cpu").refused
    assert [r["status"] for r in found.values()] == ["wrong", "wrong"]
    rows = list(kernels_worker.layer_rows(wrong, TINY, keys("forward"), (), "cpu"))  # was not warm, so checked here
    assert [r["status"] for r in rows] == ["wrong"]


def test_what_takes_too_long_to_compile_has_rows_and_costs_no_others() -> None:
    def slow(shape: Shape, device: str) -> Subject:
        time.sleep(30)
        raise AssertionError

    quick = kernels_jobs.Job(op="quick", implementation="peer", worker="w", build=subject, shapes=(TINY,))
    wanted = [*quick.measurements(), *keys("forward", "both")]
    begun = time.monotonic()
    state = kernels_worker.warmed([quick, job(slow)], wanted, 2.0, "cpu")
    assert time.monotonic() - begun < 20
    assert state.warm == set(quick.measurements()) and set(state.refused) == set(keys("forward", "both"))
    assert {r["status"] for r in state.refused.values()} == {"unfinished"}
    assert "within" in state.refused[keys("both")[0]]["note"]


def test_a_tuner_that_is_out_of_time_ends_the_warm_up() -> None:
    def tunes(shape: Shape, device: str) -> Subject:
        raise OutOfTime

    found = kernels_worker.warmed([job(tunes)], keys("forward"), 60, "cpu").refused
    assert [r["status"] for r in found.values()] == ["unfinished"]


def test_memory_that_runs_out_beside_others_is_tried_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def build(shape: Shape, device: str) -> Subject:
        calls.append(shape)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return subject(shape, device)

    state = kernels_worker.warmed([job(build)], keys("forward"), 60, "cpu")
    assert (state.refused, state.warm) == ({}, set())
    monkeypatch.setattr(kernels_worker, "peak_bytes", lambda run: 5)
    monkeypatch.setattr(kernels_worker, "times", lambda run: (2.0, 1.0, 3.0))
    (row,) = kernels_worker.layer_rows(job(build), TINY, keys("forward"), state.warm, "cpu")
    assert row["status"] == "ok" and len(calls) == 4  # two for the check, one to be timed


def test_passes_differentiate_what_they_say() -> None:
    made = subject(TINY, "cpu")
    found = {name: run() for name, run in kernels_worker.passes(made, ("forward", "both", "maps"))}
    assert not found["forward"][0].requires_grad and found["forward"][1] == ()
    assert [x is None for x in found["both"][1]] == [False] * 3
    assert len(found["maps"][1]) == 1 and not made.leaves["q"].requires_grad


def test_the_place_in_a_block_where_a_step_takes_longest() -> None:
    spent = [1.0 + (n % 4 == 2) * 5 for n in range(12)]
    spent[0] = 100.0  # the first of all is slow by chance
    assert kernels_decode.typical(spent, 4) == {"step": 1.0, "block end": 6.0}


def test_rows_of_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, int]] = []

    def subject(name: str, movable: bool) -> Any:
        def build(batch: int, context: int) -> Any:
            if name == "fla fused_recurrent":
                raise ModuleNotFoundError("No module named 'fla'")
            moved.append((f"made {name}", context))
            return lambda: None, 2, (lambda c: moved.append((name, c))) if movable else None

        return build

    class Graph:
        def __init__(self, run: Any) -> None:
            self.replay = run

    monkeypatch.setattr(
        kernels_decode, "SUBJECTS", {name: subject(name, "linearize" in name) for name in kernels_decode.SUBJECTS}
    )
    monkeypatch.setattr(kernels_decode, "check_ours", lambda batch=2: None)
    monkeypatch.setattr(kernels_decode, "by_place", lambda step, window: {"step": 4.0, "block end": 6.0})
    monkeypatch.setattr(kernels_model, "captured", Graph)
    monkeypatch.setattr(kernels_model, "median_ms", lambda run, repeat: 8.0)
    wanted = [key for key in kernels_decode.KEYS if key[2].startswith("64x") or key[1] == "linearize pure"]
    rows = {kernels_rows.key_of(r): r for r in kernels_decode.decode_rows(wanted)}
    assert set(rows) == set(wanted)
    step = ("decode", "linearize", "64x131072", "step")
    assert rows[step]["ms"] == 2.0 and rows[step]["context"] == 131072 and rows[step]["batch"] == 64
    assert rows[(*step[:3], "block end")]["ms"] == 3.0
    assert [x for x in moved if x[0].endswith("linearize")] == [
        ("made linearize", 2048), *(("linearize", context) for context in kernels_decode.CONTEXTS)
    ]  # fmt: skip
    assert rows["decode", "SDPA", "64x32768", "step"]["ms"] == 4.0
    assert rows["decode", "SDPA", "64x131072", "step"]["status"] == "left out"
    assert rows["decode", "fla fused_recurrent", "64x2048", "step"]["status"] == "missing"
    monkeypatch.setattr(kernels_decode, "check_ours", lambda batch=2: "wrong: a step is off" if batch == 16 else None)
    (row,) = kernels_decode.decode_rows([step])
    assert (row["status"], row["note"]) == ("wrong", "wrong: a step is off")
