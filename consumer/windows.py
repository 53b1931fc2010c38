"""Rolling windows of the blocks of one partition: event columns in, look columns out.

A session is a row of preallocated arrays. One compiled loop (`consumer.kernel`) appends events, closes sessions and
writes every due look. Sessions hang in a list ordered by last activity, so the next one to expire is always its
head: closing costs nothing per event and needs no timers.

The outcome is a function of the event sequence alone: how it is cut into batches changes nothing. That is why
expiry is decided event by event, and why a block's event first expires the block's own session.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consumer.events import CLOCK, TOMBSTONE, EventBatch
from consumer.kernel import LOOK, NO_WATERMARK, NONE, SESSION, advance, link_newest, rise
from consumer.records import SessionState
from model.vocabulary import UNK

MAX_LOOKS = 16_384
"""Looks handed out at a time, which bounds memory however many sessions close at once."""


@dataclass(frozen=True)
class Departed:
    """A block whose session closed and did not start again at once.

    `saved`: the state topic holds a record of it. `marker`: its last offset, if it was closed by the wall clock or
    to make room, which its events alone do not tell; None otherwise.
    """

    block: str
    saved: bool
    marker: int | None


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
        limit: open sessions at most; a further one closes the longest silent of them.
    """

    def __init__(self, *, window: int, every: int, idle_timeout: int, limit: int = 2**31 - 1) -> None:
        self._limit = limit
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
        self._roster = np.array([NONE, NONE, 0], np.int32)  # oldest, newest, open
        self._departed: list[Departed] = []
        self._urgent: set[int] = set()
        self._clock = np.array([NO_WATERMARK], np.int64)
        self._looks: Looks | None = None

    @property
    def open_blocks(self) -> int:
        """Number of open sessions."""
        return len(self._slots)

    @property
    def watermark(self) -> int | None:
        """Largest event time seen, in milliseconds; None before the first event."""
        return None if self._clock[0] <= NO_WATERMARK else int(self._clock[0])

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
        """Close every session and yield their last looks: the partition has fallen silent on the wall clock."""
        slots = np.fromiter(self._slots.values(), np.int32, len(self._slots))
        slots = slots[np.argsort(self._sessions["last_offset"][slots])]  # an order that outlives a restart
        nothing = np.zeros(len(slots), np.int64)
        yield from self._run(slots, np.full(len(slots), TOMBSTONE, np.int32), nothing, nothing, by_clock=True)

    def rise(self, looks: Looks, levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Take in the score levels (N,) of looks, in their order; return the highest of its session at each look."""
        highest = np.empty(len(looks), np.uint8)
        rise(self._sessions, looks.facts, levels, highest)
        return highest

    def snapshot(self, slot: int) -> SessionState:
        """Return the open session of a slot, without what its alerts said."""
        session = self._sessions[slot]
        count = int(session["count"])
        length = min(count - int(session["lost"]), self._window)
        ring = np.arange(count - length, count) % self._window
        return SessionState(
            count=count,
            seen=int(session["seen"]),
            first_offset=int(session["first_offset"]),
            first_time=int(session["first_time"]),
            last_offset=int(session["last_offset"]),
            last_time=int(session["last_time"]),
            tokens=self._tokens[slot, ring],
            offsets=self._offsets[slot, ring],
            times=self._times[slot, ring],
            unknown=self.unknown(slot),
            level=int(session["level"]),
        )

    def restore(
        self, sessions: Iterable[tuple[str, SessionState]], watermark: int | None, start: int
    ) -> dict[str, int]:
        """Take in stored sessions, into an empty store; return the slot of each block.

        `start` is the offset from which events will be read again, and `watermark` the one there. A session whose
        last event lies beyond is out of the list of those that can expire until that event comes by as `CLOCK`.
        """
        if watermark is not None:
            self._clock[0] = watermark
        for block, state in sorted(sessions, key=lambda item: item[1].last_offset):  # the order of last activity
            slot = self._slot(block, UNK)
            session = self._sessions[slot]
            for name in ("count", "seen", "first_offset", "first_time", "last_offset", "last_time", "level"):
                session[name] = getattr(state, name)
            session["unsaved"], session["saved"] = NONE, True
            length = min(len(state.tokens), self._window)
            session["lost"] = state.count - length  # stored with a smaller window than today's, it has no more
            ring = np.arange(state.count - length, state.count) % self._window
            for column, values in (
                (self._tokens, state.tokens),
                (self._offsets, state.offsets),
                (self._times, state.times),
            ):
                column[slot, ring] = values[len(values) - length :]
            if state.unknown:
                self._unknown[slot] = dict(state.unknown)
                self._prune_unknown(slot)
            if state.last_offset < start:
                link_newest(self._sessions, self._roster, slot)
        return dict(self._slots)

    def unsaved(self) -> list[int]:
        """Return the slots of open sessions with events that no record covers."""
        sessions = self._sessions
        return np.flatnonzero((sessions["count"] > 0) & (sessions["unsaved"] != NONE)).tolist()

    def is_open(self, slot: int) -> bool:
        """Say whether the slot holds an open session."""
        return bool(self._sessions["count"][slot])

    def is_unsaved(self, slot: int) -> bool:
        """Say whether the slot holds an open session with events that no record covers."""
        return self.is_open(slot) and bool(self._sessions["unsaved"][slot] != NONE)

    def has_record(self, block: str) -> bool:
        """Say whether the block is open and has a record."""
        slot = self._slots.get(block)
        return slot is not None and bool(self._sessions["saved"][slot])

    def mark_saved(self, slot: int) -> None:
        """Note that a record now covers all events of a slot's session."""
        self._sessions["unsaved"][slot] = NONE
        self._sessions["saved"][slot] = True

    def take_departed(self) -> list[Departed]:
        """Return the blocks that closed since the last call."""
        departed, self._departed = self._departed, []
        return departed

    def take_urgent(self) -> set[int]:
        """Return the slots whose session must be saved at the next commit: it follows one that was evicted."""
        urgent, self._urgent = self._urgent, set()
        return urgent

    def _run(
        self,
        slots: NDArray[np.int32],
        tokens: NDArray[np.int32],
        times: NDArray[np.int64],
        offsets: NDArray[np.int64],
        *,
        by_clock: bool = False,
    ) -> Iterator[Looks]:
        looks = self._buffer()
        closed: dict[int, int | None] = {}
        done = 0
        while done < len(slots):
            done, filled = advance(
                self._sessions, self._tokens, self._offsets, self._times, self._roster, self._clock,
                self._every, self._idle, self._limit, slots, tokens, times, offsets, done,
                looks.facts, looks.rows, looks.offsets, looks.times,
            )  # fmt: skip
            if filled:
                facts = looks.facts[:filled]
                for fact in facts[facts["closing"]]:
                    unforeseen = by_clock or fact["evicted"]
                    closed[int(fact["slot"])] = int(fact["last_offset"]) if unforeseen else None
                yield Looks(facts, looks.rows[:filled], looks.offsets[:filled], looks.times[:filled])
        self._release(closed)

    def _slot(self, block: str, token: int) -> int:
        slot = self._slots.get(block, NONE)
        if slot == NONE and token not in (TOMBSTONE, CLOCK):
            if not self._free:
                self._grow()
            slot = self._free.pop()
            self._slots[block] = slot
            self._names[slot] = block
            self._sessions["saved"][slot] = False
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

    def _release(self, closed: Mapping[int, int | None]) -> None:
        """Forget the blocks whose session closed (slot: marker) and did not start again within the batch."""
        for slot, marker in closed.items():
            if self._sessions["count"][slot]:
                if marker is not None:
                    self._urgent.add(slot)
                continue
            block = self._names[slot]
            self._departed.append(Departed(block, bool(self._sessions["saved"][slot]), marker))
            del self._slots[block]
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
