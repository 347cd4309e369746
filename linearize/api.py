"""The Python API: `linearize.convert`, `load`, `evaluate`, `audit`, `recall` and `select`. Heavy imports wait."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.errors import UsageError
from linearize.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.progress import Progress

PathLike = str | os.PathLike[str]
Subject = PathLike | tuple[Any, Any]
"""A model by name, or a pair of model and tokenizer."""


def convert(
    model: PathLike,
    out: PathLike,
    *,
    recipe: PathLike | Recipe = "pure",
    data: str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert a softmax model into a linear one, verify the export and return its report.

    Args:
        model: a folder, a Hub id, or `demo`.
        out: the folder to make; it must not exist or be empty, unless `resume`.
        recipe: a name, a YAML file, or a `Recipe`.
        data: a text file or folder, a Hub data set id, or `demo`.
        overrides: `["align.tokens=2M"]` or `{"align.tokens": 2_000_000}`.
        resume: go on where an interrupted run of the same recipe stopped.
        progress: where to report to; None: nowhere.

    Raises:
        UsageError: bad input. RefusedError: refused before any work. VerificationError: the result does not hold.
    """
    plan = load_recipe(recipe, overrides)
    from linearize.convert.early import refuse_early

    refuse_early(model, out, data, resume=resume)  # torch and transformers take seconds to import
    from linearize.convert.pipeline import convert as run
    from linearize.progress import NullProgress

    return run(
        os.fspath(model), os.fspath(out), recipe=plan, data=data, resume=resume, progress=progress or NullProgress()
    )


