"""The model card of an export: short, and honest about what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linearize._version import __version__

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- linearize
- linear-attention
---

# {teacher}, linearized

`{teacher}` with {replaced} replaced by linear attention: recipe `{recipe}`{paper}, made with linearize {version}.

| | |
|---|---|
| model type | `{family}` |
| parameters | {parameters:,} |
| memory of the linear layers for one sequence | {state_bytes:,} bytes, however long it is |
| layers that are still softmax | {softmax} |
| trained on | {align:,} tokens of alignment and {finetune:,} of finetuning, {context} tokens of context |
| weights | {dtype} |

## Loading

With linearize installed no code from this folder runs:

```python
import linearize
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Without linearize, the Python files beside the weights run; read them first:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
```

## What was measured while it was made

{figures}

Its quality on text is not among these: `linearize audit FOLDER --against TEACHER --data FILE` measures it, and says
what each branch contributes.

## Limits

{limits}

`linearize.json` lists every file with its sha256, the recipe, and the digests of teacher and data.
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card, from the facts that `pipeline` gathers about a conversion."""
    recipe, linear, layers = facts["recipe"], facts["linear"], facts["layers"]
    softmax = [i for i in range(layers) if i not in linear]
    return CARD.format(
        teacher=facts["teacher"],
        replaced=f"the attention of {'all' if not softmax else len(linear)} of its {layers} layers",
        recipe=recipe.name,
        paper=f" ({recipe.paper})" if recipe.paper else "",
        version=__version__,
        family=facts["family"],
        parameters=facts["parameters"],
        state_bytes=facts["state_bytes"],
        softmax=", ".join(map(str, softmax)) or "none",
        context=recipe.context,
        dtype=facts["dtype"],
        figures="\n".join(_figures(facts)),
        limits="\n".join(_limits(facts)),
        **facts["tokens"],
    )


def _figures(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    if facts["mean_match"] is not None:
        match = f"{facts['mean_match']:.1%}"
        lines.append(f"- alignment: {match} of the teacher's attention outputs are explained, mean of the layers")
    for name in ("align", "finetune"):
        if name in facts["losses"]:
            first, last = facts["losses"][name]
            lines.append(f"- {name}: loss {first:.4g} at first, {last:.4g} at the end")
    lines.append(f"- merging and casting to {facts['dtype']} moved a logit by {facts['merge_error']:.2g} at most")
    return lines


def _limits(facts: Mapping[str, Any]) -> list[str]:
    lines = ["- It is not the teacher: what is lost shows most where text far beyond the softmax window matters."]
    if facts["break_even"] is not None:
        lines.append(
            f"- Up to {facts['break_even']:,} tokens the state of a linear layer is larger than the key/value cache it "
            "replaces; it pays beyond that."
        )
    lines.append("- Assisted generation is refused: a linear state cannot take tokens back.")
    lines.append("- The licence and the terms of use of the teacher hold for these weights too.")
    return lines
