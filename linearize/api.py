"""The Python API: `linearize.convert`, `load`, `evaluate`, `audit`, `recall` and `select`. Heavy imports wait."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import UsageError
from linearize.inference import PathLike, generate, load
from linearize.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from linearize.progress import Progress

__all__ = [
    "audit",
    "convert",
    "evaluate",
    "generate",
    "import_lolcats",
    "load",
    "recall",
    "report",
    "select",
]

Subject = PathLike | tuple[Any, Any]
"""A model by name, or a pair of model and tokenizer."""


def convert(
    model: PathLike,
    out: PathLike,
    *,
    recipe: PathLike | Recipe = "pure",
    data: PathLike,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    progress: Progress | None = None,
    report_to: str = "none",
    stream: bool | None = None,
    teacher_bits: int | None = None,
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
        report_to: a tracker that is given the figures of every step: trackio | wandb | tensorboard | none.
        stream: convert a layer at a time, for a teacher larger than memory (docs/memory.md); it cannot finetune.
            None: where the ordinary way does not fit into memory.
        teacher_bits: 8 or 4: hold the frozen weights, the teacher's and the student's, in so many bits while it trains
            (docs/memory.md); what is trained and all of the export is in full precision. None: as they are.

    Returns:
        What `linearize convert --json` prints (docs/json.md): out, layers, stages, state_bytes, verification and more.

    Raises:
        UsageError: bad input. RefusedError: refused before any work. VerificationError: the result does not hold.
    """
    plan = load_recipe(recipe, overrides)
    from linearize.convert.early import refuse_early
    from linearize.teacher_bits import require_teacher_bits
    from linearize.tracking import require_tracker

    data = os.fspath(data)
    require_tracker(report_to)
    require_teacher_bits(teacher_bits, stream=stream)
    refuse_early(model, out, data, resume=resume)  # torch and transformers take seconds to import
    from linearize.convert.pipeline import convert as run
    from linearize.progress import NullProgress

    return run(
        os.fspath(model),
        os.fspath(out),
        recipe=plan,
        data=data,
        resume=resume,
        progress=progress or NullProgress(),
        report_to=report_to,
        stream=stream,
        teacher_bits=teacher_bits,
    )


