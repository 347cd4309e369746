"""`lm-eval/wikitext` beside lm-evaluation-harness itself: the same model, the same raw file, both run here.

    PYTHONPATH=.:kernels:cli python benchmarks/lm_eval_parity.py MODEL wikitext2-raw-test.txt [--context N] [--out FILE]

Needs `pip install lm-eval`. The harness runs its own task (its YAML, its detokeniser, its windows, its model class);
only its data set, which lives on the Hub, is replaced by the pages of the raw file. Exits with 1 if a figure differs by
more than one part in a million.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
TOLERANCE = 1e-6
TASK = "wikitext_from_file"
YAML = """\
include: {wikitext}
task: {task}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {pages}
training_split: null
validation_split: null
"""


def harness(model: str, raw: Path, *, context: int, device: str) -> dict[str, float]:
    """The harness's figures for a model folder, in fp32."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched: if something were, this would say so
    os.environ.setdefault("TQDM_DISABLE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from linearize.evaluate.protocols import split_pages

    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    wikitext = Path(spec.origin).parent / "tasks" / "wikitext" / "wikitext.yaml"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        pages = split_pages(raw.read_bytes().decode("utf-8"))
        (folder / "pages.jsonl").write_text("".join(json.dumps({"page": p}) + "\n" for p in pages), encoding="utf-8")
        (folder / f"{TASK}.yaml").write_text(
            YAML.format(wikitext=wikitext, task=TASK, pages=folder / "pages.jsonl"), encoding="utf-8"
        )
        done: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32", "max_length": context},
            tasks=[TASK],
            task_manager=TaskManager(include_path=name),
            device=device,
            batch_size=8,
            bootstrap_iters=0,
        )
    return {metric: float(done["results"][TASK][f"{metric},none"]) for metric in METRICS}


def main() -> int:
    """Run both and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder")
    parser.add_argument("data", type=Path, help="WikiText-2's raw test file")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the model's own, at most 1024)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()

    from linearize.artifacts.load import resolve
    from linearize.evaluate import evaluate

    ours = evaluate(args.model, data=str(args.data), protocol="lm-eval/wikitext", context=args.context,
                    device=args.device, dtype="float32")  # fmt: skip
    theirs = harness(str(resolve(args.model)), args.data, context=ours["context"], device=args.device)
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "torch", "transformers")}
    print(f"{args.model}  {ours['protocol']}  fp32  {ours['device']}  {datetime.date.today()}  {platform.machine()}")
    print("  ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{ours['tokens']} tokens, {ours['words']} words, {ours['bytes']} bytes, {ours['bos']} BOS\n")
    print(f"{'':16} {'linearize':>18} {'lm-eval':>18} {'relative':>10}")
    worst = 0.0
    for metric in METRICS:
        relative = abs(ours[metric] / theirs[metric] - 1)
        worst = max(worst, relative)
        print(f"{metric:16} {ours[metric]:18.10g} {theirs[metric]:18.10g} {relative:10.1e}")
    if args.out is not None:
        report = {"linearize": ours, "lm_eval": theirs, "versions": versions, "worst_relative": worst}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\nequal" if worst <= TOLERANCE else f"\nNOT equal within {TOLERANCE}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
