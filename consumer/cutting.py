"""A message of the lines topic becomes what is to be sent of it: events, a block's end, or a dead letter."""

from collections.abc import Sequence
from typing import NamedTuple

from confluent_kafka import Message

from consumer.events import Undecodable, ended_block
from consumer.settings import Settings, milliseconds
from consumer.text import Row, TextDecoder, known_lines
from model.bundle import Bundle


class Cut(NamedTuple):
    """What is to be sent of a line; nothing, if it names no block.

    Attributes:
        source: topic/partition/offset of the line.
        rows: its events.
        unmatched: whether they are of no template that the model knows.
        over: the block that a tombstone's key says is over.
        letter: the message and why it can be none of these.
    """

    source: str
    rows: Sequence[Row] = ()
    unmatched: bool = False
    over: bytes | None = None
    letter: tuple[Message, str] | None = None

    @property
    def time(self) -> int | None:
        """Milliseconds since 1970; None where it tells none that matters."""
        return self.rows[0][2] if self.rows else None


class Cutter:
    """Cuts lines as the model does.

    Raises:
        UserError: the model knows no lines, or not as the settings cut them.
    """

    def __init__(self, settings: Settings, bundle: Bundle) -> None:
        tokens = bundle.vocabulary.tokens
        self._known = tokens.keys()
        self._decoder = TextDecoder(known_lines(settings, bundle), tokens, milliseconds(settings.windows.max_ahead))

    def cut(self, message: Message, before: int | None = None) -> Cut:
        """Return what is to be sent of a message; `before` is the time of the newest line before, in its partition."""
        source = f"{message.topic()}/{message.partition()}/{message.offset()}"
        line = message.value()
        try:
            if line is None:
                return Cut(source, over=ended_block(message.key()))
            rows = self._decoder.rows(line, message.timestamp()[1], before)
        except Undecodable as reason:
            return Cut(source, letter=(message, str(reason)))
        return Cut(source, rows, bool(rows) and rows[0][1] not in self._known)
