"""Raw log lines to events: what a line from a shipper says, without Kafka.

A line is an event of each block that it names, once a block. A line that names none is no dead letter, since most
lines of a real log do not: it is counted and skipped. Bytes that are not UTF-8 become U+FFFD, as in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from consumer.events import (
    MAX_ID_BYTES,
    TOMBSTONE,
    Decoder,
    EventBatch,
    Messages,
    Refused,
    Undecodable,
    check_ahead,
)
from consumer.names import Names
from consumer.settings import Settings, milliseconds
from model.bundle import Bundle
from model.config import EventSettings
from model.errors import UserError
from model.lines import LineFormat, LineReader
from model.stamps import LATEST
from model.vocabulary import UNK

Row = tuple[str, str, int]
"""Block id, event id and milliseconds since 1970. The event id of a line that no template matches is its text, cut."""


_AT_ONCE = 512  # lines: what is made of more of them at a time no longer fits the processor's cache


@dataclass(frozen=True)
class Columns:
    """Events of many lines, one list entry each, and why other lines cannot be events.

    Attributes:
        places: of the event's line among the lines, ascending; several events may be of one line.
        blocks: block id.
        events: event id.
        times: milliseconds since 1970.
        untimed: those, counted from 0, whose line tells no time: theirs is its message's.
        refused: by place.
    """

    places: list[int]
    blocks: list[str]
    events: list[str]
    times: list[int]
    untimed: list[int]
    refused: dict[int, Undecodable]

    def add(self, place: int, block: str, event: str, time: int, *, told: bool = True) -> None:
        """Append an event."""
        if not told:
            self.untimed.append(len(self.places))
        self.places.append(place)
        self.blocks.append(block)
        self.events.append(event)
        self.times.append(time)


class TextDecoder:
    """Turns lines into events.

    Args:
        lines: how they are cut, and the templates, both of the model.
        tokens: token of each event id of the vocabulary.
        max_ahead: as for `Decoder`.

    `skipped` counts the lines that named no block.
    """

    def __init__(self, lines: LineFormat, tokens: Mapping[str, int], max_ahead: int) -> None:
        self._lines = LineReader(lines)
        self._tokens = tokens
        self._max_ahead = max_ahead
        self._tombstones = Decoder(EventSettings(), tokens)
        self.skipped = 0

    def rows(self, value: bytes, sent: int, before: int | None = None) -> list[Row]:
        """Return what a line says.

        Args:
            value: the line.
            sent: its Kafka timestamp in milliseconds.
            before: time of the newest line before it. One that tells none itself is as old as that; as `sent`, if this
                is not known.

        Raises:
            Undecodable: it cannot be an event; the text says why.
        """
        blocks, event, time = self._lines.read(_text(value))
        return self._rows(blocks, event, time, sent, before)

    def columns(self, values: Sequence[bytes], sent: Sequence[int]) -> Columns:
        """Return what each of many lines says, as `rows` without what was before; this is faster."""
        columns = Columns([], [], [], [], [], {})
        for start in range(0, len(values), _AT_ONCE):
            end = start + _AT_ONCE
            self._append(columns, start, values[start:end], sent[start:end])
        return columns

    def _append(self, columns: Columns, start: int, values: Sequence[bytes], sent: Sequence[int]) -> None:
        named, events, times = self._lines.read_all([_text(value) for value in values])
        for place, (blocks, event, time, when) in enumerate(zip(named, events, times, sent, strict=True), start):
            if len(blocks) != 1 or time is None or time - when > self._max_ahead or len(blocks[0]) * 4 > MAX_ID_BYTES:
                try:
                    rows = self._rows(blocks, event, time, when)
                except Undecodable as reason:
                    columns.refused[place] = reason
                    continue
                for block, _, at in rows:
                    columns.add(place, block, event, at, told=time is not None)
            else:
                columns.add(place, blocks[0], event, time)

    def _rows(
        self, blocks: Sequence[str], event: str, time: int | None, sent: int, before: int | None = None
    ) -> list[Row]:
        if not blocks:
            self.skipped += 1
            return []
        if time is None:
            if sent < 0:
                raise Undecodable("the line tells no time, and its message has no timestamp")
            if sent > LATEST:  # a shipper that counts microseconds: no alert could write such a year
                raise Undecodable("the timestamp of the message, which is its line's, lies after the year 9999")
            time = sent if before is None else before
        else:
            check_ahead(time, sent, self._max_ahead)
        for block in blocks:
            if len(block) * 4 > MAX_ID_BYTES and len(block.encode()) > MAX_ID_BYTES:
                raise Undecodable(f"the block id is longer than {MAX_ID_BYTES} bytes")
        return [(block, event, time) for block in sorted(blocks)]  # so that a restart finds them in the same order

    def decode(self, messages: Messages) -> tuple[EventBatch, list[Refused]]:
        """Return the events of the lines among `messages`, the tombstones, and what else there was.

        All events of a line have its offset. Keys of lines say nothing: shippers write there what they like.
        """
        lines: list[int] = []
        others: list[int] = []
        for place, value in enumerate(messages.values):
            (others if value is None else lines).append(place)
        found = self.columns([messages.values[place] or b"" for place in lines], messages.sent[lines].tolist())
        places = [lines[place] for place in found.places]
        tokens = [self._tokens.get(event, UNK) for event in found.events]
        refused = [Refused(lines[place], str(reason)) for place, reason in found.refused.items()]
        names, events, times = [block.encode() for block in found.blocks], list(found.events), list(found.times)
        if others:
            closed, unreadable = self._tombstones.decode(messages.at(others))
            refused += [Refused(others[place], reason) for place, reason in unreadable]
            places += np.searchsorted(messages.offsets, closed.offsets).tolist()
            names += closed.names
            tokens += [TOMBSTONE] * len(closed)
            events += [""] * len(closed)
            times += [0] * len(closed)
        untimed = np.zeros(len(places), np.bool_)
        untimed[found.untimed] = True
        order = np.argsort(places, kind="stable")
        in_order = [names[place] for place in order.tolist()]
        batch = EventBatch(
            Names.of(in_order),
            np.array(tokens, np.int32)[order],
            np.array(times, np.int64)[order],
            messages.offsets[np.array(places, np.int64)[order]],
            untimed=untimed[order],
        )
        unknown = {row: events[order[row]] for row in np.flatnonzero(batch.tokens == UNK).tolist()}
        return replace(batch, unknown=unknown), sorted(refused)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


AnyDecoder = Decoder | TextDecoder


def decoder_for(settings: Settings, bundle: Bundle) -> AnyDecoder:
    """Return the decoder of what `events.format` says is in the event topic, into the model's vocabulary.

    Raises:
        UserError: the model knows no lines, or not as the settings cut them.
    """
    max_ahead = milliseconds(settings.windows.max_ahead)
    if settings.events.format == "json":
        return Decoder(settings.events, bundle.vocabulary.tokens, max_ahead)
    return TextDecoder(known_lines(settings, bundle), bundle.vocabulary.tokens, max_ahead)


def known_lines(settings: Settings, bundle: Bundle) -> LineFormat:
    """Return how the model cuts lines, which is how the settings cut them.

    Raises:
        UserError: as `decoder_for`.
    """
    if bundle.lines is None:
        raise UserError(
            f"{settings.model.path}: the model was trained on events and knows no templates of raw lines; "
            "train one on raw log lines with python -m model --normal raw.log.gz"
        )
    bundle.lines.check(settings.events)
    return bundle.lines
