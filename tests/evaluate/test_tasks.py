"""lm-evaluation-harness on an export: with no glue of ours, in batches, and beside the teacher in one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import UsageError
from linearize.evaluate import tasks as module
from linearize.evaluate.tasks import evaluate_tasks

MISSING = "needs lm-eval, of the extra `eval`"
CHOICE, WRITE = "linearize_choice", "linearize_write"
SHARED = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    CHOICE: """\
output_type: multiple_choice
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    WRITE: """\
output_type: generate_until
doc_to_target: "{{good}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 24}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
DOCS = [{"question": "count" + " on" * (i % 5), "good": f" {i * 7}", "bad": f" {i * 3 + 1}?"} for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files over a local data set."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + SHARED.format(data=folder / "docs.jsonl") + text)
    shares = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (folder / "group.yaml").write_text(f"group: linearize_group\ntask: [{CHOICE}]\n{shares}\n")
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def few_tasks() -> Callable[..., Any]:
    """Stands in for the harness's own TaskManager call: its thousands of task files need not be read each time."""
    pytest.importorskip("lm_eval", reason=MISSING)
    from lm_eval.tasks import TaskManager

    return lambda path: TaskManager(include_path=str(path), include_defaults=False)


def test_batches_of_an_export_are_each_row_alone(pure_export: Path, hybrid_export: Path, folder: Path) -> None:
    """The harness's own model class after `import linearize`: right padding for scores, left padding for texts."""
    pytest.importorskip("lm_eval", reason=MISSING)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    import linearize  # noqa: F401 - all that is needed

    for path in (pure_export, hybrid_export):
        found = []
        for batch in (1, 5):
            harness = HFLM(pretrained=str(path), batch_size=batch, device="cpu", dtype="float32")
            assert type(harness.model).__module__ == "linearize.modeling.modeling_linearized"
            kinds = {
                "loglikelihood": lambda doc: (doc["question"], doc["good"]),
                "loglikelihood_rolling": lambda doc: (doc["question"] * 12,),
                "generate_until": lambda doc: (doc["question"], {"until": ["zz"], "max_gen_toks": 24}),
            }
            found.append({
                kind: getattr(harness, kind)([Instance(kind, d, make(d), i) for i, d in enumerate(DOCS)])  # type: ignore[arg-type]
                for kind, make in kinds.items()
            })  # fmt: skip
        alone, together = found
        scores, others = ([score for score, _ in f["loglikelihood"]] for f in found)
        assert others == pytest.approx(scores, rel=1e-5)
        assert together["loglikelihood_rolling"] == pytest.approx(alone["loglikelihood_rolling"], rel=1e-5)
        assert together["generate_until"] == alone["generate_until"]
        assert len({len(doc["question"]) for doc in DOCS[:5]}) > 1 and any(alone["generate_until"]), "it was padded"


