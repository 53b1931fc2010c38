"""The Kafka side: reads the event topic, runs the detector, publishes alerts, commits offsets.

The order of steps is the promise. A batch of messages is decoded, judged, and its alerts and dead letters are
handed to the producer; at each commit the producer is flushed first, and only when the brokers have acknowledged
all of it are the input offsets committed. A crash before that reads the events again.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from threading import Event

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from consumer.alerts import Alert
from consumer.detector import Detector
from consumer.events import Decoder, EventBatch, Undecodable
from consumer.settings import Settings
from model.errors import UserError

log = logging.getLogger("consumer")

SHUTDOWN_SECONDS = 5.0
"""How long a stop may wait for the brokers to take what is still to be published."""

_REPORT_SECONDS = 60.0


class Service:
    """One consumer process: a member of the consumer group, with one producer."""

    def __init__(self, settings: Settings, detector: Detector, decoder: Decoder) -> None:
        self._settings = settings
        self._detector = detector
        self._decoder = decoder
        self._positions: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._active: dict[int, float] = {}
        self._failure: str | None = None
        self.messages = self.alerts = self.dead_letters = 0

    def run(self, stop: Event) -> None:
        """Work until `stop` is set, then publish and commit what is done and leave the group.

        Raises:
            UserError: Kafka refuses to go on (wrong credentials, missing rights, topic deleted, fenced …).
        """
        kafka = self._settings.kafka
        try:
            self._producer = Producer(
                {"linger.ms": 5, "message.timeout.ms": 0}
                | kafka.for_producer()
                | {"enable.idempotence": True, "error_cb": self._on_error},
                logger=log,
            )
            self._consumer = Consumer(
                {"auto.offset.reset": "earliest"}
                | kafka.for_consumer()
                | {
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "partition.assignment.strategy": "cooperative-sticky",
                    "error_cb": self._on_error,
                },
                logger=log,
            )
        except KafkaException as error:
            raise UserError(f"kafka: {error.args[0].str()}; mend this librdkafka setting") from None
        self._consumer.subscribe(
            [self._settings.topics.events],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )
        try:
            self._loop(stop)
            self._commit(SHUTDOWN_SECONDS)
        finally:
            self._consumer.close()
            left = self._producer.flush(0)
        if left:
            raise UserError(
                f"{left:,} messages were not acknowledged in time; their events will be read again at the next start"
            )

    def _loop(self, stop: Event) -> None:
        scoring = self._settings.scoring
        interval = self._settings.commit.interval.total_seconds()
        wait = min(scoring.max_wait.total_seconds(), interval)
        commit_at = time.monotonic() + interval
        report_at = time.monotonic() + _REPORT_SECONDS
        while not stop.is_set():
            messages = self._consumer.consume(scoring.max_batch, wait)
            self._take(messages)
            self._close_silent()
            self._producer.poll(0)
            if self._failure:
                raise UserError(self._failure)
            now = time.monotonic()
            if now >= commit_at:
                self._commit(interval)
                commit_at = now + interval
            if now >= report_at:
                log.info("%s", self.summary())
                report_at = now + _REPORT_SECONDS

    def summary(self) -> str:
        """Return where things stand, in a line."""
        return (
            f"{self.messages:,} messages, {self._detector.looks:,} looks, {self._detector.scored:,} windows scored, "
            f"{self.alerts:,} alerts, {self.dead_letters:,} dead letters, {self._detector.open_blocks:,} open blocks"
        )

    def _take(self, messages: Sequence[Message]) -> None:
        """Decode and judge messages; alerts and dead letters go to the producer."""
        batches: dict[int, EventBatch] = {}
        for message in messages:
            if message.error():
                self._on_message_error(message.error())
                continue
            partition, offset = message.partition(), message.offset()
            if partition not in self._active or offset < self._positions.get(partition, 0):
                continue  # no longer ours, or seen before a rebalance gave the partition back
            self.messages += 1
            self._positions[partition] = offset + 1
            self._active[partition] = time.monotonic()
            batch = batches.get(partition)
            if batch is None:
                batch = batches[partition] = EventBatch()
            try:
                self._decoder.decode(message.key(), message.value(), offset, batch)
            except Undecodable as reason:
                self._bury(message, str(reason))
        if batches:
            self._publish(self._detector.process(batches))

    def _close_silent(self) -> None:
        """Close the sessions of partitions that have been silent for the idle timeout, on the wall clock."""
        limit = time.monotonic() - self._settings.windows.idle_timeout.total_seconds()
        for partition in [partition for partition, active in self._active.items() if active < limit]:
            self._publish(self._detector.close(partition))
            self._active[partition] = time.monotonic()

    def _publish(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self.alerts += 1
            self._produce(self._settings.topics.alerts, alert.encode(), alert.block_id.encode(), [])

    def _bury(self, message: Message, reason: str) -> None:
        """Send a message that cannot be decoded to the dead-letter topic, as it was, with why and where from."""
        self.dead_letters += 1
        origin = [
            ("dead_letter.reason", reason.encode("utf-8", "replace")),
            ("dead_letter.topic", message.topic().encode()),
            ("dead_letter.partition", str(message.partition()).encode()),
            ("dead_letter.offset", str(message.offset()).encode()),
            ("dead_letter.timestamp", str(message.timestamp()[1]).encode()),
        ]
        headers = [*(message.headers() or []), *origin]
        self._produce(self._settings.topics.dead_letters, message.value(), message.key(), headers)

    def _produce(
        self, topic: str, value: bytes | None, key: bytes | None, headers: list[tuple[str, bytes | None]]
    ) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key, headers=headers, on_delivery=self._on_delivery)
            except BufferError:  # the brokers are behind: wait for them, which bounds our memory
                self._producer.poll(0.1)
            else:
                return

    def _commit(self, seconds: float) -> None:
        """Commit the input offsets, unless brokers have not acknowledged all alerts within `seconds`."""
        if self._positions == self._committed:
            return
        if self._producer.flush(seconds) or self._failure:
            return
        topic = self._settings.topics.events
        offsets = [TopicPartition(topic, partition, offset) for partition, offset in self._positions.items()
                   if self._committed.get(partition) != offset]  # fmt: skip
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            reason = error.args[0]
            if not reason.retriable() and reason.code() not in _REJOINING:
                raise UserError(f"kafka: the offsets cannot be committed: {reason.str()}") from None
            log.warning("offsets not committed, will try again: %s", reason.str())
        else:
            self._committed = dict(self._positions)

    def _on_assign(self, _: Consumer, partitions: Sequence[TopicPartition]) -> None:
        for assigned in partitions:
            self._detector.assign(assigned.partition)
            self._active[assigned.partition] = time.monotonic()
        log.info("assigned partitions %s", _numbers(partitions))

    def _on_revoke(self, _: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._commit(SHUTDOWN_SECONDS)
        self._drop(partitions)
        log.info("gave back partitions %s", _numbers(partitions))

    def _on_lost(self, _: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._drop(partitions)
        log.warning("lost partitions %s: another member has them now", _numbers(partitions))

    def _drop(self, partitions: Sequence[TopicPartition]) -> None:
        for dropped in partitions:
            self._detector.revoke(dropped.partition)
            for known in (self._positions, self._committed, self._active):
                known.pop(dropped.partition, None)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failure = f"{message.topic()}: a message could not be delivered: {error.str()}"

    def _on_error(self, error: KafkaError) -> None:
        """Hear of trouble with the brokers. librdkafka mends all but the fatal ones by itself."""
        if error.fatal() or error.code() in _HOPELESS:
            self._failure = f"kafka: {error.str()}"
        else:
            log.warning("kafka: %s", error.str())

    def _on_message_error(self, error: KafkaError) -> None:
        if error.code() in _HOPELESS or error.fatal():
            self._failure = f"{self._settings.topics.events}: {error.str()}"
        else:
            log.warning("%s: %s", self._settings.topics.events, error.str())


_REJOINING = {
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError._NO_OFFSET,  # noqa: SLF001 - confluent-kafka names librdkafka's own errors so
    KafkaError._TIMED_OUT,  # noqa: SLF001
    KafkaError._TRANSPORT,  # noqa: SLF001
    KafkaError._WAIT_COORD,  # noqa: SLF001
    KafkaError._ASSIGNMENT_LOST,  # noqa: SLF001
}
"""A commit refused for one of these is made again by whoever owns the partition next."""

_HOPELESS = {
    KafkaError._AUTHENTICATION,  # noqa: SLF001
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
}
"""Waiting does not mend these."""


def _numbers(partitions: Iterable[TopicPartition]) -> str:
    return ", ".join(str(number) for number in sorted(partition.partition for partition in partitions)) or "none"
