"""The model card of an export: short, and honest about what it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from linearize._version import __version__
from linearize.artifacts.download import pinned
from linearize.artifacts.licence import OTHER, UNKNOWN, as_metadata
from linearize.artifacts.quality import unmeasured
from linearize.modeling.configuration_linearized import OLDEST
from linearize.modeling.mixer_spec import MixerSpec
from linearize.teacher_bits import KINDS

CARD = """
# {title}, linearized

`{title}` with {replaced} replaced by linear attention: recipe `{recipe}`{paper}, made with linearize {version}.

| | |
|---|---|
| base model | {base} |
| model type | `{family}` |
| parameters | {parameters:,} |
| memory of the linear layers for one sequence | {memory} |
| layers that are still softmax | {softmax} |
| softmax window of the linear layers | {window} |
| trained on | {align:,} tokens of alignment and {finetune:,} of finetuning, {context} tokens of context |
| text | `{text}`, sha256 `{digest}...` of the {read:,} bytes that were read |
| weights | {dtype} |

`linearize inspect {argument}` prints parameters, layers and state again; `linearize.json` holds the recipe, the losses,
and the digests of teacher and text.

## Loading

transformers {oldest} or newer. With linearize installed no code from this folder runs:

```python
import linearize
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained({out})
tokenizer = AutoTokenizer.from_pretrained({out})
```

