"""Messages to columns: what a log event says, without Kafka.

A message is an event (a JSON object) or a tombstone (no value, key = block id), which closes its block. Whatever
is neither raises `Undecodable` with a reason that a person can act on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from consumer.settings import EventSettings
from model.vocabulary import UNK

TOMBSTONE = -1
"""Stands in the token column for "this block is over"."""

CLOCK = -2
"""Stands in the token column for an event that only moves the watermark: its block has taken it in before."""

MAX_ID_BYTES = 1024
"""Longest block id or event id, in bytes of UTF-8: an id is a name, and names are kept in memory."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_EARLIEST = -62_135_596_800_000  # the first millisecond of the year 1
_LATEST = 253_402_300_799_999  # the last millisecond of the year 9999


class Undecodable(ValueError):  # noqa: N818 - it names the message, not the program's failure
    """A message that is neither event nor tombstone; the text says why."""


@dataclass
class EventBatch:
    """Events of one partition in offset order, one list entry each.

    Attributes:
        blocks: block id.
        tokens: vocabulary token, or `TOMBSTONE`.
        times: milliseconds since 1970; 0 for a tombstone.
        offsets: in the partition.
        unknown: event id at the places whose token is UNK.
    """

    blocks: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    unknown: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.blocks)

    def columns(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Return tokens, times and offsets as arrays (N,)."""
        return np.array(self.tokens, np.int32), np.array(self.times, np.int64), np.array(self.offsets, np.int64)


class Decoder:
    """Turns a message's key and value into a row of an `EventBatch`.

    Args:
        fields: the names of an event's fields.
        tokens: token of each event id of the vocabulary.
        max_ahead: milliseconds that an event may be stamped ahead of its Kafka message. A far future must not push
            the watermark, or one bad clock would close every block.
    """

    def __init__(self, fields: EventSettings, tokens: Mapping[str, int], max_ahead: int = _LATEST) -> None:
        self._tokens = tokens
        self._max_ahead = max_ahead
        event = msgspec.defstruct(
            "Event",
            [("block_id", str), ("event_id", str), ("timestamp", datetime | int | float)],
            rename={name: getattr(fields, name) for name in ("block_id", "event_id", "timestamp")},
            gc=False,
        )
        self._parse: Callable[[bytes], Any] = msgspec.json.Decoder(event).decode

    def decode(
        self, key: bytes | None, value: bytes | None, offset: int, batch: EventBatch, sent: int = _LATEST
    ) -> None:
        """Append the message to `batch`; `sent` is its Kafka timestamp in milliseconds.

        Raises:
            Undecodable: it is no event; `batch` is as it was.
        """
        if value is None:
            block, token, time = _tombstone(key), TOMBSTONE, 0
        else:
            try:
                event = self._parse(value)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise Undecodable(f"not an event: {error}") from None
            block = event.block_id
            if key is not None and key != _bytes(block):
                raise Undecodable("the message key is not the block id")
            _check_id("block id", block)
            time = _milliseconds(event.timestamp)
            if time - sent > self._max_ahead:
                raise Undecodable("the timestamp is further ahead of the message's own than windows.max_ahead allows")
            token = self._tokens.get(event.event_id, UNK)
            if token == UNK:
                _check_id("event id", event.event_id)
                batch.unknown[len(batch.blocks)] = event.event_id
        batch.blocks.append(block)
        batch.tokens.append(token)
        batch.times.append(time)
        batch.offsets.append(offset)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _check_id(what: str, text: str) -> None:
    if not text:
        raise Undecodable(f"the {what} is empty")
    if len(text) * 4 > MAX_ID_BYTES and len(_bytes(text)) > MAX_ID_BYTES:
        raise Undecodable(f"the {what} is longer than {MAX_ID_BYTES} bytes")


def _tombstone(key: bytes | None) -> str:
    if key is None:
        raise Undecodable("neither key nor value")
    try:
        block = key.decode()
    except UnicodeDecodeError:
        raise Undecodable("the tombstone's key is not UTF-8") from None
    _check_id("block id", block)
    return block


def _milliseconds(moment: datetime | float) -> int:
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        milliseconds = (moment - _EPOCH) // _MILLISECOND
        if milliseconds < _EARLIEST:  # 0001-01-01T00:00:00+01:00: no alert could write it in UTC
            raise Undecodable("the timestamp lies before the year 1")
        return milliseconds
    if not 0 <= moment <= _LATEST:
        raise Undecodable("the timestamp is not between the years 1970 and 9999 in milliseconds")
    return int(moment)
