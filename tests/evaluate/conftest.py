"""A tiny teacher with its tokenizer, and text for it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path]) -> Path:
    """A random Llama of context 128. Its weights are large, so that what attention sees matters."""
    return build_llama(tmp_path_factory.mktemp("teacher"), initializer_range=0.4)


@pytest.fixture
def pair(teacher_folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer), the model fresh for every test."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_folder, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(teacher_folder)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of two sources, some shorter than a window."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "über", "東京", "delta\n", "x = 1", "the", "of"]
    path = tmp_path_factory.mktemp("text") / "held.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(12):
            text = " ".join(draw.choices(words, k=draw.choice((3, 30, 90))))
            file.write(json.dumps({"source": ("tech", "prose")[i % 2], "text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def make_export(teacher_folder: Path) -> Callable[..., Path]:
    """make_export(folder, mixers) -> folder: the teacher with untrained linear layers, as an export lies on disk."""

    def make(folder: Path, mixers: list[str]) -> Path:
        from linearize.artifacts.load import load_model
        from linearize.convert.export import auto_map, carried_files
        from linearize.convert.surgery import linearize_model
        from linearize.modeling import export_files
        from linearize.recipe import load_recipe

        spec = load_recipe("lolcats", ["mixer.window=16", "mixer.feature_dim=8", "context=128"]).mixer
        teacher = load_model(teacher_folder, device="cpu", dtype="float32")
        student, _ = linearize_model(teacher, spec=spec, layer_mixers=mixers, seed=0)
        student.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map(student)}))
        for path in (*export_files(), *carried_files(teacher_folder)):
            shutil.copyfile(path, folder / path.name)
        return folder

    return make


@pytest.fixture(scope="session")
def pure_export(tmp_path_factory: pytest.TempPathFactory, make_export: Callable[..., Path]) -> Path:
    """A converted model without any softmax layer."""
    return make_export(tmp_path_factory.mktemp("exports") / "pure", ["linear", "linear"])


@pytest.fixture(scope="session")
def hybrid_export(tmp_path_factory: pytest.TempPathFactory, make_export: Callable[..., Path]) -> Path:
    """A converted model with one softmax layer."""
    return make_export(tmp_path_factory.mktemp("exports") / "hybrid", ["linear", "softmax"])
