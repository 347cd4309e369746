"""Records of a data set on the Hub, streamed by `datasets`: no more is fetched than is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from linearize.errors import RefusedError, UsageError, did_you_mean
from linearize.records import INSTALL, Record, record_of, text_column

ROLES = {"train": ("train",), "heldout": ("validation", "test")}
"""The splits that stand for a role, the first that is there."""


def hub_records(
    name: str,
    *,
    role: str,
    split: str | None = None,
    config: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    shuffle: tuple[int, int] | None = None,
) -> Iterator[Record]:
    """The rows of a split, in the data set's own order or shuffled with (seed, rows of the buffer).

    Args:
        name: owner/name. role: train | heldout, where `split` does not name one. revision: a branch, tag or commit.

    Raises:
        UsageError: `datasets` is absent, or the data set, its configuration, split or column is not to be had.
            RefusedError: offline, and not in the cache.
    """
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise UsageError(
            f"{name}: no such file here, and reading a Hub dataset needs the package datasets",
            hint=f"{INSTALL}, or give a file",
        ) from error
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        parts = list(datasets.get_dataset_split_names(name, config, **at))
        part = _part(name, parts, role, split)
        rows = datasets.load_dataset(name, config, split=part, streaming=True, **at)
        if shuffle is not None:
            rows = rows.shuffle(seed=shuffle[0], buffer_size=shuffle[1])
        field = column
        for number, row in enumerate(rows):
            if number == 0:
                field = text_column(_columns(rows, row), column, f"{name}, row 0")
            if row.get(str(field)) is not None:  # an empty cell is no document, and no mistake
                yield record_of(row, name, f"row {number}", field)
    except UsageError:
        raise
    except Exception as error:  # the Hub's client has many kinds of failure, and each is the user's to act on
        if constants.HF_HUB_OFFLINE:
            raise RefusedError(
                f"HF_HUB_OFFLINE is set, and the Hub dataset {name} is not in the cache",
                "Unset it, or give a file or a folder.",
            ) from error
        raise UsageError(
            f"{name}: cannot be read from the Hub ({type(error).__name__}: {error})",
            hint="Check the name and the network; HUB_ID:config=NAME picks a configuration",
        ) from error


def _part(name: str, parts: list[str], role: str, split: str | None) -> str:
    known = ", ".join(parts) or "none"
    if split is not None:
        if split not in parts:
            raise UsageError(f"{name}: the dataset has no split {split}; it has {known}.{did_you_mean(split, parts)}")
        return split
    wanted = ROLES[role]
    part = next((p for p in wanted if p in parts), None)
    if part is None:
        raise UsageError(f"{name}: the dataset has no split {' or '.join(wanted)}; it has {known}",
                         "Name one with HUB_ID:split=NAME")  # fmt: skip
    return part


def _columns(rows: Any, row: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each column holds strings: as the data set declares it, or as its first row looks."""
    features = getattr(rows, "features", None)
    if features:
        return {key: getattr(kind, "dtype", None) in ("string", "large_string") for key, kind in features.items()}
    return {key: isinstance(value, str) for key, value in row.items()}
