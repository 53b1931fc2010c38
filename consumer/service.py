"""The Kafka side: reads the event topic, runs the detector, publishes alerts, commits.

The order of steps is the promise (docs/guarantees.md): a batch of messages is decoded and judged, alerts and dead
letters are handed to the delivery, and a commit makes them durable together with the state records and the input
offsets. Whatever goes wrong before that, `Restorer` says where to begin again.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from consumer.alerts import Alert
from consumer.artifacts import Artifacts, ArtifactWatcher
from consumer.board import Board
from consumer.checkpoint import PER_COMMIT, Checkpointer, Replay
from consumer.clients import member
from consumer.crossings import Crossings
from consumer.delivery import StateRecord, TransactionAborted, delivery_for
from consumer.drift import MEANING
from consumer.events import EventBatch, Messages
from consumer.faultpoints import come_by
from consumer.letters import KINDS, dead_letter, kind
from consumer.logs import minute
from consumer.metrics import Metrics, PartitionStatus, Status
from consumer.patience import HOPELESS, Patience
from consumer.refusals import with_remedy
from consumer.rehearsal import rehearse
from consumer.restore import Restorer, Start, readable
from consumer.settings import Settings
from consumer.web import serving
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
    leftovers: list[bytes]
    checkpointer: Checkpointer

    @property
    def published(self) -> int:
        """Offset below which the partition's alerts are published already."""
        return 0 if self.replay is None else self.replay.until

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
        self._crossings = Crossings(self._topic)
        self._board = Board(settings)
        self._detector.time_scoring = self._metrics.scoring_seconds.time
        patience.call_while_waiting(self._metrics.beat)
        self.messages = 0
        self.alerts = Counter[str]()
        self.dead_letters = Counter[str]()

    def run(self) -> None:
        """Work until a stop is asked for, then commit what is done and leave the group.

        Raises:
            UserError: Kafka refuses to go on (wrong credentials, missing rights, topic deleted …).
        """
        with serving(self._metrics, self._board, self._settings.metrics.listen):
            self._run()

    def _run(self) -> None:
        rehearse(self._watcher.in_use, self._settings)
        self._delivery = delivery_for(self._settings, self._patience)
        self._consumer = member(self._settings, self._patience, defaults={})
        self._restorer = Restorer(self._settings, self._consumer, self._patience, self._metrics.restored_records.inc)
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
        reported = self.status()
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
                self._metrics.status = status = self.status()
                self._board.sample(status)
                status_at = now + _STATUS_SECONDS
            if now >= report_at:
                before, reported = reported, self.status()
                line, numbers = minute(before, reported, now - report_at + _REPORT_SECONDS)
                log.info("last minute: %s", line, extra=numbers)
                report_at = now + _REPORT_SECONDS

    def _read(self, seconds: float) -> None:
        """Judge what comes in before the batch is full or the time is over."""
        messages = self._consumer.consume(self._settings.scoring.max_batch, seconds)
        self._raise_failure()
        if self._recovery_due:  # a callback lost the transaction: memory is ahead of what is committed
            self._recover()  # and the messages will be read again
        elif messages:
            self._metrics.batch_messages.observe(len(messages))
            with self._metrics.batch_seconds.time():
                self._take(messages)

    def summary(self) -> str:
        """Return where things stand, in a line."""
        evicted = f", {self._detector.evicted:,} closed early to make room" if self._detector.evicted else ""
        return (
            f"{self.messages:,} messages, {self._detector.looks:,} looks, {self._detector.scored:,} windows scored, "
            f"{self.alerts.total():,} alerts, {self.dead_letters.total():,} dead letters, "
            f"{self._detector.open_blocks:,} open blocks{evicted}"
        )

    def status(self) -> Status:
        """Return where things stand, for the metrics."""
        artifacts = self._watcher.in_use
        levels = {level.name: level.threshold for level in artifacts.threshold.levels}
        return Status(
            ready=self._joined and not any(assigned.is_catching_up for assigned in self._assigned.values()),
            counts={
                "messages": self.messages,
                "events": self._detector.events,
                "looks": self._detector.looks,
                "cache_hits": self._detector.cached,
                "windows_scored": self._detector.scored,
                "evicted_blocks": self._detector.evicted,
                "crossed_blocks": self._crossings.count,
                "skipped_lines": self._decoder.skipped,
            },
            reloads=dict(self._watcher.outcomes),
            alerts=dict.fromkeys(levels, 0) | self.alerts,
            dead_letters=dict.fromkeys(KINDS, 0) | self.dead_letters,
            levels=levels,
            scores=self._detector.levels.tolist(),
            artifacts={
                "model": artifacts.bundle.fingerprint,
                "strategy": artifacts.threshold.strategy,
                "calibration_quantile": f"{artifacts.threshold.quantile:g}",
            },
            partitions={number: self._partition_status(number) for number in self._assigned},
        )

    def _partition_status(self, number: int) -> PartitionStatus:
        store, drift = self._detector.store(number), self._detector.drift(number)
        assigned = self._assigned[number]
        _, end = self._consumer.get_watermark_offsets(TopicPartition(self._topic, number), cached=True)
        return PartitionStatus(
            open_blocks=store.open_blocks,
            watermark=store.watermark,
            lag=None if end < 0 else max(0, end - assigned.position),
            catch_up=assigned.replay.until - assigned.position if assigned.replay and assigned.is_catching_up else 0,
            drift=drift.evidence(),
            alarm=drift.alarm,
        )

    def _take(self, messages: Sequence[Message]) -> None:
        """Decode and judge messages; alerts and dead letters go to the delivery."""
        by_partition: dict[int, list[Message]] = {}
        for message in messages:
            if message.error() is None:
                by_partition.setdefault(message.partition(), []).append(message)
            else:
                self._on_message_error(message.error(), message.partition())
        self.messages += len(messages)
        live: dict[int, EventBatch] = {}
        unfit: list[tuple[Message, str]] = []
        for partition, some in by_partition.items():
            batch, refused = self._decoded(partition, some)
            unfit += refused
            if batch is not None:
                live[partition] = batch
        if live:
            self._publish(self._detector.process(live))
            self._say_alarms()
            self._look_for_crossings(live)
        for message, reason in unfit:  # only now: what is sent first opens the transaction, and its time runs
            self._bury(message, reason)
        for partition in by_partition.keys() & self._assigned.keys():
            self._end_replay(partition)

    def _decoded(
        self, partition: int, messages: Sequence[Message]
    ) -> tuple[EventBatch | None, list[tuple[Message, str]]]:
        """Return the events that are to be judged, and what is no event, with the reason.

        Those that a predecessor has judged are taken in without publishing.
        """
        assigned = self._assigned.get(partition)
        if assigned is None:
            return None, []  # no longer ours
        columns = Messages.of(messages)
        known, done = np.searchsorted(columns.offsets, [assigned.position, assigned.published]).tolist()
        if known == len(messages):
            return None, []  # seen before a rebalance gave the partition back
        done = max(known, done)
        assigned.position = int(columns.offsets[-1]) + 1
        assigned.touched = True
        assigned.active = time.monotonic()
        self._patience.uncommitted += len(messages) - done
        if known < done:
            self._detector.replay(partition, self._decoder.decode(columns.from_place(known, done))[0])
        batch, refused = self._decoder.decode(columns.from_place(done))
        return batch, [(messages[done + letter.place], letter.reason) for letter in refused]

    def _look_for_crossings(self, partitions: Iterable[int]) -> None:
        stores = {partition: self._detector.store(partition) for partition in self._assigned}
        for partition in partitions:
            self._crossings.look(partition, stores[partition].opened, stores)

    def _close_silent(self) -> None:
        """Close the sessions of partitions that have been silent for the idle timeout, on the wall clock."""
        limit = time.monotonic() - self._settings.windows.idle_timeout.total_seconds()
        for partition, assigned in self._assigned.items():
            if assigned.active < limit and assigned.replay is None:
                self._publish(self._detector.close(partition, PER_COMMIT))
                self._say_alarms()
                assigned.touched = True
                if not self._detector.store(partition).open_blocks:
                    assigned.active = time.monotonic()

    def _publish(self, alerts: Sequence[Alert]) -> None:
        self._board.post(alerts)
        for alert in alerts:
            self.alerts[alert.severity] += 1
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
        self.dead_letters[kind(reason)] += 1
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

    def _begin(self, partitions: Sequence[int]) -> Iterator[TopicPartition]:
        """Restore the windows of partitions, one after the other; yield where to read on in each."""
        with closing(self._restorer.starts(partitions, self._detector.vocabulary)) as starts:
            for partition in partitions:
                with self._metrics.restore_seconds.time():
                    start = next(starts)
                self._assign(partition, start)
                yield TopicPartition(self._topic, partition, start.offset)

    def _assign(self, partition: int, start: Start) -> None:
        watermark = start.recovered.checkpoint.watermark if start.recovered.checkpoint else None
        with readable(self._settings.topics.state, partition):
            self._detector.assign(
                partition,
                start.recovered.sessions,
                watermark,
                start.offset,
                drift=start.recovered.drift,
                since=start.replay.until,
            )
        self._assigned[partition] = _Assigned(
            position=start.offset,
            touched=start.chosen,
            active=time.monotonic(),
            replay=start.replay,
            leftovers=start.leftovers,
            checkpointer=Checkpointer(
                self._detector, partition, self._settings.kafka.group, start.recovered, start.offset
            ),
        )
        self._end_replay(partition)

    def _end_replay(self, partition: int) -> None:
        """Forget the replay once past all of it."""
        assigned = self._assigned[partition]
        if assigned.replay is not None and assigned.position >= assigned.replay.end:
            assigned.replay = None
            self._detector.store(partition).end_replay()

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
        """Go back to what is committed, in all partitions: memory is ahead of it.

        Raises:
            UserError: Kafka refuses to go on.
        """
        self._delivery.abort()  # whatever it still holds will be judged and sent again
        self._recovery_due = False
        self._patience.uncommitted = 0
        for where in self._begin(list(self._assigned)):
            if where.partition in self._astray:  # nothing is fetched there any more, and a seek would not change that
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
            consumer.incremental_assign(list(self._begin([assigned.partition for assigned in partitions])))
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
            if not self._failure:  # a process that is ending anyway does not wait for brokers
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
