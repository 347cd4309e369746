"""How the commands of the pages run in a test: what their names stand for, what is made shorter, what is not run.

A command that no rule here leaves out is run as it stands on the page, in a folder that holds what the pages talk
about (`world.py`). So a new command on a page runs, or needs a line here with its reason.
"""

from __future__ import annotations

NAMES = {
    "--distilled FILE.pt": "--distilled distill/model.pt",
    "--finetuned FILE.pt": "--finetuned ft/model.pt",
    "--window N": "--window 32",
    "--lora-alpha A": "--lora-alpha 8",
    "--keep N": "--keep 2",
    "--tasks A,B": "--tasks piqa,arc_easy",
    "llama-25m": "./my-llama",
    "my-team/its-model": "me/its-model",
    "recipes/mine.yaml": "mine.yaml",
    "MODEL": "demo",
    "BASE": "./my-llama",
    "OUT": "out",
    "RUN": "out",
    "DATA": "demo",
    "TEXT": "demo",
    "R": "lolcats",
    "NAME": "lolcats",
    "FILE": "my.yaml",
}
"""Words that stand for something of the reader's own, as they are written on the pages."""

INSTEAD = {
    "LINEARIZE_KERNELS=torch linearize convert ...": (
        "LINEARIZE_KERNELS=torch linearize convert demo out --recipe lolcats --data demo seed=1"
    ),
    "LINEARIZE_CUDA_GRAPHS=0 linearize generate ...": (
        "LINEARIZE_CUDA_GRAPHS=0 linearize generate out --prompt 'import os'"
    ),
    # `demo` reads 512 tokens.
    "linearize recall out --against ./my-llama --data text.jsonl --distance 256 --distance 1500 --context 2048": (
        "linearize recall out --against ./my-llama --data text.jsonl --distance 150 --distance 200"
    ),
}
"""Lines that are a sketch, or ask for more than the test's model has."""

STEPS = (
    "context=160 calibrate.tokens=160 align.tokens=320 align.batch_tokens=160 finetune.tokens=320 "
    "finetune.batch_tokens=160"
)
SHORTER = {
    "convert pure": f"{STEPS} mixer.feature_dim=16",
    "convert hybrid": f"{STEPS} mixer.feature_dim=16",
    "convert": STEPS,
    "select gated-deltanet": "context=160",
    "select": "--align-tokens 160 context=160 mixer.feature_dim=16",
    "eval": "--context 160",
    "audit": "--context 160",
    "recall": "--queries 32 --context 320",
    "report": "--context 160",
    "bench": "--contexts 16,48 --batches 1 --new-tokens 8 --repeats 1 --no-memory",
    "generate": "--max-new-tokens 4",
}
"""What is put in the place of a command's own sizes: two steps a stage, a short window, a few tokens. The first
entry whose words are all in the command holds. What is 0, on the page or in the recipe, stays 0."""

NOT_RUN = {
    "make ": "installs packages from a network; `.ci/run` is `make lint` and `make test`",
    ".ci/run": "is what runs this test",
    "pip install ": "installs packages from a network",
    "python3 -m venv .venv": "for the next lines, which install packages",
    ". .venv/bin/activate": "for the next line, which installs packages",
    "lm-eval run ": "downloads a data set; tests/evaluate/test_tasks.py runs the harness on an export with local tasks",
    "linearize --install-completion": "writes to the user's own shell; tests/cli/test_completion.py installs it",
    'layer.self_attn.mixer.backend = "triton"': "a line of Python among the commands; tests/modeling/test_fused.py",
    'gated_linear(q, k, v, g, backend="torch")': "a line of Python among the commands; tests/kernels",
    "out_t = sum_s ": "a formula",
}
"""Beginnings of lines that are not run, with the reason."""

ARGUMENTS_ONLY = {
    "python -m benchmarks.": "takes minutes to hours, and teachers or GPUs that are not here",
    "python benchmarks/": "the same",
    "python -m tests.": "takes minutes; the same cases are tests of the suite",
    "python tests/kernels/compile_gate.py ": "needs Triton's compiler; tests/kernels/test_compile_gate.py",
}
"""Programs whose arguments are read by their own parser, and no more, with the reason."""

PATHS_ONLY = ("pytest ", "python -m pytest ")
"""Lines that run the suite, or a part: the files that they name must be there."""

NAMESPACE = {
    "families.md": "from linearize.modeling.family import Family",
    "CONTRIBUTING.md": "from linearize.modeling.family import Family",
}
"""What a page's Python block takes for granted, by page."""

NEEDS = {"--tasks": "lm_eval", "--plots": "matplotlib", ".parquet": "pyarrow", "--teacher-bits": "bitsandbytes"}
"""Packages that a line with this word needs, which not every machine has."""

ELSEWHERE = {"tutorial.md": ("console", "python")}
"""Blocks that test_tutorial.py runs as they are."""
