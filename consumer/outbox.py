"""What the re-keyer sends of a line, and how much that was."""

from collections import Counter

import msgspec

from consumer.cutting import Cut
from consumer.delivery import Delivery, Headers
from consumer.letters import dead_letter, kind
from consumer.settings import Settings

SOURCE_HEADER = "line.source"
"""Header of an event: topic/partition/offset of its line."""


class Outbox:
    """Hands events and dead letters to the delivery. `counts` and `dead_letters` are of what was handed over."""

    def __init__(self, settings: Settings) -> None:
        self._topics = settings.topics
        self._fields = (settings.events.block_id, settings.events.event_id, settings.events.timestamp)
        self.counts = Counter[str]()
        self.dead_letters = Counter[str]()

    def send(self, cut: Cut, delivery: Delivery) -> int:
        """Send the events of a line, or the dead letter that it is; return how many messages that were.

        Raises:
            TransactionAborted, UserError: as `Delivery.send`.
        """
        self.counts["lines"] += 1
        if cut.letter is not None:
            message, reason = cut.letter
            self.dead_letters[kind(reason)] += 1
            delivery.send(self._topics.dead_letters, *dead_letter(message, reason))
            return 1
        headers: Headers = [(SOURCE_HEADER, cut.source.encode())]
        if cut.over is not None:
            delivery.send(self._topics.events, None, cut.over, headers)
            return 1
        self.counts["events"] += len(cut.rows)
        self.counts["unmatched_lines"] += cut.unmatched
        self.counts["skipped_lines"] += not cut.rows
        for row in cut.rows:
            value = msgspec.json.encode(dict(zip(self._fields, row, strict=True)))
            delivery.send(self._topics.events, value, row[0].encode(), headers)
        return len(cut.rows)