def load(
    model: PathLike, *, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, native or converted, in eval mode, and its tokenizer. No code of the checkpoint is ever run.

    Args:
        model: a folder, a Hub id, or `demo`.
        device: auto | cpu | cuda | cuda:N.
        dtype: auto (as stored) | float32 | bfloat16 | float16.

    Raises:
        UsageError: no such model, or a family that is not supported. RefusedError: the checkpoint is damaged.
    """
    from linearize.artifacts.load import load_model, load_tokenizer, resolve

    path = resolve(os.fspath(model))
    return load_model(path, device=device, dtype=dtype), load_tokenizer(path)


def evaluate(
    model: Subject,
    *,
    data: str,
    protocol: str | None = None,
    context: int | None = None,
    against: Subject | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_windows: int | None = None,
) -> dict[str, Any]:
    """Perplexity per word, byte and token and bits per byte, with the name of the protocol that they follow.

    Args:
        model: a folder, a Hub id, `demo`, or what `load` returned.
        data: a text file or folder, a Hub data set id, or `demo` (its held-out part).
        protocol: `lm-eval/wikitext`, `concat@N` or `documents@N`; None: `concat` at `context`.
        context: tokens of one window; None: the model's own, at most 1024.
        against: the teacher, measured in the same run.
        device: auto | cpu | cuda | cuda:N.
        dtype: auto (as stored on a GPU, float32 on a CPU) | float32 | bfloat16 | float16.
        max_windows: read only this many windows; None: all.

    Raises:
        UsageError: bad input. RefusedError: too little text, or a damaged checkpoint.
    """
    from linearize.evaluate.perplexity import evaluate as run

    return run(
        model,
        data=data,
        protocol=protocol,
        context=context,
        against=against,
        device=device,
        dtype=dtype,
        max_windows=max_windows,
    )


def audit(
    out: Subject,
    *,
    against: Subject,
    data: str,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_windows: int | None = 64,
) -> dict[str, Any]:
    """Recovery R, the branch audit and perplexity by position of a converted model beside its teacher.

    Args:
        out: the converted model: a folder, a Hub id, or what `load` returned.
        against: its teacher, likewise.
        data: a text file or folder, a Hub data set id, or `demo` (its held-out part).
        context: tokens of one text, far longer than the student's window; None: the one it was trained with.
        device: auto | cpu | cuda | cuda:N.
        dtype: auto (as stored on a GPU, float32 on a CPU) | float32 | bfloat16 | float16.
        max_windows: read only this many texts of `context` tokens; None: all.

    Raises:
        UsageError: bad input, such as a model that is not a converted one. RefusedError: too little text.
    """
    from linearize.evaluate.recovery import audit as run

    return run(out, against=against, data=data, context=context, device=device, dtype=dtype, max_windows=max_windows)


def recall(
    out: Subject,
    *,
    against: Subject,
    data: str,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    queries: int = 64,
    distances: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What a converted model remembers from beyond its window, as a share of what its teacher does.

    Args:
        out: the converted model: a folder, a Hub id, or what `load` returned.
        against: its teacher, likewise.
        data: a text file or folder, a Hub data set id, or `demo` (its held-out part); the pages are made of it.
        context: the most tokens of a page; None: the model's own, at most 1024.
        device: auto | cpu | cuda | cuda:N.
        dtype: auto (as stored on a GPU, float32 on a CPU) | float32 | bfloat16 | float16.
        queries: of pairs and of passkeys at each distance.
        distances: tokens from a value to its query; None: 2.5, 5 and 10 windows, as far as the context allows.
        seed: of the pages.

    Returns:
        share (percent), tasks, cells, notes and more; see `linearize.evaluate.recall.recall`.

    Raises:
        UsageError: bad input, such as a distance that the window reaches. RefusedError: too little text or context.
    """
    from linearize.evaluate.recall import recall as run

    return run(
        out,
        against=against,
        data=data,
        context=context,
        device=device,
        dtype=dtype,
        queries=queries,
        distances=distances,
        seed=seed,
    )


def select(
    model: PathLike,
    *,
    data: str,
    keep: int,
    recipe: PathLike | Recipe = "pure",
    overrides: Sequence[str] | Mapping[str, Any] = (),
    method: str | None = None,
    align_tokens: int = 256_000,
    max_windows: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rank a teacher's layers by what it loses when one is swapped, and choose `keep` of them to stay softmax.

    Args:
        model: a folder, a Hub id, or `demo`.
        data: a text file or folder, a Hub data set id, or `demo`.
        recipe: a name, a YAML file, or a `Recipe`: its window, mixer, context, alignment, seed and device count.
        overrides: `["context=512"]` or `{"context": 512}`.
        method: `aligned` | `window` (nothing is trained); None: aligned, unless the recipe has nothing to align.
        align_tokens: most tokens of the short alignment.
        max_windows: most windows of the recipe's context on which a swap is measured.
        progress: where to report to; None: nowhere.

    Returns:
        chosen, uniform, override, ranking, layers and placements; see `linearize.convert.select.select`.

    Raises:
        UsageError: bad input. RefusedError: too little text. VerificationError: the alignment died.
    """
    plan = load_recipe(recipe, overrides)
    from linearize.artifacts.load import resolve
    from linearize.convert.families import require_family
    from linearize.data import require_place

    require_place(data)  # before torch and transformers, which take seconds to import
    require_family(resolve(os.fspath(model)))
    from linearize.convert.select import select as run

    return run(
        os.fspath(model),
        data=data,
        keep=keep,
        recipe=plan,
        method=method,
        align_tokens=align_tokens,
        max_windows=max_windows,
        progress=progress,
    )


def generate(
    model: PathLike,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Continue `prompt`: greedy at temperature 0, else sampled with `seed`.

    Returns:
        prompt, completion, text (both), new_tokens, seconds (of generation), tokens_per_second, device, dtype.

    Raises:
        UsageError: bad input, such as an empty prompt for a tokenizer without a BOS token.
    """
    import torch

    loaded, tokenizer = load(model, device=device, dtype=dtype)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.device).long()
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise UsageError("--prompt: empty, and the tokenizer has no BOS token to start from", "Give some text.")
        ids = torch.tensor([[tokenizer.bos_token_id]], device=loaded.device)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    began = time.perf_counter()
    with torch.no_grad():
        tokens = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
        )[0]
    seconds = time.perf_counter() - began
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    new = tokens[ids.shape[1] :]
    return {
        "model": os.fspath(model),
        "prompt": prompt,
        "completion": tokenizer.decode(new, skip_special_tokens=True),
        "text": text,
        "new_tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds if seconds > 0 else 0.0,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
