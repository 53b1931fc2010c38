"""Reads the partitions of the lines topic side by side, into the merge, which bounds how far each may be ahead."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from confluent_kafka import Consumer, Message, TopicPartition

from consumer.clients import member
from consumer.cutting import Cut, Cutter
from consumer.merge import Merge
from consumer.patience import AT_END, Patience
from consumer.settings import Settings

log = logging.getLogger("consumer")

_SILENCE_SECONDS = 5.0  # of a partition that holds up the others
_SETTLED_SECONDS = 0.3  # after which what has come to Kafka has been read, three waits of its answers

_SIDE_BY_SIDE = {
    "queued.min.messages": 10_000,  # what is read ahead of a partition that is paused is thrown away
    "fetch.queue.backoff.ms": 5,  # after which one that was read ahead so far is read on: others may wait for it
    "max.partition.fetch.bytes": 131_072,  # the smaller the portions, the less has to wait for its turn
    "fetch.wait.max.ms": 100,  # so much later a partition says that it is at its end
}
"""librdkafka settings that users may change."""


def lines_consumer(settings: Settings, group: str, patience: Patience) -> Consumer:
    """Return a member of a group that decides by itself where to read on, and hears of the ends of partitions.

    Raises:
        UserError: librdkafka refuses a setting.
    """
    return member(settings, patience, defaults=_SIDE_BY_SIDE, group_id=group, enable_partition_eof=True)


class Reading:
    """Feeds a merge from a consumer."""

    def __init__(self, topic: str, consumer: Consumer, merge: Merge[Cut]) -> None:
        self._topic = topic
        self._consumer = consumer
        self._merge = merge
        self._silence: dict[int, float] = {}  # seconds, of each partition that the others wait for
        self._settled = 0  # turns
        self._settling = deque[float]()  # when each later turn began

    def consume(self, most: int, wait: float) -> tuple[list[Message], float]:
        """Return what comes before it is so many messages or so many seconds are over, and how long that was."""
        began = time.monotonic()
        messages = self._consumer.consume(most, wait)
        return messages, min(wait, time.monotonic() - began)  # callbacks may have taken longer

    def take(self, messages: Iterable[Message], waited: float, cutter: Cutter) -> Iterator[Message]:
        """Take lines into the merge; yield messages that are errors."""
        self._begin_turn()
        for message in messages:
            error, partition, offset = message.error(), message.partition(), message.offset()
            if error is not None and error.code() != AT_END:
                yield message
                continue
            self._silence.pop(partition, None)
            if error is not None:
                self._merge.rest(partition)
            elif self._merge.wants(partition, offset):  # else it is no longer ours, or known
                cut = cutter.cut(message, self._merge.latest(partition))
                self._merge.add(partition, offset, cut.time, message.timestamp()[1], len(message), cut)
        self._give_up_on_silence(waited)

    def balance(self) -> None:
        """Pause partitions that are far ahead, read on those that no longer are."""
        for numbers, call in zip(self._merge.balance(), (self._consumer.pause, self._consumer.resume), strict=True):
            if numbers:
                call(self._of_topic(numbers))

    def forget(self, partitions: Sequence[int]) -> None:
        """Drop what is pending of partitions."""
        paused = [number for number in self._merge.paused if number in partitions]
        if paused:
            self._consumer.resume(self._of_topic(paused))  # else they might come back paused
        for number in partitions:
            self._merge.drop(number)

    def ends(self) -> dict[int, int]:
        """Return where partitions end, as far as the last answers of the brokers said."""
        ends = {}
        for place in self._of_topic(self._merge.partitions):
            _, end = self._consumer.get_watermark_offsets(place, cached=True)
            if end >= 0:
                ends[place.partition] = end
        return ends

    def _begin_turn(self) -> None:
        now = time.monotonic()
        self._settling.append(now)
        while self._settling and self._settling[0] + _SETTLED_SECONDS <= now:
            self._settling.popleft()
            self._settled += 1
        self._merge.turn(self.ends(), self._settled)

    def _give_up_on_silence(self, waited: float) -> None:
        """Let the others go on when a partition that they wait for is neither read nor at its end."""
        self._silence = {number: self._silence.get(number, 0.0) + waited for number in self._merge.awaited()}
        for number, seconds in self._silence.items():
            if seconds > _SILENCE_SECONDS:
                log.warning(
                    "%s/%d: no line for %.0f s, though it is not at its end: the other partitions go on without it, "
                    "and its lines will come out of their order", self._topic, number, _SILENCE_SECONDS,
                )  # fmt: skip
                self._merge.rest(number)

    def _of_topic(self, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, number) for number in partitions]
