"""The partitions of the event topic that the group assigns to this process: with which windows, and what is durable.

A commit makes durable what was sent since the last one, together with the state records and the input offsets.
Whatever the occasion, a partition begins where `Restorer` says.
"""

import time
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from consumer.delivery import Delivery, StateRecord
from consumer.detector import Detector
from consumer.faultpoints import come_by
from consumer.membership import Membership
from consumer.metrics import Metrics
from consumer.partition import Partition
from consumer.patience import Patience, has_lost_its_place
from consumer.restore import Restorer
from consumer.settings import Settings
from model.errors import UserError


class Assignment(Membership):
    """The partitions of the event topic that a member owns, and what is durable of them.

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
        super().__init__(settings.topics.events, consumer, delivery, patience)
        self._settings = settings
        self._detector = detector
        self._restorer = restorer
        self._metrics = metrics
        self._partitions: dict[int, Partition] = {}
        self._astray: set[int] = set()

    @property
    def partitions(self) -> Mapping[int, Partition]:
        """The partitions that are assigned, by number."""
        return self._partitions

    @property
    def ready(self) -> bool:
        """Whether the process is in its group and past all that predecessors published."""
        return self.joined and not any(partition.catch_up for partition in self._partitions.values())

    def on_error(self, error: KafkaError, partition: int) -> None:
        """Take in an error that came in the place of a message; if there is no going on, `check` says so."""
        super().on_error(error, partition)
        if has_lost_its_place(error):
            self._astray.add(partition)

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
        self._patience.committed()
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
        super().recover()
        self._astray.clear()

    def read_on(self, number: int) -> None:
        """Go back to where a partition is read, though more came from the client.

        Raises:
            UserError: Kafka does not let it.
        """
        self._seek(TopicPartition(self._topic, number, self._partitions[number].position))

    def _go_to(self, where: TopicPartition) -> None:
        if where.partition in self._astray:
            super()._go_to(where)
        else:
            self._seek(where)

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

    def _owned(self) -> Sequence[int]:
        return list(self._partitions)

    def _hand_over(self, numbers: Collection[int]) -> None:
        """Commit what is done, with whole checkpoints of these partitions: in portions, as always."""
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


def _records(due: Sequence[Partition], begin: Container[int]) -> Iterator[StateRecord]:
    sharers = sum(partition.has_records or partition.number in begin for partition in due)
    for partition in due:
        yield from partition.records(begin=partition.number in begin, sharers=max(1, sharers))
    if begin:
        come_by("checkpoint")
