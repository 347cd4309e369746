"""In how many bits the frozen side of a conversion is held: what can be said of it before torch is imported."""

from __future__ import annotations

import importlib.util
from typing import Any

from linearize.errors import UsageError
from linearize.modeling.family import PREFIX

KINDS = {4: "4 bit (nf4)", 8: "8 bit (LLM.int8)"}
"""The kinds of bitsandbytes, by bits of a weight."""
LEAST = "0.49.2"
EXPERTS = ("mixtral", "qwen3_moe")
"""Families whose experts are tensors of their own kind, which bitsandbytes leaves as they are."""


def require_teacher_bits(bits: Any, *, stream: bool | None = None) -> None:
    """Refuse what `--teacher-bits` cannot be; None: the teacher stays as it is.

    Raises:
        UsageError: another number, a streamed conversion, or bitsandbytes is not installed.
    """
    if bits is None:
        return
    if isinstance(bits, bool) or bits not in KINDS:
        raise UsageError(f"--teacher-bits: {bits!r} is not one of {', '.join(map(str, KINDS))}", "Use 8 or 4")
    if stream:
        raise UsageError(
            "--teacher-bits: with --stream one layer is held at a time, as it is stored", "Leave out one of the two"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "--teacher-bits needs bitsandbytes, which is not installed", f"pip install 'bitsandbytes>={LEAST}'"
        )


def require_comparison_bits(bits: Any, teacher: Any) -> None:
    """As `require_teacher_bits`, where a model is measured beside its teacher: `teacher`, by name, or None.

    Raises:
        UsageError: also without a teacher, or with one that is in memory already.
    """
    require_teacher_bits(bits)
    if bits is None:
        return
    if teacher is None:
        raise UsageError("--teacher-bits is for the model that --against names", "Add --against TEACHER")
    if isinstance(teacher, tuple):
        raise UsageError("teacher_bits: the teacher is in memory already", "Give it by name, or leave out teacher_bits")


def require_quantisable(model_type: str) -> None:
    """Refuse a model of which next to nothing, or the wrong parts, would be quantised.

    Raises:
        UsageError: a mixture of experts, or a converted model.
    """
    if model_type.startswith(PREFIX):
        raise UsageError(
            "--teacher-bits: the teacher is a converted model, whose mixers are not quantised", "Leave it out"
        )
    if model_type in EXPERTS:
        raise UsageError(
            f"--teacher-bits: bitsandbytes does not quantise the experts of {model_type}, and they are most of it",
            "Leave it out",
        )
