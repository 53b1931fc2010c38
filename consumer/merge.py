"""Lines of many partitions in the order of their times: a streaming k-way merge, without Kafka and without a clock.

The lines of a partition are pending in the order of their offsets, and the oldest of all goes first. It waits while
another partition has nothing pending but may still hold something older: until that one shows a line, is at its end,
or has been sent up to where it ended when the waiting line was read. What is known of an end is a little old, so the
line also waits until its turn has settled. So a backlog comes out in order however it is fetched, and nothing is held
back for long by a partition that never comes to its end, or by a clock that is wrong.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, NamedTuple, TypeVar

LINES = 25_000
"""A partition with more lines pending is not read on for the while."""

BYTES = 256_000_000
"""Of all that is pending, as Python holds it; each partition has an equal share."""

_LINE_BYTES = 600  # what a line takes beside its text
_AHEAD = 20  # turns

T = TypeVar("T")


class _Line(NamedTuple, Generic[T]):
    age: tuple[float, int]  # never falls within a partition
    offset: int
    turn: int
    size: int
    content: T


@dataclass(slots=True)
class _Partition(Generic[T]):
    """What is known of a partition.

    Attributes:
        read: offset after the last line read.
        at_end: whether nothing more is to be expected for now.
        heard: whether a line came since it was assigned: what was known of its end before may be outdated.
        end: where it ended at the turn `lap`, once that is known.
        reached: turn up to which all that it held has been sent.
        sent_time: of the last line that was sent.
    """

    read: int
    sent_time: float = -math.inf
    lines: deque[_Line[T]] = field(default_factory=deque)
    size: int = 0
    age: tuple[float, int] = (-math.inf, -1)  # of the last line read
    at_end: bool = False
    heard: bool = False
    paused: bool = False
    end: int | None = None
    lap: float = -math.inf
    reached: float = -math.inf

    @property
    def unsent(self) -> int:
        """Offset of the first line that has not been sent, or where to read on."""
        return self.lines[0].offset if self.lines else self.read

    def free(self) -> float:
        """Return the last turn whose lines need not wait for this partition."""
        if self.at_end and not self.lines:
            return math.inf
        if self.end is not None and self.unsent >= self.end:
            self.reached = self.lap
        return self.reached


class Merge(Generic[T]):
    """The lines of the assigned partitions that have been read and not sent."""

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition[T]] = {}
        self._heads: list[tuple[tuple[float, int], int]] = []  # a heap: age and partition of each first line
        self._turn = 0
        self._settled = math.inf

    @property
    def partitions(self) -> list[int]:
        """Those that are assigned."""
        return list(self._partitions)

    @property
    def paused(self) -> list[int]:
        """Those that are not read on, as `balance` had it."""
        return [number for number, known in self._partitions.items() if known.paused]

    def assign(self, partition: int, offset: int, latest: int | None = None) -> None:
        """Begin with a partition, anew if it is known already, at an offset; `latest`: the newest time before it."""
        self.drop(partition)
        time = -math.inf if latest is None else latest
        self._partitions[partition] = _Partition(offset, time, age=(time, -1))

    def drop(self, partition: int) -> None:
        """Forget a partition and what is pending of it."""
        if self._partitions.pop(partition, None) is not None:
            self._order()

    def turn(self, ends: Mapping[int, int], settled: float = math.inf) -> None:
        """Begin another turn of reading and sending.

        Args:
            ends: offsets at which partitions end, where known.
            settled: so many turns are so long ago that what was at Kafka then has been read, or shows in `ends`.
        """
        self._turn += 1
        self._settled = settled
        for number, partition in self._partitions.items():
            partition.free()
            if partition.heard and number in ends and partition.reached == partition.lap:
                partition.lap, partition.end = self._turn, ends[number]

    def wants(self, partition: int, offset: int) -> bool:
        """Whether a line is to be added: its partition is assigned, and it was not read before."""
        known = self._partitions.get(partition)
        return known is not None and offset >= known.read

    def latest(self, partition: int) -> int | None:
        """Return the time of the newest line of a partition so far, None if none told any."""
        return _told(self._partitions[partition].age[0])

    def latest_sent(self, partition: int) -> int | None:
        """Return the time of the newest line of a partition that has been released, None if none told any."""
        return _told(self._partitions[partition].sent_time)

    def add(self, partition: int, offset: int, time: int | None, sent: int, size: int, content: T) -> None:
        """Take in the next line of a partition.

        Args:
            partition: its number.
            offset: of the line.
            time: of the line; one that is stamped earlier than a line before it, or not at all, is as old as that one.
            sent: its Kafka timestamp, which decides between lines of one time.
            size: of its text.
            content: what `release` is to give back.
        """
        known = self._partitions[partition]
        known.read = offset + 1
        known.heard, known.at_end = True, False
        latest = known.age[0] if time is None else max(known.age[0], time)
        known.age = max(known.age, (latest, sent))
        if not known.lines:
            heappush(self._heads, (known.age, partition))
        known.lines.append(_Line(known.age, offset, self._turn, size + _LINE_BYTES, content))
        known.size += size + _LINE_BYTES

    def rest(self, partition: int) -> None:
        """Expect nothing of a partition before it shows another line: it is at its end, or out of reach."""
        if partition in self._partitions:
            self._partitions[partition].at_end = True

    def release(self) -> Iterator[T]:
        """Yield what may be sent now, the oldest first."""
        empty = [known.free() for known in self._partitions.values() if not known.lines]
        free = min([*empty, self._settled]) if empty else math.inf
        while self._heads:
            _, number = self._heads[0]
            known = self._partitions[number]
            if known.lines[0].turn > free:
                break
            content = self._pop(known)
            if known.lines:
                heapreplace(self._heads, (known.lines[0].age, number))
            else:
                heappop(self._heads)
                free = min(free, known.free(), self._settled)
            yield content
        yield from self._release_overtaken()

    def unsent(self, partition: int) -> int:
        """Return the offset to be committed: of the first line that has not been released, or where to read on."""
        return self._partitions[partition].unsent

    def pending(self, partition: int) -> int:
        """Return how many lines of a partition have been read and not released."""
        return len(self._partitions[partition].lines)

    def awaited(self) -> list[int]:
        """Return the partitions that hold up the others."""
        if not self._heads:
            return []
        turn = self._partitions[self._heads[0][1]].lines[0].turn
        return [number for number, known in self._partitions.items() if not known.lines and known.free() < turn]

    def balance(self) -> tuple[list[int], list[int]]:
        """Return the partitions that are to be paused, since much of them is pending, and those to be read on."""
        share = BYTES / max(1, len(self._partitions))
        pause, resume = [], []
        for number, known in self._partitions.items():
            fill = max(len(known.lines) / LINES, known.size / share)
            if not known.paused and fill > 1:
                pause.append(number)
            elif known.paused and fill < 0.5:
                resume.append(number)
            else:
                continue
            known.paused = not known.paused
        return pause, resume

    def _release_overtaken(self) -> Iterator[T]:
        """Yield lines that others go on overtaking, though those have long been sent up to where the lines came in.

        Their partition is stamped by a clock that is ahead, and the others do not come to an end.
        """
        least, second = sorted([*(known.free() for known in self._partitions.values()), math.inf, math.inf])[:2]
        for _, number in sorted(self._heads):
            known = self._partitions[number]
            others = min(second if known.free() == least else least, self._settled)
            while known.lines and known.lines[0].turn + _AHEAD <= others:
                content = self._pop(known)
                self._order()
                yield content

    def _pop(self, known: _Partition[T]) -> T:
        line = known.lines.popleft()
        known.size -= line.size
        known.sent_time = line.age[0]
        return line.content

    def _order(self) -> None:
        self._heads = [(known.lines[0].age, number) for number, known in self._partitions.items() if known.lines]
        heapify(self._heads)


def _told(time: float) -> int | None:
    return None if time == -math.inf else int(time)
