"""Rolling windows of the blocks of one partition: event columns in, look columns out.

A session is a row of an array and a chain of pages. One compiled loop (`consumer.kernel`) appends events, closes
sessions and writes every due look. Sessions hang in a list ordered by last activity, so the next one to expire is
always its head: closing costs nothing per event and needs no timers.

The outcome is a function of the event sequence alone: how it is cut into batches changes nothing. That is why
expiry is decided event by event, and why a block's event first expires the block's own session.
"""

import secrets
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consumer.events import NO_WATERMARK, TOMBSTONE, EventBatch
from consumer.kernel import (
    FREE_PAGE,
    LISTED,
    NEWEST,
    OLDEST,
    PAGE,
    SESSION,
    UNLISTED,
    USED_PAGES,
    Columns,
    Pages,
    Sessions,
    advance,
    append,
    expiring,
    link_all,
    read,
    rise,
)
from consumer.looks import LookRoom, Looks
from consumer.names import NONE, NameIndex, Names, grown
from consumer.packing import read_windows, write_windows
from consumer.records import EVENT_BYTES, HEAD, VERSION, Bounds, SessionState, StoredSessions

STORED = ("count", "seen", "first_offset", "first_time", "last_offset", "last_time", "level")
"""What sessions and their records both have."""

_SEED = np.uint64(secrets.randbits(64))
"""Nobody who does not know it can make two windows of one hash, and so hide one behind the other's score."""

_SHARED = 10_000
"""Unknown event ids whose text blocks share; at most 10 MB."""

_AFTER_ALL = 2**62
"""An offset later than any."""


class Departed(NamedTuple):
    """A block whose session closed and did not start again at once.

    `saved`: the state topic holds a record of it. `marker`: its last offset, if it was closed by the wall clock or
    to make room, which its events alone do not tell; None otherwise.
    """

    name: bytes
    saved: bool
    marker: int | None


