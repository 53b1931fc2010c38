"""How alerts, state records and input offsets become durable: together, or one after the other.

What librdkafka reports is handled by class:

    retriable   the same call is made again, for as long as it takes (see `consumer.patience`)
    abortable   the transaction is aborted, `TransactionAborted` tells the service to recover and go on
    fenced      the transaction timed out while the process or the brokers were away: the producer is replaced by one
                of the same id, which nobody else uses, then as abortable
    no return   librdkafka has lost itself in the call: as fenced
    fatal       `UserError`: the process stops with the reason
"""

import logging
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any, ClassVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from consumer.clients import client
from consumer.faultpoints import come_by
from consumer.patience import HOPELESS, Patience, is_passing
from consumer.refusals import with_remedy
from consumer.settings import TRANSACTION_MS, Settings
from model.errors import UserError

log = logging.getLogger("consumer")

Headers = list[tuple[str, bytes | None]]

StateRecord = tuple[int, bytes, bytes | None]
"""Partition, key and value of a state record."""

_CALL_SECONDS = 10.0
_PAUSE_SECONDS = 0.1  # before the same call again, in which the client tells its troubles: it may fail at once
_LOST_SECONDS = 15.0  # well beyond what the call may take
_START_SECONDS = 30.0
_FENCED = {
    KafkaError._FENCED,  # noqa: SLF001 - confluent-kafka names librdkafka's own errors so
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.INVALID_PRODUCER_ID_MAPPING,
    KafkaError.UNKNOWN_PRODUCER_ID,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_TXN_STATE,
}
"""The brokers have ended the transaction, or the producer's right to it, without being asked."""


_REFUSED_FOR_GOOD = HOPELESS | {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.INVALID_RECORD,
    KafkaError.INVALID_TIMESTAMP,  # this machine's clock is wrong
    KafkaError.POLICY_VIOLATION,
}
"""The same message would be refused again, and with it the transaction."""


class TransactionAborted(Exception):  # noqa: N818 - it names what happened
    """Nothing since the last commit will be seen; the service has to recover what it held in memory."""


class Delivery(ABC):
    """Takes messages at any time and makes them durable at `commit`. The producer's queue is the only buffer."""

    def __init__(self, settings: Settings, patience: Patience) -> None:
        self._settings = settings
        self._patience = patience
        self._refused: KafkaError | None = None
        self._producer = self._connect()

    def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int = -1) -> None:
        """Hand over a message; waits while the brokers are behind.

        Raises:
            TransactionAborted, UserError: as `commit`.
        """
        while True:
            try:
                self._producer.produce(
                    topic, value, key, headers=headers, partition=partition, on_delivery=self._delivered
                )
            except BufferError:
                _pause(self._producer)
                self._patience.check()
            else:
                return

    def poll(self) -> None:
        """Let delivery reports in.

        Raises:
            TransactionAborted, UserError: as `commit`.
        """
        self._producer.poll(0)

    @abstractmethod
    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition], records: Iterable[StateRecord]) -> None:
        """Make durable all that was sent, the state records and the input offsets.

        Raises:
            TransactionAborted: nothing of it became visible.
            UserError: Kafka refuses for good.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop what was sent since the last commit, as far as it can be dropped."""

    def close(self) -> None:
        """End, without waiting."""
        with suppress(KafkaException):  # a fenced producer says so once more
            self._producer.purge()
            self._producer.flush(0)

    _defaults: ClassVar[Mapping[str, Any]] = {}
    """librdkafka settings that users may change."""

    def _own(self) -> dict[str, Any]:
        return {}

    def _connect(self) -> Producer:
        return client(
            Producer,
            self._settings,
            {
                "linger.ms": 5,
                "compression.type": "lz4",
                "queue.buffering.max.messages": 20_000,  # a checkpoint fills it: 100,000 take 45 MB more
                "log_level": 2,
                **self._defaults,
            }
            | self._settings.kafka.for_producer()
            | {"enable.idempotence": True, "error_cb": self._patience.notice}
            | self._own(),
            logger=log,
        )

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self._patience.heard()
        elif error.code() != KafkaError._PURGE_QUEUE:  # noqa: SLF001
            self._refused = error

    def _send_records(self, records: Iterable[StateRecord]) -> None:
        for partition, key, value in records:
            self.send(self._settings.topics.state, value, key, [], partition)


