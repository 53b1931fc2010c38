"""Rolling windows of the blocks of one partition: event columns in, look columns out.

A session is a row of preallocated arrays. One compiled loop (`consumer.kernel`) appends events, closes sessions and
writes every due look. Sessions hang in a list ordered by last activity, so the next one to expire is always its
head: closing costs nothing per event and needs no timers.

The outcome is a function of the event sequence alone: how it is cut into batches changes nothing. That is why
expiry is decided event by event, and why a block's event first expires the block's own session.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consumer.events import TOMBSTONE, EventBatch
from consumer.kernel import LOOK, NEVER, NONE, SESSION, advance

MAX_LOOKS = 16_384
"""Looks handed out at a time, which bounds memory however many sessions close at once."""


@dataclass(frozen=True)
class Looks:
    """Due looks in the order in which they fell due. Views, valid until the next ones are asked for.

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


class WindowStore:
    """The open sessions of one partition.

    Args:
        window: newest events of a session that a look shows.
        every: a look falls due after every so many events of a session, and when it closes.
        idle_timeout: milliseconds of event time after which a silent session closes.
    """

    def __init__(self, *, window: int, every: int, idle_timeout: int) -> None:
        self._window = window
        self._every = every
        self._idle = idle_timeout
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._names: list[str] = []
        self._unknown: dict[int, dict[int, str]] = {}
        self._sessions = np.zeros(0, SESSION)
        self._tokens = np.zeros((0, window), np.uint16)
        self._offsets = np.zeros((0, window), np.int64)
        self._times = np.zeros((0, window), np.int64)
        self._list = np.array([NONE, NONE], np.int32)  # the longest silent session, the latest one
        self._clock = np.array([NEVER], np.int64)
        self._looks: Looks | None = None

    @property
    def open_blocks(self) -> int:
        """Number of open sessions."""
        return len(self._slots)

    @property
    def watermark(self) -> int | None:
        """Largest event time seen, in milliseconds; None before the first event."""
        return None if self._clock[0] == NEVER else int(self._clock[0])

    def block(self, slot: int) -> str:
        """Return the block id of a look's slot."""
        return self._names[slot]

    def unknown(self, slot: int) -> dict[int, str]:
        """Return the event ids, by offset, of the UNK tokens in a slot's window."""
        return self._unknown.get(slot, {})

    def apply(self, batch: EventBatch) -> Iterator[Looks]:
        """Take in the events of `batch` and yield all looks that fall due.

        The iterator must be exhausted: the events are taken in while it runs.
        """
        tokens, times, offsets = batch.columns()
        slots = np.array([self._slot(block, token) for block, token in zip(batch.blocks, batch.tokens, strict=True)],
                         np.int32)  # fmt: skip
        for place, event in batch.unknown.items():
            self._unknown.setdefault(int(slots[place]), {})[batch.offsets[place]] = event
        yield from self._run(slots, tokens, times, offsets)
        for slot in {int(slots[place]) for place in batch.unknown}:
            self._prune_unknown(slot)

    def close_all(self) -> Iterator[Looks]:
        """Close every session and yield their last looks: the partition has fallen silent, or the file ended."""
        slots = np.fromiter(self._slots.values(), np.int32, len(self._slots))
        nothing = np.zeros(len(slots), np.int64)
        yield from self._run(slots, np.full(len(slots), TOMBSTONE, np.int32), nothing, nothing)

    def _run(
        self,
        slots: NDArray[np.int32],
        tokens: NDArray[np.int32],
        times: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> Iterator[Looks]:
        looks = self._buffer()
        closed: list[NDArray[np.int32]] = []
        done = 0
        while done < len(slots):
            done, filled = advance(
                self._sessions, self._tokens, self._offsets, self._times, self._list, self._clock,
                self._every, self._idle, slots, tokens, times, offsets, done,
                looks.facts, looks.rows, looks.offsets, looks.times,
            )  # fmt: skip
            if filled:
                facts = looks.facts[:filled]
                closed.append(facts["slot"][facts["closing"]])
                yield Looks(facts, looks.rows[:filled], looks.offsets[:filled], looks.times[:filled])
        if closed:
            self._release(np.unique(np.concatenate(closed)))

    def _slot(self, block: str, token: int) -> int:
        slot = self._slots.get(block, NONE)
        if slot == NONE and token != TOMBSTONE:
            if not self._free:
                self._grow()
            slot = self._free.pop()
            self._slots[block] = slot
            self._names[slot] = block
        return slot

    def _grow(self) -> None:
        """Double the rows; a row costs the same whether its session is young or old."""
        old = len(self._sessions)
        new = max(1024, 2 * old)
        for name in ("_sessions", "_tokens", "_offsets", "_times"):
            array = getattr(self, name)
            larger = np.zeros((new, *array.shape[1:]), array.dtype)
            larger[:old] = array
            setattr(self, name, larger)
        self._names.extend([""] * (new - old))
        self._free.extend(range(new - 1, old - 1, -1))

    def _release(self, slots: NDArray[np.int32]) -> None:
        """Forget the blocks whose session closed and did not start again within the batch."""
        for slot in slots[self._sessions["count"][slots] == 0].tolist():
            del self._slots[self._names[slot]]
            self._names[slot] = ""
            self._unknown.pop(slot, None)
            self._free.append(slot)

    def _prune_unknown(self, slot: int) -> None:
        names = self._unknown.get(slot)
        if names is not None:
            inside = set(self._offsets[slot, : min(self._window, self._sessions[slot]["count"])].tolist())
            self._unknown[slot] = {offset: name for offset, name in names.items() if offset in inside}

    def _buffer(self) -> Looks:
        if self._looks is None:
            self._looks = Looks(
                np.zeros(MAX_LOOKS, LOOK),
                np.zeros((MAX_LOOKS, self._window + 2), np.uint16),
                np.zeros((MAX_LOOKS, self._window), np.int64),
                np.zeros((MAX_LOOKS, self._window), np.int64),
            )
        return self._looks
