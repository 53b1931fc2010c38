"""The partitions of the lines topic that the group assigns to a re-keyer: what is pending of them, and what is durable.

What is pending is not committed, and a successor reads it again: nothing else of it need be kept.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from confluent_kafka import OFFSET_INVALID, Consumer, TopicPartition

from consumer.cutting import Cut, Cutter
from consumer.delivery import Delivery
from consumer.membership import Membership
from consumer.merge import Merge
from consumer.patience import Patience
from consumer.places import Places
from consumer.reading import Reading
from consumer.rekey_metrics import RekeyMetrics
from consumer.settings import Settings


class LineAssignment(Membership):
    """The partitions of the lines topic that a member owns.

    Args:
        consumer: the member.
        delivery: takes what comes of lines, from others, and commits it.
        places: says where to begin.
        metrics: get the times of commits.
    """

    def __init__(
        self,
        settings: Settings,
        consumer: Consumer,
        delivery: Delivery,
        places: Places,
        patience: Patience,
        metrics: RekeyMetrics,
    ) -> None:
        super().__init__(settings.topics.lines, consumer, delivery, patience)
        self._places = places
        self._metrics = metrics
        self._at_once = settings.scoring.max_batch
        self._merge = Merge[Cut]()
        self._reading = Reading(self._topic, consumer, self._merge)
        self._committed: dict[int, int] = {}
        self._gave_back: set[int] = set()

    @property
    def pending(self) -> Mapping[int, int]:
        """By partition, lines that were read and wait until none older can come."""
        return {number: self._merge.pending(number) for number in self._owned()}

    @property
    def lag(self) -> Mapping[int, int | None]:
        """By partition, lines that are not done with; None where it is not known yet."""
        ends = self._reading.ends()
        return {
            number: max(0, ends[number] - self._merge.unsent(number)) if number in ends else None
            for number in self._owned()
        }

    def read(self, seconds: float, cutter: Cutter) -> Iterator[Cut]:
        """Take in what comes while waiting for no longer than this, and yield the lines that need not wait any more.

        When a callback lost the transaction, none are: they will be read again.

        Raises:
            UserError: as `check`.
        """
        self._gave_back.clear()
        messages, waited = self._reading.consume(self._at_once, seconds)
        self.check()
        if self.recovery_due:
            return
        for failed in self._reading.take(messages, waited, cutter):
            self.on_error(failed.error(), failed.partition())
        for cut in self._merge.release():
            self._patience.uncommitted += 1
            yield cut
        self._reading.balance()

    def commit(self) -> None:
        """Make durable what was sent, and that its lines were read.

        Raises:
            TransactionAborted: nothing was made durable.
            UserError: Kafka refuses for good.
        """
        sent = {number: self._merge.unsent(number) for number in self._owned()}
        sent = {number: offset for number, offset in sent.items() if offset != self._committed[number]}
        if not sent:
            return
        offsets = [TopicPartition(self._topic, number, offset, self._note(number)) for number, offset in sent.items()]
        with self._metrics.commit_seconds.time():
            self._delivery.commit(self._consumer, offsets, ())
        self._committed |= sent
        self._patience.committed()

    def recover(self) -> None:
        """Go back to what is committed, in all partitions.

        Raises:
            UserError: Kafka refuses to go on.
        """
        self._reading.forget(self._owned())
        super().recover()

    def _note(self, number: int) -> str:
        """Return what goes with a committed offset: a successor's first line may tell no time."""
        latest = self._merge.latest_sent(number)
        return "" if latest is None else str(latest)

    def _owned(self) -> Sequence[int]:
        return list(self._committed)

    def _begin(self, numbers: Sequence[int]) -> Iterable[TopicPartition]:
        starts = self._places.starts(numbers)
        for start in starts:
            self._merge.assign(start.partition, start.offset, start.latest)
            self._committed[start.partition] = OFFSET_INVALID if start.chosen else start.offset
        return [TopicPartition(self._topic, start.partition, start.offset) for start in starts]

    def _hand_over(self, numbers: Collection[int]) -> None:  # noqa: ARG002 - all share the transaction
        self.commit()

    def _drop(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        self._gave_back.update(numbers)
        self._reading.forget(numbers)
        for number in numbers:
            del self._committed[number]

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        super()._on_assign(consumer, partitions)
        # What was read before, and is about to be handed over, went on from what was pending then.
        self.recovery_due |= not self._gave_back.isdisjoint(assigned.partition for assigned in partitions)
