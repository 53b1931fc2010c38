"""Due looks in columns, and the memory in which all stores of a process hand them out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consumer.kernel import LOOK

MAX_LOOKS = 16_384
"""Looks handed out at a time, which bounds memory however many sessions close at once."""

_LEAST = 512
"""Looks that there is room for at least: few events may close many sessions."""


@dataclass(frozen=True)
class Looks:
    """Due looks in the order in which they fell due.

    Views, valid until the next ones are asked for, of this store or, once it has no more, of one that shares its room.

    Attributes:
        facts: (N,) of the fields slot, length, count, closing, hash, first/last offset and time of the session.
        rows: (N, window + 2) the network's input: BOS, events, END when closing, PAD.
        offsets: (N, window) where each event came from, the oldest first.
        times: (N, window) milliseconds since 1970.
    """

    facts: NDArray[Any]
    rows: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    times: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.facts)

    def part(self, begin: int, end: int) -> "Looks":
        """Return the looks from place `begin` up to `end`."""
        part = slice(begin, end)
        return Looks(self.facts[part], self.rows[part], self.offsets[part], self.times[part])


class LookRoom:
    """Memory for the looks of several stores, each of which has a part of it while it takes in events.

    Stores that do so side by side have parts side by side; when all are done, the next one begins at the first place
    again. So it is as large as a batch of events makes it, in however many partitions these are.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._looks = _empty(0, window)
        self._lent = self._borrowers = 0

    @contextmanager
    def lend(self, events: int) -> Iterator[Looks]:
        """Enter with room for the looks of so many events, or for as many of them as are handed out at a time."""
        begin, end = self._lent, self._lent + min(MAX_LOOKS, max(2 * events, _LEAST))
        if end > len(self._looks):  # what is lent keeps the old memory until it is given back
            self._looks = _empty(max(end, 2 * len(self._looks)), self._window)
        self._lent = end
        self._borrowers += 1
        try:
            yield self._looks.part(begin, end)
        finally:
            self._borrowers -= 1
            if not self._borrowers:
                self._lent = 0


def _empty(count: int, window: int) -> Looks:
    """Make room for looks; it takes no memory before they are written."""
    return Looks(
        np.zeros(count, LOOK),
        np.zeros((count, window + 2), np.uint16),
        np.zeros((count, window), np.int64),
        np.zeros((count, window), np.int64),
    )
