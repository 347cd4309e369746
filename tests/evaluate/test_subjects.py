"""What is judged: in how many bits a teacher is held, and how far a model can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import linearize
from linearize import teacher_bits
from linearize.artifacts.quantised import quantised_modules
from linearize.errors import UsageError
from linearize.evaluate import audit, evaluate, subjects
from linearize.evaluate.recall import recall
from linearize.evaluate.subjects import learned_positions, open_subject, trained_positions
from linearize.evaluate.tasks import evaluate_tasks
from linearize_cli.app import main
from tests import encoders
from tests.conftest import save_byte_tokenizer
from tests.modeling.families import teacher as make_teacher

needs = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (the extra quantize)")
WORDS = "alpha beta gamma delta one two three four five six seven eight nine ten red green blue white black old new "
HELD = "was held in 4 bit (nf4): its figures are not quite those of its own weights"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if bitsandbytes were here."""
    monkeypatch.setattr(teacher_bits.importlib.util, "find_spec", lambda name: True)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """No weights may be read; what was asked to be is listed."""
    asked: list[Any] = []
    monkeypatch.setattr(subjects, "load_model", lambda *args, **kwargs: asked.append((args, kwargs)))
    yield asked
    assert asked == []


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GPT-2 and OPT, whose 64 positions are learned, and an OPT of 32."""
    base = tmp_path_factory.mktemp("learned")
    for name, family, positions in (("gpt2", "gpt2", 64), ("opt", "opt", 64), ("short", "opt", 32)):
        sizes = {"vocab_size": 259, "num_hidden_layers": 1, "max_position_embeddings": positions}
        make_teacher(family, **sizes).save_pretrained(base / name)
        save_byte_tokenizer(base / name)
    return {path.name: path for path in base.iterdir()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text with enough different words for recall."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n\n".join(" ".join(f"{word}{i}" for word in WORDS.split()) for i in range(60)))
    return str(path)


# ----------------------------------------------------------------------------------------------- how far a model reads


def test_what_a_config_says_of_positions(learned: dict[str, Path], teacher_folder: Path) -> None:
    gpt2, llama = open_subject(learned["gpt2"]).config, open_subject(teacher_folder).config
    assert (learned_positions(gpt2), trained_positions(gpt2)) == (64, 64)
    assert (learned_positions(llama), trained_positions(llama)) == (None, 128)
    assert learned_positions(LlamaConfig()) is None and learned_positions(object()) is None


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize(
    "command",
    [
        "eval {0} --data {1} --context 65",
        "eval {0} --data {1} --protocol documents@65",
        "eval demo --against {0} --data {1} --context 65",
        "recall {0} --against {0} --data {1} --context 400 --distance 160",
    ],
)
def test_learned_positions_end_before_any_weight_is_read(
    command: str, name: str, learned: dict[str, Path], words: str, unread: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = learned[name]
    assert main(command.format(folder, words).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"reach beyond the 64 positions that {folder} has learned" in err
    assert len(err.splitlines()) == 1 and err.endswith("It can read no further: ask for 64 or fewer\n")


def test_a_teacher_with_fewer_positions_is_named(learned: dict[str, Path], words: str, unread: list[Any]) -> None:
    with pytest.raises(UsageError, match=f"windows of 64 tokens .* 32 positions that {learned['short']} has learned"):
        evaluate(str(learned["opt"]), against=str(learned["short"]), data=words)


def test_an_audit_beyond_learned_positions_is_refused(
    learned: dict[str, Path], words: str, monkeypatch: pytest.MonkeyPatch, unread: list[Any]
) -> None:
    monkeypatch.setattr("linearize.evaluate.recovery._spec", lambda student: LOLCATS)
    with pytest.raises(UsageError, match="windows of 65 tokens reach beyond the 64 positions"):
        audit(str(learned["gpt2"]), against=str(learned["gpt2"]), data=words, context=65)


class LOLCATS:
    """What an audit reads of a mixer."""

    window, sinks = 8, 0


def test_all_learned_positions_are_used(learned: dict[str, Path], words: str) -> None:
    report = evaluate(str(learned["gpt2"]), data=words, context=64, max_windows=2, device="cpu")
    assert report["tokens"] == 2 * 63 and not report["beyond_trained"] and report["notes"] == []


def test_text_beyond_learned_positions_is_not_begun(
    learned: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", str(learned["gpt2"]), "--prompt", "four", "--device", "cpu", "--json", "--max-new-tokens"]
    assert main([*command, "61"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 61
    assert main([*command, "62"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "4 tokens of the prompt and 62 new ones are more than the 64 positions" in err
    assert err.endswith("Use --max-new-tokens 61 or less\n")
    assert main(["generate", str(learned["gpt2"]), "--prompt", "long" * 20]) == 2
    assert capsys.readouterr().err.endswith("Shorten the text\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_rotary_positions_go_on_with_a_warning_at_the_start(
    as_json: bool, teacher_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(teacher_folder), "--data", str(text_file), "--context", "200", "--device", "cpu"]
    assert main([*command, *(["--json"] if as_json else [])]) == 0
    out, err = capsys.readouterr()
    line = f"windows of 200 tokens reach beyond the 128 positions that {teacher_folder} was trained on"
    assert err.startswith(f"warning: {line}\n") and err.count(line) == 1
    if as_json:
        report = json.loads(out)
        assert report["beyond_trained"] is True and report["notes"] == [line]
    assert main([*command[:5], "128", *command[6:], "--json"]) == 0
    out, err = capsys.readouterr()
    assert "warning" not in err and json.loads(out)["beyond_trained"] is False


def test_an_audit_and_a_recall_name_both_models(
    pure_export: Path, teacher_folder: Path, text_file: Path, words: str,
    undocumented: Callable[[str, dict[str, Any]], list[str]],
) -> None:  # fmt: skip
    both = [pure_export, teacher_folder]
    report = audit(str(both[0]), against=str(both[1]), data=str(text_file), context=256, max_windows=2, device="cpu")
    lines = [f"windows of 256 tokens reach beyond the 128 positions that {name} was trained on" for name in both]
    assert report["notes"][:2] == lines and report["beyond_trained"] and undocumented("audit", report) == []
    report = recall(
        str(both[0]), against=str(both[1]), data=words, context=400, distances=[160], queries=32, device="cpu"
    )
    assert all(f"128 positions that {name} was trained on" in n for name, n in zip(both, report["notes"][:2]))
    assert report["beyond_trained"] and undocumented("recall", report) == []


def test_generation_says_it_in_our_words(teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(teacher_folder), "--prompt", "x" * 120, "--max-new-tokens", "12", "--device", "cpu"]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "120 tokens of the prompt and 12 new ones reach beyond the 128 positions" in err and "reminder" not in err


def test_a_converted_model_is_no_teacher(pure_export: Path, hybrid_export: Path, words: str, unread: list[Any]) -> None:
    """Its linear layers could not be cut to a window, and the floor would be the model itself."""
    for run in (audit, recall):
        with pytest.raises(UsageError, match=r"hybrid is a converted model itself, so it cannot be cut"):
            run(str(pure_export), against=str(hybrid_export), data=words)


# ------------------------------------------------------------------------------------------- a teacher in 8 or 4 bits


@pytest.mark.parametrize("command", ["eval", "audit", "recall", "report"])
@pytest.mark.parametrize(
    ("bits", "told"),
    [("5", "5 is not one of 4, 8. Use 8 or 4"), ("4", "needs bitsandbytes, which is not installed. pip install")],
)
def test_bits_are_refused_before_anything_is_read(
    command: str, bits: str, told: str, pure_export: Path, monkeypatch: pytest.MonkeyPatch,
    unread: list[Any], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(teacher_bits.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("linearize.report.make.require_export", lambda folder, name: None)
    words = [command, str(pure_export), "--against", "demo", "--data", "nothere.txt", "--teacher-bits", bits]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"--teacher-bits{':' if bits == '5' else ''} {told}" in err


@pytest.mark.usefixtures("installed")
def test_bits_need_a_teacher_that_is_read_from_files(pair: Any, teacher_folder: Path, text_file: Path) -> None:
    name, data = str(teacher_folder), str(text_file)
    with pytest.raises(UsageError, match="--teacher-bits is for the model that --against names"):
        linearize.evaluate(name, data=data, teacher_bits=4)
    with pytest.raises(UsageError, match="--against names"):
        evaluate_tasks(name, tasks=["piqa"], teacher_bits=4)
    for run in (linearize.evaluate, linearize.audit, linearize.recall):
        with pytest.raises(UsageError, match="the teacher is in memory already"):
            run(name, against=pair, data=data, teacher_bits=4)


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_quantised_is_refused_by_name(
    pure_export: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, unread: list[Any]
) -> None:
    with pytest.raises(UsageError, match="the teacher is a converted model, whose mixers are not quantised"):
        evaluate(str(teacher_folder), against=str(pure_export), data=str(text_file), teacher_bits=8)
    make_teacher("mixtral", vocab_size=259).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="does not quantise the experts of mixtral"):
        audit(str(pure_export), against=str(tmp_path), data=str(text_file), teacher_bits=4)


@pytest.mark.usefixtures("installed")
def test_the_teacher_alone_is_asked_for_in_bits(
    pure_export: Path, teacher_folder: Path, text_file: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plumbing of every command, without bitsandbytes: which model is loaded in how many bits."""
    asked: dict[str, int | None] = {}
    real = subjects.load_model

    def load(path: Path, *, bits: int | None, **how: Any) -> Any:
        asked[str(path)] = bits
        return real(path, **how)

    monkeypatch.setattr(subjects, "load_model", load)
    names: dict[str, Any] = {"against": str(teacher_folder), "device": "cpu", "teacher_bits": 4}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "eval": lambda: linearize.evaluate(str(pure_export), data=str(text_file), max_windows=1, **names),
        "audit": lambda: linearize.audit(str(pure_export), data=str(text_file), max_windows=1, **names),
        "recall": lambda: linearize.recall(str(pure_export), data=words, context=400, distances=[40], **names),
    }
    for command, run in runs.items():
        asked.clear()
        report = run()
        assert asked == {str(pure_export): None, str(teacher_folder): 4}, command
        assert report["teacher_bits"] == 4, command
        notes = (report["against"] if command == "eval" else report)["notes"]
        assert f"{teacher_folder} {HELD}" in notes, command


