"""What an imported LoLCATs model says of itself: its card, and what its files left open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from linearize._version import __version__
from linearize.convert.lolcats_format import PAPER, Published
from linearize.recipe import Lora

CARD = """
# {teacher}, linearized

`{teacher}` with the attention of {linear} of its {layers} layers replaced by linear attention, imported from published
LoLCATs weights ({paper}) with linearize {version}. Nothing was trained here.

| | |
|---|---|
| distilled | `{distilled}`, sha256 `{distilled_sha256}` |
| finetuned | {finetuned} |
| layers that are still softmax | {softmax} |
| mixer | {features} features a head, {window} |
| memory of the linear layers for one sequence | {state_bytes:,} bytes, however long it is |
| weights | {dtype} |

## Loading

```python
import linearize  # no code from this folder runs; without it add trust_remote_code=True, which runs the files here
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({out})
tokenizer = AutoTokenizer.from_pretrained({out})
```

## Limits

{notes}

`linearize audit {out} --against TEACHER --data FILE` measures what was lost, and what each branch contributes.

## Licence

Those of the base model and of the published weights hold for these weights.
"""


def notes_on(published: Published, kept: list[int], lora: Lora | None) -> list[str]:
    """What the files do not say, and where the reference computes something else."""
    notes = []
    if kept:
        notes.append(f"layers without maps in the file stay softmax: {', '.join(map(str, kept))}")
    if lora is not None:
        notes.append(f"the files do not say how adapters are scaled; used alpha {lora.alpha:g} at rank {lora.r}")
    notes.append("the files do not say the activation of the maps; used [softmax(xW), softmax(-xW)], as all published")
    if published.window:
        block = published.window
        notes.append(
            f"blocks of {block} tokens begin at the start of the text, in prefill and decoding; the reference counts "
            f"them from its end, so it computes the same where the length is a multiple of {block} above {block}"
        )
    return notes


def card(report: dict[str, Any], files: dict[str, Any]) -> str:
    """The card below its front matter, from the report of an import and {distilled, finetuned: {name, sha256}}."""
    distilled, finetuned = files["distilled"], files["finetuned"]
    linear, softmax = report["layers"]["linear"], report["layers"]["softmax"]
    block = report["window"]
    return CARD.format(
        teacher=report["model"],
        linear=len(linear),
        layers=len(linear) + len(softmax),
        paper=PAPER,
        version=__version__,
        distilled=distilled["name"],
        distilled_sha256=distilled["sha256"],
        finetuned="none" if finetuned is None else f"`{finetuned['name']}`, sha256 `{finetuned['sha256']}`",
        softmax=", ".join(map(str, softmax)) or "none",
        features=2 * report["feature_dim"],
        window=f"softmax window of {block} to {2 * block} tokens (blocks of {block})" if block else "no window",
        state_bytes=report["state_bytes"],
        dtype=report["dtype"],
        out=json.dumps(Path(report["out"]).name, ensure_ascii=False),
        notes="\n".join(f"- {note[0].upper()}{note[1:]}." for note in report["notes"]),
    )
