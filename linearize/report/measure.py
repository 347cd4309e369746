"""What a report measures by running both models: the attention maps, on the first tokens of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from linearize.data import load_source
from linearize.evaluate.protocols import CONCAT, Protocol, make_task
from linearize.evaluate.recovery import require_same_tokenizer
from linearize.evaluate.subjects import default_context, open_subject
from linearize.progress import tell
from linearize.report.attention import MOST, Chosen, collect, packed, spread, texts_of, tokens_for


def attention_facts(
    run: Path,
    against: Any,
    *,
    data: str,
    layer: int | None,
    head: int | None,
    device: str,
    dtype: str,
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """The attention maps of teacher and student, and how they are to be shown.

    Returns tokens, texts (one a token), source, window, layers, heads, of (all layers and heads), start (layer and
    head), rows and maps as `attention.packed` makes them.

    Raises:
        UsageError: another tokenizer, or a model that is not a converted one. RefusedError: too little text.
    """
    student = open_subject(run, device=device, dtype=dtype)
    teacher = open_subject(against, device=device, dtype=dtype, bits=teacher_bits)
    require_same_tokenizer(student, teacher)
    texts, source = load_source(data, split="heldout")
    model, other = student.load(), teacher.load()
    config = model.config
    window = int(config.mixer_spec().window) if config.linear_layers else 0
    length = tokens_for(window, default_context(config))
    task = make_task(Protocol(name=CONCAT, context=length), texts, student.tokenizer, max_windows=1)
    ids = [int(i) for i in task.rows[0].tokens]
    count = config.num_hidden_layers, config.num_attention_heads
    layers, heads = spread(count[0], MOST, layer), spread(count[1], MOST, head)
    tell(f"reading attention maps of {length} tokens", student.name)
    maps = collect(model, other, torch.tensor([ids]), Chosen(layers=layers, heads=heads))
    rows, blob = packed(maps, heads)
    linear = [i for i in layers if maps[i].kind == "linear"]
    return {
        "tokens": length,
        "texts": texts_of(student.tokenizer, ids),
        "source": Path(source.describe()["name"]).name,
        "window": window,
        "layers": layers,
        "heads": heads,
        "of": count,
        "start": (layer if layer is not None else (linear or layers)[len(linear or layers) // 2], head or 0),
        "rows": rows,
        "maps": blob,
    }
