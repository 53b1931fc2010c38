"""Normal traffic for calibration, straight from the event topic.

The consumer's own decoder and window rules cut the sessions. Time is event time: a partition is in the range from
the event with which its watermark reaches the range's beginning to the last one before it reaches the end. Only
sessions that begin and close in the range count, for only these are known whole:

- Which sessions were open when the range began shows from the events of one idle timeout before it: whoever was
  silent for longer had closed. So reading starts there. Where the topic's older events have been deleted, the first
  idle timeout of what is kept serves instead, and the range begins after it.
- Which sessions would have gone on after the end nobody knows here.

Both kinds are counted. They are the long-lived blocks: the range should be many times longer than a block lives.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibration.block_scores import CACHE, Block, SessionScores, keep_highest
from consumer.events import CLOCK, NO_WATERMARK, TOMBSTONE, EventBatch, Messages, Refused
from consumer.history import TopicHistory
from consumer.scores import LookScores
from consumer.settings import Settings, milliseconds
from consumer.text import AnyDecoder, decoder_for
from model.scoring import Scorer

_NEVER = 2**62


@dataclass
class Traffic:
    """What was found in the range.

    Attributes:
        scores: block score of each session that began and closed in the range.
        highest: as `BlockScores`.
        messages: read in the range.
        dead_letters: of these, those that are neither event nor tombstone.
        already_open: sessions left out because they were open when the range began.
        still_open: sessions left out because they were open when it ended.
        first, last: event times of the range as it was found, in milliseconds; None without events.
        looks, distinct: looks scored, and distinct windows among them, those before the range included.
        read: messages read, those around the range included.
        refused: of these, those that are neither event nor tombstone; `why` says it of the first.
        skipped: of these, lines that name no block.
        events: of these, the events; `unknown` of them have an event id that the model does not know.
        earliest, latest: times of the events among them; None without events.
        cut: whether older events than those read have been deleted.
    """

    scores: list[float] = field(default_factory=list)
    highest: list[Block] = field(default_factory=list)
    messages: int = 0
    dead_letters: int = 0
    already_open: int = 0
    still_open: int = 0
    first: int | None = None
    last: int | None = None
    looks: int = 0
    distinct: int = 0
    read: int = 0
    refused: int = 0
    why: str = ""
    skipped: int = 0
    events: int = 0
    unknown: int = 0
    earliest: int | None = None
    latest: int | None = None
    cut: bool = False

    @property
    def blocks(self) -> NDArray[np.float64]:
        """The scores as an array (N,)."""
        return np.array(self.scores, np.float64)

    @property
    def begun(self) -> int:
        """Sessions that began in the range."""
        return len(self.scores) + self.still_open

    def look_at(self, times: NDArray[np.int64], refused: Sequence[Refused]) -> None:
        """Note what messages were, whether they lie in the range or not: times (N,) of events, and what is none."""
        self.events += len(times)
        self.refused += len(refused)
        if refused and not self.why:
            self.why = refused[0].reason
        if len(times):
            earliest, latest = int(times.min()), int(times.max())
            self.earliest = earliest if self.earliest is None else min(self.earliest, earliest)
            self.latest = latest if self.latest is None else max(self.latest, latest)


class PartitionTraffic:
    """The part of one partition: takes messages in offset order, fills in a `Traffic`.

    Args:
        traffic: to be filled in.
        decoder: the consumer's.
        scores: of the model, without a threshold.
        begin, end: the range in milliseconds of event time, `end` not included; None: open.
        every, idle_timeout: as `WindowStore`.
        cut: events before the first message have been deleted, whatever their time was.
    """

    def __init__(
        self,
        traffic: Traffic,
        decoder: AnyDecoder,
        scores: LookScores,
        *,
        begin: int | None,
        end: int | None,
        every: int,
        idle_timeout: int,
        cut: bool,
    ) -> None:
        self._traffic = traffic
        self._decoder = decoder
        self._sessions = SessionScores(scores, every=every, idle_timeout=idle_timeout)
        self._begin = begin or 0
        self._end = _NEVER if end is None else end
        self._warm_up = idle_timeout if cut else None
        self._watermark = NO_WATERMARK
        self._start: int | None = None  # offset with which the range began
        self.is_over = False
        """Whether the range's end has been reached: no further record matters."""

    def take(self, messages: Messages) -> None:
        """Take in messages; those beyond the end of the range are left alone."""
        batch, refused = self._decoder.decode(messages)
        self._traffic.read += len(messages.offsets)
        # Rows before each dead letter.
        dead = np.searchsorted(batch.offsets, messages.offsets[[letter.place for letter in refused]]).tolist()
        offsets = batch.offsets
        times = np.where(batch.tokens == TOMBSTONE, NO_WATERMARK, batch.times_after(self._watermark))
        self._traffic.look_at(times[batch.tokens != TOMBSTONE], refused)
        self._traffic.unknown += len(batch.unknown)
        watermarks = np.maximum(np.maximum.accumulate(times), self._watermark)  # (N,) ascending
        if self._warm_up is not None and len(events := watermarks[watermarks > NO_WATERMARK]):
            self._begin, self._warm_up = max(self._begin, int(events[0]) + self._warm_up + 1), None

        begun = self._start is not None or (self._begin == 0 and self._warm_up is None)
        stop = int(np.searchsorted(watermarks, self._end))
        start = 0
        if self._start is None:
            start = min(stop, int(np.searchsorted(watermarks, self._begin)))
            self._judge(batch.rows(0, start))
            if start < stop:
                self._start = int(offsets[start])
                self._open_range(int(watermarks[start]))
        self._judge(batch.rows(start, stop))
        if stop < len(batch):
            self._judge(_clock(self._end))
            self.is_over = True
        elif stop:
            self._watermark = int(watermarks[-1])
        letters = sum(start + (not begun) <= row <= stop for row in dead)
        self._traffic.dead_letters += letters
        self._traffic.messages += stop - start + letters

    def close(self) -> None:
        """Count what is left open; to be called once, at the end."""
        if self._start is not None:
            self._traffic.still_open += sum(first >= self._start for first in self._sessions.open_since())
            last = self._end if self.is_over else self._watermark
            self._traffic.last = max(last, self._traffic.last or 0)

    def _open_range(self, watermark: int) -> None:
        """Begin the range, with an event that moves the watermark there."""
        if self._begin:
            self._judge(_clock(self._begin))
        self._traffic.already_open += self._sessions.open_blocks
        # After other messages the traffic covers the range from its beginning, however quiet that is.
        first = self._begin if self._begin and self._start else watermark
        self._traffic.first = first if self._traffic.first is None else min(first, self._traffic.first)

    def _judge(self, batch: EventBatch) -> None:
        for block in self._sessions.take(batch):
            self._traffic.looks += block.looked
            if self._start is not None and block.first_offset >= self._start:
                self._traffic.scores.append(block.score)
                keep_highest(self._traffic.highest, block)


