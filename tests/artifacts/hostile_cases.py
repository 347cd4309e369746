"""Hostile files by the hundred, from one seed: each case damages a copy of a sound folder in one way.

`must` says whether the damage has to be refused; where it is False it may also be harmless (a flipped bit in a weight
that nobody vouches for, a key that is never read), and then only tracebacks and escapes count.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.artifacts.damage import Case
from tests.artifacts.hostile_places import manifests, places
from tests.artifacts.hostile_runs import runs
from tests.artifacts.hostile_settings import configs, tokenizers
from tests.artifacts.hostile_weights import headers, indexes, torn


def cases(seed: int = 0) -> Iterator[Case]:
    """All of them, in an order of their own."""
    rng = random.Random(seed)
    yield from torn(rng)
    yield from headers(rng)
    yield from indexes(rng)
    yield from configs(rng)
    yield from tokenizers(rng)
    yield from places()
    yield from manifests(rng)
    yield from runs(rng)
