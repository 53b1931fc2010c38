"""The Kafka side: reads the event topic, runs the detector, publishes alerts, commits.

The order of steps is the promise (docs/guarantees.md): a batch of messages is decoded and judged, alerts and dead
letters are handed to the delivery, and a commit makes them durable together with the state records and the input
offsets. Whatever goes wrong before that, `Restorer` says where to begin again.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from consumer.alerts import Alert
from consumer.artifacts import Artifacts, ArtifactWatcher
from consumer.checkpoint import Checkpointer, Replay
from consumer.delivery import StateRecord, TransactionAborted, delivery_for
from consumer.drift import MEANING
from consumer.events import EventBatch, Undecodable
from consumer.faultpoints import come_by
from consumer.letters import dead_letter
from consumer.metrics import Metrics, MetricsServer, PartitionStatus, Status
from consumer.patience import HOPELESS, Patience
from consumer.refusals import with_remedy
from consumer.restore import Restorer, Start
from consumer.settings import Settings
from model.errors import UserError

log = logging.getLogger("consumer")

_REPORT_SECONDS = 60.0
_STATUS_SECONDS = 1.0


@dataclass
class _Assigned:
    """What the service knows of a partition that it owns."""

    position: int
    touched: bool  # something happened since the last commit
    active: float
    replay: Replay | None
    replay_end: int
    leftovers: list[bytes]
    checkpointer: Checkpointer

    def end_replay(self) -> None:
        """Forget the replay once past all of it."""
        if self.replay is not None and self.position >= self.replay_end:
            self.replay = None

    @property
    def is_catching_up(self) -> bool:
        """Whether the partition is still behind its committed offset: then it has nothing to commit."""
        return self.replay is not None and self.position < self.replay.until


class Service:
    """One consumer process: a member of the consumer group, with one producer."""

    def __init__(self, settings: Settings, artifacts: Artifacts, patience: Patience) -> None:
        self._settings = settings
        self._topic = settings.topics.events
        self._watcher = ArtifactWatcher(settings, artifacts)
        self._detector = artifacts.detector(settings)
        self._decoder = artifacts.decoder(settings)
        self._patience = patience
        self._assigned: dict[int, _Assigned] = {}
        self._failure: str | None = None
        self._joined = False
        self._recovery_due = False
        self._astray: set[int] = set()
        self._checkpoint_at = 0.0
        self._metrics = Metrics()
        patience.call_while_waiting(self._metrics.beat)
        self.messages = self.alerts = self.dead_letters = 0

    def run(self) -> None:
        """Work until a stop is asked for, then commit what is done and leave the group.

        Raises:
            UserError: Kafka refuses to go on (wrong credentials, missing rights, topic deleted …).
        """
        listen = self._settings.metrics.listen
        server = MetricsServer(self._metrics, listen) if listen else None
        if server:
            log.info("metrics are at http://%s/metrics", server.address)
        try:
            self._run()
        finally:
            if server:
                server.close()

    def _run(self) -> None:
        self._delivery = delivery_for(self._settings, self._patience)
        try:
            self._consumer = Consumer(
                {"log_level": 2}
                | self._settings.kafka.for_consumer()
                | {
                    "auto.offset.reset": "error",  # never jump in silence: the restorer finds out where to go on
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "isolation.level": "read_committed",
                    "partition.assignment.strategy": "cooperative-sticky",
                    "error_cb": self._patience.notice,
                },
                logger=log,
            )
        except KafkaException as error:
            raise UserError(f"kafka: {error.args[0].str()}; mend this librdkafka setting") from None
        self._restorer = Restorer(self._settings, self._consumer, self._patience)
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

    def _loop(self) -> None:
        scoring = self._settings.scoring
        interval = self._settings.commit.interval.total_seconds()
        checkpoint_interval = self._settings.checkpoint.interval.total_seconds()
        wait = min(scoring.max_wait.total_seconds(), interval)
        now = time.monotonic()
        commit_at, report_at = now + interval, now + _REPORT_SECONDS
        self._checkpoint_at = now + checkpoint_interval
        reload_interval = self._settings.reload.interval.total_seconds()
        reload_at = now + reload_interval
        status_at = now
        while not self._patience.stop_asked:
            self._metrics.beat()
            try:
                self._read(wait)
                self._close_silent()
                self._delivery.poll()
                self._raise_failure()
                now = time.monotonic()
                if now >= commit_at:
                    begin = now >= self._checkpoint_at
                    if begin:
                        self._checkpoint_at = now + checkpoint_interval
                    self._commit(begin=begin)
                    commit_at = time.monotonic() + interval
                if now >= reload_at and not self._recovery_due:
                    reload_at = now + reload_interval
                    self._reload()
            except TransactionAborted as reason:
                log.warning("transaction aborted (%s): recovering", reason)
                self._recovery_due = True
            if self._recovery_due:
                self._recover()
            if now >= status_at:
                self._metrics.status = self.status()
                status_at = now + _STATUS_SECONDS
            if now >= report_at:
                log.info("%s", self.summary())
                report_at = now + _REPORT_SECONDS

    def _read(self, seconds: float) -> None:
        """Judge what comes in before the batch is full or the time is over."""
        messages = self._consumer.consume(self._settings.scoring.max_batch, seconds)
        if self._recovery_due:  # a callback lost the transaction: memory is ahead of what is committed
            self._recover()  # and the messages will be read again
        elif messages:
            with self._metrics.batch_seconds.time():
                self._take(messages)

    def summary(self) -> str:
        """Return where things stand, in a line."""
        evicted = f", {self._detector.evicted:,} closed early to make room" if self._detector.evicted else ""
        return (
            f"{self.messages:,} messages, {self._detector.looks:,} looks, {self._detector.scored:,} windows scored, "
            f"{self.alerts:,} alerts, {self.dead_letters:,} dead letters, "
            f"{self._detector.open_blocks:,} open blocks{evicted}"
        )

    def status(self) -> Status:
        """Return where things stand, for the metrics."""
        artifacts = self._watcher.in_use
        return Status(
            ready=self._joined and not any(assigned.is_catching_up for assigned in self._assigned.values()),
            counts={
                "messages": self.messages,
                "looks": self._detector.looks,
                "windows_scored": self._detector.scored,
                "alerts": self.alerts,
                "dead_letters": self.dead_letters,
                "evicted_blocks": self._detector.evicted,
            },
            reloads=dict(self._watcher.outcomes),
            threshold=artifacts.threshold.threshold,
            artifacts={
                "model": artifacts.bundle.fingerprint,
                "strategy": artifacts.threshold.strategy,
                "quantile": f"{artifacts.threshold.quantile:g}",
            },
            partitions={number: self._partition_status(number) for number in self._assigned},
        )

    def _partition_status(self, number: int) -> PartitionStatus:
        store, drift = self._detector.store(number), self._detector.drift(number)
        _, end = self._consumer.get_watermark_offsets(TopicPartition(self._topic, number), cached=True)
        return PartitionStatus(
            open_blocks=store.open_blocks,
            watermark=store.watermark,
            lag=None if end < 0 else max(0, end - self._assigned[number].position),
            drift=drift.evidence(),
            alarm=drift.alarm,
        )

    def _take(self, messages: Sequence[Message]) -> None:
        """Decode and judge messages; alerts and dead letters go to the delivery."""
        live: dict[int, EventBatch] = {}
        done: dict[int, EventBatch] = {}  # judged by a predecessor: taken in without publishing
        now = time.monotonic()
        for message in messages:
            if message.error():
                self._on_message_error(message.error(), message.partition())
                continue
            partition, offset = message.partition(), message.offset()
            assigned = self._assigned.get(partition)
            if assigned is None or offset < assigned.position:
                continue  # no longer ours, or seen before a rebalance gave the partition back
            assigned.position = offset + 1
            assigned.touched = True
            assigned.active = now
            published = assigned.replay is not None and offset < assigned.replay.until
            self._patience.uncommitted += not published
            batches = done if published else live
            batch = batches.get(partition)
            if batch is None:
                batch = batches[partition] = EventBatch()
            try:
                self._decoder.decode(message.key(), message.value(), offset, batch, message.timestamp()[1])
            except Undecodable as reason:
                if not published:
                    self._bury(message, str(reason))
        self.messages += len(messages)
        for partition, batch in done.items():
            self._detector.replay(partition, self._masked(partition, batch))
        if live:
            self._publish(self._detector.process({part: self._masked(part, batch) for part, batch in live.items()}))
            self._say_alarms()
        for assigned in self._assigned.values():
            assigned.end_replay()

    def _masked(self, partition: int, batch: EventBatch) -> EventBatch:
        """Hide what restored sessions include already."""
        replay = self._assigned[partition].replay
        return batch if replay is None else replay.masked(batch)

    def _close_silent(self) -> None:
        """Close the sessions of partitions that have been silent for the idle timeout, on the wall clock."""
        limit = time.monotonic() - self._settings.windows.idle_timeout.total_seconds()
        for partition, assigned in self._assigned.items():
            if assigned.active < limit and assigned.replay is None:
                self._publish(self._detector.close(partition))
                self._say_alarms()
                assigned.touched = True
                assigned.active = time.monotonic()

    def _publish(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self.alerts += 1
            self._delivery.send(self._settings.topics.alerts, alert.encode(), alert.block_id.encode(), [])

    def _say_alarms(self) -> None:
        for partition, drift in self._detector.alarms:
            log.warning(
                "%s/%d: drift (%s) after %s blocks: %s; calibrate again on recent traffic: "
                "python -m calibration --topic %s, see docs/detection.md",
                self._topic, partition, drift.alarm, f"{drift.blocks:,}", MEANING[drift.alarm or "tail"], self._topic,
            )  # fmt: skip
        self._detector.alarms.clear()

    def _bury(self, message: Message, reason: str) -> None:
        self.dead_letters += 1
        self._delivery.send(self._settings.topics.dead_letters, *dead_letter(message, reason))

    def _commit(self, *, begin: bool = False, finish: Sequence[int] = ()) -> None:
        """Make durable what is done: in `finish` partitions with a whole checkpoint, they are handed over.

        Raises:
            TransactionAborted: nothing was made durable.
        """
        due = {
            partition: assigned
            for partition, assigned in self._assigned.items()
            if (assigned.touched or begin or partition in finish) and not assigned.is_catching_up
        }
        if not due:
            return
        offsets = [TopicPartition(self._topic, partition, assigned.position) for partition, assigned in due.items()]
        with self._metrics.commit_seconds.time():
            self._delivery.commit(self._consumer, offsets, self._records(due, begin=begin, finish=finish))
        self._patience.uncommitted = 0
        for assigned in due.values():
            assigned.touched = False
            assigned.leftovers = []

    def _records(self, due: Mapping[int, _Assigned], *, begin: bool, finish: Sequence[int]) -> Iterator[StateRecord]:
        for partition, assigned in due.items():
            for key in assigned.leftovers:
                yield partition, key, None
            for key, value in assigned.checkpointer.records(
                assigned.position, begin=begin, finish=partition in finish and assigned.replay is None
            ):
                yield partition, key, value
        if begin:
            come_by("checkpoint")

    def _begin(self, partition: int) -> TopicPartition:
        """Restore a partition's windows; return where to read on."""
        with self._metrics.restore_seconds.time():
            start: Start = self._restorer.start(partition, self._detector.vocabulary)
        watermark = start.recovered.checkpoint.watermark if start.recovered.checkpoint else None
        self._detector.assign(
            partition,
            start.recovered.sessions,
            watermark,
            start.offset,
            drift=start.recovered.drift,
            since=start.replay.until,
        )
        end = start.replay.end
        self._assigned[partition] = _Assigned(
            position=start.offset,
            touched=False,
            active=time.monotonic(),
            replay=start.replay if end > start.offset else None,
            replay_end=end,
            leftovers=start.leftovers,
            checkpointer=Checkpointer(
                self._detector, partition, self._settings.kafka.group, start.recovered, start.offset
            ),
        )
        return TopicPartition(self._topic, partition, start.offset)

    def _reload(self) -> None:
        """Take a new model or threshold if there is one.

        What is done is committed, with a whole checkpoint, by the old pair; then all partitions recover under the
        new one. Should the commit fail, they recover from the one before it: nothing is lost, only judged later.

        Raises:
            TransactionAborted: as `_commit`; the new pair has been taken.
        """
        artifacts = self._watcher.poll()
        if artifacts is None:
            return
        log.info("now %s", artifacts)
        before = self._detector  # whose windows the checkpoint holds: each checkpointer knows its own
        self._detector, self._decoder = artifacts.detector(self._settings), artifacts.decoder(self._settings)
        self._detector.count_on(before)
        self._recovery_due = True
        self._commit(finish=list(self._assigned))
        come_by("reload")

    def _recover(self) -> None:
        """Go back to what is committed, in all partitions: memory is ahead of it."""
        self._recovery_due = False
        self._patience.uncommitted = 0
        for partition in list(self._assigned):
            where = self._begin(partition)
            if partition in self._astray:  # nothing is fetched there any more, and a seek would not change that
                self._consumer.incremental_unassign([where])
                self._consumer.incremental_assign([where])
            else:
                self._seek(where)
        self._astray.clear()

    def _seek(self, where: TopicPartition) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self._consumer.seek(where)
            except KafkaException as error:
                if time.monotonic() > deadline:
                    raise UserError(f"kafka: cannot go back to {where}: {error.args[0].str()}") from None
                time.sleep(0.05)
            else:
                return

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            consumer.incremental_assign([self._begin(assigned.partition) for assigned in partitions])
        except UserError as error:  # a callback cannot raise through librdkafka
            self._failure = str(error)
            return
        self._joined = True
        come_by("rebalance")
        log.info("assigned partitions %s", _numbers(partitions))

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        numbers = [revoked.partition for revoked in partitions if revoked.partition in self._assigned]
        try:
            if not self._failure and not self._recovery_due:
                self._commit(finish=numbers)
        except TransactionAborted as reason:
            log.warning("transaction aborted (%s): what is not committed will be done again", reason)
            self._recovery_due = True
        except UserError as error:
            self._failure = str(error)
        self._drop(numbers)
        consumer.incremental_unassign(partitions)
        come_by("rebalance")
        log.info("gave back partitions %s", _numbers(partitions))

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            self._delivery.abort()
        except UserError as error:
            self._failure = str(error)
        self._drop([lost.partition for lost in partitions])
        self._recovery_due = True  # what else was in the transaction is gone with it
        consumer.incremental_unassign(partitions)
        log.warning("lost partitions %s: another member has them now", _numbers(partitions))

    def _drop(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            self._detector.revoke(partition)
            self._assigned.pop(partition, None)

    def _raise_failure(self) -> None:
        self._patience.check()
        if self._failure:
            raise UserError(self._failure)

    def _on_message_error(self, error: KafkaError, partition: int) -> None:
        if error.code() in HOPELESS or error.code() == KafkaError._FATAL:  # noqa: SLF001 - librdkafka's own
            self._failure = f"{self._topic}: {with_remedy(error)}"
            return
        log.warning("%s: %s", self._topic, error.str())
        if error.code() in _LOST_PLACE:
            self._astray.add(partition)
            self._recovery_due = True


_LOST_PLACE = {KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION}  # noqa: SLF001
"""The offset to be read next is not in the topic: it was cut, or made anew."""


def _numbers(partitions: Iterable[TopicPartition]) -> str:
    return ", ".join(str(number) for number in sorted(partition.partition for partition in partitions)) or "none"