def import_lolcats(
    base: PathLike,
    out: PathLike,
    *,
    distilled: PathLike,
    finetuned: PathLike | None = None,
    window: int | None = None,
    lora_alpha: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Put LoLCATs' published weights onto their base model, export and verify it; nothing is trained or unpickled.

    Args:
        base: the Llama or Mistral they were made from: a folder, a Hub id, or `demo`.
        out: the folder to make; it must not exist or be empty.
        distilled: the `.pt` with the feature maps and window factors.
        finetuned: the `.pt` with the low-rank adapters, which are merged in float32.
        window: tokens of the window's block; None: what the file's name says (`wtk64`), else 64.
        lora_alpha: the adapters are scaled by alpha / rank; None: 2, as in every published configuration.
        device: auto | cpu | cuda | cuda:N.
        dtype: of the export: auto (the base's) | float32 | bfloat16 | float16.
        progress: where to report to; None: nowhere.

    Returns:
        out, model, format, family, dtype, device, layers {linear, softmax}, window, feature_dim, lora, parameters,
        state_bytes, break_even_context, merge_error, verification, notes, seconds.

    Raises:
        UsageError: bad input, such as a file that holds more than tensors, or an attention that no mixer here computes
            exactly. RefusedError: refused before any work. VerificationError: the export is not what was made.
    """
    from linearize.convert.early import path_of, require_out

    require_out(path_of(out), resume=False)
    for path in (distilled, finetuned):
        if path is not None and not Path(path).is_file():
            raise UsageError(f"there is no file {os.fspath(path)}", "Give the .pt file that was published.")
    from linearize.convert.lolcats_import import import_lolcats as run

    return run(
        os.fspath(base),
        os.fspath(out),
        distilled=distilled,
        finetuned=finetuned,
        window=window,
        lora_alpha=lora_alpha,
        device=device,
        dtype=dtype,
        progress=progress,
    )


def evaluate(
    model: Subject,
    *,
    data: PathLike,
    protocol: str | None = None,
    context: int | None = None,
    against: Subject | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_windows: int | None = None,
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Perplexity per word, byte and token and bits per byte, with the name of the protocol that they follow.

    Of a masked language model: how well it finds hidden tokens; see `linearize.evaluate.masked.evaluate_masked`.

    Args:
        model: a folder, a Hub id, `demo`, or what `load` returned.
        data: a text file or folder, a Hub data set id, or `demo` (its held-out part).
        protocol: `lm-eval/wikitext`, `concat@N` or `documents@N`; None: `concat` at `context`. Masked: `masked@N`.
        context: tokens of one window; None: the model's own, at most 1024.
        against: the teacher, measured in the same run.
        device: auto | cpu | cuda | cuda:N.
        dtype: auto (as stored on a GPU, float32 on a CPU) | float32 | bfloat16 | float16.
        max_windows: read only this many windows; None: all.
        teacher_bits: 8 or 4: hold `against` in so many bits (docs/memory.md); None: as it is.

    Returns:
        perplexities, bits_per_byte, protocol, against (the same of the teacher) and more; see
        `linearize.evaluate.perplexity.evaluate`.

    Raises:
        UsageError: bad input. RefusedError: too little text, or a damaged checkpoint.
    """
    from linearize.artifacts.kind import is_masked
    from linearize.artifacts.load import resolve
    from linearize.teacher_bits import require_comparison_bits

    require_comparison_bits(teacher_bits, against)  # before torch and transformers, which take seconds to import
    run: Any
    if is_masked(model[0] if isinstance(model, tuple) else resolve(model)):
        from linearize.evaluate.masked import evaluate_masked as run
    else:
        from linearize.evaluate.perplexity import evaluate as run
    return run(model, data=os.fspath(data), protocol=protocol, context=context, against=against, device=device,
               dtype=dtype, max_windows=max_windows, teacher_bits=teacher_bits)  # fmt: skip


def audit(
    out: Subject,
    *,
    against: Subject,
    data: PathLike,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_windows: int | None = 64,
    save: bool = False,
    teacher_bits: int | None = None,
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
        save: write the figures into the manifest and the model card of `out`, a folder.
        teacher_bits: 8 or 4: hold `against` in so many bits (docs/memory.md); None: as it is.

    Returns:
        R (percent), ppl_student, ppl_teacher, ppl_window, branches, by_position and more; see
        `linearize.evaluate.recovery.audit`.

    Raises:
        UsageError: bad input, such as a model that is not a converted one. RefusedError: too little text, or figures
            against a model that is not its teacher are to be saved.
    """
    if isinstance(out, (str, os.PathLike)) and not isinstance(against, tuple) and os.fspath(out) == os.fspath(against):
        raise UsageError(f"OUT and TEACHER are both {os.fspath(out)}", "Give the model that OUT was made from.")
    from linearize.teacher_bits import require_comparison_bits

    require_comparison_bits(teacher_bits, against)
    if save:
        from linearize.artifacts.quality import require_savable, save_audit

        folder = require_savable(out, against)
    from linearize.evaluate.recovery import audit as run

    report = run(out, against=against, data=os.fspath(data), context=context, device=device, dtype=dtype,
                 max_windows=max_windows, teacher_bits=teacher_bits)  # fmt: skip
    if save:
        assert not isinstance(against, tuple)  # it was refused
        save_audit(folder, report, against=os.fspath(against))
    return report


def recall(
    out: Subject,
    *,
    against: Subject,
    data: PathLike,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    queries: int = 64,
    distances: Sequence[int] | None = None,
    seed: int = 0,
    teacher_bits: int | None = None,
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
        teacher_bits: 8 or 4: hold `against` in so many bits (docs/memory.md); None: as it is.

    Returns:
        share (percent), tasks, cells, notes and more; see `linearize.evaluate.recall.recall`.

    Raises:
        UsageError: bad input, such as a distance that the window reaches. RefusedError: too little text or context.
    """
    from linearize.teacher_bits import require_comparison_bits

    require_comparison_bits(teacher_bits, against)
    from linearize.evaluate.recall import recall as run

    return run(out, against=against, data=os.fspath(data), context=context, device=device, dtype=dtype,
               queries=queries, distances=distances, seed=seed, teacher_bits=teacher_bits)  # fmt: skip


def select(
    model: PathLike,
    *,
    data: PathLike,
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
        keep: layers that stay softmax.
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
    from linearize.artifacts.kind import require_causal
    from linearize.artifacts.load import resolve
    from linearize.convert.families import require_family
    from linearize.data import require_place

    data = os.fspath(data)
    require_place(data)  # before torch and transformers, which take seconds to import
    folder = resolve(os.fspath(model))
    require_family(folder)
    require_causal(folder, os.fspath(model), "Name the layers that stay softmax yourself: keep_softmax=[0,5]")
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


def report(
    run: PathLike,
    *,
    out: PathLike | None = None,
    against: PathLike | None = None,
    data: PathLike | None = None,
    bench: PathLike | None = None,
    layer: int | None = None,
    head: int | None = None,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    teacher_bits: int | None = None,
) -> dict[str, Any]:
    """Write what a conversion did, and what it is worth, into one self-contained HTML file.

    Args:
        run: the converted model: a folder, or a Hub id.
        out: the file; None: RUN-report.html beside RUN. A file that is no report is never replaced.
        against: its teacher, and
        data: some text: with both, recovery, branches and attention maps are measured and shown.
        bench: rows of `bench`, as JSON or JSON lines, for curves of speed and memory.
        layer, head: of the attention maps that are shown first.
        context: tokens of one text of the audit; None: the one it was trained with.
        device: auto | cpu | cuda | cuda:N.
        dtype: auto (as stored on a GPU, float32 on a CPU) | float32 | bfloat16 | float16.
        teacher_bits: 8 or 4: hold `against` in so many bits (docs/memory.md); None: as it is.

    Returns:
        file, bytes, sections, left_out (a line for each part that lacks its facts), audit and attention.

    Raises:
        UsageError: bad input. RefusedError: `out` is another file, or there is too little text.
    """
    from linearize.report.make import report as run_report

    return run_report(
        os.fspath(run),
        out=out,
        against=None if against is None else os.fspath(against),
        data=None if data is None else os.fspath(data),
        bench=None if bench is None else os.fspath(bench),
        layer=layer,
        head=head,
        context=context,
        device=device,
        dtype=dtype,
        teacher_bits=teacher_bits,
    )
