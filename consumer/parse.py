"""The fast way through an event's JSON: one compiled pass over a buffer of messages.

It knows the plain case only: one flat object; names and texts in ASCII without escapes; the timestamp as a number of
milliseconds or as ISO 8601 in UTC. Whatever else a message holds it leaves alone (`IS_PLAIN` False), for a real parser
to read or to refuse. So it may be narrow, but what it takes it must take as that parser would.

That small functions become part of the loop is left to LLVM: numba's own inlining counts references to each array at
each of them, which took half of the time.
"""

import numpy as np

from consumer.names import NONE
from model.jit import njit

BLOCK, EVENT, TIME = range(3)
"""The fields, as columns of what is found."""

_QUOTE, _BACKSLASH, _COMMA, _COLON, _DOT = 34, 92, 44, 58, 46
_OPEN, _CLOSE, _ZERO, _NINE, _T, _Z, _DASH = 123, 125, 48, 57, 84, 90, 45
_DIGITS = 17  # a number of so many digits fits into 64 bits; no year before 9999 needs more than 15


@njit(cache=True)
def parse(data, begins, sizes, keys, key_begins, key_sizes, names, name_begins, name_sizes, places, times):
    """Read messages i = data[begins[i] : begins[i] + sizes[i]]; return which were plain: (N,) bool.

    Args:
        keys, key_begins, key_sizes: the messages' keys in the same way; of the size `NONE`: it has none. A plain
            message's key is its block id.
        names, name_begins, name_sizes: (3,) the fields' names in the same way.
        places: (N, 2, 2) written: begin and size, in `data`, of the texts of BLOCK and EVENT.
        times: (N,) written: milliseconds since 1970.
    """
    plain = np.zeros(len(begins), np.bool_)
    for i in range(len(begins)):
        if _object(data, begins[i], begins[i] + sizes[i], names, name_begins, name_sizes, places, times, i):
            begin, size = places[i, BLOCK]
            plain[i] = key_sizes[i] == NONE or (key_sizes[i] == size and _same(keys, key_begins[i], data, begin, size))
    return plain


@njit(cache=True)
def _object(data, at, end, names, name_begins, name_sizes, places, times, i):
    at = _blank(data, at, end)
    if at >= end or data[at] != _OPEN:
        return False
    found = 0
    while True:
        at = _blank(data, at + 1, end)
        stop = _text(data, at, end)
        if stop < 0:
            return False
        field = _field(data, at + 1, stop, names, name_begins, name_sizes)
        at = _blank(data, stop + 1, end)
        if at >= end or data[at] != _COLON:
            return False
        at = _blank(data, at + 1, end)
        if field >= 0:
            if found & (1 << field):
                return False  # named twice
            found |= 1 << field
        if at < end and data[at] == _QUOTE:
            stop = _text(data, at, end)
            if stop < 0:
                return False
            if field == TIME:
                if not _iso(data, at + 1, stop, times, i):
                    return False
            elif field >= 0:
                places[i, field, 0] = at + 1
                places[i, field, 1] = stop - at - 1
            at = stop + 1
        else:
            stop, number = _number(data, at, end)
            if stop < 0 or field == BLOCK or field == EVENT:
                return False
            if field == TIME:
                times[i] = number
            at = stop
        at = _blank(data, at, end)
        if at >= end:
            return False
        if data[at] == _CLOSE:
            return found == 7 and _blank(data, at + 1, end) == end
        if data[at] != _COMMA:
            return False


@njit(cache=True)
def _blank(data, at, end):
    """Skip white space."""
    while at < end and (data[at] == 32 or data[at] == 10 or data[at] == 13 or data[at] == 9):
        at += 1
    return at


@njit(cache=True)
def _text(data, at, end):
    """Return the place of the quote that ends the text which begins at `at`; -1 if it is not plain."""
    if at >= end or data[at] != _QUOTE:
        return -1
    at += 1
    while at < end and data[at] != _QUOTE:
        if data[at] < 32 or data[at] > 126 or data[at] == _BACKSLASH:
            return -1
        at += 1
    return at if at < end else -1


@njit(cache=True)
def _field(data, begin, end, names, name_begins, name_sizes):
    for field in range(3):
        size = name_sizes[field]
        if end - begin == size and _same(names, name_begins[field], data, begin, size):
            return field
    return -1


@njit(cache=True)
def _same(left, left_begin, right, right_begin, size):
    for k in range(size):
        if left[left_begin + k] != right[right_begin + k]:
            return False
    return True


@njit(cache=True)
def _number(data, at, end):
    """Return where the whole number that begins at `at` ends, or -1, and its value."""
    begin, number = at, 0
    while at < end and _ZERO <= data[at] <= _NINE and at - begin < _DIGITS:
        number = 10 * number + (data[at] - _ZERO)
        at += 1
    if at == begin or (data[begin] == _ZERO and at > begin + 1):
        return -1, 0
    return at, number


@njit(cache=True)
def _digits(data, at, count):
    """Return the number of `count` digits at `at`, or -1."""
    number = 0
    for k in range(at, at + count):
        if not _ZERO <= data[k] <= _NINE:
            return -1
        number = 10 * number + (data[k] - _ZERO)
    return number


@njit(cache=True)
def _iso(data, at, end, times, i):
    """Read YYYY-MM-DDThh:mm:ss, with or without up to six decimals and Z, into times[i]; say whether it was that."""
    if end > at and data[end - 1] == _Z:
        end -= 1
    if end - at < 19 or data[at + 4] != _DASH or data[at + 7] != _DASH or data[at + 10] != _T:
        return False
    if data[at + 13] != _COLON or data[at + 16] != _COLON:
        return False
    year, month, day = _digits(data, at, 4), _digits(data, at + 5, 2), _digits(data, at + 8, 2)
    hour, minute, second = _digits(data, at + 11, 2), _digits(data, at + 14, 2), _digits(data, at + 17, 2)
    if year < 1 or not 1 <= month <= 12 or day < 1 or hour < 0 or minute < 0 or second < 0:
        return False
    if day > _month_length(year, month) or hour > 23 or minute > 59 or second > 59:
        return False
    milliseconds = 0
    if end - at > 19:
        decimals = end - at - 20
        if data[at + 19] != _DOT or not 1 <= decimals <= 6:
            return False
        fraction = _digits(data, at + 20, decimals)
        if fraction < 0:
            return False
        milliseconds = fraction * 10 ** (6 - decimals) // 1000
    days = _days(year, month, day)
    times[i] = ((days * 24 + hour) * 60 + minute) * 60_000 + second * 1000 + milliseconds
    return True


@njit(cache=True)
def _month_length(year, month):
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 28
    return 30 if month in (4, 6, 9, 11) else 31


@njit(cache=True)
def _days(year, month, day):
    """Days since 1970: `days_from_civil` of H. Hinnant, chrono-Compatible Low-Level Date Algorithms."""
    year -= month <= 2
    era = year // 400
    of_era = year - era * 400
    of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468