Without linearize, the Python files beside the weights run; read them first:

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained({out}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({out}, trust_remote_code=True)
```

{quality}

## What was measured while it was made

{figures}

`linearize.json` holds all of them, under `figures`.

## Making it again

Save the recipe below as `recipe.yaml`; the text is the one named above.

```
{command}
```

<details><summary>recipe.yaml</summary>

```yaml
{recipe_yaml}
```

</details>

## Limits

{limits}

## Licence

{licence}

`linearize.json` lists every file but this one with its sha256.
"""
TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask"}
"""The Hub's task of what an export loads as."""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card, metadata and text, from the facts that `pipeline` gathers about a conversion."""
    text = facts["text"]
    datasets = [text["name"].partition(":")[0]] if text["kind"] == "hub" else None
    return front_matter(facts["origin"], facts["licence"], facts["auto_class"], datasets) + _text(facts)


def front_matter(
    origin: Mapping[str, Any],
    licence: dict[str, Any] | None,
    auto_class: str = "AutoModelForCausalLM",
    datasets: list[str] | None = None,
) -> str:
    """The metadata of a card, between its marks. What is not known is left out, never filled in.

    `origin`: of the teacher, see `linearize.artifacts.download.origin`. `licence`: see `read_licence`. `datasets`: ids
    of the Hub.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        **as_metadata(licence),
        base_model=origin["repo"],
        datasets=datasets,
        library_name="transformers",
        pipeline_tag=TASKS.get(auto_class),
        tags=["linear-attention", "linearize"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _text(facts: Mapping[str, Any]) -> str:
    recipe, linear, layers = facts["recipe"], facts["linear"], facts["layers"]
    softmax = [i for i in range(layers) if i not in linear]
    return CARD.format(
        title=facts["origin"]["name"],
        base=_base(facts["origin"]),
        replaced=f"the attention of {'all' if not softmax else len(linear)} of its {layers} layers",
        recipe=recipe.name,
        recipe_yaml=yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True).strip(),
        paper=f" ({recipe.paper})" if recipe.paper else "",
        version=__version__,
        family=facts["family"],
        auto_class=facts["auto_class"],
        oldest=".".join(map(str, OLDEST)),
        parameters=facts["parameters"],
        memory=_memory(facts),
        softmax=", ".join(map(str, softmax)) or "none",
        window=_window(recipe.mixer) if linear else "none: no layer is linear",
        context=recipe.context,
        dtype=facts["dtype"],
        quality=unmeasured(facts["out"], pinned(facts["origin"]), masked=_masked(facts)),
        figures="\n".join(_figures(facts)),
        command=_command(facts),
        limits="\n".join(_limits(facts)),
        licence=_licence(facts),
        text=facts["text"]["name"],
        digest=facts["text"]["sha256"][:12],
        read=facts["text"]["bytes"],
        out=json.dumps(facts["out"], ensure_ascii=False),
        argument=shlex.quote(facts["out"]),
        **facts["tokens"],
    )


def _base(origin: Mapping[str, Any]) -> str:
    if origin["repo"] is None:
        return f"`{origin['name']}`, not from the Hub"
    at = f" at commit `{origin['revision']}`" if origin["revision"] else ", by the name that its config gives itself"
    return f"[{origin['repo']}](https://huggingface.co/{origin['repo']}){at}"


def _command(facts: Mapping[str, Any]) -> str:
    words = ["linearize", "convert", pinned(facts["origin"]), "OUT", "--recipe", "recipe.yaml", "--data"]
    bits = facts.get("teacher_bits")
    return shlex.join([*words, facts["text"]["name"], *([] if bits is None else ["--teacher-bits", str(bits)])])


def _figures(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    if facts["mean_match"] is not None:
        match = f"{facts['mean_match']:.2%}"
        but = ", ".join(map(str, facts.get("unmatched", ())))
        but = f" but {but}, whose window was hidden in every step" if but else ""
        lines.append(f"- alignment: {match} of the teacher's attention outputs are explained, mean of the layers{but}")
    for name in ("align", "finetune"):
        if name in facts["losses"]:
            first, last = facts["losses"][name]
            if first is None:
                lines.append(f"- {name}: no training loss was measured: the window was hidden in every step")
                continue
            if last is None:
                seen = " with the window" if 0 < getattr(facts["recipe"], name).window_dropout < 1 else ""
                lines.append(f"- {name}: training loss {first:.4g} in its only step{seen}")
                continue
            lines.append(
                f"- {name}: running mean of the training loss {first:.4g} at the start and {last:.4g} at the end, over "
                "different batches"
            )
    if facts.get("teacher_bits") is not None:
        lines.append(
            f"- while it was trained the frozen weights were held in {KINDS[facts['teacher_bits']]}; these are the "
            f"teacher's own again: a logit differs by at most {facts['quantised']['max']:.2g} from training's, in mean "
            f"by {facts['quantised']['mean']:.2g}"
        )
    lines.append(f"- merging and casting to {facts['dtype']} moved a logit by {facts['merge_error']:.2g} at most")
    return lines


def _limits(facts: Mapping[str, Any]) -> list[str]:
    if _masked(facts):
        return [
            "- It is not the teacher: what is lost shows where a token is found by one other token alone.",
            "- Linear layers follow a mask of [batch, tokens] alone, and give no attention weights.",
        ]
    lines = ["- It is not the teacher: what is lost shows most where text far beyond the softmax window matters."]
    if facts["break_even"] is not None:
        lines.append(
            f"- Up to {facts['break_even']:,} tokens the state of a linear layer is larger than the key/value cache it "
            "replaces; it pays beyond that."
        )
    lines.append("- Assisted generation is refused: a linear state cannot take tokens back.")
    return lines


def _masked(facts: Mapping[str, Any]) -> bool:
    return TASKS.get(facts["auto_class"]) == "fill-mask"


def _memory(facts: Mapping[str, Any]) -> str:
    if _masked(facts):
        return "none between calls: an encoder keeps no cache"
    return f"{facts['state_bytes']:,} bytes, however long it is"


def _window(mixer: MixerSpec) -> str:
    """How far the softmax branch of a linear layer sees."""
    sinks = f", and the first {mixer.sinks} of the sequence" if mixer.sinks else ", no sinks"
    if not mixer.window:
        return "none" + sinks
    return f"the last {mixer.window} to {2 * mixer.window} tokens (blocks of {mixer.window}){sinks}"


def _licence(facts: Mapping[str, Any]) -> str:
    """What can be said of the licence: what the teacher's own files say, and where they say it."""
    found, terms = facts["licence"], facts["terms"]
    lines = []
    if found is not None and found["id"] != OTHER:
        lines.append(f"The teacher's: `{found['id']}`, as its `{found['source']}` says.")
    elif found is not None:
        where = f": {found['link']}" if found["link"] else ""
        lines.append(f"The teacher's own terms (`{found['name']}`{where}).")
    if terms:
        files = ", ".join(f"`{name}`" for name in terms)
        lines.append(f"They hold for these weights too: {files}, as they lay beside the teacher's weights.")
    if lines:
        return " ".join(lines)
    return UNKNOWN
