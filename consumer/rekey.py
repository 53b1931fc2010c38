"""`python -m consumer --rekey`: raw lines from any partitions become events keyed by block, exactly once.

It keeps nothing in memory that a successor would need, so its way to recover is to go back to the committed offset.
The steps are those of the service without the judging: lines are read and cut, events and dead letters go to the
delivery, and a commit makes them durable together with the input offsets.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from consumer.clients import client
from consumer.delivery import Headers, TransactionAborted, delivery_for
from consumer.events import Undecodable
from consumer.faultpoints import come_by
from consumer.letters import dead_letter
from consumer.patience import HOPELESS, Patience, is_passing
from consumer.refusals import with_remedy
from consumer.settings import Settings, milliseconds
from consumer.text import TextDecoder, known_lines
from model.bundle import Bundle
from model.errors import UserError

log = logging.getLogger("consumer")

SOURCE_HEADER = "line.source"
"""Header of an event: topic/partition/offset of its line."""

T = TypeVar("T")

_CALL_SECONDS = 10.0
_REPORT_SECONDS = 60.0
_LOST_PLACE = {KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION}  # noqa: SLF001 - librdkafka's own


class _Event(NamedTuple):
    """What is to be sent; `time` in milliseconds since 1970."""

    time: int
    key: bytes
    value: bytes | None
    headers: Headers


class Rekeyer:
    """One re-keying process: a member of the consumer group `<kafka.consumer.group.id>-rekey`.

    Raises:
        UserError: the model knows no lines, or not as the settings cut them.
    """

    def __init__(self, settings: Settings, bundle: Bundle, patience: Patience) -> None:
        self._settings = settings
        self._topic = settings.topics.lines
        self.group = f"{settings.kafka.group}-rekey"
        tokens = bundle.vocabulary.tokens
        self._decoder = TextDecoder(known_lines(settings, bundle), tokens, milliseconds(settings.windows.max_ahead))
        self._fields = (settings.events.block_id, settings.events.event_id, settings.events.timestamp)
        self._known = tokens.keys()
        self._patience = patience
        self._positions: dict[int, int] = {}
        self._times: dict[int, int] = {}  # latest of each partition so far
        self._touched: set[int] = set()
        self._failure: str | None = None
        self._recovery_due = False
        self.lines = self.events = self.unmatched = self.dead_letters = 0

    def run(self) -> None:
        """Work until a stop is asked for, then commit what is done and leave the group.

        Raises:
            UserError: Kafka refuses to go on (wrong credentials, missing rights, topic deleted …).
        """
        self._delivery = delivery_for(self._settings, self._patience)
        self._consumer = client(
            Consumer,
            self._settings,
            {"log_level": 2}
            | self._settings.kafka.for_consumer()
            | {
                "group.id": self.group,
                "auto.offset.reset": "error",  # never jump in silence
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "isolation.level": "read_committed",
                "partition.assignment.strategy": "cooperative-sticky",
                "error_cb": self._patience.notice,
            },
            logger=log,
        )
        try:
            self._consumer.subscribe(
                [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            self._loop()
        except BaseException:
            self._failure = self._failure or "stopped by an error"  # nothing half done may be committed on the way out
            raise
        finally:
            self._consumer.close()  # gives the partitions back, which commits what is done
            self._delivery.close()
        self._raise_failure()

    def summary(self) -> str:
        """Return where things stand, in a line."""
        return (
            f"{self.lines:,} lines, {self.events:,} events, {self.unmatched:,} of them of no template, "
            f"{self._decoder.skipped:,} lines without a block, {self.dead_letters:,} dead letters"
        )

    def _loop(self) -> None:
        interval = self._settings.commit.interval.total_seconds()
        wait = min(self._settings.scoring.max_wait.total_seconds(), interval)
        now = time.monotonic()
        commit_at, report_at = now + interval, now + _REPORT_SECONDS
        while not self._patience.stop_asked:
            try:
                messages = self._consumer.consume(self._settings.scoring.max_batch, wait)
                self._raise_failure()
                if not self._recovery_due:  # else a callback lost the transaction, and they will be read again
                    self._take(messages)
                self._delivery.poll()
                self._raise_failure()
                now = time.monotonic()
                if now >= commit_at and not self._recovery_due:
                    self._commit()
                    commit_at = time.monotonic() + interval
            except TransactionAborted as reason:
                log.warning("transaction aborted (%s): going back to what is committed", reason)
                self._recovery_due = True
            if self._recovery_due:
                self._recover()
            if now >= report_at:
                log.info("%s", self.summary())
                report_at = now + _REPORT_SECONDS

    def _take(self, messages: Iterable[Message]) -> None:
        """Cut lines; events go to the delivery in the order of their times, dead letters as they come.

        Lines of one block may lie in several partitions. Those of a partition keep their order: a line that is stamped
        earlier than one before it there counts as old as that one.
        """
        events: list[tuple[int, int, _Event]] = []
        for message in messages:
            if message.error():
                self._on_message_error(message.error(), message.partition())
                continue
            partition, offset = message.partition(), message.offset()
            if offset < self._positions.get(partition, offset + 1):
                continue  # no longer ours, or seen before a rebalance gave the partition back
            self._positions[partition] = offset + 1
            self._touched.add(partition)
            self._patience.uncommitted += 1
            self.lines += 1
            sent = message.timestamp()[1]
            try:
                for event in self._events(message, sent):
                    latest = self._times[partition] = max(event.time, self._times.get(partition, event.time))
                    events.append((latest, sent, event))
            except Undecodable as reason:
                self.dead_letters += 1
                self._delivery.send(self._settings.topics.dead_letters, *dead_letter(message, str(reason)))
        for _, _, event in sorted(events, key=lambda item: item[:2]):
            self._delivery.send(self._settings.topics.events, event.value, event.key, event.headers)

    def _events(self, message: Message, sent: int) -> Iterator["_Event"]:
        key, line = message.key(), message.value()
        source: Headers = [(SOURCE_HEADER, f"{self._topic}/{message.partition()}/{message.offset()}".encode())]
        if line is None:
            if key is None:
                raise Undecodable("neither key nor value")
            yield _Event(self._times.get(message.partition(), sent), key, None, source)  # the block of this key is over
            return
        for block, event, time_ms in self._decoder.rows(line, sent):
            value = msgspec.json.encode(dict(zip(self._fields, (block, event, time_ms), strict=True)))
            yield _Event(time_ms, block.encode(), value, source)
            self.events += 1
            self.unmatched += event not in self._known

    def _commit(self) -> None:
        """Make durable what was sent, and that its lines were read.

        Raises:
            TransactionAborted: nothing was made durable.
        """
        offsets = [TopicPartition(self._topic, partition, self._positions[partition]) for partition in self._touched]
        if not offsets:
            return
        self._delivery.commit(self._consumer, offsets, ())
        self._patience.uncommitted = 0
        self._touched.clear()

    def _recover(self) -> None:
        """Go back to what is committed, in all partitions."""
        self._delivery.abort()  # whatever it still holds will be cut and sent again
        self._recovery_due = False
        self._patience.uncommitted = 0
        self._touched.clear()
        for where in self._starts(list(self._positions)):
            # Nothing is fetched any more where the place was lost, and a seek would not change that.
            self._consumer.incremental_unassign([where])
            self._consumer.incremental_assign([where])

    def _starts(self, partitions: Sequence[int]) -> list[TopicPartition]:
        """Note and return where to read on in each partition."""
        if not partitions:
            return []
        wanted = [TopicPartition(self._topic, partition) for partition in partitions]
        starts = []
        with closing(self._asker()) as asker:  # the group's own client must not be asked this in its callbacks
            for found in self._patiently(asker, lambda: _committed(self._consumer, wanted)):
                low, high = self._patiently(asker, partial(_bounds, asker, self._topic, found.partition))
                starts.append(TopicPartition(self._topic, found.partition, self._start(found, low, high)))
                self._positions[found.partition] = starts[-1].offset
                self._times.pop(found.partition, None)
        return starts

    def _asker(self) -> Consumer:
        own = {"group.id": self.group, "log_level": 2, "error_cb": self._patience.notice}  # it never joins
        return Consumer(self._settings.kafka.for_consumer() | own, logger=log)

    def _start(self, committed: TopicPartition, low: int, high: int) -> int:
        where = f"{self._topic}/{committed.partition}"
        if committed.offset > high:
            log.warning("%s: the topic was made anew: reading it from its beginning", where)
            return low
        if committed.offset < 0:
            policy = str(self._settings.kafka.for_consumer().get("auto.offset.reset", "earliest"))
            return high if policy in {"latest", "largest", "end"} else low
        if committed.offset < low:
            log.warning(
                "%s: lines %d to %d were deleted before they were read; keep lines for longer than this process may "
                "be away", where, committed.offset, low - 1,
            )  # fmt: skip
        return max(committed.offset, low)

    def _patiently(self, asker: Consumer, call: Callable[[], T]) -> T:
        """Make a call again while brokers are away or busy: a predecessor's transaction may have to time out first."""
        while True:
            try:
                return call()
            except KafkaException as error:
                if not is_passing(error.args[0]):
                    raise UserError(f"kafka: {with_remedy(error.args[0])}") from None
                asker.poll(0.1)  # a pause in which the client tells its troubles
                self._patience.retry(error.args[0])

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            consumer.incremental_assign(self._starts([assigned.partition for assigned in partitions]))
        except UserError as error:  # a callback cannot raise through librdkafka
            self._failure = str(error)
            return
        come_by("rebalance")
        log.info("assigned partitions %s", _numbers(partitions))

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            if not self._failure and not self._recovery_due:
                self._commit()
        except TransactionAborted as reason:
            log.warning("transaction aborted (%s): what is not committed will be done again", reason)
            self._recovery_due = True
        except UserError as error:
            self._failure = str(error)
        self._drop(partitions)
        consumer.incremental_unassign(partitions)
        come_by("rebalance")
        log.info("gave back partitions %s", _numbers(partitions))

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            self._delivery.abort()
        except UserError as error:
            self._failure = str(error)
        self._drop(partitions)
        self._recovery_due = True  # what else was in the transaction is gone with it
        consumer.incremental_unassign(partitions)
        log.warning("lost partitions %s: another member has them now", _numbers(partitions))

    def _drop(self, partitions: Iterable[TopicPartition]) -> None:
        for dropped in partitions:
            self._positions.pop(dropped.partition, None)
            self._times.pop(dropped.partition, None)
            self._touched.discard(dropped.partition)

    def _raise_failure(self) -> None:
        self._patience.check()
        if self._failure:
            raise UserError(self._failure)

    def _on_message_error(self, error: KafkaError, partition: int) -> None:
        if error.code() in HOPELESS or error.code() == KafkaError._FATAL:  # noqa: SLF001 - librdkafka's own
            self._failure = f"{self._topic}: {with_remedy(error)}"
            return
        log.warning("%s/%d: %s", self._topic, partition, error.str())
        self._recovery_due |= error.code() in _LOST_PLACE


def _bounds(asker: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """Return the first offset of a partition, and the one after its last."""
    return asker.get_watermark_offsets(TopicPartition(topic, partition), timeout=_CALL_SECONDS)


def _committed(consumer: Consumer, wanted: Sequence[TopicPartition]) -> list[TopicPartition]:
    found: list[TopicPartition] = consumer.committed(list(wanted), timeout=_CALL_SECONDS)
    for place in found:
        if place.error is not None:
            raise KafkaException(place.error)
    return found


def _numbers(partitions: Iterable[TopicPartition]) -> str:
    return ", ".join(str(number) for number in sorted(partition.partition for partition in partitions)) or "none"
