"""`python -m consumer --rekey`: raw lines from any partitions become events keyed by block, exactly once.

It keeps nothing in memory that a successor would need, so its way to recover is to go back to the committed offset.
The steps are those of the service without the judging: lines are read and cut, and wait in the merge until none older
can come; their events and dead letters go to the delivery, and a commit makes them durable together with the offset of
the first line of each partition that still waits.
"""

import logging
import time
from collections.abc import Sequence

from confluent_kafka import Consumer, KafkaError, TopicPartition

from consumer.artifacts import ModelWatcher
from consumer.clients import listed
from consumer.cutting import Cut, Cutter
from consumer.delivery import TransactionAborted, delivery_for
from consumer.faultpoints import come_by
from consumer.merge import Merge
from consumer.outbox import Outbox
from consumer.patience import Patience, has_lost_its_place, is_hopeless
from consumer.places import Places
from consumer.reading import Reading, lines_consumer
from consumer.refusals import with_remedy
from consumer.rekey_metrics import RekeyMetrics, RekeyStatus
from consumer.settings import Settings
from consumer.web import serving
from model.errors import UserError

log = logging.getLogger("consumer")

_REPORT_SECONDS = 60.0
_STATUS_SECONDS = 1.0


class Rekeyer:
    """One re-keying process: a member of the consumer group `<kafka.consumer.group.id>-rekey`.

    Raises:
        UserError: there is no model, or it knows no lines, or not as the settings cut them.
    """

    def __init__(self, settings: Settings, patience: Patience) -> None:
        self._settings = settings
        self._topic = settings.topics.lines
        self.group = f"{settings.kafka.group}-rekey"
        self._watcher = ModelWatcher(settings)
        self._cutter = Cutter(settings, self._watcher.in_use)
        self._outbox = Outbox(settings)
        self._metrics = RekeyMetrics()
        patience.call_while_waiting(self._metrics.beat)
        self._patience = patience
        self._merge = Merge[Cut]()
        self._committed: dict[int, int] = {}
        self._gave_back: set[int] = set()
        self._failure: str | None = None
        self._joined = False
        self._recovery_due = False

    def run(self) -> None:
        """Work until a stop is asked for, then commit what is done and leave the group.

        Raises:
            UserError: Kafka refuses to go on (wrong credentials, missing rights, topic deleted …).
        """
        with serving(self._metrics, None, self._settings.metrics.listen):
            self._run()

    def _run(self) -> None:
        self._delivery = delivery_for(self._settings, self._patience)
        self._consumer = lines_consumer(self._settings, self.group, self._patience)
        self._reading = Reading(self._topic, self._consumer, self._merge)
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

    def status(self) -> RekeyStatus:
        """Return where things stand."""
        partitions, ends = self._merge.partitions, self._reading.ends()
        return RekeyStatus(
            ready=self._joined,
            counts=dict(self._outbox.counts),
            dead_letters=dict(self._outbox.dead_letters),
            reloads=dict(self._watcher.outcomes),
            model=self._watcher.in_use.fingerprint,
            pending={number: self._merge.pending(number) for number in partitions},
            lag={
                number: max(0, ends[number] - self._merge.unsent(number)) if number in ends else None
                for number in partitions
            },
        )

    def _loop(self) -> None:
        interval = self._settings.commit.interval.total_seconds()
        wait = min(self._settings.scoring.max_wait.total_seconds(), interval)
        reload_interval = self._settings.reload.interval.total_seconds()
        now = status_at = time.monotonic()
        commit_at, reload_at, report_at = now + interval, now + reload_interval, now + _REPORT_SECONDS
        while not self._patience.stop_asked:
            self._metrics.beat()
            try:
                self._read(wait)
                self._delivery.poll()
                self._raise_failure()
                now = time.monotonic()
                if now >= commit_at and not self._recovery_due:
                    self._commit()
                    commit_at = time.monotonic() + interval
                if now >= reload_at and not self._recovery_due:
                    reload_at = now + reload_interval
                    self._reload()
            except TransactionAborted as reason:
                log.warning("transaction aborted (%s): going back to what is committed", reason)
                self._recovery_due = True
            if self._recovery_due:
                self._recover()
            if now >= status_at:
                self._metrics.status = self.status()
                status_at = now + _STATUS_SECONDS
            if now >= report_at:
                self._report()
                report_at = now + _REPORT_SECONDS

    def _report(self) -> None:
        status = self.status()
        lag = sum(known or 0 for known in status.lag.values())
        log.info("%s; lag %s, %s of it pending", status, f"{lag:,}", f"{sum(status.pending.values()):,}")

    def _read(self, wait: float) -> None:
        """Take in what comes while waiting for no longer than `wait`, and send what need not wait any more."""
        self._gave_back.clear()
        messages, waited = self._reading.consume(self._settings.scoring.max_batch, wait)
        self._raise_failure()
        if self._recovery_due:
            return  # a callback lost the transaction, and they will be read again
        for failed in self._reading.take(messages, waited, self._cutter):
            self._on_message_error(failed.error(), failed.partition())
        for cut in self._merge.release():
            self._patience.uncommitted += 1
            self._outbox.send(cut, self._delivery)
        self._reading.balance()

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
        with self._metrics.commit_seconds.time():
            self._delivery.commit(self._consumer, offsets, ())
        self._committed |= sent
        self._patience.uncommitted = 0

    def _reload(self) -> None:
        """Take a new model if there is one; what is pending was cut by the old one, and is read again.

        Raises:
            TransactionAborted: as `_commit`; the new model has been taken.
        """
        bundle = self._watcher.poll()
        if bundle is None:
            return
        log.info("now model %s", bundle.fingerprint[:12])
        self._cutter = Cutter(self._settings, bundle)
        self._recovery_due = True
        self._commit()
        come_by("reload")

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

    def _forget(self, partitions: Sequence[int]) -> None:
        """Drop what is pending of partitions; whoever has them next reads it again."""
        self._reading.forget(partitions)
        for number in partitions:
            self._committed.pop(number, None)

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        numbers = [assigned.partition for assigned in partitions]
        try:
            consumer.incremental_assign(self._begin(numbers))
        except UserError as error:  # a callback cannot raise through librdkafka
            self._failure = str(error)
            return
        self._joined = True
        # What was read before, and is about to be handed over, went on from what was pending then.
        self._recovery_due |= not self._gave_back.isdisjoint(numbers)
        come_by("rebalance")
        log.info("assigned partitions %s", listed(partitions))

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
        log.info("gave back partitions %s", listed(partitions))

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            self._delivery.abort()
        except UserError as error:
            self._failure = str(error)
        self._recovery_due = True  # what else was in the transaction is gone with it
        self._give_back(consumer, partitions)
        log.warning("lost partitions %s: another member has them now", listed(partitions))

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
        if is_hopeless(error):
            self._failure = f"{self._topic}: {with_remedy(error)}"
            return
        log.warning("%s/%d: %s", self._topic, partition, error.str())
        self._recovery_due |= has_lost_its_place(error)
