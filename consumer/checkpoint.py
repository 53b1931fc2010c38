"""What goes to the state topic at a commit, and what comes back from it. Pure: no Kafka, no clock.

At every commit: what drift the closed sessions showed, sessions that alerted (so that what they said is never said
twice) and deletions of sessions that closed. From time to time a checkpoint: all sessions with events that no record
covers, a bounded number a commit, and last the checkpoint record, which says from which input offset a successor has
to read again.

A successor restores the sessions, reads the input from the checkpoint's offset up to the committed offset without
publishing (`Replay`), each session skipping what its record covers, and is where its predecessor was.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from consumer.detector import Detector
from consumer.events import CLOCK, TOMBSTONE, EventBatch
from consumer.kernel import NO_WATERMARK
from consumer.records import (
    BLOCK,
    CHECKPOINT,
    DRIFT,
    VOCABULARY,
    Checkpoint,
    DriftState,
    SessionState,
    closed_marker,
    vocabulary_id,
)
from model.vocabulary import SPECIAL, UNK, Vocabulary

Record = tuple[bytes, bytes | None]
"""Key and value of a state record; None deletes it."""

PER_COMMIT = 20_000
"""Sessions that a checkpoint writes with one commit at most, so that no commit takes long."""


@dataclass
class Recovered:
    """What a state partition says.

    Attributes:
        checkpoint: None if there is none.
        sessions: open sessions by block, their tokens in today's vocabulary.
        markers: last offset of blocks that were closed by the wall clock or to make room.
        vocabularies: ids of the vocabularies that are stored.
        drift: None if nothing is known.
    """

    checkpoint: Checkpoint | None = None
    sessions: dict[str, SessionState] = field(default_factory=dict)
    markers: dict[str, int] = field(default_factory=dict)
    vocabularies: set[bytes] = field(default_factory=set)
    drift: DriftState | None = None


def recover(records: Mapping[bytes, bytes], vocabulary: Vocabulary) -> Recovered:
    """Read the latest records of a state partition, by key.

    Raises:
        DamagedRecordError: another version wrote them.
    """
    found = Recovered()
    tables = {key[1:]: _translation(value, vocabulary) for key, value in records.items() if key[:1] == VOCABULARY}
    found.vocabularies = set(tables)
    for key, value in records.items():
        if key == CHECKPOINT:
            found.checkpoint = Checkpoint.unpack(value)
        elif key == DRIFT:
            found.drift = DriftState.unpack(value)
        elif key[:1] == BLOCK:
            block = key[1:].decode()
            state, written_in = SessionState.unpack(value)
            if state.closed:
                found.markers[block] = state.last_offset
            else:
                found.sessions[block] = _translated(state, *tables[written_in], vocabulary)
    return found


@dataclass
class Replay:
    """Input that a predecessor has taken in already.

    Below the offset `until` its alerts have been published. `covered` holds, by block, the last offset that its
    restored session (or closed marker) includes; with at-least-once delivery that can be beyond `until`.
    """

    until: int
    covered: Mapping[str, int]

    @property
    def end(self) -> int:
        """The offset from which on nothing is special."""
        return max([self.until, *(last + 1 for last in self.covered.values())])

    def masked(self, batch: EventBatch) -> EventBatch:
        """Return `batch` with covered events only moving the watermark, and covered tombstones left out."""
        masked = EventBatch()
        for place, (block, token, time, offset) in enumerate(
            zip(batch.blocks, batch.tokens, batch.times, batch.offsets, strict=True)
        ):
            covered = offset <= self.covered.get(block, -1)
            if covered and token == TOMBSTONE:
                continue
            if place in batch.unknown and not covered:
                masked.unknown[len(masked)] = batch.unknown[place]
            masked.blocks.append(block)
            masked.tokens.append(CLOCK if covered else token)
            masked.times.append(time)
            masked.offsets.append(offset)
        return masked


class Checkpointer:
    """Keeps one state partition in step with one partition of the detector.

    Args:
        group: the consumer group, noted in the checkpoint.
        recovered: what the state partition holds now.
        start: the input offset from which this owner reads.
    """

    def __init__(self, detector: Detector, partition: int, group: str, recovered: Recovered, start: int) -> None:
        self._detector = detector
        self._partition = partition
        self._store = detector.store(partition)
        self._group = group
        self._markers = dict(recovered.markers)
        self._vocabulary = detector.vocabulary
        self._vocabulary_id = vocabulary_id(self._vocabulary.events)
        self._introduced = self._vocabulary_id in recovered.vocabularies
        self._pending: deque[int] = deque()
        self._next: Checkpoint | None = None
        self._begun_at: int | None = recovered.checkpoint.offset if recovered.checkpoint else None
        self._first = None if recovered.checkpoint else Checkpoint(start, NO_WATERMARK, group)

    def records(self, position: int, *, begin: bool = False, finish: bool = False) -> Iterator[Record]:
        """Yield the records that belong to the commit of the input offset `position`.

        Args:
            position: the next offset to be read.
            begin: a checkpoint is due; one that is under way goes on instead.
            finish: complete a checkpoint within this commit: the partition is handed over.
        """
        if self._first is not None:  # so that a missing checkpoint always means that the state was lost
            yield CHECKPOINT, self._first.pack()
            self._first = None
        drift = self._detector.take_drift(self._partition)
        if drift is not None:
            yield DRIFT, drift.pack()
        yield from self._departures()
        urgent = self._store.take_urgent() | self._detector.take_alerted(self._partition)
        yield from self._sessions(slot for slot in sorted(urgent) if self._store.is_open(slot))
        if finish or (begin and self._next is None):
            watermark = self._store.watermark
            if watermark is None or (position == self._begun_at and not self._store.unsaved()):
                return  # nothing happened since the last one
            self._begun_at = position
            self._pending = deque(self._store.unsaved())
            self._next = Checkpoint(position, watermark, self._group)
        if self._next is not None:
            some = len(self._pending) if finish else min(PER_COMMIT, len(self._pending))
            slots = [self._pending.popleft() for _ in range(some)]
            yield from self._sessions(slot for slot in slots if self._store.is_unsaved(slot))
            if not self._pending:
                yield CHECKPOINT, self._next.pack()
                yield from self._outdated_markers(self._next.offset)
                self._next = None

    def _sessions(self, slots: Iterator[int]) -> Iterator[Record]:
        for slot in slots:
            if not self._introduced:
                self._introduced = True
                yield VOCABULARY + self._vocabulary_id, _events_record(self._vocabulary.events)
            yield (
                _key(self._store.block(slot)),
                self._detector.snapshot(self._partition, slot).pack(self._vocabulary_id),
            )
            self._store.mark_saved(slot)

    def _departures(self) -> Iterator[Record]:
        for departed in self._store.take_departed():
            if departed.marker is not None:
                self._markers[departed.block] = departed.marker
                yield _key(departed.block), closed_marker(departed.marker).pack(self._vocabulary_id)
            elif self._markers.pop(departed.block, None) is not None or departed.saved:
                yield _key(departed.block), None

    def _outdated_markers(self, offset: int) -> Iterator[Record]:
        """Delete markers that no replay from `offset` on will need, unless a newer record took their place."""
        for block in [block for block, last in self._markers.items() if last < offset]:
            del self._markers[block]
            if not self._store.has_record(block):
                yield _key(block), None


def _key(block: str) -> bytes:
    return BLOCK + block.encode()


def _events_record(events: Sequence[str]) -> bytes:
    return msgspec.msgpack.encode(list(events))


def _translation(record: bytes, vocabulary: Vocabulary) -> tuple[list[str], NDArray[np.uint16]]:
    events: list[str] = msgspec.msgpack.decode(record, type=list[str])
    return events, np.array([*range(SPECIAL), *vocabulary.encode(events)], np.uint16)


def _translated(
    state: SessionState, events: list[str], table: NDArray[np.uint16], vocabulary: Vocabulary
) -> SessionState:
    """Say a session in today's vocabulary: events it no longer knows become UNK by name, and the other way round."""
    tokens = table[state.tokens]
    unknown = dict(state.unknown)
    for place, offset in enumerate(state.offsets.tolist()):
        if tokens[place] == UNK:
            name = unknown.get(offset) or events[state.tokens[place] - SPECIAL]
            tokens[place] = vocabulary.tokens.get(name, UNK)
            if tokens[place] == UNK:
                unknown[offset] = name
            else:
                unknown.pop(offset, None)
    return replace(state, tokens=tokens, unknown=unknown)
