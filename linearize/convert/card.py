"""The model card of an export: short, and honest about what it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from linearize._version import __version__
from linearize.modeling.mixer_spec import MixerSpec

CARD = """---
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
tags:
- linear-attention
- linearize
---

# {teacher}, linearized

`{teacher}` with {replaced} replaced by linear attention: recipe `{recipe}`{paper}, made with linearize {version}.

| | |
|---|---|
| model type | `{family}` |
| parameters | {parameters:,} |
| memory of the linear layers for one sequence | {state_bytes:,} bytes, however long it is |
| layers that are still softmax | {softmax} |
| softmax window of the linear layers | {window} |
| trained on | {align:,} tokens of alignment and {finetune:,} of finetuning, {context} tokens of context |
| text | `{text}`, sha256 `{digest}...` of the {read:,} bytes that were read |
| weights | {dtype} |

## Loading

With linearize installed no code from this folder runs:

```python
import linearize
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({out})
tokenizer = AutoTokenizer.from_pretrained({out})
```

Without linearize, the Python files beside the weights run; read them first:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({out}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({out}, trust_remote_code=True)
```

## What was measured while it was made

{figures}

Its quality on text is not among these: `linearize audit {argument} --against TEACHER --data FILE` measures it, and says
what each branch contributes.

## Limits

{limits}

## Licence

{licence}

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
        window=_window(recipe.mixer) if linear else "none: no layer is linear",
        context=recipe.context,
        dtype=facts["dtype"],
        figures="\n".join(_figures(facts)),
        limits="\n".join(_limits(facts)),
        licence=_licence(facts["terms"]),
        base_model=json.dumps(facts["teacher"]),
        text=facts["text"]["name"],
        digest=facts["text"]["sha256"][:12],
        read=facts["text"]["bytes"],
        out=json.dumps(facts["out"], ensure_ascii=False),
        argument=shlex.quote(facts["out"]),
        **facts["tokens"],
    )


def _figures(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    if facts["mean_match"] is not None:
        match = f"{facts['mean_match']:.2%}"
        lines.append(f"- alignment: {match} of the teacher's attention outputs are explained, mean of the layers")
    for name in ("align", "finetune"):
        if name in facts["losses"]:
            first, last = facts["losses"][name]
            lines.append(
                f"- {name}: running mean of the training loss {first:.4g} at the start and {last:.4g} at the end, over "
                "different batches"
            )
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
    return lines


def _window(mixer: MixerSpec) -> str:
    """How far the softmax branch of a linear layer sees."""
    sinks = f", and the first {mixer.sinks} of the sequence" if mixer.sinks else ", no sinks"
    if not mixer.window:
        return "none" + sinks
    return f"the last {mixer.window} to {2 * mixer.window} tokens (blocks of {mixer.window}){sinks}"


def _licence(terms: Sequence[str]) -> str:
    """What can be said of terms: only which files came with the teacher."""
    if terms:
        files = ", ".join(f"`{name}`" for name in terms)
        return f"Those of the teacher hold for these weights too: {files}, as they lay beside its weights."
    return (
        "Unknown: no file of terms lay beside the teacher's weights. Whatever its licence and terms of use say holds "
        "for these weights too; ask where you got it."
    )
