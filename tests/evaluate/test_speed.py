"""Benchmarks: what a row says and in which units, limits, refusals, and that both models read the same. No figure."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import linearize
from linearize.errors import RefusedError, UsageError
from linearize.evaluate import speed, speed_memory, speed_points, speed_run
from linearize.evaluate.speed import bench
from linearize.evaluate.speed_run import SETTLED, cache_bytes, run_once, same_tokens

QUICK: dict[str, Any] = {"device": "cpu", "new_tokens": 8, "repeats": 3, "memory": False}
SPEEDS = ("ttft_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")


@pytest.fixture(scope="module")
def read() -> list[tuple[str, torch.Tensor]]:
    """What was read while `result` was measured, in order."""
    return []


@pytest.fixture(scope="module")
def result(
    pure_export: Path,
    teacher_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    read: list[tuple[str, torch.Tensor]],
) -> dict[str, Any]:
    """One benchmark of both models, also beyond the teacher's 128 positions."""
    real = run_once

    def watch(model: Any, ids: torch.Tensor, **how: Any) -> Any:
        read.append((model.config.model_type, ids))
        return real(model, ids, **how)

    file = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    file.write_text('{"an": "older row"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed_run, "run_once", watch)
        return bench(
            pure_export, against=teacher_folder, contexts=[200, 24, 96], batches=[3, 1], file=file, **QUICK
        )  # fmt: skip


def test_rows(result: dict[str, Any], pure_export: Path, teacher_folder: Path) -> None:
    rows = result["rows"]
    points = [(c, b, role) for c in (24, 96, 200) for b in (1, 3) for role in ("student", "teacher")]
    assert [(r["context"], r["batch"], r["role"]) for r in rows] == points, "small points come first"
    assert all(set(row) == set(rows[0]) for row in rows)
    for row in rows:
        assert row["model"] == str(pure_export if row["role"] == "student" else teacher_folder)
        assert (
            row["versions"]["torch"] == metadata.version("torch")
            and row["versions"]["linearize"] == linearize.__version__
        )
        assert row["machine"]["cores"] and row["machine"]["cpu"] and row["machine"]["gpu"] is None
        assert (row["device"], row["dtype"], row["new_tokens"]) == ("cpu", "float32", 8)
        if row["status"] != "ok":
            continue
        assert row["repeats"] == 3 and row["reason"] is None
        for key in SPEEDS:
            assert 0 < row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
        # Tokens of the whole batch over seconds: the median of three of one is that of the other.
        tokens = row["context"] * row["batch"]
        assert row["prefill_tokens_per_second"] == pytest.approx(tokens / row["ttft_seconds"])
    assert json.loads(json.dumps(result)) == result


def test_each_row_is_in_the_file_as_well(result: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in Path(result["file"]).read_text().splitlines()]
    assert lines == [{"an": "older row"}, *result["rows"]]


def test_both_models_read_the_same_tokens_in_turns(result: dict[str, Any], read: list[Any]) -> None:
    by_point: dict[str, set[str]] = {}
    for row in result["rows"]:
        by_point.setdefault(f"{row['context']} x {row['batch']}", set()).add(row["tokens_sha256"])
    digests = list(by_point.values())
    assert all(len(digest) == 1 for digest in digests), "one text at a point, whoever reads it"
    assert len(set.union(*digests)) == len(digests), "another one at each"
    first = read[:8]  # one warm-up each, then three turns
    assert [kind for kind, _ in first] == ["linearized_llama", "llama", *["linearized_llama", "llama"],
                                           *["llama", "linearized_llama"], *["linearized_llama", "llama"]]  # fmt: skip
    assert all(torch.equal(ids, first[0][1]) for _, ids in first)
    assert speed_run.digest(first[0][1]) == result["rows"][0]["tokens_sha256"]


def test_a_pure_linear_students_memory_does_not_grow_with_the_context(result: dict[str, Any]) -> None:
    held = {(r["role"], r["context"], r["batch"]): (r["state_bytes"], r["kv_bytes"]) for r in result["rows"]}
    state, _ = held["student", 24, 1]
    assert state > 0
    for context in (24, 96, 200):
        assert held["student", context, 1] == (state, 0)
        assert held["student", context, 3][0] == 3 * state
    # The teacher's grows by keys and values of every token read: 2 layers x 2 x 2 heads x 8 channels x 4 bytes.
    for context in (24, 96):
        assert held["teacher", context, 3] == (0, 3 * 256 * (context + 8 - 1)), "the last token is not read"


def test_beyond_its_positions_the_teacher_is_refused_and_the_student_marked(result: dict[str, Any]) -> None:
    rows = {(row["role"], row["context"]): row for row in result["rows"] if row["batch"] == 1}
    refused = rows["teacher", 200]
    assert refused["status"] == "refused" and refused["ttft_seconds"] is None
    assert refused["reason"] == "200 tokens and 8 new ones reach beyond its 128 positions"
    assert rows["student", 200]["status"] == "ok" and rows["student", 200]["beyond_trained"]
    assert not rows["student", 96]["beyond_trained"]


def test_a_run_is_greedy_and_nothing_ends_it(pure_export: Path) -> None:
    model, _ = linearize.load(pure_export, device="cpu", dtype="float32")
    ids = same_tokens(259, batch=2, context=9, seed=0)
    greedy = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.eos_token_id = True, 5.0, greedy[0, -1].item()
    seen: list[torch.Tensor] = []
    forward = model.forward
    model.forward = lambda *a, **k: seen.append(k["input_ids"]) or forward(*a, **k)  # type: ignore[method-assign]
    found = run_once(model, ids, new_tokens=12)
    assert model.generation_config is settings, "put back"
    assert sum(x.shape[1] for x in seen) == 9 + 11 and not found.stopped
    assert torch.equal(seen[1], greedy[:, 9:10])
    assert 0 < found.first < found.total and found.decode is not None and 0 < found.decode < found.total
    stopped = run_once(model, ids, new_tokens=50, seconds=1e-9)
    assert stopped.stopped and stopped.decode is None
    assert SETTLED < speed_run.LEAST_NEW == 8


def test_bytes_of_a_cache_are_those_of_its_tensors(hybrid_export: Path) -> None:
    model, _ = linearize.load(hybrid_export, device="cpu", dtype="float32")
    out = model(same_tokens(259, batch=2, context=20, seed=0), use_cache=True)
    state, keys = cache_bytes(out.past_key_values)
    assert state == out.past_key_values.state_bytes > 0
    assert keys == 2 * 20 * 2 * 2 * 8 * 4, "one softmax layer: keys and values of 2 heads of 8, in float32"


def test_limits_skip_a_point_and_all_larger_ones(pure_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    real = run_once

    def watch(model: Any, ids: torch.Tensor, **how: Any) -> Any:
        calls.append(tuple(ids.shape))
        return real(model, ids, **how)

    monkeypatch.setattr(speed_run, "run_once", watch)
    slow = bench(pure_export, contexts=[16, 32], batches=[1, 2], max_seconds=1e-6, **QUICK)["rows"]
    assert [row["status"] for row in slow] == ["skipped"] * 4 and calls == [(1, 16)]
    assert slow[0]["reason"].startswith("two runs take more than 1e-06 s (the first stopped at")
    assert all("16 tokens x 1 were too much already: two runs" in row["reason"] for row in slow[1:])
    calls.clear()
    fat = bench(pure_export, contexts=[16], batches=[1], max_bytes=1000, **QUICK)["rows"]
    assert fat[0]["status"] == "skipped" and "of memory and more, and may take 0.00 GiB" in fat[0]["reason"]
    assert calls == [] and fat[0]["decode_tokens_per_second"] is None


def test_what_a_point_took_tells_what_a_larger_one_takes() -> None:
    side = speed_points.Side(
        role="student", name="s", folder=Path(), model=None, weights=1, positions=None, beyond=None
    )
    plan = speed_points.Plan(
        new_tokens=8, repeats=3, seconds=60.0, max_bytes=None, memory=False, seed=0, vocabulary=9
    )  # fmt: skip
    side.done.append((100, 2, 5.0, 6.0))  # prefill 5 s, new tokens 1 s
    assert speed_points._too_much(side, 100, 8, plan) is None  # 2 x (20 + 1) s
    assert "would take some 62 s, more than 60 s" in str(speed_points._too_much(side, 300, 4, plan))
    assert speed_points._too_much(side, 50, 1000, plan) is None, "a smaller context says nothing about it"


@pytest.mark.slow
def test_memory_of_a_fresh_process(pure_export: Path) -> None:
    """Resident growth in a process of its own; one that may not have the memory fails instead of the machine."""
    about = {"dtype": "float32", "vocabulary": 259, "batch": 64, "seed": 0, "seconds": 200.0}
    found = speed_memory.child_growth(pure_export, context=256, max_bytes=None, **about)
    cache = 64 * 12816
    assert found.bytes is not None and found.bytes > cache and found.reason is None
    none = speed_memory.child_growth(pure_export, context=256, max_bytes=1 << 20, **about)
    assert none.bytes is None and none.fatal and "takes more than 0.0 GiB" in str(none.reason)


def test_a_memory_figure_stands_beside_the_weights(pure_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def growth(folder: Path, **given: Any) -> speed_memory.Growth:
        asked.append(given)
        fits = given["context"] < 32
        return speed_memory.Growth(bytes=5000 if fits else None, reason=None if fits else "too fat", fatal=not fits)

    monkeypatch.setattr(speed_memory, "child_growth", growth)
    rows = bench(pure_export, contexts=[16, 32], batches=[1], **QUICK | {"memory": True})["rows"]
    model, _ = linearize.load(pure_export, device="cpu", dtype="float32")
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert (rows[0]["weights_bytes"], rows[0]["growth_bytes"]) == (weights, 5000)
    assert rows[0]["peak_bytes"] == weights + 5000 and rows[0]["memory_method"] == speed_memory.CPU_METHOD
    assert (rows[1]["status"], rows[1]["reason"]) == ("skipped", "too fat")
    assert [given["batch"] for given in asked] == [1, 1] and asked[0]["dtype"] == "float32"


def test_bad_input_and_nothing_left(pure_export: Path, teacher_folder: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"contexts": [0]}, "contexts: needs"),
        ({"contexts": []}, "contexts: needs"),
        ({"batches": []}, "batches: needs"),
        ({"new_tokens": 7}, "at least 8"),
        ({"repeats": 0}, "repeats: needs"),
        ({"max_seconds": 0.0}, "must be positive"),
        ({"file": tmp_path / "no" / "rows.jsonl"}, "rows.jsonl: cannot be written"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ):
        with pytest.raises(UsageError, match=message):
            bench(pure_export, **QUICK | given)
    with pytest.raises(UsageError, match="there is no model"):
        bench(tmp_path / "absent", **QUICK)


def test_a_student_reads_on_only_where_its_rope_does(tmp_path: Path) -> None:
    from transformers import GPT2Config, LlamaConfig

    assert speed._why_not_beyond(LlamaConfig()) is None
    dynamic = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    reason = speed._why_not_beyond(dynamic)
    assert reason == "its dynamic RoPE depends on the length"
    assert speed._why_not_beyond(GPT2Config()) == "it has no rotary positions"
    side = speed_points.Side(role="student", name="s", folder=tmp_path, model=None, weights=1, positions=128,
                             beyond=reason)  # fmt: skip
    with pytest.raises(RefusedError, match=f"no context is left to measure: s: 200 tokens.*, and {reason}"):
        speed._points([200], [1], [side], 8)
    assert speed._points([200, 100], [1], [side], 8) == [(100, 1), (200, 1)], "one point that can be measured is enough"


def test_contexts_that_are_chosen_fit() -> None:
    def side(positions: int) -> speed_points.Side:
        return speed_points.Side(role="teacher", name="t", folder=Path(), model=None, weights=1, positions=positions,
                                 beyond=None)  # fmt: skip

    assert speed._points(None, [2, 1, 2], [side(4096)], 64) == [(c, b) for c in (512, 2048) for b in (1, 2)]
    assert [c for c, _ in speed._points(None, [1], [side(1024)], 64)] == [256, 512, 960]
    with pytest.raises(RefusedError, match="leave no room in 64 positions"):
        speed._points(None, [1], [side(64)], 64)


def test_plots_are_svg_of_both_models(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra `plots`")
    from linearize.evaluate.speed_plots import draw

    paths = draw(result["rows"], tmp_path / "plots")
    assert [path.name for path in paths] == ["decode.svg", "prefill.svg", "first-token.svg", "cache.svg"]
    for path in paths:
        text = path.read_text()
        xml.etree.ElementTree.fromstring(text)
        assert "student, batch 1" in text and "teacher, batch 3" in text and "context, tokens" in text
        assert metadata.version("torch") in text
    again = draw(result["rows"], tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: cannot be written"):
        draw(result["rows"], tmp_path / "file")


def test_without_matplotlib_it_is_said_and_still_measured(
    pure_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    found = bench(pure_export, contexts=[16], batches=[1], plots=tmp_path / "plots", **QUICK)
    assert found["rows"][0]["status"] == "ok" and found["plots"] == []
    assert "they need the package matplotlib" in found["notes"][0] and "pip install" in found["notes"][0]
    assert not (tmp_path / "plots").exists()


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_allocators(pure_export: Path, teacher_folder: Path) -> None:
    given = QUICK | {"device": "cuda", "dtype": "bfloat16"}
    rows = bench(pure_export, against=teacher_folder, contexts=[24, 96], batches=[4], **given)["rows"]
    for row in rows:
        assert row["status"] == "ok" and row["memory_method"] == speed_memory.GPU_METHOD and row["machine"]["gpu"]
        assert row["growth_bytes"] >= row["state_bytes"] + row["kv_bytes"] > 0
        assert row["peak_bytes"] == row["growth_bytes"] + row["weights_bytes"]
    assert rows[0]["state_bytes"] == rows[2]["state_bytes"] > 0
