"""From a teacher on the Hub to a student on the Hub and back again, against a local server."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import linearize
from linearize.artifacts.download import pin
from linearize.artifacts.load import load_model, resolve
from linearize.artifacts.manifest import read_manifest, verify_manifest
from linearize.artifacts.quality import BEGIN, END, TASK_NAME
from linearize.convert import pipeline
from linearize.errors import LinearizeError, RefusedError, UsageError
from linearize.recipe import load_recipe
from tests.artifacts.hub_server import Hub, Repo

CARD = "---\nlicense: other\nlicense_name: toy-terms\nlicense_link: LICENSE\n---\n\n# A teacher\n"
QUICK = [
    "context=128",
    "mixer.window=16",
    "device=cpu",
    "align.batch_tokens=512",
    "align.tokens=4k",
    "finetune.tokens=0",
]


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> dict[str, bytes]:
    """A tiny Llama as files, and what no download may touch beside it."""
    folder = build_llama(tmp_path_factory.mktemp("teacher"), initializer_range=0.2, max_position_embeddings=256)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    junk = ("pytorch_model.bin", "modeling_evil.py", "optimizer.pt", "LICENSE.pkl", "sub/config.json", "notes.txt")
    return {**files, "README.md": CARD.encode(), "LICENSE": b"terms", **dict.fromkeys(junk, b"import os")}


@pytest.fixture
def teacher(hub: Hub, teacher_files: dict[str, bytes]) -> Repo:
    """The teacher as owner/teacher; tag v1 is it, main has moved on to something broken."""
    repo = hub.make("owner/teacher", teacher_files)
    repo.refs["v1"] = repo.refs["main"]
    repo.commit({"config.json": b"{}"}, "Broken since")
    return repo


@pytest.fixture
def text(tmp_path: Path, root: Path) -> Path:
    path = tmp_path / "private" / "text.txt"
    path.parent.mkdir()
    path.write_text((root / "LICENSE").read_text() * 3)
    return path


@pytest.fixture
def out(teacher: Repo, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student of owner/teacher@v1."""
    monkeypatch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
    monkeypatch.chdir(tmp_path)
    linearize.convert("owner/teacher@v1", "made", recipe="lolcats", data=str(text), overrides=QUICK)
    return tmp_path / "made"


