"""Where a re-keyer reads on in each partition: at the group's committed offset, or what comes nearest to it."""

import logging
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

from confluent_kafka import Consumer, TopicPartition

from consumer.beginnings import Beginnings
from consumer.clients import CALL_SECONDS, committed_offsets
from consumer.patience import Patience
from consumer.settings import Settings

log = logging.getLogger("consumer")


class Place(NamedTuple):
    """Where to read on in a partition.

    Attributes:
        partition, offset: there.
        chosen: the group has no offset that fits, so that only a commit makes others begin there, too.
        latest: time of the newest line before, in milliseconds since 1970; None if none is known to have told any.
    """

    partition: int
    offset: int
    chosen: bool = False
    latest: int | None = None


class Places:
    """Asks for places, with a client of its own. Waits for brokers that are away, however long.

    Args:
        consumer: the group's, to ask for committed offsets.
        group: its name; on it this user has rights.
    """

    def __init__(self, settings: Settings, consumer: Consumer, group: str, patience: Patience) -> None:
        self._kafka = settings.kafka
        self._topic = settings.topics.lines
        self._consumer = consumer
        self._group = group
        self._patience = patience
        self._beginnings = Beginnings(settings.kafka)

    def starts(self, partitions: Sequence[int]) -> list["Place"]:
        """Return where to read on in each partition.

        Raises:
            UserError: Kafka refuses to tell.
        """
        if not partitions:
            return []
        wanted = [TopicPartition(self._topic, partition) for partition in partitions]
        starts = []
        with closing(self._asker()) as asker:  # the group's own client must not be asked this in its callbacks
            for found in self._patience.ask(asker, lambda: committed_offsets(self._consumer, wanted)):
                low, high = self._patience.ask(asker, partial(_bounds, asker, self._topic, found.partition))
                starts.append(self._start(found, low, high))
        return starts

    def _asker(self) -> Consumer:
        own = {"group.id": self._group, "log_level": 2, "error_cb": self._patience.notice}  # it never joins
        return Consumer(self._kafka.for_consumer() | own, logger=log)

    def _start(self, committed: TopicPartition, low: int, high: int) -> "Place":
        number = committed.partition
        where = f"{self._topic}/{number}"
        if committed.offset > high:
            log.warning("%s: the topic was made anew: reading it from its beginning", where)
            return Place(number, low, chosen=True)
        if committed.offset < 0:
            return Place(number, self._beginnings.choose(number, low, high), chosen=True)
        self._beginnings.forget(number)
        if committed.offset < low:
            log.warning(
                "%s: lines %d to %d were deleted before they were read; keep lines for longer than this process may "
                "be away", where, committed.offset, low - 1,
            )  # fmt: skip
        return Place(number, max(committed.offset, low), latest=_time(committed.metadata))


def _bounds(asker: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """Return the first offset of a partition, and the one after its last."""
    return asker.get_watermark_offsets(TopicPartition(topic, partition), timeout=CALL_SECONDS)


def _time(noted: str | None) -> int | None:
    """Return what was noted with an offset; the offsets that a person sets have nothing of the kind."""
    return int(noted) if noted and noted.removeprefix("-").isdecimal() else None
