"""A member of a consumer group: what it does when partitions come, go and get lost, whatever is done with them.

Callbacks of librdkafka cannot raise: what they meet with is kept until the main loop asks. When memory is ahead of what
is committed, a recovery goes back to that, in all partitions: they share the transaction.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager

from confluent_kafka import Consumer, KafkaError, TopicPartition

from consumer.clients import listed
from consumer.delivery import Delivery, TransactionAborted
from consumer.faultpoints import come_by
from consumer.patience import Patience, has_lost_its_place, is_hopeless
from consumer.refusals import with_remedy
from model.errors import UserError

log = logging.getLogger("consumer")


class Membership(ABC):
    """What a process owns of a topic.

    Args:
        topic: the one to subscribe to.
        consumer: the member.
        delivery: what others hand to it is aborted with a recovery.
        patience: is asked whether there is hope, and told what is committed.

    Attributes:
        joined: whether partitions were assigned, be it none.
        recovery_due: whether `recover` is to be called before anything more is read.
    """

    def __init__(self, topic: str, consumer: Consumer, delivery: Delivery, patience: Patience) -> None:
        self._topic = topic
        self._consumer = consumer
        self._delivery = delivery
        self._patience = patience
        self._failure: str | None = None
        self.joined = False
        self.recovery_due = False

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

    def check(self) -> None:
        """Do nothing while all is well.

        Raises:
            UserError: Kafka refuses to go on: a callback or a client met with that.
        """
        self._patience.check()
        if self._failure:
            raise UserError(self._failure)

    def on_error(self, error: KafkaError, partition: int) -> None:
        """Take in an error that came in the place of a message; if there is no going on, `check` says so."""
        if is_hopeless(error):
            self._failure = f"{self._topic}: {with_remedy(error)}"
            return
        log.warning("%s%s: %s", self._topic, f"/{partition}" if partition >= 0 else "", error.str())
        self.recovery_due |= has_lost_its_place(error)

    def recover(self) -> None:
        """Go back to what is committed, in all partitions: memory is ahead of it.

        Raises:
            UserError: Kafka refuses to go on.
        """
        self._delivery.abort()  # whatever it still holds will be done and sent again
        self.recovery_due = False
        self._patience.begin_anew()
        for where in self._begin(self._owned()):
            self._go_to(where)

    @abstractmethod
    def commit(self) -> None:
        """Make durable what is done.

        Raises:
            TransactionAborted: nothing was made durable.
            UserError: Kafka refuses for good.
        """

    @abstractmethod
    def _owned(self) -> Sequence[int]:
        """Return the partitions that are assigned."""

    @abstractmethod
    def _begin(self, numbers: Sequence[int]) -> Iterable[TopicPartition]:
        """Take partitions over, or begin anew with them; return where to read on in each.

        Raises:
            UserError: Kafka refuses to tell.
        """

    @abstractmethod
    def _hand_over(self, numbers: Collection[int]) -> None:
        """Commit what is done, and what a successor in these partitions needs.

        Raises:
            TransactionAborted: not all was made durable.
            UserError: Kafka refuses for good.
        """

    @abstractmethod
    def _drop(self, numbers: Iterable[int]) -> None:
        """Forget partitions, which are others' now."""

    def _go_to(self, where: TopicPartition) -> None:
        """Read a partition from there."""
        self._consumer.incremental_unassign([where])  # a seek changes nothing where the place was lost
        self._consumer.incremental_assign([where])

    def _on_assign(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            self._commit_first()
            consumer.incremental_assign(list(self._begin([assigned.partition for assigned in partitions])))
        except UserError as error:
            self._failure = str(error)
            return
        self.joined = True
        come_by("rebalance")
        log.info("assigned partitions %s", listed(partitions))

    def _commit_first(self) -> None:
        """Commit before partitions are taken over: that may last until the transactions of others have timed out."""
        try:
            if not self._failure and not self.recovery_due:
                self.commit()
        except TransactionAborted as reason:
            log.warning("transaction aborted (%s): recovering", reason)
            self.recovery_due = True

    def _on_revoke(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        numbers = self._known(partitions)
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
        self._drop(self._known(partitions))
        self.recovery_due = True  # what else was in the transaction is gone with it
        consumer.incremental_unassign(partitions)
        log.warning("lost partitions %s: another member has them now", listed(partitions))

    def _known(self, partitions: Iterable[TopicPartition]) -> list[int]:
        owned = set(self._owned())
        return [given.partition for given in partitions if given.partition in owned]
