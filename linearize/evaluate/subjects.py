"""The models that are judged: opened by name, in how many bits, and how far they can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from linearize.artifacts.config_reader import build_config
from linearize.artifacts.kind import require_causal, require_masked
from linearize.artifacts.load import load_model, load_tokenizer, resolve, select_device
from linearize.errors import UsageError
from linearize.modeling.family_table import FAMILIES, PREFIX
from linearize.progress import warn
from linearize.teacher_bits import KINDS, require_comparison_bits, require_quantisable

DEFAULT_CONTEXT = 1024
"""The longest context that is chosen unasked; a model of a shorter one gets its own."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to judge: its name, config and tokenizer now, its weights when `load` is called."""

    name: str
    tokenizer: Any
    config: Any
    load: Callable[[], Any]
    bits: int | None = None
    """Of the weights of its linear layers; None: as they are."""

    @property
    def notes(self) -> list[str]:
        """What is to be said of its figures, one line each."""
        if self.bits is None:
            return []
        return [f"{self.name} was held in {KINDS[self.bits]}: its figures are not quite those of its own weights"]


def open_subject(
    model: Any, *, device: str = "auto", dtype: str = "auto", masked: bool = False, bits: int | None = None
) -> Subject:
    """A folder, Hub id, `demo` or (model, tokenizer) pair as a Subject; config and tokenizer are read now.

    `bits` 8 or 4: its linear layers are to be quantised, as by `convert --teacher-bits`.

    Raises:
        UsageError: no such model, no tokenizer, no such device, a masked model where a causal one is needed (with
            `masked`, the other way round), or one that cannot be held in `bits`.
    """
    require = require_masked if masked else require_causal
    require_comparison_bits(bits, model)
    if isinstance(model, tuple):
        loaded, tokenizer = model
        require(loaded, _name(loaded))
        return Subject(name=_name(loaded), tokenizer=tokenizer, config=loaded.config, load=lambda: loaded)
    path = resolve(model)
    require(path, str(model))
    where = select_device(device)
    kind = "float32" if dtype == "auto" and where.type == "cpu" else dtype
    config = build_config(path)
    if bits is not None:
        require_quantisable(config.model_type)
    return Subject(
        name=str(model),
        tokenizer=load_tokenizer(path),
        config=config,
        load=lambda: load_model(path, device=where, dtype=kind, bits=bits),
        bits=bits,
    )


def require_softmax(teacher: Subject) -> None:
    """Refuse a converted model in the place of a teacher: no mask cuts its linear layers to a window.

    Raises:
        UsageError: it has linear layers.
    """
    if getattr(teacher.config, "linear_layers", None):
        raise UsageError(
            f"{teacher.name} is a converted model itself, so it cannot be cut to a window",
            "Give the teacher that OUT was made from",
        )


def default_context(config: Any) -> int:
    """The model's own context, at most 1024."""
    return min(trained_positions(config) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def trained_positions(config: Any) -> int | None:
    """Tokens of the longest text that a model was trained on, by its config; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def learned_positions(config: Any) -> int | None:
    """Tokens beyond which a model has no positions to read with; None for one whose positions are computed."""
    family = FAMILIES.get(str(getattr(config, "model_type", "")).removeprefix(PREFIX))
    return None if family is None else family.most_positions(config)


def require_positions(subjects: Sequence[Subject], tokens: int, *, what: str) -> None:
    """Refuse `tokens` tokens, read at once as `what`, for models whose learned positions end before.

    Raises:
        UsageError: such a model, by its name.
    """
    for subject in subjects:
        most = learned_positions(subject.config)
        if most is not None and tokens > most:
            raise UsageError(
                f"{what} reach beyond the {most:,} positions that {subject.name} has learned",
                f"It can read no further: ask for {most:,} or fewer",
            )


def beyond_trained(subject: Subject, tokens: int, *, what: str) -> str | None:
    """What is to be said where `tokens` tokens, read at once as `what`, are more than a model was trained on."""
    own = trained_positions(subject.config)
    if own is None or tokens <= own:
        return None
    return f"{what} reach beyond the {own:,} positions that {subject.name} was trained on"


def warn_beyond(subjects: Sequence[Subject], tokens: int, *, what: str) -> list[str]:
    """The lines of `beyond_trained`, said at once to whoever listens: such a run measures what few expect."""
    lines = [line for subject in subjects if (line := beyond_trained(subject, tokens, what=what)) is not None]
    for line in lines:
        warn(line)
    return lines


def _name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