class ExactlyOnce(Delivery):
    """One transaction a commit. Readers with isolation.level=read_committed see all of it or nothing."""

    _defaults: ClassVar[Mapping[str, Any]] = {"transaction.timeout.ms": TRANSACTION_MS}

    def __init__(self, settings: Settings, patience: Patience) -> None:
        self._id = f"{settings.kafka.group}-{uuid.uuid4().hex}"
        self._open = False
        self._limit = _START_SECONDS
        super().__init__(settings, patience)
        self._limit = math.inf  # whoever has started waits for as long as it takes

    def _own(self) -> dict[str, Any]:
        return {"transactional.id": self._id}

    def _connect(self) -> Producer:
        producer = super()._connect()
        deadline = time.monotonic() + self._limit
        while True:
            try:
                producer.init_transactions(_CALL_SECONDS)
            except KafkaException as error:
                if not is_passing(error.args[0]) or time.monotonic() > deadline:
                    raise UserError(f"kafka: transactions cannot be used: {with_remedy(error.args[0])}") from None
                _pause(producer)
                self._patience.retry(error.args[0])
            else:
                return producer

    def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int = -1) -> None:
        """Hand over a message, in the transaction."""
        self._begin()
        try:
            super().send(topic, value, key, headers, partition)
        except KafkaException as error:
            self._fail(error.args[0])

    def poll(self) -> None:
        """Let delivery reports in, and with them news that the producer was fenced."""
        try:
            super().poll()
        except KafkaException as error:
            self._fail(error.args[0])

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition], records: Iterable[StateRecord]) -> None:
        """Add state records and offsets to the transaction and commit it."""
        self._begin()
        self._send_records(records)
        try:
            group = consumer.consumer_group_metadata()
        except RuntimeError as error:  # so says the binding once the client is out of its group, on the way out
            self.abort()
            raise TransactionAborted(str(error)) from None
        self._call(lambda: self._producer.send_offsets_to_transaction(list(offsets), group, _CALL_SECONDS))
        come_by("before_commit")
        if come_by("abort"):
            self.abort()
            raise TransactionAborted("asked for by scripts.faults")
        self._call(lambda: self._producer.commit_transaction(_CALL_SECONDS))
        self._open = False
        come_by("after_commit")

    def abort(self) -> None:
        """Abort the transaction, if one is open."""
        if not self._open:
            return
        self._open = False
        while True:
            try:
                self._producer.abort_transaction(_CALL_SECONDS)
            except KafkaException as error:
                if not error.args[0].retriable():
                    self._go_on_after(error.args[0])
                    return
                _pause(self._producer)
                self._patience.retry(error.args[0])
            else:
                return

    def _begin(self) -> None:
        if not self._open:
            try:
                self._producer.begin_transaction()
            except KafkaException as error:
                self._fail(error.args[0])
            self._open = True

    def _call(self, call: Callable[[], None]) -> None:
        while True:
            try:
                returned = _returned(call)
            except KafkaException as error:
                if not error.args[0].retriable():
                    self._fail(error.args[0])
                _pause(self._producer)
                self._patience.retry(error.args[0])
            else:
                if not returned:
                    reason = "a call to librdkafka does not return"
                    self._replace(reason)
                    raise TransactionAborted(reason)
                self._patience.heard()
                return

    def _fail(self, error: KafkaError) -> None:
        """Raise what `error` means; afterwards no transaction is open."""
        refused, self._refused = self._refused, None
        if error.fatal() or error.code() in _FENCED:
            self._go_on_after(error)
        else:
            self.abort()
        for cause in filter(None, (refused, error)):
            if cause.code() in _REFUSED_FOR_GOOD:
                raise UserError(
                    f"kafka: a message is refused: {cause.str()}; see to the user's rights, to max.message.bytes and "
                    "to this machine's clock"
                )
        raise TransactionAborted(error.str())

    def _go_on_after(self, error: KafkaError) -> None:
        if error.code() not in _FENCED:
            raise _at_its_end(error)
        self._replace(f"the producer was fenced ({error.str()})")

    def _replace(self, reason: str) -> None:
        """Go on with a new producer. It has the old one's id: brokers end what that left open, and deny it the rest."""
        log.warning("kafka: %s: going on with a new producer", reason)
        self._open = False
        self.close()
        self._producer = self._connect()


