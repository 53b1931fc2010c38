"""The compiled loops of `consumer.windows`: plain loops over plain arrays, no Python objects.

A window is a chain of pages of ten events, so a young session takes little room and an old one no more than its
window. A page keeps offsets and times as distances from its first event's, in four bytes each; an event too far away
for that begins a page of its own. The oldest page is free again as soon as the window no longer reaches into it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consumer.events import CLOCK, TOMBSTONE
from consumer.names import NONE, mix
from model.jit import njit
from model.vocabulary import BOS, END, PAD

PAGE = 10
"""Events of a page."""

UNLISTED = -2
"""Stands for the older neighbour of a session that is not in the list yet."""

SESSION = np.dtype(
    [
        ("count", np.int64),  # events so far; 0: the row holds no open session
        ("seen", np.int64),  # the watermark at the last event
        ("first_offset", np.int64),
        ("first_time", np.int64),
        ("last_offset", np.int64),
        ("last_time", np.int64),
        ("held", np.int32),  # events in the pages: the window, and what else is on its first page
        ("first_page", np.int32),
        ("last_page", np.int32),
        ("older", np.int32),  # neighbours in the list ordered by `seen`
        ("newer", np.int32),
        ("level", np.uint8),  # of the highest score of its looks so far
        ("saved", np.bool_),  # the state topic holds a record of the block, maybe of an earlier session
        ("unsaved", np.bool_),  # there are events that no state record covers
        ("restored", np.bool_),  # from a record or marker: events up to `last_offset` have been taken in before
    ],
    align=True,
)

LOOK = np.dtype(
    [
        ("slot", np.int32),
        ("length", np.int32),  # events in the window; END is not one of them
        ("count", np.int64),  # events of the session so far
        ("closing", np.bool_),
        ("evicted", np.bool_),  # closed to make room, not by its own events
        ("hash", np.uint64),  # of the network's input: equal windows have equal hashes, in one process
        ("first_offset", np.int64),  # of the session
        ("first_time", np.int64),
        ("last_offset", np.int64),
        ("last_time", np.int64),
    ]
)

_inline = njit(cache=True, inline="always")
"""For what is handed views of a row: were it called, references to each array would be counted at each look, which took
half of the time."""


class Pages(NamedTuple):
    """P pages of events, chained."""

    tokens: NDArray[np.uint16]  # (P, PAGE)
    offsets: NDArray[np.uint32]  # (P, PAGE) from the first one's
    times: NDArray[np.int32]  # (P, PAGE) from the first one's
    begins: NDArray[np.int64]  # (P, 2) offset and time of the first
    links: NDArray[np.int32]  # (P, 2) the next page, and how many events are on this one


class Sessions(NamedTuple):
    """All that the loops work on. `roster` and `clock` are the only numbers; see below."""

    rows: NDArray[np.void]  # (S,) of SESSION
    pages: Pages
    roster: NDArray[np.int32]  # (5,)
    clock: NDArray[np.int64]  # (1,) the watermark


OLDEST, NEWEST, LISTED, FREE_PAGE, USED_PAGES = range(5)
"""Places in the roster: the session longest silent, the latest one, how many are in that list; the first of the free
pages, and how many were ever used."""


class Columns(NamedTuple):
    """N due looks, as they are written: see `consumer.looks.Looks`."""

    facts: NDArray[np.void]
    rows: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    times: NDArray[np.int64]
    seed: np.uint64  # of the hashes


@njit(cache=True)
def advance(sessions, window, every, idle, limit, slots, tokens, times, offsets, start, looks):
    """Take in events from `start` on until all are in or the looks are full; return (events done, looks written).

    An event whose looks do not fit is not begun, except that the sessions it expired stay closed: continuing at
    the same event goes on where this call stopped. There must be a free page for every event.
    """
    rows, roster, clock = sessions.rows, sessions.roster, sessions.clock
    capacity = len(looks.facts)
    filled = 0
    for i in range(start, len(slots)):
        slot = slots[i]
        token = tokens[i]
        if slot != NONE and rows[slot].restored and offsets[i] <= rows[slot].last_offset:
            if token == TOMBSTONE:
                continue
            token = CLOCK
        if token != TOMBSTONE:
            clock[0] = max(clock[0], times[i])
            while roster[OLDEST] != NONE and rows[roster[OLDEST]].seen + idle < clock[0]:
                if filled == capacity:
                    return i, filled
                oldest = roster[OLDEST]
                _look(sessions, window, oldest, True, False, looks, filled)
                filled += 1
                _close(sessions, oldest)
        if slot == NONE:
            continue
        session = rows[slot]
        if token == CLOCK:
            if session.count > 0 and offsets[i] == session.last_offset:
                link_newest(rows, roster, slot)  # restored with this event in it: from here on it may expire
            continue
        if token == TOMBSTONE and session.count == 0:
            continue  # a tombstone for a block that is not open
        if filled + 2 > capacity:  # an event makes two looks at most: that of a block evicted, and its own
            return i, filled
        if token == TOMBSTONE:
            _look(sessions, window, slot, True, False, looks, filled)
            filled += 1
            _close(sessions, slot)
            continue
        if session.count == 0:
            if roster[LISTED] >= limit:
                oldest = roster[OLDEST]
                _look(sessions, window, oldest, True, True, looks, filled)
                filled += 1
                _close(sessions, oldest)
            session.first_offset = offsets[i]
            session.first_time = times[i]
            session.held = 0
            session.first_page = NONE
            session.last_page = NONE
        else:
            _unlink(rows, roster, slot)
        append(sessions, window, slot, token, offsets[i], times[i])
        session.count += 1
        session.last_offset = offsets[i]
        session.last_time = times[i]
        session.seen = clock[0]
        session.unsaved = True
        link_newest(rows, roster, slot)
        if session.count % every == 0:
            _look(sessions, window, slot, False, False, looks, filled)
            filled += 1
    return len(slots), filled


@njit(cache=True)
def append(sessions, window, slot, token, offset, time):
    """Write an event behind the last one of a session; free the pages that its window leaves behind."""
    session, pages, roster = sessions.rows[slot], sessions.pages, sessions.roster
    begins, links = pages.begins, pages.links
    page = session.last_page
    fits = False
    if page != NONE and links[page, 1] < PAGE:
        back, since = offset - begins[page, 0], time - begins[page, 1]
        fits = 0 <= back < 1 << 32 and -(1 << 31) <= since < 1 << 31
    if not fits:
        fresh = roster[FREE_PAGE]
        if fresh != NONE:
            roster[FREE_PAGE] = links[fresh, 0]
        else:
            fresh = roster[USED_PAGES]
            roster[USED_PAGES] += 1
        links[fresh, 0] = NONE
        links[fresh, 1] = 0
        begins[fresh, 0] = offset
        begins[fresh, 1] = time
        if page == NONE:
            session.first_page = fresh
        else:
            links[page, 0] = fresh
        session.last_page = fresh
        page = fresh
    at = links[page, 1]
    pages.tokens[page, at] = token
    pages.offsets[page, at] = offset - begins[page, 0]
    pages.times[page, at] = time - begins[page, 1]
    links[page, 1] = at + 1
    session.held += 1
    while session.held - links[session.first_page, 1] >= window:
        first = session.first_page
        session.held -= links[first, 1]
        session.first_page = links[first, 0]
        links[first, 0] = roster[FREE_PAGE]
        roster[FREE_PAGE] = first


@_inline
def read(sessions, window, slot, tokens, offsets, times):
    """Write the window of a session, the oldest event first, into arrays (window,); return its length."""
    session, pages = sessions.rows[slot], sessions.pages
    page, at = session.first_page, max(0, session.held - window)
    length = min(session.held, window)
    for k in range(length):
        if at == pages.links[page, 1]:
            page, at = pages.links[page, 0], 0
        tokens[k] = pages.tokens[page, at]
        offsets[k] = pages.begins[page, 0] + pages.offsets[page, at]
        times[k] = pages.begins[page, 1] + pages.times[page, at]
        at += 1
    return length


@njit(cache=True)
def rise(rows, facts, levels, highest):
    """Raise the level of each look's session to that of the look; write what it is by then into `highest`."""
    for i in range(len(facts)):
        session = rows[facts[i].slot]
        session.level = max(session.level, levels[i])
        highest[i] = session.level
        if facts[i].closing:
            session.level = 0  # the slot's next session begins anew, maybe within these looks


