"""How long the process waits for brokers that do not answer: without limit while it runs, briefly once it is to stop.

A stop commits what is done for as long as brokers answer. When they have been silent for too long it ends as by
kill -9, from a thread of its own: a call of librdkafka may take longer than that, and every other end is as safe.
"""

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import NoReturn, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from consumer.refusals import with_remedy
from model.errors import UserError

log = logging.getLogger("consumer")

T = TypeVar("T")

NOT_COMMITTED = 3
"""Exit status of a stop that left events to be done again."""

_SAY_SECONDS = 30.0
_LEAST_SECONDS, _MOST_SECONDS = 0.1, 10.0  # between two tries that come to nothing
_SILENCE_SECONDS = 7.0  # a container is killed ten seconds after it was asked to stop

HOPELESS = {
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - confluent-kafka names librdkafka's own errors so
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
}
"""Waiting does not mend these."""

AT_END = KafkaError._PARTITION_EOF  # noqa: SLF001
"""No trouble: a partition is read to its end."""

_PASSING = {
    KafkaError._TIMED_OUT,  # noqa: SLF001
    KafkaError._TIMED_OUT_QUEUE,  # noqa: SLF001
    KafkaError._TRANSPORT,  # noqa: SLF001
    KafkaError._RESOLVE,  # noqa: SLF001
    KafkaError._DESTROY,  # noqa: SLF001 - the connection that the request was to use has been given up for another
    KafkaError._WAIT_COORD,  # noqa: SLF001
    KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
    KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001 - so says librdkafka of any partition while no broker is there
    KafkaError.UNSTABLE_OFFSET_COMMIT,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.REPLICA_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,  # the client has not heard of the new leader yet
    KafkaError.UNKNOWN_LEADER_EPOCH,  # or the broker has not
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.CONCURRENT_TRANSACTIONS,
    KafkaError.THROTTLING_QUOTA_EXCEEDED,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.REQUEST_TIMED_OUT,
}


def is_hopeless(error: KafkaError) -> bool:
    """Say whether a client that met with `error` cannot go on, however long it waits."""
    return error.code() in HOPELESS or error.code() == KafkaError._FATAL  # noqa: SLF001


def has_lost_its_place(error: KafkaError) -> bool:
    """Say whether the offset to be read next is not in the topic: it was cut, or made anew."""
    return error.code() in {KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION}  # noqa: SLF001


def is_passing(error: KafkaError) -> bool:
    """Say whether the same call may succeed once brokers are back, or no longer busy."""
    return error.retriable() or error.code() in _PASSING


def _do_nothing() -> None:
    pass


class Patience:
    """Shared by all that talk to the brokers.

    Attributes:
        uncommitted: events read that no commit is known to cover.
    """

    def __init__(self) -> None:
        self.uncommitted = 0
        self.call_while_waiting(_do_nothing)
        self._stop = Event()
        self._heard = 0.0
        self._said: dict[int, float] = {}
        self._in_vain = 0
        self._hopeless: str | None = None

    @property
    def stop_asked(self) -> bool:
        """Whether the process is to end."""
        return self._stop.is_set()

    def call_while_waiting(self, beat: Callable[[], None]) -> None:
        """Have `beat` called again and again: a process that waits for brokers is alive."""
        self._beat = beat

    def committed(self) -> None:
        """Note that all that was read is committed."""
        self.uncommitted = self._in_vain = 0

    def begin_anew(self) -> None:
        """Go back to what is committed, at once, or the later the more often that came to nothing."""
        self.uncommitted = 0
        if self._in_vain:
            self._stop.wait(min(_MOST_SECONDS, _LEAST_SECONDS * 2**self._in_vain))
        self._in_vain += 1

    def heard(self) -> None:
        """Note that the brokers do what they are asked."""
        self._heard = time.monotonic()

    def notice(self, error: KafkaError) -> None:
        """Hear of trouble from a client, as its `error_cb`; librdkafka mends most by itself."""
        if error.code() in HOPELESS:
            self._hopeless = f"kafka: {with_remedy(error)}"
        else:
            self._say(error.code(), error.str())

    def check(self) -> None:
        """Do nothing while there is hope.

        Raises:
            UserError: a client met something that waiting does not mend.
        """
        self._beat()
        if self._hopeless:
            raise UserError(self._hopeless)

    def retry(self, error: KafkaError) -> None:
        """Say, now and then, why the same call is made again.

        Raises:
            UserError: as `check`.
        """
        self.check()
        self._say(error.code(), f"{error.str()}; trying again until it works")

    def ask(self, client: Consumer | AdminClient, call: Callable[[], T]) -> T:
        """Make a call again while brokers are away or busy: a predecessor's transaction may have to time out first.

        What a `client` that reads hands out meanwhile is lost.

        Raises:
            UserError: Kafka refuses, or as `check`.
        """
        while True:
            try:
                return call()
            except KafkaException as error:
                if not is_passing(error.args[0]):
                    raise UserError(f"kafka: {with_remedy(error.args[0])}") from None
                client.poll(0.1)  # a pause in which the client tells its troubles
                self.retry(error.args[0])

    def end_on(self, *signals: signal.Signals) -> None:
        """Stop at any of these signals, from the main thread: what is done is committed while brokers answer."""
        bell, ringer = socket.socketpair()
        ringer.setblocking(False)
        signal.set_wakeup_fd(ringer.fileno())  # Python's own handlers wait until the main thread is out of librdkafka
        for number in signals:
            signal.signal(number, lambda *_: None)
        Thread(target=self._end, args=(bell, ringer), daemon=True).start()

    def exit_status(self) -> int:
        """Say what is not committed; return the status with which the process is to end."""
        if not self.uncommitted:
            return 0
        log.error(
            "%s events were read that no commit is known to cover: what is not committed will be done again",
            f"{self.uncommitted:,}",
        )
        return NOT_COMMITTED

    def _say(self, code: int, trouble: str) -> None:
        now = time.monotonic()
        if now - self._said.get(code, -math.inf) >= _SAY_SECONDS:
            self._said[code] = now
            log.warning("kafka: %s", trouble)

    def _end(self, bell: socket.socket, _ringer: socket.socket) -> NoReturn:
        bell.recv(1)
        asked = time.monotonic()
        self._stop.set()
        while (left := max(asked, self._heard) + _SILENCE_SECONDS - time.monotonic()) > 0:
            time.sleep(left)
        log.error("told to stop, and no broker has answered for %.0f s: ending without them", _SILENCE_SECONDS)
        os._exit(self.exit_status())