class AtLeastOnce(Delivery):
    """Flushes alerts, then state records, then commits offsets: a crash in between repeats alerts, never loses one."""

    def _own(self) -> dict[str, Any]:
        return {"message.timeout.ms": 0}  # wait for the brokers for as long as it takes

    def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int = -1) -> None:
        """Hand over a message; the brokers may make it visible at once."""
        try:
            super().send(topic, value, key, headers, partition)
        except KafkaException as error:
            raise UserError(f"{topic}: {error.args[0].str()}") from None

    def poll(self) -> None:
        """Let delivery reports in, and with them news that the producer is at its end."""
        try:
            super().poll()
        except KafkaException as error:
            raise _at_its_end(error.args[0]) from None

    def commit(self, consumer: Consumer, offsets: Sequence[TopicPartition], records: Iterable[StateRecord]) -> None:
        """Wait for alerts, then for state records, then commit the offsets."""
        self._flush()
        come_by("before_commit")
        self._send_records(records)
        self._flush()
        while True:
            try:
                consumer.commit(offsets=list(offsets), asynchronous=False)
            except KafkaException as error:
                if not is_passing(error.args[0]):
                    raise TransactionAborted(error.args[0].str()) from None
                _pause(self._producer)
                self._patience.retry(error.args[0])
            else:
                self._patience.heard()
                break
        come_by("after_commit")

    def abort(self) -> None:
        """Do nothing: what was sent may have been seen, and will be sent again."""

    def _flush(self) -> None:
        try:
            while self._producer.flush(_CALL_SECONDS):
                self._patience.retry(KafkaError(KafkaError._TIMED_OUT, "alerts are not acknowledged yet"))  # noqa: SLF001
        except KafkaException as error:
            raise _at_its_end(error.args[0]) from None
        if self._refused is not None:
            raise UserError(f"a message could not be delivered: {self._refused.str()}")


_KINDS: dict[str, type[Delivery]] = {"exactly_once": ExactlyOnce, "at_least_once": AtLeastOnce}


def delivery_for(settings: Settings, patience: Patience) -> Delivery:
    """Return the delivery that `delivery:` asks for, ready to send."""
    return _KINDS[settings.delivery](settings, patience)


def _at_its_end(error: KafkaError) -> UserError:
    return UserError(f"kafka: {error.str()}; the process cannot go on and has to be started again")


def _pause(producer: Producer) -> None:
    """Wait a little, in which the client tells its troubles; if one of them ends it, its next call says so anew."""
    with suppress(KafkaException):
        producer.poll(_PAUSE_SECONDS)


def _returned(call: Callable[[], None]) -> bool:
    """Make a call that keeps to a time-out if all is well; say whether it returned.

    rd_kafka_send_offsets_to_transaction ignores its time-out, and it never returns when the brokers restarted in a way
    that made the client forget the group's coordinator (librdkafka's issues 5456 and 5511). A thread can be left there.
    """
    raised: list[Exception] = []

    def make() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever it is: a call that failed must not pass for done
            raised.append(error)

    thread = Thread(target=make, daemon=True)
    thread.start()
    thread.join(_LOST_SECONDS)
    if raised:
        raise raised[0]
    return not thread.is_alive()
