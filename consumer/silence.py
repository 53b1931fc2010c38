"""Whether a partition has been silent for long enough to close its blocks by the wall clock.

That nothing was read proves little: brokers may have been away, with all who write to them, this process may have stood
still, or a backlog be worked off. So silence counts as long as the brokers say, again and again, that nothing more is
there.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from confluent_kafka import IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from consumer.clients import CALL_SECONDS, client
from consumer.settings import Settings

if TYPE_CHECKING:
    from concurrent.futures import Future

_LEAST_SECONDS, _MOST_SECONDS = 0.1, 60.0  # between two questions
_GAP_SECONDS = 2.0  # that a process may be busy with something else, however short the time-out


class Silence:
    """How long a partition has been silent. All times are of one monotonic clock, in seconds.

    Args:
        timeout: for how long it must have been.
        now: when it begins.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self._timeout = timeout
        self._interval = min(max(timeout / 8, _LEAST_SECONDS), _MOST_SECONDS)
        self.begin(now)

    def begin(self, now: float) -> None:
        """Something came, or may have: begin anew."""
        self._since = self._sure = now

    def is_doubtful(self, now: float) -> bool:
        """Whether the brokers should be asked again."""
        return now - self._sure >= self._interval

    def confirm(self, asked: float) -> None:
        """Note that there was nothing more when the brokers were `asked`; what was in a longer gap, nobody knows."""
        if asked - self._sure > max(3 * self._interval, _GAP_SECONDS):
            self._since = asked
        self._sure = max(self._sure, asked)

    @property
    def is_over(self) -> bool:
        """Whether it has lasted."""
        return self._sure - self._since > self._timeout


class Ends:
    """Asks the brokers, in the background, where partitions of a topic end: one that is away holds up nobody."""

    def __init__(self, settings: Settings, topic: str) -> None:
        self._topic = topic
        # Others tell of brokers that are away.
        self._admin = client(AdminClient, settings, {**settings.kafka.for_admin(), "log_level": 0})
        self._asked: dict[int, tuple[float, Future[Any]]] = {}

    def ask(self, partitions: Iterable[int], now: float) -> None:
        """Ask where these end, as far as an answer is not awaited."""
        for number in partitions:
            if number not in self._asked:
                (future,) = self._admin.list_offsets(
                    {TopicPartition(self._topic, number): OffsetSpec.latest()},
                    isolation_level=IsolationLevel.READ_UNCOMMITTED,  # what waits for its transaction is there, too
                    request_timeout=CALL_SECONDS,
                ).values()
                self._asked[number] = now, future

    def answers(self) -> Iterator[tuple[int, float, int]]:
        """Yield what came since: partition, when it was asked, and where it ended. No answer is none."""
        for number, (asked, future) in list(self._asked.items()):
            if future.done():
                del self._asked[number]
                if future.exception() is None:
                    yield number, asked, int(future.result().offset)
