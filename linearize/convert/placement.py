"""Which layers to keep, from scores; which windows to score them on; and the cut that stands for a recipe's window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from linearize.errors import UsageError
from linearize.modeling.mixer_spec import MixerSpec

REFERENCE = (64, 4)
"""Window and sinks of the cut for a recipe that has no window."""


def costliest(scores: Mapping[int, float], keep: int) -> tuple[int, ...]:
    """The `keep` layers of the highest scores, in rising order; of two alike the earlier one."""
    return tuple(sorted(ranking(scores)[:keep]))


def ranking(scores: Mapping[int, float]) -> list[int]:
    """Layers by falling score; of two alike the earlier one first."""
    return sorted(scores, key=lambda layer: (-scores[layer], layer))


def require_keep(keep: int, num_layers: int) -> None:
    """UsageError unless some layers are kept and some are converted."""
    if not 0 < keep < num_layers:
        raise UsageError(
            f"keep {keep}: a model of {num_layers} layers can keep 1 to {num_layers - 1} of them", "Choose fewer layers"
        )


def cut_of(spec: MixerSpec, context: int) -> tuple[int, int]:
    """Window and sinks of the cut that stands for a recipe: its own, or REFERENCE where it has no window.

    Raises:
        UsageError: the cut sees all of `context`, so that no swap would cost anything.
    """
    window, sinks = (spec.window, spec.sinks) if spec.window else REFERENCE
    if context <= 2 * window:
        raise UsageError(
            f"context {context} lies within the window of {2 * window} tokens (blocks of {window}), so no layer can be "
            "told from another",
            f"Use a context above {2 * window}, or name the layers in keep_softmax",
        )
    return window, sinks


def set_apart(windows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` windows (all, if there are fewer), spread evenly so that every kind of text is among them; the rest."""
    count = min(count, len(windows))
    chosen = np.zeros(len(windows), dtype=bool)
    chosen[np.arange(count) * len(windows) // count] = True
    return windows[chosen], windows[~chosen]