class WindowStore:
    """The open sessions of one partition.

    Args:
        window: newest events of a session that a look shows.
        every: a look falls due after every so many events of a session, and when it closes.
        idle_timeout: milliseconds of event time after which a silent session closes.
        limit: open sessions at most; a further one closes the longest silent of them.
        room: for looks, shared with other stores of the same window; of its own if None.
    """

    def __init__(
        self, *, window: int, every: int, idle_timeout: int, limit: int = 2**31 - 1, room: LookRoom | None = None
    ) -> None:
        self.bounds = self._bounds_before = Bounds(idle_timeout, limit)
        self._window = window
        self._every = every
        self._index = NameIndex()
        self._unknown: dict[int, tuple[array[int], tuple[str, ...]]] = {}  # by slot: offsets, and an event id for each
        self._shared: dict[str, str] = {}
        roster = np.zeros(5, np.int32)
        roster[[OLDEST, NEWEST, FREE_PAGE]] = NONE
        self._sessions = Sessions(
            np.zeros(self._index.capacity, SESSION), _pages(1024), roster, np.array([NO_WATERMARK], np.int64)
        )
        self._marked = np.zeros(0, np.int32)
        self._departed: list[Departed] = []
        self._urgent: set[int] = set()
        self._room = room or LookRoom(window)
        self.opened = Names.of([])
        """Open blocks whose session began with an event of the last batch."""

    @property
    def open_blocks(self) -> int:
        """Number of open sessions."""
        return len(self._index) - len(self._silent_markers())

    @property
    def watermark(self) -> int | None:
        """Largest event time seen, in milliseconds; None before the first event."""
        clock = int(self._sessions.clock[0])
        return None if clock <= NO_WATERMARK else clock

    def name(self, slot: int) -> bytes:
        """Return the block id of a slot, in UTF-8."""
        return self._index.name(slot)

    def names(self, slots: NDArray[np.int32]) -> Names:
        """Return the block ids of slots, in UTF-8: views, valid until the next event."""
        return self._index.names(slots)

    def block(self, slot: int) -> str:
        """Return the block id of a slot."""
        return self._index.name(slot).decode()

    def are_open(self, names: Names) -> NDArray[np.bool_]:
        """Say of each block (N,) whether it is open."""
        slots = self._index.find(names)
        is_open = slots != NONE  # few are, in a partition that is not theirs
        is_open[is_open] = self._sessions.rows["count"][slots[is_open]] > 0
        return is_open

    def unknown(self, slot: int) -> dict[int, str]:
        """Return the event ids, by offset, of the UNK tokens in a slot's window."""
        return dict(zip(*self._unknown.get(slot, ((), ())), strict=True))

    def apply(self, batch: EventBatch, *, again: bool = False) -> Iterator[Looks]:
        """Take in the events of `batch` and yield all looks that fall due.

        The iterator must be exhausted: the events are taken in while it runs. Those that a predecessor has taken in
        before come `again`: its bounds end sessions, or else today's might end some which it has not.
        """
        slots = self._index.locate(batch.names, batch.tokens >= 0)
        self._make_room(len(slots))
        unknown: dict[int, dict[int, str]] = {}
        for place, event in batch.unknown.items():
            slot = int(slots[place])
            unknown.setdefault(slot, self.unknown(slot))[int(batch.offsets[place])] = event
        for slot, names in unknown.items():
            self._know(slot, names)
        times = batch.times_after(int(self._sessions.clock[0]))
        bounds = self._bounds_before if again else self.bounds
        yield from self._run(slots, batch.tokens, times, batch.offsets, bounds)
        rows = self._sessions.rows
        begun = (rows["count"][slots] > 0) & (rows["first_offset"][slots] == batch.offsets)
        self.opened = batch.names.take((slots != NONE) & begun)
        for slot, names in unknown.items():
            inside = self.snapshot(slot).offsets.tolist() if self.is_open(slot) else []
            self._know(slot, {offset: names[offset] for offset in inside if offset in names})

    def close_all(self, at_most: int | None = None) -> Iterator[Looks]:
        """Close every session, or so many, and yield their last looks: the partition is silent on the wall clock."""
        return self._close(self._open_by_activity()[:at_most])

    def flood(self, batch: EventBatch, at_most: int) -> int | None:
        """Return the row of the first event in `batch` whose time ends more than so many sessions; None: there is none.

        Sessions that the batch begins do not count; those that it keeps alive before that event may.
        """
        clock = self._sessions.clock[0]
        own = batch.times_after(int(clock))
        times = np.maximum.accumulate(np.where(batch.tokens == TOMBSTONE, clock, np.maximum(own, clock)))
        ending = self._expiring(int(times[-1]) if len(times) else NO_WATERMARK, at_most + 1)
        if len(ending) <= at_most:
            return None
        latest = int(self._sessions.rows["seen"][ending].max())  # the last one's, as a rule
        return int(np.searchsorted(times, latest + self.bounds.idle_timeout, side="right"))

    def close_ending(self, time: int, at_most: int) -> Iterator[Looks]:
        """Close so many of the sessions that end once the watermark is at `time`, and yield their last looks.

        The watermark stays. As after `close_all`, a marker says so of each: what comes before the event that moves it
        may be read again.
        """
        return self._close(self._expiring(time, at_most))

    def rise(self, looks: Looks, levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Take in the score levels (N,) of looks, in their order; return the highest of its session at each look."""
        highest = np.empty(len(looks), np.uint8)
        rise(self._sessions.rows, looks.facts, levels, highest)
        return highest

    def snapshot(self, slot: int) -> SessionState:
        """Return the open session of a slot, without what its alerts said."""
        session = self._sessions.rows[slot]
        tokens, offsets, times = np.empty(self._window, np.uint16), *np.empty((2, self._window), np.int64)
        length = read(self._sessions, self._window, slot, tokens, offsets, times)
        count, seen, first_offset, first_time, last_offset, last_time, level = (int(session[name]) for name in STORED)
        return SessionState(
            count,
            seen,
            first_offset,
            first_time,
            last_offset,
            last_time,
            level=level,
            tokens=tokens[:length],
            offsets=offsets[:length],
            times=times[:length],
            unknown=self.unknown(slot),
        )

    def packed(self, slots: NDArray[np.int32], vocabulary: bytes) -> list[bytes | None]:
        """Return the records of open sessions (N,) that have not alerted and know every event; None: does not fit."""
        rows = self._sessions.rows[slots]
        heads = np.zeros(len(slots), HEAD)
        for name in STORED:
            heads[name] = rows[name]
        heads["version"] = VERSION
        heads["vocabulary"] = np.frombuffer(vocabulary, np.uint8)
        heads["length"] = np.minimum(rows["held"], self._window)
        sizes = HEAD.itemsize + EVENT_BYTES * heads["length"].astype(np.int64)
        ends = np.cumsum(sizes)
        out = np.empty(int(sizes.sum()), np.uint8)
        begins = ends - sizes
        out[begins[:, None] + np.arange(HEAD.itemsize)] = heads.view(np.uint8).reshape(-1, HEAD.itemsize)
        fits = write_windows(self._sessions, self._window, slots, begins + HEAD.itemsize, out) >= 0
        data = out.tobytes()
        return [
            data[begin:end] if fit else None
            for begin, end, fit in zip(begins.tolist(), ends.tolist(), fits.tolist(), strict=True)
        ]

    def restore(
        self, stored: StoredSessions, watermark: int | None, start: int, bounds: Bounds | None = None
    ) -> dict[int, SessionState]:
        """Take in stored sessions, into an empty store; return, by slot, those that are out of the ordinary.

        These have alerted, or know events that the vocabulary does not. `start` is the offset from which events will
        be read again, and `watermark` the one there. What a session includes is not taken in twice. One whose last
        event lies beyond `start` is not in the list of those that can expire until that event comes by. Nor is taken
        in what the markers cover. Both last until `end_replay`. `bounds` are those of the predecessor, if known.
        """
        self._bounds_before = bounds or self.bounds
        if watermark is not None:
            self._sessions.clock[0] = watermark
        count = len(stored.names)
        markers = Names.of(stored.markers)
        slots = self._index.locate(stored.names, np.ones(count, np.bool_))
        self._marked = self._index.locate(markers, np.ones(len(markers), np.bool_))
        self._make_room(int(stored.heads["length"].sum()))
        rows = self._sessions.rows
        for name in STORED:
            rows[name][slots] = stored.heads[name]
        rows["saved"][slots] = True
        rows["restored"][slots] = rows["restored"][self._marked] = True
        rows["last_offset"][self._marked] = list(stored.markers.values())
        special = self._read_windows(slots, stored)
        link_all(rows, self._sessions.roster, slots[_by_activity(stored.heads["last_offset"], stored.names)], start)
        return special

    def _read_windows(self, slots: NDArray[np.int32], stored: StoredSessions) -> dict[int, SessionState]:
        window = self._window
        taken = np.zeros(len(slots), np.bool_)
        for places, table in stored.ordinary():
            lengths = stored.heads["length"][places].astype(np.int32)
            begins = stored.records.begin[places] + HEAD.itemsize
            taken[places] = read_windows(
                self._sessions, window, slots[places], stored.records.data, begins, lengths, table
            )
        special = {int(slots[place]): stored.state(place) for place in np.flatnonzero(~taken).tolist()}
        for slot, state in special.items():
            one = np.array([slot], np.int32)
            self._sessions.rows["held"][slot] = 0
            self._sessions.rows["first_page"][slot] = self._sessions.rows["last_page"][slot] = NONE
            for event in zip(state.tokens, state.offsets, state.times, strict=True):
                append(self._sessions, window, one[0], *event)
            self._know(slot, state.unknown)
        return special

    def end_replay(self) -> None:
        """No event comes any more that a marker was for, or for which a session waits to be listed.

        One still waits if today's settings refuse its last event.
        """
        silent, self._marked = self._silent_markers(), np.zeros(0, np.int32)
        self._forget(silent)
        rows, roster = self._sessions.rows, self._sessions.roster
        if (rows["older"][self._open()] == UNLISTED).any():
            roster[[OLDEST, NEWEST]], roster[LISTED] = NONE, 0
            link_all(rows, roster, self._open_by_activity(), _AFTER_ALL)

    def unsaved(self) -> NDArray[np.int32]:
        """Return the slots (N,) of open sessions with events that no record covers."""
        slots = self._open()
        return slots[self.are_unsaved(slots)]

    def first_offsets(self) -> NDArray[np.int64]:
        """Return the first offset of each open session (N,)."""
        return self._sessions.rows["first_offset"][self._open()]

    def are_unsaved(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Say of each slot (N,) whether it holds an open session with events that no record covers."""
        rows = self._sessions.rows
        return (rows["count"][slots] > 0) & rows["unsaved"][slots]

    def is_open(self, slot: int) -> bool:
        """Say whether the slot holds an open session."""
        return bool(self._sessions.rows["count"][slot])

    def have_records(self, names: Names) -> NDArray[np.bool_]:
        """Say of each block (N,) whether it is open and has a record."""
        slots = self._index.find(names)
        return (slots != NONE) & (self._sessions.rows["count"][slots] > 0) & self._sessions.rows["saved"][slots]

    def mark_saved(self, slots: Sequence[int] | NDArray[np.int32]) -> None:
        """Note that records now cover all events of these sessions."""
        self._sessions.rows["unsaved"][slots] = False
        self._sessions.rows["saved"][slots] = True

    def take_departed(self) -> list[Departed]:
        """Return the blocks that closed since the last call."""
        departed, self._departed = self._departed, []
        return departed

    def take_urgent(self) -> set[int]:
        """Return the slots whose session must be saved at the next commit: it follows one that was evicted."""
        urgent, self._urgent = self._urgent, set()
        return urgent

    def _close(self, slots: NDArray[np.int32]) -> Iterator[Looks]:
        tombstones, nothing = np.full(len(slots), TOMBSTONE, np.int32), np.zeros(len(slots), np.int64)
        return self._run(slots, tombstones, nothing, nothing + _AFTER_ALL, self.bounds, by_clock=True)

    def _expiring(self, time: int, at_most: int) -> NDArray[np.int32]:
        slots = np.empty(at_most, np.int32)
        return slots[: expiring(self._sessions.rows, self._sessions.roster, self.bounds.idle_timeout, time, slots)]

    def _run(
        self,
        slots: NDArray[np.int32],
        tokens: NDArray[np.int32],
        times: NDArray[np.int64],
        offsets: NDArray[np.int64],
        bounds: Bounds,
        *,
        by_clock: bool = False,
    ) -> Iterator[Looks]:
        closed: dict[int, int] = {}
        done = 0
        with self._room.lend(len(slots)) as looks:
            columns = Columns(looks.facts, looks.rows, looks.offsets, looks.times, _SEED)
            while done < len(slots):
                done, filled = advance(
                    self._sessions, self._window, self._every, bounds.idle_timeout, bounds.limit,
                    slots, tokens, times, offsets, done, columns,
                )  # fmt: skip
                if filled:
                    due = looks.part(0, filled)
                    ended = due.facts[due.facts["closing"]]
                    markers = np.where(ended["evicted"] | by_clock, ended["last_offset"], NONE)
                    closed.update(zip(ended["slot"].tolist(), markers.tolist(), strict=True))
                    yield due
        if closed:
            self._release(closed)

    def _release(self, closed: dict[int, int]) -> None:
        """Forget the blocks whose session closed (slot: marker or NONE) and did not start again within the batch."""
        slots = np.fromiter(closed, np.int32, len(closed))
        is_open = self._sessions.rows["count"][slots] > 0
        self._urgent.update(slot for slot in slots[is_open].tolist() if closed[slot] != NONE)
        slots = slots[~is_open]
        saved = self._sessions.rows["saved"][slots].tolist()
        markers = [None if closed[slot] == NONE else closed[slot] for slot in slots.tolist()]
        self._departed.extend(map(Departed, self.names(slots), saved, markers))
        self._marked = np.setdiff1d(self._marked, slots)
        self._forget(slots)

    def _forget(self, slots: NDArray[np.int32]) -> None:
        self._index.forget(slots)
        self._sessions.rows["saved"][slots] = self._sessions.rows["restored"][slots] = False
        if self._unknown:
            for slot in slots.tolist():
                self._unknown.pop(slot, None)

    def _silent_markers(self) -> NDArray[np.int32]:
        """Return the slots that hold a marker only."""
        return self._marked[self._sessions.rows["count"][self._marked] == 0]

    def _open(self) -> NDArray[np.int32]:
        return np.flatnonzero(self._sessions.rows["count"]).astype(np.int32)

    def _open_by_activity(self) -> NDArray[np.int32]:
        slots = self._open()
        return slots[_by_activity(self._sessions.rows["last_offset"][slots], self.names(slots))]

    def _make_room(self, events: int) -> None:
        """Grow before the compiled loop begins, so that it never has to."""
        sessions, used = self._sessions, int(self._sessions.roster[USED_PAGES])
        rows, pages = sessions.rows, sessions.pages
        if self._index.capacity > len(rows):
            rows = grown(rows, self._index.capacity)
        if used + events > len(pages.links):
            pages = Pages(*(grown(array, max(2 * len(array), used + events)) for array in pages))
        self._sessions = sessions._replace(rows=rows, pages=pages)

    def _know(self, slot: int, names: Mapping[int, str]) -> None:
        """Note the event ids, by offset, of a slot's UNK tokens.

        When a new version of the sender logs new events, all blocks have them: these share the text of an id, and a
        dictionary for each block would be several times the block.
        """
        if not names:
            self._unknown.pop(slot, None)
            return
        if len(self._shared) > _SHARED:
            self._shared.clear()
        shared = self._shared.setdefault
        self._unknown[slot] = array("q", list(names)), tuple(shared(name, name) for name in names.values())


def _by_activity(last_offsets: NDArray[np.int64], names: Names) -> NDArray[np.int64]:
    """Return the order (N,) of last activity: that in which decoders hand out events, so it outlives a restart.

    The events of one line have one offset and come in the order of their blocks' names.
    """
    order = np.argsort(last_offsets, kind="stable")
    ties = np.diff(last_offsets[order]) == 0
    tied = np.flatnonzero(np.append(ties, False) | np.append(False, ties)) if ties.any() else np.zeros(0, np.int64)
    keys = {place: (int(last_offsets[place]), names[place]) for place in order[tied].tolist()}
    order[tied] = sorted(keys, key=keys.__getitem__)
    return order


def _pages(count: int) -> Pages:
    return Pages(
        np.zeros((count, PAGE), np.uint16),
        np.zeros((count, PAGE), np.uint32),
        np.zeros((count, PAGE), np.int32),
        np.zeros((count, 2), np.int64),
        np.zeros((count, 2), np.int32),
    )
