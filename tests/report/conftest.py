"""A tiny teacher, its conversion, and the report of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OPTIONS = [
    "context=64", "mixer.window=16", "mixer.feature_dim=8", "device=cpu", "align.tokens=1024", "align.batch_tokens=256",
    "finetune.tokens=512", "finetune.batch_tokens=256", "finetune.kl=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory, build_llama: Callable[..., Path], root: Path) -> dict[str, Path]:
    """teacher, run (an export of three layers, the middle one kept softmax) and text."""
    from linearize.convert import pipeline

    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text((root / "LICENSE").read_text() * 3)
    teacher = build_llama(folder / "teacher", initializer_range=0.2, num_hidden_layers=3, max_position_embeddings=256)
    with pytest.MonkeyPatch.context() as patch:  # the fresh processes are another test's matter
        patch.setattr(pipeline, "verify_export", lambda folder, expected, **places: {})
        pipeline.convert(
            teacher, folder / "run", recipe="lolcats", data=str(folder / "text.txt"),
            overrides=[*OPTIONS, "keep_softmax=[1]"],
        )  # fmt: skip
    return {"teacher": teacher, "run": folder / "run", "text": folder / "text.txt"}


@pytest.fixture(scope="session")
def full(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `linearize.report` returns with a teacher and a text."""
    import linearize

    out = tmp_path_factory.mktemp("html") / "full.html"
    return linearize.report(
        places["run"], out=out, against=places["teacher"], data=str(places["text"]), device="cpu", layer=2, head=3
    )
