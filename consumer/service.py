"""The Kafka side: reads the event topic, runs the detector, publishes alerts, commits.

The order of steps is the promise (docs/guarantees.md): a batch of messages is decoded and judged, alerts and dead
letters are handed to the delivery, and a commit makes them durable. What is to be committed, and where to begin again
whatever goes wrong before that, `Assignment` knows.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
from confluent_kafka import Message, TopicPartition

from consumer.alerts import Alert
from consumer.artifacts import Artifacts, ArtifactWatcher
from consumer.assignment import Assignment
from consumer.board import Board
from consumer.checkpoint import PER_COMMIT
from consumer.clients import READ_AHEAD, member
from consumer.crossings import Crossings
from consumer.delivery import TransactionAborted, delivery_for
from consumer.drift import MEANING
from consumer.events import EventBatch, Messages
from consumer.faultpoints import come_by
from consumer.letters import KINDS, dead_letter, kind
from consumer.logs import minute, printable
from consumer.metrics import Metrics, PartitionStatus, Status
from consumer.partition import Partition
from consumer.patience import AT_END, Patience
from consumer.rehearsal import rehearse
from consumer.restore import Restorer
from consumer.settings import Settings
from consumer.silence import Ends
from consumer.web import serving
from model.stamps import EARLY

log = logging.getLogger("consumer")

_REPORT_SECONDS = 60.0
_STATUS_SECONDS = 1.0


class Service:
    """One consumer process: a member of the consumer group, with one producer."""

    def __init__(self, settings: Settings, artifacts: Artifacts, patience: Patience) -> None:
        self._settings = settings
        self._topic = settings.topics.events
        self._watcher = ArtifactWatcher(settings, artifacts)
        self._detector = artifacts.detector(settings)
        self._decoder = artifacts.decoder(settings)
        self._patience = patience
        self._metrics = Metrics()
        self._crossings = Crossings(self._topic)
        self._board = Board(settings)
        self._detector.time_scoring = self._metrics.scoring_seconds.time
        patience.call_while_waiting(self._metrics.beat)
        self.messages = 0
        self.alerts = Counter[str]()
        self.dead_letters = Counter[str]()
        self._handed_over = 0
        self._warned: dict[str, float] = {}

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
        self._consumer = member(self._settings, self._patience, defaults=READ_AHEAD, enable_partition_eof=True)
        self._ends = Ends(self._settings, self._topic)
        self._assignment = Assignment(
            self._settings,
            self._detector,
            self._consumer,
            self._delivery,
            Restorer(self._settings, self._consumer, self._patience, self._metrics.restored_records.inc),
            self._patience,
            self._metrics,
        )
        with closing(self._delivery), self._assignment.membership():
            self._loop()
            self._handed_over = self._detector.open_blocks
        self._assignment.check()

    def _loop(self) -> None:
        scoring = self._settings.scoring
        interval = self._settings.commit.interval.total_seconds()
        checkpoint_interval = self._settings.checkpoint.interval.total_seconds()
        wait = min(scoring.max_wait.total_seconds(), interval)
        now = time.monotonic()
        commit_at, checkpoint_at, report_at = now + interval, now + checkpoint_interval, now + _REPORT_SECONDS
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
                self._assignment.check()
                now = time.monotonic()
                if now >= commit_at:
                    due = now >= checkpoint_at
                    if due:
                        checkpoint_at = now + checkpoint_interval
                    self._assignment.commit(begin=self._assignment.partitions if due else ())
                    commit_at = time.monotonic() + interval
                if now >= reload_at and not self._assignment.recovery_due:
                    reload_at = now + reload_interval
                    self._reload()
            except TransactionAborted as reason:
                log.warning("transaction aborted (%s): recovering", reason)
                self._assignment.recovery_due = True
            if self._assignment.recovery_due:
                self._assignment.recover()
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
        self._assignment.check()
        if self._assignment.recovery_due:  # a callback lost the transaction: memory is ahead of what is committed
            self._assignment.recover()  # and the messages will be read again
        elif messages:
            by_partition, ends = self._sorted(messages)
            floods = self._count_and_take(by_partition) if by_partition else {}
            for number, partition in self._assignment.partitions.items():
                if number in ends and number not in floods:
                    partition.reach(ends[number])
                partition.end_replay()
            for number, time_ahead in floods.items():
                self._close_ahead_of(number, time_ahead)

    def _count_and_take(self, by_partition: Mapping[int, Sequence[Message]]) -> Mapping[int, int]:
        count = sum(map(len, by_partition.values()))
        self.messages += count
        self._metrics.batch_messages.observe(count)
        with self._metrics.batch_seconds.time():
            return self._take(by_partition)

    def summary(self) -> str:
        """Return what was done, in a line."""
        evicted = f", {self._detector.evicted:,} closed early to make room" if self._detector.evicted else ""
        return (
            f"{self.messages:,} messages, {self._detector.looks:,} looks, {self._detector.scored:,} windows scored, "
            f"{self.alerts.total():,} alerts, {self.dead_letters.total():,} dead letters, "
            f"{self._handed_over:,} open blocks handed over{evicted}"
        )

    def status(self) -> Status:
        """Return where things stand, for the metrics."""
        artifacts = self._watcher.in_use
        levels = {level.name: level.threshold for level in artifacts.threshold.levels}
        return Status(
            ready=self._assignment.ready,
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
            partitions={
                number: self._partition_status(partition) for number, partition in self._assignment.partitions.items()
            },
        )

    def _partition_status(self, partition: Partition) -> PartitionStatus:
        store, drift = self._detector.store(partition.number), self._detector.drift(partition.number)
        _, end = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition.number), cached=True)
        return PartitionStatus(
            open_blocks=store.open_blocks,
            watermark=store.watermark,
            lag=None if end < 0 else max(0, end - partition.reached),
            catch_up=partition.catch_up,
            drift=drift.evidence(),
            alarm=drift.alarm,
        )

    def _take(self, by_partition: Mapping[int, Sequence[Message]]) -> Mapping[int, int]:
        """Decode and judge messages; alerts and dead letters go to the delivery.

        Returns by partition, in milliseconds, the time of the event up to which it was read only, for what it ends.
        """
        live: dict[int, EventBatch] = {}
        unfit: list[tuple[Message, str]] = []
        floods: dict[int, int] = {}
        for number, some in by_partition.items():
            batch, refused, flood = self._decoded(number, some)
            unfit += refused
            if batch is not None:
                live[number] = batch
            if flood is not None:
                floods[number] = flood
        if live:
            self._publish(self._detector.process(live))
            self._say_alarms()
            self._look_for_crossings(live)
        for message, reason in unfit:  # only now: what is sent first opens the transaction, and its time runs
            self._bury(message, reason)
        return floods

    def _sorted(self, messages: Sequence[Message]) -> tuple[Mapping[int, Sequence[Message]], Mapping[int, int]]:
        """Return messages by partition, and where those end that are read to their end; errors go to the assignment."""
        by_partition: dict[int, list[Message]] = {}
        ends: dict[int, int] = {}
        for message in messages:
            error = message.error()
            if error is None:
                by_partition.setdefault(message.partition(), []).append(message)
            elif error.code() == AT_END:
                ends[message.partition()] = message.offset()
            else:
                self._assignment.on_error(error, message.partition())
        return by_partition, ends

    def _decoded(
        self, number: int, messages: Sequence[Message]
    ) -> tuple[EventBatch | None, list[tuple[Message, str]], int | None]:
        """Return the events of a partition that are to be judged, and what is no event, with the reason.

        Those that a predecessor has judged are taken in without publishing. One that ends more sessions than a commit
        should hold stays unread, with all behind it: then its time, in milliseconds, is returned, too.
        """
        partition = self._assignment.partitions.get(number)
        if partition is None:
            return None, [], None  # no longer ours
        columns = Messages.of(messages)
        known, done = partition.advance(columns.offsets)
        if known == len(messages):
            return None, [], None  # seen before a rebalance gave the partition back
        if known < done:
            self._detector.replay(number, self._decoder.decode(columns.from_place(known, done))[0])
        batch, refused = self._decoder.decode(columns.from_place(done))
        if len(batch) and 0 < (newest := int(batch.times.max())) < EARLY < int(columns.sent[-1]):
            self._warn(
                "seconds", number, f"a timestamp of {newest} is taken as milliseconds since 1970; send seconds as "
                "milliseconds or as ISO 8601",
            )  # fmt: skip
        end, flood = len(messages), None
        row = self._detector.store(number).flood(batch, PER_COMMIT)
        if row is not None:
            partition.position = int(batch.offsets[row])
            end = int(np.searchsorted(columns.offsets, partition.position))
            flood = int(batch.times[row])
            batch = batch.rows(0, int(np.searchsorted(batch.offsets, partition.position)))
        self._patience.uncommitted += end - done
        return batch, [(messages[done + place], reason) for place, reason in refused if done + place < end], flood

    def _close_ahead_of(self, number: int, moment: int) -> None:
        """Close some of the sessions that the next message ends; read on at that message."""
        log.info(
            "%s/%d: the log goes on after a pause that ends more than %s open blocks: closing so many first",
            self._topic, number, f"{PER_COMMIT:,}",
        )  # fmt: skip
        self._close(number, partial(self._detector.close_ending, number, moment, PER_COMMIT))
        self._assignment.read_on(number)

    def _look_for_crossings(self, numbers: Iterable[int]) -> None:
        stores = {number: self._detector.store(number) for number in self._assignment.partitions}
        self._crossings.look({number: stores[number].opened for number in numbers}, stores)

    def _close_silent(self) -> None:
        """Close the sessions of partitions that have been silent for the idle timeout, on the wall clock."""
        partitions = self._assignment.partitions
        for number, asked, end in self._ends.answers():
            if number in partitions:
                partitions[number].ends_at(end, asked)
        self._ends.ask([number for number, known in partitions.items() if known.is_doubtful], time.monotonic())
        for number, partition in partitions.items():
            if partition.is_silent:
                self._close(number, partial(self._detector.close, number, PER_COMMIT))

    def _close(self, number: int, judge: Callable[[], Sequence[Alert]]) -> None:
        """Close some sessions of a partition, with a commit of their own.

        More with one commit might take longer than its transaction may last, again and again. And to judge takes long:
        meanwhile none is open, whose time would run.
        """
        self._assignment.commit()
        self._publish(judge())
        self._say_alarms()
        self._assignment.partitions[number].closed_some()
        self._assignment.commit()

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
        self._warn(
            kind(reason), message.partition(), f"offset {message.offset()} is no event, but a dead letter: {reason}"
        )
        self._delivery.send(self._settings.topics.dead_letters, *dead_letter(message, reason))

    def _warn(self, what: str, number: int, trouble: str) -> None:
        """Warn of a partition; of what comes with each message, once in a minute."""
        now = time.monotonic()
        if now - self._warned.get(what, -math.inf) >= _REPORT_SECONDS:
            self._warned[what] = now
            log.warning("%s/%d: %s", self._topic, number, printable(trouble))

    def _reload(self) -> None:
        """Take a new model or threshold if there is one, once what is done is committed by the old pair.

        Raises:
            TransactionAborted: as `Assignment.change_detector`; the new pair has been taken.
        """
        artifacts = self._watcher.poll()
        if artifacts is None:
            return
        log.info("now %s", artifacts)
        detector, skipped = self._detector, self._decoder.skipped
        self._detector, self._decoder = artifacts.detector(self._settings), artifacts.decoder(self._settings)
        self._detector.count_on(detector)
        self._decoder.skipped = skipped
        self._assignment.change_detector(self._detector)
        come_by("reload")
