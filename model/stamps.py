"""Times: as log lines and people write them, and as milliseconds since 1970."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache

LATEST = 253_402_300_799_999
"""The last millisecond of the year 9999: an alert could not write a later time."""

EARLY = 10**11
"""In milliseconds 1973, of which no log is, in seconds the year 5138: whoever writes a lower number means seconds."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REMEMBERED = 4096  # neighbouring lines mostly share their second
_FIELDS = {"Y": r"\d{4}", "y": r"\d\d", "m": r"\d\d", "d": r"\d\d", "H": r"\d\d", "M": r"\d\d", "S": r"\d\d"}
_DIRECTIVE = re.compile("%(.)")


def stamp_reader(form: str) -> Callable[[str], int | None]:
    """Return what turns a timestamp into milliseconds since 1970, and into None what is no timestamp.

    `form` is `iso`, `ms` or `s` (numbers since 1970), or a format of strptime. What names no zone is UTC.
    """
    moment_of = {"iso": datetime.fromisoformat, "ms": _milliseconds, "s": _seconds}.get(form) or _by_format(form)

    @lru_cache(_REMEMBERED)
    def read(stamp: str) -> int | None:
        try:
            moment = moment_of(stamp)
        except (ValueError, OverflowError):
            return None
        since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
        time = since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000
        return time if 0 <= time <= LATEST else None

    return read


def _milliseconds(stamp: str) -> datetime:
    return _EPOCH + timedelta(milliseconds=float(stamp))


def _seconds(stamp: str) -> datetime:
    return _EPOCH + timedelta(seconds=float(stamp))


def _by_format(form: str) -> Callable[[str], datetime]:
    """Return strptime with a format; where it is made of padded numbers only, four times as fast."""

    def slow(stamp: str) -> datetime:
        return datetime.strptime(stamp, form)  # noqa: DTZ007 - a zone is given by the caller

    names = _DIRECTIVE.findall(form)
    if not set("mdHMS") <= set(names) <= set(_FIELDS) or len(names) != 6:
        return slow
    parts = _DIRECTIVE.split(form)  # text, directive, text, directive, …, text
    pattern = "".join(f"({_FIELDS[part]})" if place % 2 else re.escape(part) for place, part in enumerate(parts))
    match = re.compile(pattern, re.ASCII).fullmatch
    places = [1 + names.index(name) for name in ("Y" if "Y" in names else "y", *"mdHMS")]
    short = "y" in names

    def fast(stamp: str) -> datetime:
        found = match(stamp)
        if found is None:
            return slow(stamp)
        year, month, day, hour, minute, second = map(int, found.group(*places))
        if short:
            year += 1900 if year > 68 else 2000  # as strptime has it
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC)

    return fast


_iso_8601 = stamp_reader("iso")


def time_of(text: str) -> int | None:
    """Return a time that is written in ISO 8601 or in milliseconds since 1970; None where it is no such time."""
    if not text.isdecimal():
        return _iso_8601(text)
    try:
        time = int(text)
    except ValueError:  # more digits than Python reads
        return None
    return time if time <= LATEST else None


def iso(milliseconds: int) -> str:
    """Write a time in ISO 8601, in UTC."""
    moment = _EPOCH + timedelta(milliseconds=int(milliseconds))
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
