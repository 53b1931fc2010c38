"""The compiled loop of `consumer.windows`: plain loops over plain arrays, no Python objects."""

import numpy as np
from numba import njit

from consumer.events import CLOCK, TOMBSTONE
from model.vocabulary import BOS, END, PAD

NONE = -1
"""No slot."""

OLDEST, NEWEST, OPEN = range(3)
"""Places in the roster: the session longest silent, the latest one, and how many are open."""

NO_WATERMARK = -(2**62)
"""The watermark before the first event: earlier than any."""

SESSION = np.dtype(
    [
        ("count", np.int64),  # events so far; 0: the row holds no open session
        ("lost", np.int64),  # the first so many events are not in the row, though there would be room for them
        ("seen", np.int64),  # the watermark at the last event
        ("first_offset", np.int64),
        ("first_time", np.int64),
        ("last_offset", np.int64),
        ("last_time", np.int64),
        ("unsaved", np.int64),  # offset of the first event that no state record covers; NONE: all are covered
        ("level", np.uint8),  # of the highest score of its looks so far
        ("saved", np.bool_),  # the state topic holds a record of the block, maybe of an earlier session
        ("older", np.int32),  # neighbours in the list ordered by `seen`
        ("newer", np.int32),
    ]
)

LOOK = np.dtype(
    [
        ("slot", np.int32),
        ("length", np.int32),  # events in the window; END is not one of them
        ("count", np.int64),  # events of the session so far
        ("closing", np.bool_),
        ("evicted", np.bool_),  # closed to make room, not by its own events
        ("hash", np.uint64),  # of the network's input: equal windows have equal hashes
        ("first_offset", np.int64),  # of the session
        ("first_time", np.int64),
        ("last_offset", np.int64),
        ("last_time", np.int64),
    ]
)


@njit(cache=True)
def advance(
    sessions, tokens, offsets, times, roster, clock, every, idle, limit,
    in_slot, in_token, in_time, in_offset, start,
    facts, rows, row_offsets, row_times,
):  # fmt: skip
    """Take in events from `start` on until all are in or the looks are full; return (events done, looks written).

    An event whose looks do not fit is not begun, except that the sessions it expired stay closed: continuing at
    the same event goes on where this call stopped.
    """
    window = tokens.shape[1]
    capacity = len(facts)
    filled = 0
    for i in range(start, len(in_slot)):
        slot = in_slot[i]
        token = in_token[i]
        if token != TOMBSTONE:
            clock[0] = max(clock[0], in_time[i])
            while roster[OLDEST] != NONE and sessions[roster[OLDEST]].seen + idle < clock[0]:
                if filled == capacity:
                    return i, filled
                oldest = roster[OLDEST]
                _look(
                    sessions, tokens, offsets, times, oldest, True, False, facts, rows, row_offsets, row_times, filled
                )
                filled += 1
                _close(sessions, roster, oldest)
        if slot == NONE:
            continue
        session = sessions[slot]
        if token == CLOCK:
            if session.count > 0 and in_offset[i] == session.last_offset:
                link_newest(sessions, roster, slot)  # restored with this event in it: from here on it may expire
            continue
        if token == TOMBSTONE and session.count == 0:
            continue  # a tombstone for a block that is not open
        if filled + 2 > capacity:  # an event makes two looks at most: that of a block evicted, and its own
            return i, filled
        if token == TOMBSTONE:
            _look(sessions, tokens, offsets, times, slot, True, False, facts, rows, row_offsets, row_times, filled)
            filled += 1
            _close(sessions, roster, slot)
            continue
        if session.count == 0:
            if roster[OPEN] >= limit:
                oldest = roster[OLDEST]
                _look(sessions, tokens, offsets, times, oldest, True, True, facts, rows, row_offsets, row_times, filled)
                filled += 1
                _close(sessions, roster, oldest)
            session.first_offset = in_offset[i]
            session.first_time = in_time[i]
            session.lost = 0
            session.unsaved = NONE
        else:
            _unlink(sessions, roster, slot)
        at = session.count % window
        tokens[slot, at] = token
        offsets[slot, at] = in_offset[i]
        times[slot, at] = in_time[i]
        session.count += 1
        session.last_offset = in_offset[i]
        session.last_time = in_time[i]
        session.seen = clock[0]
        if session.unsaved == NONE:
            session.unsaved = in_offset[i]
        link_newest(sessions, roster, slot)
        if session.count % every == 0:
            _look(sessions, tokens, offsets, times, slot, False, False, facts, rows, row_offsets, row_times, filled)
            filled += 1
    return len(in_slot), filled


@njit(cache=True)
def rise(sessions, facts, levels, highest):
    """Raise the level of each look's session to that of the look; write what it is by then into `highest`."""
    for i in range(len(facts)):
        session = sessions[facts[i].slot]
        session.level = max(session.level, levels[i])
        highest[i] = session.level
        if facts[i].closing:
            session.level = 0  # the slot's next session begins anew, maybe within these looks


@njit(cache=True)
def link_newest(sessions, roster, slot):
    """Hang an open session at the newest end of the roster."""
    session = sessions[slot]
    session.older = roster[NEWEST]
    session.newer = NONE
    if roster[NEWEST] == NONE:
        roster[OLDEST] = slot
    else:
        sessions[roster[NEWEST]].newer = slot
    roster[NEWEST] = slot
    roster[OPEN] += 1


@njit(cache=True)
def _close(sessions, roster, slot):
    _unlink(sessions, roster, slot)
    sessions[slot].count = 0


@njit(cache=True)
def _unlink(sessions, roster, slot):
    older, newer = sessions[slot].older, sessions[slot].newer
    if older == NONE:
        roster[OLDEST] = newer
    else:
        sessions[older].newer = newer
    if newer == NONE:
        roster[NEWEST] = older
    else:
        sessions[newer].older = older
    roster[OPEN] -= 1


@njit(cache=True)
def _look(
    sessions, tokens, offsets, times, slot, closing, evicted, facts, rows, row_offsets, row_times, at,
):  # fmt: skip
    """Write the look at `slot` into place `at` of the look columns."""
    window = tokens.shape[1]
    session = sessions[slot]
    length = min(session.count - session.lost, window)
    begin = session.count - length
    row = rows[at]
    row[0] = BOS
    digest = np.uint64(0x9E3779B97F4A7C15)
    for k in range(length):
        source = (begin + k) % window
        token = tokens[slot, source]
        row[1 + k] = token
        row_offsets[at, k] = offsets[slot, source]
        row_times[at, k] = times[slot, source]
        digest = _mix(digest, token)
    used = 1 + length
    if closing:
        row[used] = END
        digest = _mix(digest, END)
        used += 1
    row[used:] = PAD
    fact = facts[at]
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


@njit(cache=True)
def _mix(digest, token):
    """One round of a 64-bit hash (the finaliser of splitmix64)."""
    digest = digest ^ (np.uint64(token) + np.uint64(0x9E3779B97F4A7C15))
    digest = (digest ^ (digest >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    digest = (digest ^ (digest >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return digest ^ (digest >> np.uint64(31))