@pytest.mark.slow
def test_the_harness_by_itself_says_the_same(
    pure_export: Path, folder: Path, tmp_path: Path, few_tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lm-eval run --model hf` with trust_remote_code, in a process that never imports linearize, in batches of 5."""
    pytest.importorskip("lm_eval", reason=MISSING)
    code = (
        "import sys\nsys.modules['linearize'] = None\nfrom lm_eval.__main__ import cli_evaluate\n"
        "sys.argv[0] = 'lm-eval'\ncli_evaluate()\nassert sys.modules['linearize'] is None"
    )
    model = f"pretrained={pure_export},trust_remote_code=True,dtype=float32"
    arguments = ["run", "--model", "hf", "--model_args", model,
                 "--tasks", f"{CHOICE},{WRITE}", "--include_path", str(folder), "--batch_size", "5", "--device", "cpu",
                 "--output_path", str(tmp_path / "out"), "--log_samples"]  # fmt: skip
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    monkeypatch.setattr(module, "_manager", few_tasks)
    ours = evaluate_tasks(pure_export, tasks=[CHOICE, WRITE], include_path=folder, batch_size=1)
    assert {(r["task"], r["metric"]) for r in ours["rows"]} == {
        (CHOICE, "acc"), (CHOICE, "acc_norm"), (WRITE, "exact_match"),
    }  # fmt: skip
    for row in ours["rows"]:
        other = theirs[row["task"]]
        assert row["student"] == other[f"{row['metric']},none"]
        assert row["student_se"] == other[f"{row['metric']}_stderr,none"]
        assert row["questions"] == len(DOCS) and row["teacher"] is None and row["difference"] is None
    assert ours["against"] is None and ours["versions"]["lm_eval"] and ours["context"] == 128


def test_teacher_and_student_in_one_table(
    pure_export: Path,
    teacher_folder: Path,
    folder: Path,
    few_tasks: Any,
    monkeypatch: pytest.MonkeyPatch,
    undocumented: Callable[[str, dict[str, Any]], list[str]],
) -> None:
    monkeypatch.setattr(module, "_manager", few_tasks)
    seen: list[dict[str, Any]] = []
    ask = module._ask
    monkeypatch.setattr(module, "_ask", lambda *a: seen.append(ask(*a)) or seen[-1])
    found = evaluate_tasks(
        pure_export, tasks=["linearize_group"], against=teacher_folder, include_path=folder, limit=7, fewshot=1
    )
    assert (found["model"], found["against"]) == (str(pure_export), str(teacher_folder))
    assert (found["limit"], found["fewshot"], found["device"], found["dtype"]) == (7, 1, "cpu", "float32")
    assert found["notes"] == []
    rows = {row["metric"]: row for row in found["rows"]}
    for metric, row in rows.items():
        assert row["fewshot"] == 1 and row["questions"] == 7 and row["higher_is_better"] is True
        mine, theirs = ([float(s[metric]) for s in each["samples"][CHOICE]] for each in seen)
        gaps = [a - b for a, b in zip(mine, theirs, strict=True)]
        mean = sum(gaps) / 7
        assert row["student"] == pytest.approx(sum(mine) / 7) and row["teacher"] == pytest.approx(sum(theirs) / 7)
        assert row["difference"] == pytest.approx(mean, abs=1e-12)
        assert row["difference_se"] == pytest.approx((sum((g - mean) ** 2 for g in gaps) / 6 / 7) ** 0.5)
    assert [(row["task"], row["metric"]) for row in found["rows"]] == [(CHOICE, "acc"), (CHOICE, "acc_norm")]
    (group,) = found["groups"]  # what a group comes to stands apart, and without an error in pairs
    assert (group["task"], group["metric"], group["questions"]) == ("linearize_group", "acc", 7)
    assert group["student"] == rows["acc"]["student"] and group["difference_se"] is None
    assert json.loads(json.dumps(found)) == found
    assert undocumented("eval --tasks", found) == []


def test_a_teacher_in_few_bits_and_prompts_beyond_its_positions(
    pure_export: Path,
    teacher_folder: Path,
    folder: Path,
    few_tasks: Any,
    monkeypatch: pytest.MonkeyPatch,
    undocumented: Callable[[str, dict[str, Any]], list[str]],
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the extra `quantize`")
    monkeypatch.setattr(module, "_manager", few_tasks)
    found = evaluate_tasks(
        pure_export, tasks=[CHOICE], against=teacher_folder, include_path=folder, limit=3, context=256, teacher_bits=4
    )
    assert (found["teacher_bits"], found["beyond_trained"]) == (4, True)
    assert [note.split(" of up to ")[0] for note in found["notes"][:2]] == ["prompts", "prompts"]
    assert f"{teacher_folder} was held in 4 bit" in found["notes"][2]
    assert all(row["teacher"] is not None for row in found["rows"]) and undocumented("eval --tasks", found) == []
    # Warnings of the harness are counted, not printed: here, prompts that do not fit into the context.
    cut = evaluate_tasks(teacher_folder, tasks=[CHOICE], include_path=folder, limit=3, context=5)
    assert any(note.startswith("lm-eval: Combined length of context (N)") for note in cut["notes"])
    assert cut["context"] == 5


def test_faults_before_any_weight_is_loaded(
    teacher_folder: Path, folder: Path, tmp_path: Path, few_tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_manager", few_tasks)
    monkeypatch.setattr(module, "_ask", lambda *a: pytest.fail("a model was asked"))
    with pytest.raises(UsageError, match=f"has no task 'linearize_chose'.*Did you mean '{CHOICE}'"):
        evaluate_tasks(teacher_folder, tasks=["linearize_chose"], include_path=folder)
    lost = SHARED.format(data=tmp_path / "nowhere.jsonl")
    (tmp_path / "lost.yaml").write_text("task: lost\n" + lost + TASKS[CHOICE])
    with pytest.raises(UsageError, match="lm-eval could not go on with the data or the settings: FileNotFoundError"):
        evaluate_tasks(teacher_folder, tasks=["lost"], include_path=tmp_path)
    with pytest.raises(UsageError, match="no such folder of tasks"):
        evaluate_tasks(teacher_folder, tasks=[CHOICE], include_path=tmp_path / "no")


def test_tasks_of_the_harness_and_of_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason=MISSING)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(tasks, "TaskManager", lambda **given: asked.append(given))
    module._manager(folder)
    module._manager(None)
    assert asked == [{"include_path": str(folder)}, {"include_path": None}], "its own are there in any case"

    def broken(**given: Any) -> None:
        raise ValueError("while parsing\na block")

    monkeypatch.setattr(tasks, "TaskManager", broken)
    with pytest.raises(UsageError, match="could not go on with the task files: ValueError: while parsing a block"):
        module._manager(folder)


def test_bad_arguments_and_a_missing_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    for tasks, given, message in (
        ([], {}, "no task is named"),
        (["a"], {"limit": 0}, "limit 0 is less than 1"),
        (["a"], {"fewshot": -1}, "fewshot -1 is less than 0"),
        (["a"], {"batch_size": 0}, "batch_size 0 is less than 1"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_tasks("demo", tasks=tasks, **given)  # type: ignore[arg-type]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package lm-eval.*pip install 'lm-eval") as caught:
        evaluate_tasks("demo", tasks=["piqa"])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_errors_of_differences_take_questions_in_pairs() -> None:
    def one(values: list[Any]) -> dict[str, Any]:
        return {"samples": {"t": [{"filter": "none", "acc": v} for v in values]}}

    alike = module._paired(one([1.0, 0.0, True]), one([1.0, 0.0, 1.0]), "t", "acc", "none", 2 / 3)
    assert alike == 0.0
    apart = module._paired(one([1.0, 0.0]), one([0.0, 0.0]), "t", "acc", "none", 0.5)
    assert apart == pytest.approx(0.5)
    # Not a mean over questions, unknown, or of one question: no error is better than a wrong one.
    assert module._paired(one([1.0, 0.0]), one([0.0, 0.0]), "t", "acc", "none", 0.7) is None
    assert module._paired(one([(1, 2), (3, 4)]), one([(1, 2), (3, 4)]), "t", "acc", "none", 0.5) is None
    assert module._paired(one([1.0]), one([0.0]), "t", "acc", "none", 1.0) is None
