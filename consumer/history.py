"""Reads stretches of a topic again, outside any consumer group's work."""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from consumer.clients import client
from consumer.patience import AT_END
from consumer.settings import Settings
from consumer.topics import require_topic
from model.errors import UserError

_BATCH = 10_000
_SECONDS = 30.0


class TopicHistory:
    """The committed messages that are in a topic; a context manager.

    Args:
        settings: where Kafka is.
        topic: its name.
        patience: seconds without any answer after which a broker counts as gone.

    Raises:
        UserError: there is no such topic, or Kafka refuses; every method may raise it.
    """

    def __init__(self, settings: Settings, topic: str, patience: float = 60.0) -> None:
        self.topic = topic
        self._patience = patience
        self.partitions = range(require_topic(settings, topic))
        self._consumer = client(
            Consumer,
            settings,
            settings.kafka.for_consumer()  # nothing is committed, so the group of this name notices nothing
            | {
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",  # events deleted meanwhile must not pass for a quiet partition
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 3,
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()

    def bounds(self, partition: int) -> tuple[int, int]:
        """Return the offset of the first message that is kept, and the one behind the last."""
        try:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=_SECONDS)
        except KafkaException as error:
            raise UserError(f"{self.topic}: {error.args[0].str()}") from None
        return low, high

    def offset_at(self, partition: int, milliseconds: int) -> int | None:
        """Return the offset of the first message whose Kafka timestamp is at or after a time; None: there is none."""
        wanted = TopicPartition(self.topic, partition, max(0, milliseconds))
        try:
            (found,) = self._consumer.offsets_for_times([wanted], timeout=_SECONDS)
        except KafkaException as error:
            raise UserError(f"{self.topic}: {error.args[0].str()}") from None
        return found.offset if found.offset >= 0 else None

    def read(self, partition: int, start: int, end: int) -> Iterator[list[Message]]:
        """Yield the messages of a partition from the offset `start` up to, not including, `end`."""
        if start >= end:
            return
        self._consumer.assign([TopicPartition(self.topic, partition, start)])
        position, heard = start, time.monotonic()
        while position < end:
            messages, at_end = self._arrived(partition)
            if messages:
                position = messages[-1].offset() + 1
                yield [message for message in messages if message.offset() < end]
                heard = time.monotonic()
            if at_end:
                return  # offsets up to `end` that never come are the marks of transactions
            if time.monotonic() - heard > self._patience:
                raise UserError(f"{self.topic}: no broker has answered for {self._patience:g} s; try again later")

    def _arrived(self, partition: int) -> tuple[list[Message], bool]:
        """Return the next messages, and whether the end of the partition was reached after them."""
        messages, at_end = [], False
        for message in self._consumer.consume(_BATCH, 0.5):
            if message.partition() != partition:
                continue  # left over from the assignment before
            error = message.error()
            if error is None:
                messages.append(message)
            elif error.code() == AT_END:
                at_end = True
            elif not error.retriable():
                raise UserError(f"{self.topic}: {error.str()}")
        return messages, at_end
