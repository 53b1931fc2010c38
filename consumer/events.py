"""Messages to columns: what log events say, without Kafka.

A message is an event (a JSON object) or a tombstone (no value, key = block id), which closes its block. Whatever
is neither is undecodable, for a reason that a person can act on.

Messages are decoded by the batch: a compiled pass (`consumer.parse`) takes those that are plain, which is nearly all,
and a JSON parser each of the others. Both say the same of the same message.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from consumer.names import NameIndex, Names
from consumer.parse import BLOCK, EVENT, parse
from consumer.settings import EventSettings
from model.stamps import LATEST
from model.vocabulary import UNK

TOMBSTONE = -1
"""Stands in the token column for "this block is over"."""

CLOCK = -2
"""Stands in the token column for an event that only moves the watermark."""

NO_WATERMARK = -(2**62)
"""The watermark before the first event: earlier than any."""

MAX_ID_BYTES = 1024
"""Longest block id or event id, in bytes of UTF-8: an id is a name, and names are kept in memory."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_EARLIEST = -62_135_596_800_000  # the first millisecond of the year 1


class Undecodable(ValueError):  # noqa: N818 - it names the message, not the program's failure
    """A message that is neither event nor tombstone; the text says why."""


class KafkaMessage(Protocol):
    """What is wanted of a client's message."""

    def key(self) -> Any:
        """Return its key."""

    def value(self) -> Any:
        """Return its value."""

    def offset(self) -> Any:
        """Return its offset in the partition."""

    def timestamp(self) -> tuple[int, int]:
        """Return the kind of its timestamp, and the timestamp in milliseconds."""


class Messages(NamedTuple):
    """Messages of one partition in offset order, as columns.

    Attributes:
        keys, values: bytes or None each.
        offsets: (N,) in the partition.
        sent: (N,) Kafka timestamps in milliseconds.
    """

    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    offsets: NDArray[np.int64]
    sent: NDArray[np.int64]

    @classmethod
    def of(cls, messages: Sequence[KafkaMessage]) -> "Messages":
        """Take messages of one partition apart."""
        return cls(
            [message.key() for message in messages],
            [message.value() for message in messages],
            np.array([message.offset() for message in messages], np.int64),
            np.array([message.timestamp()[1] for message in messages], np.int64),
        )

    def from_place(self, begin: int, end: int | None = None) -> "Messages":
        """Return the messages from place `begin` up to `end`."""
        part = slice(begin, end)
        return Messages(self.keys[part], self.values[part], self.offsets[part], self.sent[part])

    def at(self, places: Sequence[int]) -> "Messages":
        """Return the messages at some places."""
        keys, values = ([column[place] for place in places] for column in (self.keys, self.values))
        return Messages(keys, values, self.offsets[places], self.sent[places])


class Refused(NamedTuple):
    """A message that is neither event nor tombstone: its place among the messages, and why."""

    place: int
    reason: str


