"""A tiny teacher with its tokenizer, and text for it."""

from __future__ import annotations

import json
import random
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
