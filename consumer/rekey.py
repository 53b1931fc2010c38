"""`python -m consumer --rekey`: raw lines from any partitions become events keyed by block, exactly once.

It keeps nothing in memory that a successor would need, so its way to recover is to go back to the committed offset.
The steps are those of the service without the judging: lines are read and cut, and wait in the merge until none older
can come; their events and dead letters go to the delivery, and a commit makes them durable together with the offset of
the first line of each partition that still waits.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from consumer.clients import client
from consumer.cutting import Cut, Cutter
from consumer.delivery import TransactionAborted, delivery_for
from consumer.faultpoints import come_by
from consumer.letters import dead_letter, kind
from consumer.merge import Merge
from consumer.patience import HOPELESS, Patience
from consumer.places import Places
from consumer.refusals import with_remedy
from consumer.settings import Settings
from model.bundle import Bundle
from model.errors import UserError

log = logging.getLogger("consumer")

SOURCE_HEADER = "line.source"
"""Header of an event: topic/partition/offset of its line."""

_REPORT_SECONDS = 60.0
_SILENCE_SECONDS = 5.0  # of a partition that holds up the others
_LOST_PLACE = {KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION}  # noqa: SLF001 - librdkafka's own
_AT_END = KafkaError._PARTITION_EOF  # noqa: SLF001

_READING = {
    "queued.min.messages": 10_000,  # what is read ahead of a partition that is paused is thrown away
    "max.partition.fetch.bytes": 131_072_144,  # the smaller the portions, the less has to wait for its turn
    "fetch.wait.max.ms": 100,  # so much later a partition says that it is at its end
    "fetch.queue.backoff.ms": 5,
}
"""librdkafka settings that users may change: partitions are to advance side by side."""


class Rekeyer:
    """One re-keying process: a member of the consumer group `<kafka.consumer.group.id>-rekey`.

    Raises:
        UserError: the model knows no lines, or not as the settings cut them.
    """

    def __init__(self, settings: Settings, bundle: Bundle, patience: Patience) -> None:
        self._settings = settings
        self._topic = settings.topics.lines
        self.group = f"{settings.kafka.group}-rekey"
        self._cutter = Cutter(settings, bundle)
        self._fields = (settings.events.block_id, settings.events.event_id, settings.events.timestamp)
        self._patience = patience
        self._merge = Merge[Cut]()
        self._committed: dict[int, int] = {}
        self._silence: dict[int, float] = {}  # of each partition that the others wait for
        self._gave_back: set[int] = set()
        self._failure: str | None = None
        self._recovery_due = False
        self.counts = Counter[str]()
        self.dead_letters = Counter[str]()

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
            | _READING
            | self._settings.kafka.for_consumer()
            | {
                "group.id": self.group,
                "auto.offset.reset": "error",  # never jump in silence
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "partition.assignment.strategy": "cooperative-sticky",
                "error_cb": self._patience.notice,
            },
            logger=log,
        )
        self._places = Places(self._settings, self._consumer, self.group, self._patience)
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
        counts = self.counts
        return (
            f"{counts['lines']:,} lines, {counts['unmatched_lines']:,} of them of no template, "
            f"{counts['skipped_lines']:,} without a block; {counts['events']:,} events, "
            f"{self.dead_letters.total():,} dead letters"
        )

    def _loop(self) -> None:
        interval = self._settings.commit.interval.total_seconds()
        wait = min(self._settings.scoring.max_wait.total_seconds(), interval)
        now = time.monotonic()
        commit_at, report_at = now + interval, now + _REPORT_SECONDS
        while not self._patience.stop_asked:
            try:
                self._read(wait)
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

    def _read(self, wait: float) -> None:
        """Take in what comes while waiting for no longer than `wait`, and send what need not wait any more."""
        self._gave_back.clear()
        began = time.monotonic()
        messages = self._consumer.consume(self._settings.scoring.max_batch, wait)
        waited = min(wait, time.monotonic() - began)  # callbacks may have taken longer
        self._raise_failure()
        if self._recovery_due:
            return  # a callback lost the transaction, and they will be read again
        self._merge.turn(self._ends())
        self._take(messages)
        self._give_up_on_silence(waited)
        for cut in self._merge.release():
            self._send(cut)
        for numbers, call in zip(self._merge.balance(), (self._consumer.pause, self._consumer.resume), strict=True):
            if numbers:
                call(self._of_topic(numbers))

    def _ends(self) -> dict[int, int]:
        """Return where partitions end, as far as the last answers of the brokers said."""
        ends = {}
        for place in self._of_topic(self._merge.partitions):
            _, end = self._consumer.get_watermark_offsets(place, cached=True)
            if end >= 0:
                ends[place.partition] = end
        return ends

    def _take(self, messages: Iterable[Message]) -> None:
        for message in messages:
            error, partition, offset = message.error(), message.partition(), message.offset()
            if error is not None and error.code() != _AT_END:
                self._on_message_error(error, partition)
                continue
            self._silence.pop(partition, None)
            if error is not None:
                self._merge.rest(partition)
            elif self._merge.wants(partition, offset):  # else it is no longer ours, or known
                cut = self._cutter.cut(message)
                self._merge.add(partition, offset, cut.time, message.timestamp()[1], len(message), cut)

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

    def _send(self, cut: Cut) -> None:
        """Hand a line's events, or the dead letter that it is, to the delivery."""
        topics, source = self._settings.topics, cut.source.encode()
        self._patience.uncommitted += 1
        self.counts["lines"] += 1
        if cut.letter is not None:
            message, reason = cut.letter
            self.dead_letters[kind(reason)] += 1
            self._delivery.send(topics.dead_letters, *dead_letter(message, reason))
        elif cut.over is not None:
            self._delivery.send(topics.events, None, cut.over, [(SOURCE_HEADER, source)])
        elif cut.rows:
            self.counts["events"] += len(cut.rows)
            self.counts["unmatched_lines"] += cut.rows[0][1] not in self._cutter.known
            for row in cut.rows:
                value = msgspec.json.encode(dict(zip(self._fields, row, strict=True)))
                self._delivery.send(topics.events, value, row[0].encode(), [(SOURCE_HEADER, source)])
        else:
            self.counts["skipped_lines"] += 1

    def _commit(self) -> None:
        """Make durable what was sent, and that its lines were read.

        Raises:
            TransactionAborted: nothing was made durable.
        """
        sent = {number: self._merge.unsent(number) for number in self._merge.partitions}
        sent = {number: offset for number, offset in sent.items() if offset != self._committed[number]}
        if not sent:
            return
        offsets = [TopicPartition(self._topic, number, offset) for number, offset in sent.items()]
        self._delivery.commit(self._consumer, offsets, ())
        self._committed |= sent
        self._patience.uncommitted = 0

    def _recover(self) -> None:
        """Go back to what is committed, in all partitions."""
        self._delivery.abort()  # whatever it still holds will be sent again
        self._recovery_due = False
        self._patience.uncommitted = 0
        partitions = self._merge.partitions
        self._forget(partitions)
        for where in self._begin(partitions):
            # Nothing is fetched any more where the place was lost, and a seek would not change that.
            self._consumer.incremental_unassign([where])
            self._consumer.incremental_assign([where])

    def _begin(self, partitions: Sequence[int]) -> list[TopicPartition]:
        """Note and return where to read on in each partition."""
        starts = self._places.starts(partitions)
        for start in starts:
            self._merge.assign(start.partition, start.offset)
            self._committed[start.partition] = start.offset
        return starts

    def _forget(self, partitions: Iterable[int]) -> None:
        """Drop what is pending of partitions; whoever has them next reads it again."""
        paused = [number for number in self._merge.paused if number in set(partitions)]
        if paused:
            self._consumer.resume(self._of_topic(paused))  # else they might come back paused
        for number in partitions:
            self._merge.drop(number)
            self._committed.pop(number, None)

    def _of_topic(self, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, number) for number in partitions]

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        numbers = [assigned.partition for assigned in partitions]
        try:
            consumer.incremental_assign(self._begin(numbers))
        except UserError as error:  # a callback cannot raise through librdkafka
            self._failure = str(error)
            return
        # What was read before, and is about to be handed over, went on from what was pending then.
        self._recovery_due |= not self._gave_back.isdisjoint(numbers)
        come_by("rebalance")
        log.info("assigned partitions %s", _listed(partitions))

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            if not self._failure and not self._recovery_due:
                self._commit()
        except TransactionAborted as reason:
            log.warning("transaction aborted (%s): what is not committed will be done again", reason)
            self._recovery_due = True
        except UserError as error:
            self._failure = str(error)
        self._give_back(consumer, partitions)
        come_by("rebalance")
        log.info("gave back partitions %s", _listed(partitions))

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            self._delivery.abort()
        except UserError as error:
            self._failure = str(error)
        self._recovery_due = True  # what else was in the transaction is gone with it
        self._give_back(consumer, partitions)
        log.warning("lost partitions %s: another member has them now", _listed(partitions))

    def _give_back(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        numbers = [given.partition for given in partitions]
        self._gave_back.update(numbers)
        self._forget(numbers)
        consumer.incremental_unassign(partitions)

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


def _listed(partitions: Iterable[TopicPartition]) -> str:
    return ", ".join(str(number) for number in sorted(partition.partition for partition in partitions)) or "none"