def test_there_and_back_again(
    hub: Hub,
    teacher: Repo,
    out: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import ModelCard, constants

    from linearize_cli.app import main

    fetched = {line.rsplit("/", 1)[1] for line in hub.log if line.startswith("GET ") and "/resolve/" in line}
    assert {"config.json", "README.md", "LICENSE"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling_evil.py", "optimizer.pt", "LICENSE.pkl", "notes.txt"}
    assert not [line for line in hub.log if "/sub/" in line]

    manifest = read_manifest(out)
    stated = manifest["teacher"]
    assert (stated["name"], stated["repo"], stated["revision"]) == (
        "owner/teacher",
        "owner/teacher",
        teacher.refs["v1"],
    )
    assert stated["licence"] == {"id": "other", "name": "toy-terms", "link": "LICENSE", "source": "README.md"}
    card = ModelCard((out / "README.md").read_text())
    assert card.data.base_model == "owner/teacher" and card.data.eval_results is None
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "toy-terms", "LICENSE")
    for name in ("README.md", "linearize.json", "config.json"):
        assert str(tmp_path) not in (out / name).read_text()
    recipe = card.text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert load_recipe(str(tmp_path / "recipe.yaml")).digest() == manifest["recipe_digest"]
    assert f"linearize convert owner/teacher@{teacher.refs['v1']} OUT --recipe recipe.yaml --data text.txt" in card.text

    # The card is people's to edit: that harms nothing, and their words stay.
    (out / "README.md").write_text(
        (out / "README.md").read_text().replace("## Limits", "## Thanks\n\nmine\n\n## Limits")
    )
    report = linearize.audit("made", against="owner/teacher@v1", data=str(text), context=128, device="cpu", save=True)
    assert verify_manifest(out) == [] and linearize.load("made", device="cpu")
    saved = read_manifest(out)
    assert saved["audit"]["R"] == report["R"] and saved["audit"]["branches"] == report["branches"]
    assert saved["audit"]["against"]["revision"] == teacher.refs["v1"] and saved["audit"]["data"]["name"] == "text.txt"
    assert {key: saved[key] for key in manifest} == manifest
    card = ModelCard((out / "README.md").read_text())
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["perplexity"].metric_value == pytest.approx(report["ppl_student"], rel=1e-5)
    assert results["perplexity"].metric_args["protocol"] == report["protocol"] == "concat@128"
    assert results["perplexity"].dataset_args["sha256"] == report["data"]["sha256"]
    assert f"| {report['ppl_teacher']:.4f} |" in card.text and "Not measured yet" not in card.text
    assert "## Thanks\n\nmine" in card.text and card.text.count(BEGIN) == card.text.count(END) == 1
    assert str(tmp_path) not in str(card) + (out / "linearize.json").read_text()

    result = linearize.push(out, "me/student")
    assert result["notes"] == [] and result["base_model"] == "owner/teacher" and result["licence"] == "other"
    pushed = hub.repos["model", "me/student"]
    sent = ModelCard(pushed.files["README.md"].decode())
    assert sent.data.model_name == "student" and len(sent.data.eval_results) == len(results)
    assert "linearize audit me/student --against" in sent.text and '"made"' not in sent.text
    assert sent.text.count('from_pretrained("me/student"') == 4

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other-cache"))
    hub.log.clear()
    model, tokenizer = linearize.load("me/student", revision=result["commit"], device="cpu")
    assert not [line for line in hub.log if line.endswith(".py")]
    folder = resolve("me/student")
    for path in folder.iterdir():
        assert path.read_bytes() == pushed.files[path.name], path.name
    ids = tokenizer("Licensed under the", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(out, device="cpu")(ids).logits)

    pushed.commit({"config.json": b"{}"}, "Broken", ref="broken", parent=result["commit"])
    student, short = f"me/student@{result['commit']}", ["--context", "128", "--device", "cpu"]
    judged = ["--against", "owner/teacher@v1", "--data", str(text)]
    for words in (
        ["verify", student, *judged],
        ["verify", "me/student", "--revision", result["commit"]],
        ["recall", student, *judged, *short, "--queries", "32"],
        ["report", student],
        ["bench", student, "--contexts", "16", "--batches", "1", "--new-tokens", "8", "--no-memory", "--device", "cpu"],
        ["eval", student, *judged, *short],
        ["audit", "me/student", "--revision", result["commit"], *judged, *short],
    ):
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "student-report.html").is_file()
    assert main(["verify", "me/student@broken"]) == 4 and "config.json" in capsys.readouterr().err

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert resolve("me/student") == resolve(f"me/student@{result['commit']}") == folder and hub.log == []
    damaged = folder / "config.json"
    real = damaged.resolve()
    real.write_bytes(real.read_bytes() + b" ")
    with pytest.raises(UsageError, match=r"config.json has .* it is truncated or was replaced"):
        linearize.load("me/student", device="cpu")


def test_what_cannot_be_saved(
    hub: Hub, out: Path, text: Path, tmp_path: Path, build_llama: Callable[..., Path]
) -> None:
    def saving(model: str, against: str) -> str:
        with pytest.raises(LinearizeError) as caught:
            linearize.audit(model, against=against, data=str(text), context=128, device="cpu", save=True)
        return f"{type(caught.value).__name__}: {caught.value}"

    before = (out / "linearize.json").read_bytes(), (out / "README.md").read_bytes()
    build_llama(tmp_path / "other", seed=1, max_position_embeddings=256)
    assert saving("made", "other").startswith("RefusedError: other is not the teacher that made was made from")
    linearize.push(out, "me/student")
    line = saving("me/student", "owner/teacher@v1")
    assert line.startswith("UsageError: --save writes into OUT, and me/student is not a folder of yours")
    (out / "README.md").write_text("---\na: [\n---\n")
    assert saving("made", "owner/teacher@v1").startswith("UsageError: the metadata of README.md cannot be read")
    assert (out / "linearize.json").read_bytes() == before[0]

    # Other people's results stay in the metadata, and so does an export that was made when cards had a hash.
    theirs = [{"name": "x", "results": [{"task": {"type": "text-generation"}, "dataset": {"name": "d", "type": "d"},
               "metrics": [{"type": "accuracy", "value": 1.0}]}]}]  # fmt: skip
    (out / "README.md").write_text(f"---\nmodel-index: {json.dumps(theirs)}\ncustom: 1\n---\n\n# Mine\n")
    manifest = read_manifest(out)
    manifest["files"]["README.md"] = {"sha256": "0" * 64, "size": 1}
    (out / "linearize.json").write_text(json.dumps(manifest))
    for _ in range(2):
        linearize.audit("made", against="owner/teacher@v1", data=str(text), context=128, device="cpu", save=True)
    from huggingface_hub import ModelCard

    card = ModelCard((out / "README.md").read_text())
    ours = [result for result in card.data.eval_results if result.task_name == TASK_NAME]
    assert [r.metric_type for r in card.data.eval_results if r not in ours] == ["accuracy"] and len(ours) in (2, 3)
    assert card.data.model_name == "x" and card.data.to_dict()["custom"] == 1
    assert card.text.count("## Quality") == 1 and "# Mine" in card.text
    assert verify_manifest(out) == [] and "README.md" not in read_manifest(out)["files"]


