"""Streams side by side: who waits for whom, and what stays in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch

from linearize.convert import lanes
from linearize.convert.lanes import Lanes

CARD = torch.device("cuda")


class Stream:
    """Stands for a CUDA stream."""

    current: Stream
    log: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, device: torch.device | None = None) -> None:
        self.number = Stream.made
        Stream.made += 1

    made = 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.number, other.number))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(a, b) where stream a waits for b; the current one is 0."""
    Stream.made, Stream.log = 0, []
    Stream.current = Stream()

    @contextmanager
    def stream(other: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, other
        yield
        Stream.current = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    return Stream.log


def test_lanes_fork_and_join(waits: list[tuple[int, int]]) -> None:
    beside = Lanes(CARD, 3)

    class Input:
        pass

    held = Input()
    gone = weakref.ref(held)
    where = []
    for number in (0, 1, 3):
        with beside.beside(number, held):
            where.append(Stream.current.number)
    del held
    assert where == [1, 2, 1] and waits == [(1, 0), (2, 0), (1, 0)]
    assert gone() is not None  # its memory may not be given to others before it has been read
    beside.join()
    assert waits[3:] == [(0, 1), (0, 2)]  # and not for the third lane, which has done nothing
    assert gone() is None
    beside.join()
    assert len(waits) == 5


def test_without_lanes_all_runs_in_its_place(waits: list[tuple[int, int]]) -> None:
    beside = Lanes(CARD)
    with beside.beside(0, object()):
        assert Stream.current.number == 0
    beside.join()
    assert not waits


@pytest.mark.parametrize(
    ("device", "numbers", "recorded", "count"),
    [("cuda", 1 << 22, True, 4), ("cuda", (1 << 22) + 1, True, 0), ("cuda", 64, False, 0), ("cpu", 64, True, 0)],
)
def test_where_there_are_lanes(waits: Any, device: str, numbers: int, recorded: bool, count: int) -> None:
    assert len(Lanes.fitting(torch.device(device), numbers, recorded=recorded).streams) == count
    assert count in (0, lanes.LANES)


@pytest.mark.gpu
def test_on_a_gpu_in_a_graph() -> None:
    beside = Lanes(CARD, 2)
    x = torch.randn(3, 512, 512, device=CARD)

    def run() -> torch.Tensor:
        found = []
        for number, part in enumerate(x):
            with beside.beside(number, part):
                found.append((part @ part).relu().sum())
        beside.join()
        return torch.stack(found)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    assert torch.equal(found, wanted)