def read_traffic(
    settings: Settings,
    topic: str,
    scorer: Scorer,
    *,
    begin: int | None = None,
    end: int | None = None,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]],
) -> Traffic:
    """Read a topic's traffic between two event times in milliseconds, `end` not included.

    `progress` is given the number of messages to come, and told how many more are done.

    Raises:
        UserError: as `TopicHistory`.
    """
    idle_timeout = milliseconds(settings.windows.idle_timeout)
    max_ahead = milliseconds(settings.windows.max_ahead)
    decoder = decoder_for(settings, scorer.bundle)
    scores = LookScores(scorer, None, CACHE)
    traffic = Traffic()
    with TopicHistory(settings, topic) as history:
        stretches = []
        for partition in history.partitions:
            low, high = history.bounds(partition)
            start = low
            if begin is not None:  # no event is stamped more than max_ahead later than its message
                found = history.offset_at(partition, begin - idle_timeout - max_ahead)
                start = high if found is None else max(low, found)
            stretches.append((partition, start, high, 0 < start == low))
        with progress(sum(high - start for _, start, high, _ in stretches)) as advance:
            for partition, start, high, cut in stretches:
                part = PartitionTraffic(
                    traffic, decoder, scores,
                    begin=begin, end=end, every=settings.scoring.every, idle_timeout=idle_timeout, cut=cut,
                )  # fmt: skip
                done = start
                for messages in history.read(partition, start, high):
                    part.take(Messages.of(messages))
                    advance(messages[-1].offset() + 1 - done)
                    done = messages[-1].offset() + 1
                    if part.is_over:
                        break
                advance(high - done)
                part.close()
                traffic.cut |= cut
    traffic.distinct = scores.scored
    traffic.skipped = decoder.skipped
    return traffic


def _clock(time: int) -> EventBatch:
    """Return what moves the watermark to `time` and does nothing else; no block has an empty name."""
    return EventBatch.of([""], [CLOCK], [time], [0])
