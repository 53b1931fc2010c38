"""Session records in bulk: the layout of `consumer.records.SessionState`, written and read by compiled loops.

Only the common case: offsets and times that fit into four bytes, nothing unknown in the window, and no alert yet.
Whoever meets another goes by `SessionState`.
"""

import numpy as np

from consumer.kernel import append, read
from consumer.names import NONE
from model.jit import njit
from model.vocabulary import UNK


@njit(cache=True)
def write_windows(sessions, window, slots, begins, out):
    """Write the windows of sessions (N,) into `out` from begins[i] on; return their lengths (N,), -1: does not fit."""
    tokens, offsets, times = np.empty(window, np.uint16), np.empty(window, np.int64), np.empty(window, np.int64)
    lengths = np.empty(len(slots), np.int32)
    for i in range(len(slots)):
        session = sessions.rows[slots[i]]
        length = read(sessions, window, slots[i], tokens, offsets, times)
        lengths[i] = length
        at = begins[i]
        for k in range(length):
            back, since = session.last_offset - offsets[k], times[k] - session.first_time
            if back >= 1 << 32 or not -(1 << 31) < since < 1 << 31:
                lengths[i] = -1
                break
            _put(out, at + 2 * k, tokens[k], 2)
            _put(out, at + 2 * length + 4 * k, back, 4)
            _put(out, at + 6 * length + 4 * k, since, 4)
    return lengths


@njit(cache=True)
def read_windows(sessions, window, slots, data, begins, lengths, table):
    """Append the windows at begins[i] in `data` to sessions (N,) that have none; return which were taken (N,).

    The tokens are translated by `table`; a session with one that becomes UNK is left without a window.
    """
    taken = np.ones(len(slots), np.bool_)
    for i in range(len(slots)):
        slot, length, at = slots[i], lengths[i], begins[i]
        session = sessions.rows[slot]
        session.held, session.first_page, session.last_page = 0, NONE, NONE
        for k in range(length):
            token = _get(data, at + 2 * k, 2)
            if token >= len(table) or table[token] == UNK:
                taken[i] = False
                break
        if not taken[i]:
            continue
        for k in range(length):
            offset = session.last_offset - _get(data, at + 2 * length + 4 * k, 4)
            since = _get(data, at + 6 * length + 4 * k, 4)
            since -= (since >> 31) << 32  # its sign
            append(sessions, window, slot, table[_get(data, at + 2 * k, 2)], offset, session.first_time + since)
    return taken


@njit(cache=True, inline="always")
def _put(out, at, value, size):
    value = np.int64(value)
    for k in range(size):
        out[at + k] = (value >> (8 * k)) & 255


@njit(cache=True, inline="always")
def _get(data, at, size):
    value = np.int64(0)
    for k in range(size):
        value |= np.int64(data[at + k]) << (8 * k)
    return value
