"""One partition of the event topic while this process owns it: how far it is read, what of that is not committed."""

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from consumer.checkpoint import Checkpointer, Replay
from consumer.delivery import StateRecord
from consumer.detector import Detector
from consumer.restore import Start, readable
from consumer.settings import Settings
from consumer.silence import Silence


class Partition:
    """A partition that is taken over: the detector watches it from here on.

    Args:
        number: its number in the topic.
        start: where to begin, and with which windows.

    Attributes:
        position: the offset to be read next.
        touched: whether something happened since the last commit.

    Raises:
        UserError: the windows cannot be read.
    """

    def __init__(self, settings: Settings, detector: Detector, number: int, start: Start) -> None:
        recovered = start.recovered
        with readable(settings.topics.state, number):
            detector.assign(
                number,
                recovered.sessions,
                recovered.checkpoint.watermark if recovered.checkpoint else None,
                start.offset,
                drift=recovered.drift,
                since=start.replay.until,
                bounds=recovered.checkpoint.bounds if recovered.checkpoint else None,
            )
        self.number = number
        self.position = start.offset
        self.touched = start.chosen
        self._end = 0  # what was before it was read, or will never be: records of transactions take offsets, too
        self._silence = Silence(settings.windows.idle_timeout.total_seconds(), time.monotonic())
        self._replay: Replay | None = start.replay
        self._leftovers = start.leftovers
        self._store = detector.store(number)
        self._checkpointer = Checkpointer(
            detector, number, settings.kafka.group, settings.topics.events, recovered, start.offset
        )
        self.end_replay()

    @property
    def catch_up(self) -> int:
        """How many offsets are left below the committed one: until none is, there is nothing to commit."""
        return 0 if self._replay is None else max(0, self._replay.until - self.position)

    @property
    def reached(self) -> int:
        """Before this offset nothing is left to be read."""
        return max(self.position, self._end)

    @property
    def has_records(self) -> bool:
        """Whether records wait for the next commit."""
        return self._checkpointer.is_unfinished

    @property
    def is_due(self) -> bool:
        """Whether there is something for the next commit."""
        return self.touched or self.has_records

    @property
    def in_checkpoint(self) -> bool:
        """Whether a checkpoint has begun that only further commits make whole."""
        return self._checkpointer.is_under_way

    def advance(self, offsets: NDArray[np.int64]) -> tuple[int, int]:
        """Move on past messages.

        Args:
            offsets: of the messages (N,), ascending.

        Returns:
            How many of them were read before a rebalance gave the partition back, and are to be left out; and how many
            of them no longer need publishing, those left out included.
        """
        published = 0 if self._replay is None else self._replay.until
        known, done = np.searchsorted(offsets, [self.position, published]).tolist()
        if known < len(offsets):
            self.position = int(offsets[-1]) + 1
            self.touched = True
            self._silence.begin(time.monotonic())
        return known, max(known, done)

    def reach(self, end: int) -> None:
        """Note that the client has handed out all that can be read before the offset `end`."""
        self._end = max(self._end, end)
        if self._replay is not None:  # offsets may have been set by hand behind the last message
            self.position = max(self.position, min(end, self._replay.until))

    def end_replay(self) -> None:
        """Forget the replay once past all of it; for when the events moved past have been taken in."""
        if self._replay is not None and self.position >= self._replay.end:
            self._replay = None
            self._store.end_replay()

    @property
    def is_silent(self) -> bool:
        """Whether there was nothing to be read for the idle timeout; never during a replay."""
        return self._silence.is_over and self._replay is None

    @property
    def is_doubtful(self) -> bool:
        """Whether blocks are open, and it is unknown by now whether there is more to be read."""
        return bool(self._store.open_blocks) and self._silence.is_doubtful(time.monotonic())

    def ends_at(self, end: int, asked: float) -> None:
        """Take in the brokers' word on where it ended at a moment of the monotonic clock, in seconds."""
        if end <= self.reached:
            self._silence.confirm(asked)
        else:
            self._silence.begin(asked)

    def closed_some(self) -> None:
        """Note that sessions were closed because of the silence, which begins anew once none is open."""
        self.touched = True
        if not self._store.open_blocks:
            self._silence.begin(time.monotonic())

    def records(self, *, begin: bool, sharers: int = 1) -> Iterator[StateRecord]:
        """Yield what belongs on the state topic with a commit of `position`; see `Checkpointer.records`."""
        for key in self._leftovers:
            yield self.number, key, None
        for key, value in self._checkpointer.records(self.position, begin=begin, sharers=sharers):
            yield self.number, key, value

    def committed(self) -> None:
        """Note that a commit has made all of it durable."""
        self.touched = False
        self._leftovers = []
