"""The folder in which the pages' commands run: every model, text and file that they name, small."""

from __future__ import annotations

import importlib.util
import json
import lzma
import shutil
from pathlib import Path

import torch

from linearize.artifacts.load import resolve
from linearize.demo.text import stdlib_folder
from linearize.recipe import recipe_path
from tests import encoders
from tests.artifacts.hub_server import Hub
from tests.modeling import families

DEFAULT = "licensed/demo"
LLAMAS = ("my-llama", "path/or/hub-id", "path/to/large-llama", "large-llama", "base", DEFAULT)
"""All of them `demo`, with a licence."""
MASKED = ("path/to/bert",)
HUB = ("owner/model", "owner/name", "meta-llama/Llama-3.1-8B")
"""Repositories of the test's own Hub; with a tag v1.0."""
CARD = "---\nlicense: apache-2.0\n---\n\n# A teacher\n"
STDLIB = ("bisect", "colorsys", "stat")
"""Modules that `demo`'s text is made of here; `stat` is held out."""
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def build(world: Path) -> Path:
    """Everything but `out`, in the new folder `world`."""
    for name in LLAMAS:
        shutil.copytree(resolve("demo"), world / name)
        (world / name / "README.md").write_text(CARD)
    for name in MASKED:
        encoders.build(world / name, "bert", max_position_embeddings=258)
    families.save_with_images(world / "path" / "to" / "gemma-3")
    _texts(world)
    _published(world)
    _tasks(world)
    shutil.copy(recipe_path("lolcats"), world / "my.yaml")
    return world


def enter(world: Path, place: Path) -> None:
    """A folder of one page's own: what is only read is linked, what a command may change is copied."""
    for path in world.iterdir():
        (place / path.name).symlink_to(path, target_is_directory=path.is_dir())


def fill(hub: Hub, world: Path) -> None:
    """The repositories that the pages name."""
    files = {path.name: path.read_bytes() for path in (world / LLAMAS[0]).iterdir()}
    for name in HUB:
        repo = hub.make(name, files)
        repo.refs["v1.0"] = repo.refs["main"]
    hub.make("me/its-model", private=True)


def stdlib(world: Path) -> Path:
    """The folder that stands for Python's standard library: a few of its files."""
    return world / "stdlib"


def _texts(world: Path) -> None:
    lines = "".join(json.dumps({"text": text, "source": "tech"}) + "\n" for text in encoders.documents(30))
    for name in ("corpus.jsonl", "heldout.jsonl", "text.jsonl"):
        (world / name).write_text(lines)
    for name in ("corpus.jsonl.xz", "train.jsonl.xz"):
        (world / name).write_bytes(lzma.compress(lines.encode()))
    (world / "lambada.jsonl").write_text(json.dumps({"context": "the cat sat on the", "continuation": " mat"}) + "\n")
    told = "\n".join(f" {text} \n" for text in encoders.documents(40))
    (world / "wikitext2-raw-test.txt").write_text(f" \n = A Title = \n\n{told}\n = Another = \n\n{told}")
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        long = [" ".join(encoders.documents(60)[n : n + 20]) for n in range(0, 60, 20)]
        pyarrow.parquet.write_table(pyarrow.table({"text": long}), world / "corpus.parquet")
    shutil.copy(stdlib_folder() / "colorsys.py", world / "heldout.txt")
    (world / "stdlib").mkdir()
    for name in STDLIB:
        shutil.copy(stdlib_folder() / f"{name}.py", world / "stdlib")


def _published(world: Path) -> None:
    """LoLCATs' pairs of files, as its trainer saves them, for `demo`'s shapes."""
    config = json.loads((world / LLAMAS[0] / "config.json").read_text())
    layers, heads, width = config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]
    size, draw = width // heads, torch.Generator().manual_seed(0)
    maps, adapters = {}, {}
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn."
        for side in "qk":
            maps[f"{name}feature_map_{side}.mlp.layer"] = torch.randn(heads, size, size, generator=draw)
        maps[f"{name}window_factors"] = torch.zeros(1, heads, 1, 1)
        for part, shape in (("A", (8, width)), ("B", (heads * size, 8))):
            at = f"base_model.model.{name}q_proj.lora_{part}.default.weight"
            adapters[at] = 0.01 * torch.randn(*shape, generator=draw)
    for folder, state in (("distill", maps), ("ft", adapters)):
        (world / folder).mkdir()
        torch.save({"model_state_dict": state}, world / folder / "model.pt")
    shutil.copy(world / "distill" / "model.pt", world / "maps.pt")
    shutil.copy(world / "distill" / "model.pt", world / "distill.pt")
    shutil.copy(world / "ft" / "model.pt", world / "ft.pt")


def _tasks(world: Path) -> None:
    """The tasks that the pages name, over a file of a few questions."""
    folder = world / "my-tasks"
    folder.mkdir()
    rows = [{"question": "count" + " on" * (i % 5), "good": f" {i * 7}", "bad": f" {i * 3 + 1}?"} for i in range(8)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("my_task", "piqa", "arc_easy"):
        text = TASK.format(name=name, data=folder / "questions.jsonl")
        (folder / f"{name}.yaml").write_text(text)
