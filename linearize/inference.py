"""To run a model, native or converted, from Python: load it, and continue a text. Heavy imports wait."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from linearize.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PathLike = str | os.PathLike[str]


def load(
    model: PathLike, *, revision: str | None = None, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, native or converted, in eval mode, and its tokenizer. No code of the checkpoint is ever run.

    Args:
        model: a folder, a Hub id, or `demo`. A Hub id may be `owner/name@REVISION`, here and wherever a model is named.
        revision: the same, apart: a commit, a tag or a branch.
        device: auto | cpu | cuda | cuda:N.
        dtype: auto (as stored) | float32 | bfloat16 | float16.

    Returns:
        The model, one of transformers' with `generate`, and the tokenizer that lies beside it.

    Raises:
        UsageError: no such model, or a family that is not supported. RefusedError: the checkpoint is damaged.
    """
    from linearize.artifacts.download import pin
    from linearize.artifacts.load import load_model, load_tokenizer, resolve

    path = resolve(pin(model, revision))
    return load_model(path, device=device, dtype=dtype), load_tokenizer(path)


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
        UsageError: bad input, such as an empty prompt for a tokenizer without a BOS token, a masked language model, or
            more tokens than a model has learned positions for.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # a shell hands such bytes on as halves of surrogate pairs
        hint = "Give UTF-8, for example what iconv makes of it."
        raise UsageError(f"--prompt: not UTF-8, from its character {error.start + 1} on", hint) from error
    import torch

    from linearize.artifacts.kind import require_causal
    from linearize.artifacts.load import load_model, resolve
    from linearize.evaluate.subjects import learned_positions, open_subject, warn_beyond

    name = os.fspath(model)
    require_causal(resolve(name), name, "Use: transformers.pipeline('fill-mask', model=OUT)")
    subject = open_subject(name)
    tokenizer = subject.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise UsageError("--prompt: empty, and the tokenizer has no BOS token to start from", "Give some text.")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    reads = ids.shape[1] + max_new_tokens - 1  # the last new token is never read
    most = learned_positions(subject.config)
    if most is not None and reads > most:
        room = f"Use --max-new-tokens {most + 1 - ids.shape[1]} or less" if ids.shape[1] <= most else "Shorten the text"
        raise UsageError(
            f"{ids.shape[1]} tokens of the prompt and {max_new_tokens} new ones are more than the {most} positions "
            f"that {name} has learned",
            room,
        )
    warn_beyond([subject], reads, what=f"{ids.shape[1]:,} tokens of the prompt and {max_new_tokens:,} new ones")
    loaded = load_model(resolve(name), device=device, dtype=dtype)
    ids = ids.to(loaded.device)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    began = time.perf_counter()
    with torch.no_grad(), _without_reminder():
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


@contextmanager
def _without_reminder() -> Iterator[None]:
    """Without transformers' own line about texts that outgrow the positions: it was said, in words of ours."""
    logger = logging.getLogger("transformers.generation.stopping_criteria")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