@njit(cache=True)
def expiring(rows, roster, idle, time, slots):
    """Write the sessions that end once the watermark is at `time` into `slots`, the longest silent first.

    Returns how many these are, as far as there is room for them.
    """
    slot, count = roster[OLDEST], 0
    while slot != NONE and count < len(slots) and rows[slot].seen + idle < time:
        slots[count] = slot
        slot = rows[slot].newer
        count += 1
    return count


@njit(cache=True)
def link_newest(rows, roster, slot):
    """Hang an open session at the newest end of the list."""
    session = rows[slot]
    session.older = roster[NEWEST]
    session.newer = NONE
    if roster[NEWEST] == NONE:
        roster[OLDEST] = slot
    else:
        rows[roster[NEWEST]].newer = slot
    roster[NEWEST] = slot
    roster[LISTED] += 1


@njit(cache=True)
def link_all(rows, roster, slots, start):
    """Hang restored sessions (N,) into the list, in this order; those with an event from `start` on stay out of it."""
    for slot in slots:
        rows[slot].older = UNLISTED
        if rows[slot].last_offset < start:
            link_newest(rows, roster, slot)


@njit(cache=True)
def _close(sessions, slot):
    _unlink(sessions.rows, sessions.roster, slot)
    session, links = sessions.rows[slot], sessions.pages.links
    links[session.last_page, 0] = sessions.roster[FREE_PAGE]
    sessions.roster[FREE_PAGE] = session.first_page
    session.count = 0


@njit(cache=True)
def _unlink(rows, roster, slot):
    older, newer = rows[slot].older, rows[slot].newer
    if older == UNLISTED:
        return
    if older == NONE:
        roster[OLDEST] = newer
    else:
        rows[older].newer = newer
    if newer == NONE:
        roster[NEWEST] = older
    else:
        rows[newer].older = older
    roster[LISTED] -= 1


@_inline
def _look(sessions, window, slot, closing, evicted, looks, at):
    """Write the look at `slot` into place `at` of the look columns."""
    session = sessions.rows[slot]
    row = looks.rows[at]
    length = read(sessions, window, slot, row[1:], looks.offsets[at], looks.times[at])
    row[0] = BOS
    digest = looks.seed
    for k in range(1, 1 + length):
        digest = mix(digest, row[k])
    used = 1 + length
    if closing:
        row[used] = END
        digest = mix(digest, END)
        used += 1
    row[used:] = PAD
    fact = looks.facts[at]
    fact.slot = slot
    fact.length = length
    fact.count = session.count
    fact.closing = closing
    fact.evicted = evicted
    fact.hash = digest
    fact.first_offset = session.first_offset
    fact.first_time = session.first_time
    fact.last_offset = session.last_offset
    fact.last_time = session.last_time