def test_names_of_models(hub: Hub, teacher: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = resolve("owner/teacher@v1")
    assert folder.name == teacher.refs["v1"] and resolve(f"owner/teacher@{folder.name}") == folder
    assert resolve("owner/teacher").name == teacher.refs["main"]
    for name, kind, words in (
        ("owner/teacher@v9", UsageError, "owner/teacher has no revision v9"),
        ("owner/nobody", UsageError, "no Hub model owner/nobody that you may read"),
        ("owner/teacher@../../x", UsageError, "is no revision"),
        ("owner/teacher@", UsageError, "is no revision"),
    ):
        with pytest.raises(kind, match=words) as caught:
            resolve(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "owner").mkdir()
    shutil.copytree(folder, tmp_path / "owner" / "teacher@v1")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/teacher@v1") == Path("owner/teacher@v1")  # a folder comes first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    for name in ("someone/model", "someone/model@v2"):
        with pytest.raises(RefusedError, match=f"HF_HUB_OFFLINE is set, and the Hub model {name} is not in the cache"):
            resolve(name)
    assert len(hub.log) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RefusedError, match=r"http://127\.0\.0\.1:9 could not be reached"):
        resolve("someone/model")


def test_the_commands_of_the_page(
    hub: Hub,
    teacher_files: dict[str, bytes],
    out: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/hub.md, line by line, with smaller numbers for the conversion."""
    import linearize.api
    from linearize_cli.app import main

    model = hub.make("owner/model", teacher_files)
    model.refs["v1.0"] = model.refs["main"]
    whole = linearize.api.audit
    monkeypatch.setattr(linearize.api, "audit", lambda *a, **options: whole(*a, **{**options, "max_windows": 1}))
    page = (root / "docs" / "hub.md").read_text()
    commands = [
        line for block in page.split("```")[1::2] for line in block.splitlines() if line.startswith("linearize ")
    ]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)[1:]
        if "--create-pr" in words:
            (Path("out") / "README.md").write_text((Path("out") / "README.md").read_text() + "\nSomething new.\n")
        assert main([*words, *(QUICK if words[0] == "convert" else [])]) == 0, (command, capsys.readouterr().err)
    made = hub.repos["model", "me/my-model"]
    assert made.private and "refs/pr/1" in made.refs and not hub.repos["model", "me/my-public-model"].private


def test_a_revision_apart(
    hub: Hub, teacher: Repo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from linearize_cli.app import main

    assert pin("owner/teacher", "v1") == pin("owner/teacher@v1", "v1") == "owner/teacher@v1"
    assert pin("demo", None) == "demo" and pin("owner/teacher@v1", None) == "owner/teacher@v1"
    for model, revision, words in (
        ("demo", "v1", "demo is not a Hub id"),
        (str(tmp_path), "v1", "is not a Hub id"),
        ("owner/teacher@v1", "v2", "names a revision, and --revision v2 another"),
        ("owner/teacher", "../v1", "is no revision"),
        ("owner/teacher", "", "is no revision"),
    ):
        with pytest.raises(UsageError, match=words):
            pin(model, revision)
    assert main(["inspect", "owner/teacher", "--revision", "v1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    assert main(["inspect", "owner/teacher", "--revision", "v9"]) == 2
    assert capsys.readouterr().err.startswith("error: owner/teacher has no revision v9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps.pt").touch()
    commands = (
        "inspect owner/teacher",
        "convert owner/teacher out --data demo",
        "eval owner/teacher --data demo",
        "generate owner/teacher --prompt a",
        "select owner/teacher --data demo --keep 1",
        "audit owner/teacher --against demo --data demo",
        "recall owner/teacher --against demo --data demo",
        "bench owner/teacher",
        "report owner/teacher",
        "verify owner/teacher",
        f"import lolcats owner/teacher out --distilled {tmp_path}/maps.pt",
    )
    for command in commands:
        assert main([*command.split(), "--revision", "v9"]) == 2
        assert "error: owner/teacher has no revision v9" in capsys.readouterr().err, command
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    for command in commands:
        for words in ([*command.split(), "--revision", "v3"], command.replace("teacher", "teacher@v3").split()):
            assert main(words) == 3
            out, err = capsys.readouterr()
            line = err.splitlines()[-1]
            assert out == "" and "HF_HUB_OFFLINE is set, and the Hub model owner/teacher@v3 is not in the cache" in line
    assert len(hub.log) == asked
