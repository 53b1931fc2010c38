"""The partitions that the group assigns to this process: taken over, committed, recovered, given back.

A commit makes durable what was sent since the last one, together with the state records and the input offsets. When
memory is ahead of what is committed, a recovery goes back to that, in all partitions: they share the transaction.
Whatever the occasion, a partition begins where `Restorer` says.
"""

import logging
import time
from collections.abc import Collection, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from consumer.clients import listed
from consumer.delivery import Delivery, StateRecord, TransactionAborted
from consumer.detector import Detector
from consumer.faultpoints import come_by
from consumer.metrics import Metrics
from consumer.partition import Partition
from consumer.patience import Patience, has_lost_its_place, is_hopeless
from consumer.refusals import with_remedy
from consumer.restore import Restorer
from consumer.settings import Settings
from model.errors import UserError

log = logging.getLogger("consumer")


class Assignment:
    """What a member of the consumer group owns, and what is durable of it.

    Args:
        detector: holds the windows of the partitions.
        consumer: the member.
        delivery: takes what is to be published, from others, and commits it.
        restorer: says where to begin.
        metrics: get the times of commits and of restoring.
    """

    def __init__(
        self,
        settings: Settings,
        detector: Detector,
        consumer: Consumer,
        delivery: Delivery,
        restorer: Restorer,
        patience: Patience,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._topic = settings.topics.events
        self._detector = detector
        self._consumer = consumer
        self._delivery = delivery
        self._restorer = restorer
        self._patience = patience
        self._metrics = metrics
        self._partitions: dict[int, Partition] = {}
        self._astray: set[int] = set()
        self._failure: str | None = None
        self._joined = False
        self.recovery_due = False
        """Whether `recover` is to be called before anything more is read."""

    @contextmanager
    def membership(self) -> Generator[None]:
        """Be in the group; its end gives the partitions back, which commits what is done unless an error ended it."""
        try:
            self._consumer.subscribe(
                [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            yield
        except BaseException:
            self._failure = self._failure or "stopped by an error"  # nothing half done may be committed on the way out
            raise
        finally:
            self._consumer.close()

    @property
    def partitions(self) -> Mapping[int, Partition]:
        """The partitions that are assigned, by number."""
        return self._partitions

    @property
    def ready(self) -> bool:
        """Whether the process is in its group and past all that predecessors published."""
        return self._joined and not any(partition.catch_up for partition in self._partitions.values())

    def check(self) -> None:
        """Do nothing while all is well.

        Raises:
            UserError: Kafka refuses to go on: a callback, which cannot raise, or a client met with that.
        """
        self._patience.check()
        if self._failure:
            raise UserError(self._failure)

    def on_error(self, error: KafkaError, partition: int) -> None:
        """Take in an error that came in the place of a message; if there is no going on, `check` says so."""
        if is_hopeless(error):
            self._failure = f"{self._topic}: {with_remedy(error)}"
            return
        log.warning("%s: %s", self._topic, error.str())
        if has_lost_its_place(error):
            self._astray.add(partition)
            self.recovery_due = True

    def commit(self, *, begin: Container[int] = ()) -> None:
        """Make durable what is done.

        Args:
            begin: partitions of which a checkpoint is due.

        Raises:
            TransactionAborted: nothing was made durable.
            UserError: Kafka refuses for good.
        """
        due = [
            partition
            for partition in self._partitions.values()
            if (partition.is_due or partition.number in begin) and not partition.catch_up
        ]
        if not due:
            return
        offsets = [TopicPartition(self._topic, partition.number, partition.position) for partition in due]
        with self._metrics.commit_seconds.time():
            self._delivery.commit(self._consumer, offsets, _records(due, begin))
        self._patience.uncommitted = 0
        for partition in due:
            partition.committed()

    def change_detector(self, detector: Detector) -> None:
        """Hand all partitions over to `detector`.

        What is done is committed, with a whole checkpoint, by the old one; then the recovery that is due begins under
        the new one. Should the commit fail, it begins at the one before: nothing is lost, only judged later.

        Raises:
            TransactionAborted, UserError: as `commit`; the new one is in use.
        """
        self._detector = detector  # the checkpoint holds the other one's windows: each checkpointer knows its own
        self.recovery_due = True
        self._hand_over(list(self._partitions))

    def recover(self) -> None:
        """Go back to what is committed, in all partitions: memory is ahead of it.

        Raises:
            UserError: Kafka refuses to go on.
        """
        self._delivery.abort()  # whatever it still holds will be judged and sent again
        self.recovery_due = False
        self._patience.uncommitted = 0
        for where in self._begin(list(self._partitions)):
            if where.partition in self._astray:  # nothing is fetched there any more, and a seek would not change that
                self._consumer.incremental_unassign([where])
                self._consumer.incremental_assign([where])
            else:
                self._seek(where)
        self._astray.clear()

    def read_on(self, number: int) -> None:
        """Go back to where a partition is read, though more came from the client.

        Raises:
            UserError: Kafka does not let it.
        """
        self._seek(TopicPartition(self._topic, number, self._partitions[number].position))

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

    def _begin(self, numbers: Sequence[int]) -> Iterator[TopicPartition]:
        """Restore the windows of partitions, one after the other; yield where to read on in each."""
        with closing(self._restorer.starts(numbers, self._detector.vocabulary)) as starts:
            for number in numbers:
                with self._metrics.restore_seconds.time():
                    start = next(starts)
                self._partitions[number] = Partition(self._settings, self._detector, number, start)
                yield TopicPartition(self._topic, number, start.offset)

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            consumer.incremental_assign(list(self._begin([assigned.partition for assigned in partitions])))
        except UserError as error:  # a callback cannot raise through librdkafka
            self._failure = str(error)
            return
        self._joined = True
        come_by("rebalance")
        log.info("assigned partitions %s", listed(partitions))

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        numbers = [revoked.partition for revoked in partitions if revoked.partition in self._partitions]
        try:
            if not self._failure and not self.recovery_due:
                self._hand_over(numbers)
        except TransactionAborted as reason:
            log.warning("transaction aborted (%s): what is not committed will be done again", reason)
            self.recovery_due = True
        except UserError as error:
            self._failure = str(error)
        self._drop(numbers)
        consumer.incremental_unassign(partitions)
        come_by("rebalance")
        log.info("gave back partitions %s", listed(partitions))

    def _on_lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            if not self._failure:  # a process that is ending anyway does not wait for brokers
                self._delivery.abort()
        except UserError as error:
            self._failure = str(error)
        self._drop([lost.partition for lost in partitions])
        self.recovery_due = True  # what else was in the transaction is gone with it
        consumer.incremental_unassign(partitions)
        log.warning("lost partitions %s: another member has them now", listed(partitions))

    def _hand_over(self, numbers: Collection[int]) -> None:
        """Commit what is done, with whole checkpoints of these partitions: in portions, as always.

        Raises:
            TransactionAborted, UserError: as `commit`.
        """
        self._complete(numbers)
        self.commit(begin=numbers)
        self._complete(numbers)

    def _complete(self, numbers: Iterable[int]) -> None:
        """Commit until no checkpoint of these partitions is under way."""
        while any(self._partitions[number].in_checkpoint for number in numbers):
            self.commit()

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._detector.revoke(number)
            self._partitions.pop(number, None)


def _records(due: Iterable[Partition], begin: Container[int]) -> Iterator[StateRecord]:
    for partition in due:
        yield from partition.records(begin=partition.number in begin)
    if begin:
        come_by("checkpoint")