@dataclass(frozen=True)
class EventBatch:
    """Events of one partition in offset order, as columns.

    Attributes:
        names: (N,) block id of each, in UTF-8.
        tokens: (N,) vocabulary token, `TOMBSTONE` or `CLOCK`.
        times: (N,) milliseconds since 1970; 0 for a tombstone.
        offsets: (N,) in the partition.
        unknown: event id at the places whose token is UNK.
        untimed: (N,) whether an event tells no time: its entry in `times` is then its message's. None: all do.
    """

    names: Names
    tokens: NDArray[np.int32]
    times: NDArray[np.int64]
    offsets: NDArray[np.int64]
    unknown: Mapping[int, str] = field(default_factory=dict)
    untimed: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        blocks: Iterable[str],
        tokens: Iterable[int],
        times: Iterable[int],
        offsets: Iterable[int],
        unknown: Mapping[int, str] | None = None,
    ) -> "EventBatch":
        """Make the columns from lists."""
        names = Names.of(block.encode() for block in blocks)
        return cls(
            names,
            np.array(list(tokens), np.int32),
            np.array(list(times), np.int64),
            np.array(list(offsets), np.int64),
            unknown or {},
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def blocks(self) -> list[str]:
        """The block ids as text."""
        return [name.decode() for name in self.names]

    def rows(self, begin: int, end: int) -> "EventBatch":
        """Return the events from row `begin` up to `end`."""
        part = slice(begin, end)
        unknown = {row - begin: event for row, event in self.unknown.items() if begin <= row < end}
        untimed = None if self.untimed is None else self.untimed[part]
        return EventBatch(
            self.names.take(part), self.tokens[part], self.times[part], self.offsets[part], unknown, untimed
        )

    def times_after(self, watermark: int) -> NDArray[np.int64]:
        """Return the times (N,), when the newest event before had the time `watermark`.

        An event that tells none is as old as the newest before it, as a line of a stack trace is; the very first of all
        is as old as its message.
        """
        if self.untimed is None or not self.untimed.any():
            return self.times
        tell = ~self.untimed
        if watermark == NO_WATERMARK and (events := np.flatnonzero(self.tokens != TOMBSTONE)).size:
            tell[events[0]] = True
        tell &= self.tokens != TOMBSTONE
        newest = np.maximum(np.maximum.accumulate(np.where(tell, self.times, NO_WATERMARK)), watermark)
        return np.where(tell | (self.tokens == TOMBSTONE), self.times, newest)


class _Event(NamedTuple):
    block: bytes
    token: int
    time: int
    unknown: str | None


class Decoder:
    """Turns messages into an `EventBatch`.

    Args:
        fields: the names of an event's fields.
        tokens: token of each event id of the vocabulary.
        max_ahead: milliseconds that an event may be stamped ahead of its Kafka message. A far future must not push
            the watermark, or one bad clock would close every block; that the message's own time is not of the same
            clock is for the brokers to see to (`consumer.topics.SOURCE_CONFIG`).
    """

    def __init__(self, fields: EventSettings, tokens: Mapping[str, int], max_ahead: int = LATEST) -> None:
        self._tokens = tokens
        self._max_ahead = max_ahead
        self.skipped = 0
        """Messages that are no event and no trouble either: none here."""
        self._fields = Names.of(name.encode() for name in (fields.block_id, fields.event_id, fields.timestamp))
        self._vocabulary = NameIndex()
        slots = self._vocabulary.locate(Names.of(map(_bytes, tokens)), np.ones(len(tokens), np.bool_))
        self._token_of = np.full(len(tokens) + 1, UNK, np.int32)  # by slot; the last place is that of NONE
        self._token_of[slots] = list(tokens.values())
        event = msgspec.defstruct(
            "Event",
            [("block_id", str), ("event_id", str), ("timestamp", datetime | int | float)],
            rename={name: getattr(fields, name) for name in ("block_id", "event_id", "timestamp")},
            gc=False,
        )
        self._parse = msgspec.json.Decoder(event).decode

    def decode(self, messages: Messages) -> tuple[EventBatch, list[Refused]]:
        """Return the events and tombstones among `messages`, and what else there was."""
        values, keys = Names.of(messages.values), Names.of(messages.keys)
        places, times = np.zeros((len(values), 2, 2), np.int64), np.zeros(len(values), np.int64)
        plain = parse(
            values.data, values.begin, values.size, keys.data, keys.begin, keys.size,
            self._fields.data, self._fields.begin, self._fields.size, places, times,
        )  # fmt: skip
        plain &= ((places[:, :, 1] > 0) & (places[:, :, 1] <= MAX_ID_BYTES)).all(1)
        plain &= (times <= LATEST) & (times - messages.sent <= self._max_ahead)

        tokens = np.full(len(values), UNK, np.int32)
        events = Names(values.data, *places[:, EVENT].T)
        tokens[plain] = self._token_of[self._vocabulary.find(events.take(plain))]
        unknown = {place: events[place].decode() for place in np.flatnonzero(plain & (tokens == UNK)).tolist()}
        batch = EventBatch(Names(values.data, *places[:, BLOCK].T), tokens, times, messages.offsets, unknown)
        return (batch, []) if plain.all() else self._completed(batch, messages, np.flatnonzero(~plain).tolist())

    def _completed(self, batch: EventBatch, messages: Messages, others: list[int]) -> tuple[EventBatch, list[Refused]]:
        """Return `batch` with the messages at the places `others` that can be read, and those that cannot."""
        read: dict[int, _Event] = {}
        refused: list[Refused] = []
        for place in others:
            try:
                read[place] = self._one(messages.keys[place], messages.values[place], int(messages.sent[place]))
            except Undecodable as reason:
                refused.append(Refused(place, str(reason)))
        names, more, rows = batch.names, Names.of(event.block for event in read.values()), list(read)
        names.begin[rows], names.size[rows] = len(names.data) + more.begin, more.size
        batch.tokens[rows] = [event.token for event in read.values()]
        batch.times[rows] = [event.time for event in read.values()]
        unknown = dict(batch.unknown) | {row: event.unknown for row, event in read.items() if event.unknown is not None}
        kept = np.ones(len(batch), np.bool_)
        kept[[place for place, _ in refused]] = False
        place_of = (np.cumsum(kept) - 1).tolist()
        names = Names(np.concatenate((names.data, more.data)), names.begin, names.size).take(kept)
        unknown = {place_of[row]: unknown[row] for row in sorted(unknown)}
        return EventBatch(names, batch.tokens[kept], batch.times[kept], batch.offsets[kept], unknown), refused

    def _one(self, key: bytes | None, value: bytes | None, sent: int) -> _Event:
        """Read a message of any kind.

        Raises:
            Undecodable: it is neither event nor tombstone.
        """
        if value is None:
            return _Event(ended_block(key), TOMBSTONE, 0, None)
        try:
            event: Any = self._parse(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Undecodable(f"not an event: {error}") from None
        block = _bytes(event.block_id)
        if key is not None and key != block:
            raise Undecodable("the message key is not the block id")
        _check_id("block id", block)
        time = _milliseconds(event.timestamp)
        check_ahead(time, sent, self._max_ahead)
        token = self._tokens.get(event.event_id, UNK)
        if token != UNK:
            return _Event(block, token, time, None)
        _check_id("event id", _bytes(event.event_id))
        return _Event(block, UNK, time, event.event_id)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _check_id(what: str, name: bytes) -> None:
    if not name:
        raise Undecodable(f"the {what} is empty")
    if len(name) > MAX_ID_BYTES:
        raise Undecodable(f"the {what} is longer than {MAX_ID_BYTES} bytes")


def check_ahead(time: int, sent: int, max_ahead: int) -> None:
    """Compare an event's time with its message's timestamp, all in milliseconds.

    Raises:
        Undecodable: it is more than `max_ahead` later.
    """
    if time - sent > max_ahead:
        raise Undecodable(
            "the timestamp is further ahead of the message's own than windows.max_ahead allows"
            if sent >= 0
            else "the timestamp cannot be held against the message's own (windows.max_ahead): the message has none"
        )


def ended_block(key: bytes | None) -> bytes:
    """Return the block that a message without a value ends, by its key.

    Raises:
        Undecodable: it is no block id.
    """
    if key is None:
        raise Undecodable("neither key nor value")
    try:
        key.decode()
    except UnicodeDecodeError:
        raise Undecodable("the tombstone's key is not UTF-8") from None
    _check_id("block id", key)
    return key


def _milliseconds(moment: datetime | float) -> int:
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        milliseconds = (moment - _EPOCH) // _MILLISECOND
        if milliseconds < _EARLIEST:  # 0001-01-01T00:00:00+01:00: no alert could write it in UTC
            raise Undecodable("the timestamp lies before the year 1")
        if milliseconds > LATEST:  # 9999-12-31T23:59:59-01:00
            raise Undecodable("the timestamp lies after the year 9999")
        return milliseconds
    if not 0 <= moment <= LATEST:
        raise Undecodable("the timestamp is not between the years 1970 and 9999 in milliseconds")
    return int(moment)
