"""Events in, alerts out: the whole of detection, without Kafka and without a clock."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from consumer.alerts import (
    SCHEMA_VERSION,
    Alert,
    Counted,
    Expected,
    Offender,
    Reason,
    Source,
    WindowEvent,
    alert_id,
    fitting,
)
from consumer.drift import EDGES, Drift, DriftTest, draws, judge_id, levels
from consumer.events import EventBatch
from consumer.looks import LookRoom, Looks
from consumer.records import Bounds, DriftState, StoredSessions
from consumer.scores import LookScores
from consumer.settings import DriftSettings
from consumer.threshold import Threshold
from consumer.windows import WindowStore
from model.scoring import Explanation, Scorer
from model.stamps import iso
from model.vocabulary import END, UNK, Vocabulary


@dataclass(frozen=True, slots=True)
class Alerted:
    """What a session's last alert said: enough to know whether a later look has news."""

    revision: int
    score: float
    position: int


@dataclass
class _Partition:
    store: WindowStore
    drift: Drift
    drift_is_news: bool
    alerted: dict[int, Alerted] = field(default_factory=dict)
    news: set[int] = field(default_factory=set)


class Detector:
    """Windows, scores and alerts of all partitions that are assigned.

    Args:
        scorer: of the model that `threshold` was calibrated with.
        topic: name of the event topic, for the alerts.
        cache_windows: distinct windows whose score is remembered.
        max_open_blocks: open sessions of a partition at most.
        drift: how to tell that the threshold no longer means what it says; the defaults if None.
    """

    def __init__(
        self,
        scorer: Scorer,
        threshold: Threshold,
        *,
        topic: str,
        cache_windows: int,
        max_open_blocks: int = 2**31 - 1,
        drift: DriftSettings | None = None,
    ) -> None:
        drift = drift or DriftSettings()
        self._watches_drift = drift.enabled
        self._drift = DriftTest(threshold, drift)
        self.judge = judge_id(threshold, drift)
        """What alerts depend on beside the events, in eight bytes."""
        self._max_open_blocks = max_open_blocks
        self._bundle = scorer.bundle
        self._threshold = threshold
        self._topic = topic
        self._scores = LookScores(scorer, threshold.threshold, cache_windows)
        self._room = LookRoom(threshold.window)
        self._partitions: dict[int, _Partition] = {}
        self.events = 0
        """Events judged so far."""
        self.looks = 0
        """Looks taken so far."""
        self.cached = 0
        """Looks so far whose score was known already."""
        self.levels: NDArray[np.int64] = np.zeros(len(EDGES) + 1, np.int64)
        """Looks of this detector by the level of their score (`consumer.drift.levels`)."""
        self.time_scoring: Callable[[], AbstractContextManager[object]] = nullcontext
        """Entered around each scoring, for a caller that has a clock."""
        self.evicted = 0
        """Sessions closed so far to make room for others."""
        self.alarms: list[tuple[int, DriftState]] = []
        """Partitions in which drift raised the alarm, for the caller to tell and clear."""

    @property
    def scored(self) -> int:
        """Distinct windows that went through the network so far."""
        return self._scores.scored

    def count_on(self, other: "Detector") -> None:
        """Go on counting where `other` stopped, whose place this one takes."""
        self.events, self.looks, self.cached, self.evicted = other.events, other.looks, other.cached, other.evicted
        self.time_scoring = other.time_scoring
        self._scores.scored = other.scored

    @property
    def open_blocks(self) -> int:
        """Open sessions of all partitions."""
        return sum(partition.store.open_blocks for partition in self._partitions.values())

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the model in use."""
        return self._bundle.vocabulary

    def assign(
        self,
        partition: int,
        sessions: StoredSessions | None = None,
        watermark: int | None = None,
        start: int = 0,
        *,
        drift: DriftState | None = None,
        since: int = 0,
        bounds: Bounds | None = None,
    ) -> None:
        """Start to watch a partition, with the open sessions that were stored for it; see `WindowStore.restore`.

        `drift` is what was stored of it. If that is by other artifacts than today's, they are in force from the input
        offset `since` on, and the test begins anew.
        """
        threshold = self._threshold
        store = WindowStore(
            window=threshold.window,
            every=threshold.every,
            idle_timeout=threshold.idle_timeout_ms,
            limit=self._max_open_blocks,
            room=self._room,
        )
        special = {} if sessions is None else store.restore(sessions, watermark, start, bounds)
        alerted = {
            slot: Alerted(state.revision, state.score, state.position)
            for slot, state in special.items()
            if state.revision
        }
        is_ours = drift is not None and drift.judge == self.judge
        state = drift if drift is not None and is_ours else DriftState(self.judge, since)
        self._partitions[partition] = _Partition(store, Drift(self._drift, state), not is_ours, alerted)

    def store(self, partition: int) -> WindowStore:
        """Return the open sessions of a partition."""
        return self._partitions[partition].store

    def packed(self, partition: int, slots: NDArray[np.int32], vocabulary: bytes) -> list[bytes]:
        """Return open sessions (N,) as they are to be stored, with the id of their tokens' vocabulary."""
        watched = self._partitions[partition]
        records = watched.store.packed(slots, vocabulary)
        for place, slot in enumerate(slots.tolist()):
            said = watched.alerted.get(slot)
            if records[place] is None or said is not None or watched.store.unknown(slot):
                state = watched.store.snapshot(slot)
                records[place] = replace(state, **asdict(said) if said else {}).pack(vocabulary)
        return cast("list[bytes]", records)

    def take_alerted(self, partition: int) -> set[int]:
        """Return the slots whose session alerted since the last call."""
        news, self._partitions[partition].news = self._partitions[partition].news, set()
        return news

    def drift(self, partition: int) -> Drift:
        """Return the test for drift of a partition."""
        return self._partitions[partition].drift

    def take_drift(self, partition: int) -> DriftState | None:
        """Return what is to be stored of a partition's drift; None if nothing changed since the last call."""
        watched = self._partitions[partition]
        news, watched.drift_is_news = watched.drift_is_news, False
        return watched.drift.state if news else None

    def replay(self, partition: int, batch: EventBatch) -> None:
        """Take in events whose alerts have been published, and whose drift has been seen, before."""
        watched = self._partitions[partition]
        for looks in watched.store.apply(batch, again=True):
            if self._watches_drift:  # an open session's level is wanted when it closes
                watched.store.rise(looks, levels(self._scores.of(looks)))
            for slot in looks.facts["slot"][looks.facts["closing"]].tolist():
                watched.alerted.pop(slot, None)

    def revoke(self, partition: int) -> None:
        """Forget a partition and its open sessions."""
        self._partitions.pop(partition, None)

    def process(self, batches: Mapping[int, EventBatch]) -> list[Alert]:
        """Take in events, by partition, and return the alerts they cause, those of a block in order."""
        self.events += sum(map(len, batches.values()))
        return self._alerts({partition: self._partitions[partition].store.apply(batch)
                             for partition, batch in batches.items()})  # fmt: skip

    def close(self, partition: int, at_most: int | None = None) -> list[Alert]:
        """Close sessions of a partition that has fallen silent and return the alerts of their last looks."""
        return self._alerts({partition: self._partitions[partition].store.close_all(at_most)})

    def close_ending(self, partition: int, time: int, at_most: int) -> list[Alert]:
        """Close so many of the sessions that an event at `time` will end, and return the alerts of their last looks."""
        return self._alerts({partition: self._partitions[partition].store.close_ending(time, at_most)})

    def _alerts(self, streams: Mapping[int, Iterator[Looks]]) -> list[Alert]:
        alerts: list[Alert] = []
        # One portion of each partition at a time: the device sees all partitions in one batch.
        for portion in zip_longest(*streams.values()):
            present = [(number, looks) for number, looks in zip(streams, portion, strict=True) if looks is not None]
            known = self.scored
            with self.time_scoring():
                scores = self._scores.of(*(looks for _, looks in present))
            self.cached += len(scores) - (self.scored - known)
            begin = 0
            for number, looks in present:
                self.evicted += int(looks.facts["evicted"].sum())
                alerts.extend(self._judge(number, looks, scores[begin : begin + len(looks)]))
                begin += len(looks)
            self.looks += begin
        return alerts

    def _judge(self, number: int, looks: Looks, scores: NDArray[np.float64]) -> Iterator[Alert]:
        partition, facts = self._partitions[number], looks.facts
        hot = scores > self._threshold.threshold
        level = levels(scores)
        self.levels += np.bincount(level, minlength=len(self.levels))
        highest = partition.store.rise(looks, level)
        alerted = np.zeros(len(looks), np.bool_)  # at closing looks: whether the session ever did
        watched = 0
        places = np.flatnonzero(hot | facts["closing"])
        columns = (places, facts["slot"][places], hot[places], facts["closing"][places])
        for place, slot, is_hot, closing in zip(*(column.tolist() for column in columns), strict=True):
            before = partition.alerted.get(slot)
            if is_hot and (before is None or scores[place] > before.score):
                why = self._scores.explain(looks, place)
                position = _position(looks, place, why)
                graver = before is not None and self._threshold.rank(why.score) > self._threshold.rank(before.score)
                if before is None or position != before.position or graver:
                    revision = before.revision + 1 if before else 1
                    partition.alerted[slot] = Alerted(revision, why.score, position)
                    partition.news.add(slot)
                    # An alert says whether there is drift by then.
                    self._watch(number, facts[watched:place], highest[watched:place], alerted[watched:place])
                    watched = place
                    yield self._alert(number, looks, place, why, revision)
            if closing and partition.alerted.pop(slot, None) is not None:
                alerted[place] = True
        self._watch(number, facts[watched:], highest[watched:], alerted[watched:])

    def _watch(self, number: int, facts: NDArray[Any], highest: NDArray[np.uint8], alerted: NDArray[np.bool_]) -> None:
        """Let the test for drift see the sessions that closed at looks (N,).

        Of these only sessions count that were judged by today's artifacts all their life.
        """
        partition = self._partitions[number]
        drift = partition.drift
        if not self._watches_drift or drift.alarm is not None:
            return
        seen = np.flatnonzero(facts["closing"] & (facts["first_offset"] >= drift.state.since))
        if not len(seen):
            return
        partition.drift_is_news = True
        blocks = partition.store.names(facts["slot"][seen])
        if drift.take(highest[seen], alerted[seen], draws(blocks, facts["first_offset"][seen])):
            self.alarms.append((number, drift.state))

    def _alert(self, number: int, looks: Looks, place: int, why: Explanation, revision: int) -> Alert:
        fact = looks.facts[place]
        store = self._partitions[number].store
        block = store.block(int(fact["slot"]))
        names = self._names(looks, place, store.unknown(int(fact["slot"])))
        reason: Reason = "event"
        if bool(fact["closing"]) and why.offender == int(fact["length"]):
            reason = "counts" if why.counts else "truncated"
        source = min(why.offender, int(fact["length"]) - 1)
        p_value = self._threshold.p_value(why.score)
        return Alert(
            schema_version=SCHEMA_VERSION,
            alert_id=alert_id(self._topic, number, int(fact["first_offset"]), block),
            revision=revision,
            block_id=block,
            reason=reason,
            severity=self._threshold.levels[self._threshold.rank(why.score) - 1].name,
            score=why.score,
            threshold=self._threshold.threshold,
            strategy=self._threshold.strategy,
            p_value=round(p_value, 6) or p_value,  # not 0, which no p-value is
            offender=Offender(
                position=_position(looks, place, why),
                event_id=names[why.offender],
                template=self._bundle.vocabulary.template(names[why.offender]),
                surprisal=why.surprisals[why.offender],
                expected=tuple(Expected.of(token, share, self._bundle.vocabulary) for token, share in why.expected),
                offset=int(looks.offsets[place, source]),
                timestamp=iso(looks.times[place, source]),
                counts=tuple(Counted.of(kind, self._bundle.vocabulary) for kind in why.counts),
            ),
            window=tuple(map(WindowEvent, fitting(names), why.surprisals)),
            events_seen=int(fact["count"]),
            first_event_time=iso(fact["first_time"]),
            last_event_time=iso(fact["last_time"]),
            source=Source(self._topic, number, int(fact["first_offset"]), int(fact["last_offset"])),
            model=self._threshold.model,
            drift=self._partitions[number].drift.alarm,
        )

    def _names(self, looks: Looks, place: int, unknown: Mapping[int, str]) -> list[str]:
        """Return the event ids of a look; those that the vocabulary lacks come from the message itself."""
        length = int(looks.facts["length"][place])
        name = self._bundle.vocabulary.name
        names = [
            unknown.get(offset, name(UNK)) if token == UNK else name(token)
            for token, offset in zip(
                looks.rows[place, 1 : 1 + length].tolist(), looks.offsets[place, :length].tolist(), strict=True
            )
        ]
        return [*names, name(END)] if looks.facts["closing"][place] else names


def _position(looks: Looks, place: int, why: Explanation) -> int:
    """Return the offender's number in its session, from 1."""
    fact = looks.facts[place]
    return int(fact["count"]) - int(fact["length"]) + why.offender + 1