@needs
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_teacher_is_judged(
    bits: int, pure_export: Path, teacher_folder: Path, text_file: Path,
    undocumented: Callable[[str, dict[str, Any]], list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its figures are near its own and not the same; the student's are not touched; it is cut as any other."""
    held: list[int] = []
    real = subjects.load_model

    def load(*args: Any, **how: Any) -> Any:
        model = real(*args, **how)
        held.append(len(quantised_modules(model)))
        return model

    monkeypatch.setattr(subjects, "load_model", load)
    names: dict[str, Any] = {"against": str(teacher_folder), "data": str(text_file), "device": "cpu"}
    plain, packed = (audit(str(pure_export), **names, teacher_bits=kind) for kind in (None, bits))
    assert held == [0, 0, 0, 14] and (plain["teacher_bits"], packed["teacher_bits"]) == (None, bits)
    assert packed["ppl_student"] == plain["ppl_student"] and packed["branches"] == plain["branches"]
    for key in ("ppl_teacher", "ppl_window"):
        assert packed[key] != plain[key] and packed[key] == pytest.approx(plain[key], rel=0.5)
    assert undocumented("audit", packed) == []
    report = evaluate(str(teacher_folder), **names, teacher_bits=bits)
    assert report["token_perplexity"] != report["against"]["token_perplexity"]
    assert report["against"]["token_perplexity"] == pytest.approx(packed["ppl_teacher"], rel=0.3)
    assert undocumented("eval --data", report) == []


@needs
def test_a_quantised_encoder_is_judged(tmp_path: Path, undocumented: Callable[..., list[str]]) -> None:
    encoders.build(tmp_path / "teacher", "bert")
    data = str(encoders.text_file(tmp_path / "text.jsonl"))
    name = str(tmp_path / "teacher")
    report = linearize.evaluate(name, against=name, data=data, max_windows=4, device="cpu", teacher_bits=4)
    assert report["teacher_bits"] == 4 and report["notes"] == [] and "4 bit" in report["against"]["notes"][0]
    assert report["masked_nll"] != report["against"]["masked_nll"]
    assert undocumented("eval of a masked model", report) == []
