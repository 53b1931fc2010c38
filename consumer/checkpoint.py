"""What goes to the state topic at a commit, and what comes back from it. Pure: no Kafka, no clock.

At every commit: what drift the closed sessions showed, sessions that alerted (so that what they said is never said
twice) and deletions of sessions that closed. From time to time a checkpoint: all sessions with events that no record
covers, a bounded number a commit, and last the checkpoint record, which says from which input offset a successor has
to read again.

A successor restores the sessions, reads the input from the checkpoint's offset up to the committed offset without
publishing (`Replay`), each session skipping what its record covers, and is where its predecessor was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import numpy as np
from numpy.typing import NDArray

from consumer.detector import Detector
from consumer.events import NO_WATERMARK
from consumer.names import Names
from consumer.records import (
    BLOCK,
    CHECKPOINT,
    DRIFT,
    VOCABULARY,
    Checkpoint,
    DriftState,
    StoredSessions,
    Translation,
    closed_marker,
    vocabulary_id,
)
from model.vocabulary import Vocabulary

Record = tuple[bytes, bytes | None]
"""Key and value of a state record; None deletes it."""

PER_COMMIT = 20_000
"""Sessions that checkpoints write, and records that they delete, with one commit at most, so that none takes long."""


@dataclass
class Recovered:
    """What a state partition says.

    Attributes:
        sessions: open sessions and markers, in today's vocabulary.
        checkpoint: None if there is none.
        vocabularies: ids of the vocabularies that are stored.
        drift: None if nothing is known.
    """

    sessions: StoredSessions
    checkpoint: Checkpoint | None = None
    vocabularies: set[bytes] = field(default_factory=set)
    drift: DriftState | None = None

    @property
    def end(self) -> int:
        """The input offset from which on no session and no marker includes an event."""
        last = [int(self.sessions.heads["last_offset"].max())] if len(self.sessions) else []
        return 1 + max([-1, *last, *self.sessions.markers.values()])


def recover(records: Mapping[bytes, bytes], vocabulary: Vocabulary) -> Recovered:
    """Read the latest records of a state partition, by key.

    Raises:
        DamagedRecordError: another version wrote them.
    """
    blocks = {key[1:]: value for key, value in records.items() if key[:1] == BLOCK}
    translations = {
        key[1:]: Translation.between(msgspec.msgpack.decode(value, type=list[str]), vocabulary)
        for key, value in records.items()
        if key[:1] == VOCABULARY
    }
    return Recovered(
        StoredSessions(blocks, translations, vocabulary),
        Checkpoint.unpack(records[CHECKPOINT]) if CHECKPOINT in records else None,
        set(translations),
        DriftState.unpack(records[DRIFT]) if DRIFT in records else None,
    )


@dataclass(frozen=True)
class Replay:
    """Input that a predecessor has taken in already.

    Attributes:
        until: below this offset its alerts have been published.
        end: from this offset on nothing is special. With at-least-once delivery sessions can include events beyond
            `until`.
    """

    until: int
    end: int


class Checkpointer:
    """Keeps one state partition in step with one partition of the detector.

    Args:
        group, topic: the consumer group and the event topic, noted in the checkpoint.
        recovered: what the state partition holds now.
        start: the input offset from which this owner reads.
    """

    def __init__(
        self, detector: Detector, partition: int, group: str, topic: str, recovered: Recovered, start: int
    ) -> None:
        self._detector = detector
        self._partition = partition
        self._store = detector.store(partition)
        self._group = group
        self._topic = topic
        self._markers = dict(recovered.sessions.markers)
        self._vocabulary = detector.vocabulary
        self._vocabulary_id = vocabulary_id(self._vocabulary.events)
        self._introduced = self._vocabulary_id in recovered.vocabularies
        self._gone: dict[bytes, None] = {}  # blocks whose record is to be deleted, those first that were due first
        self._gone_before = 0
        self._pending = np.zeros(0, np.int32)
        self._next: Checkpoint | None = None
        self._begun_at: int | None = recovered.checkpoint.offset if recovered.checkpoint else None
        self._first = None if recovered.checkpoint else self._checkpoint(start, NO_WATERMARK)

    @property
    def is_unfinished(self) -> bool:
        """Whether there are records that wait for the next commit."""
        return self.is_under_way or bool(self._gone)

    @property
    def is_under_way(self) -> bool:
        """Whether a checkpoint has begun that is not whole yet."""
        return self._next is not None

    def records(self, position: int, *, begin: bool = False, sharers: int = 1) -> Iterator[Record]:
        """Yield the records that belong to the commit of the input offset `position`.

        Args:
            position: the next offset to be read.
            begin: a checkpoint is due; one that is under way goes on instead.
            sharers: partitions, this one among them, that have to do with one commit.
        """
        at_most = max(1, PER_COMMIT // sharers)
        if self._first is not None:  # so that a missing checkpoint always means that the state was lost
            yield CHECKPOINT, self._first.pack()
            self._first = None
        drift = self._detector.take_drift(self._partition)
        if drift is not None:
            yield DRIFT, drift.pack()
        yield from self._departures(at_most)
        urgent = self._store.take_urgent() | self._detector.take_alerted(self._partition)
        yield from self._sessions(np.array([slot for slot in sorted(urgent) if self._store.is_open(slot)], np.int32))
        if begin and not self.is_under_way:
            watermark = self._store.watermark
            if watermark is None or (position == self._begun_at and not len(self._store.unsaved())):
                return  # nothing happened since the last one
            self._begun_at = position
            self._pending = self._store.unsaved()
            self._gone_before = len(self._gone)
            self._next = self._checkpoint(position, watermark)
        if self._next is not None:
            some, self._pending = self._pending[:at_most], self._pending[at_most:]
            yield from self._sessions(some[self._store.are_unsaved(some)])
            if not len(self._pending) and not self._gone_before:
                yield CHECKPOINT, self._next.pack()
                self._outdate_markers(self._next.offset)
                self._next = None

    def _checkpoint(self, offset: int, watermark: int) -> Checkpoint:
        return Checkpoint(offset, watermark, self._group, topic=self._topic, bounds=self._store.bounds)

    def _sessions(self, slots: NDArray[np.int32]) -> Iterator[Record]:
        for begin in range(0, len(slots), PER_COMMIT):
            some = slots[begin : begin + PER_COMMIT]
            if not self._introduced:
                self._introduced = True
                yield VOCABULARY + self._vocabulary_id, msgspec.msgpack.encode(self._vocabulary.events)
            packed = self._detector.packed(self._partition, some, self._vocabulary_id)
            for name, record in zip(self._store.names(some), packed, strict=True):
                self._gone.pop(name, None)
                yield BLOCK + name, record
            self._store.mark_saved(some)

    def _departures(self, at_most: int) -> Iterator[Record]:
        """Delete the records of blocks that closed, some at each commit; until then a successor closes them again.

        That it can, as long as it reads their last events and what closed them again: so a checkpoint waits for the
        deletions that were due when it began. What was closed from outside no event tells: its marker never waits.
        """
        for departed in self._store.take_departed():
            if departed.marker is not None:
                self._markers[departed.name] = departed.marker
                self._gone.pop(departed.name, None)
                yield BLOCK + departed.name, closed_marker(departed.marker).pack(self._vocabulary_id)
            elif self._markers.pop(departed.name, None) is not None or departed.saved:
                self._gone[departed.name] = None
        for name in list(islice(self._gone, at_most)):
            del self._gone[name]
            self._gone_before = max(0, self._gone_before - 1)
            yield BLOCK + name, None
        if not self._gone:  # a session that was saved anew needs no deletion
            self._gone_before = 0

    def _outdate_markers(self, offset: int) -> None:
        """Let go of markers that no replay from `offset` on will need, unless a newer record took their place.

        After a flood of new ids these are many: they are deleted like other records, some at each commit.
        """
        outdated = [name for name, last in self._markers.items() if last < offset]
        for name, replaced in zip(outdated, self._store.have_records(Names.of(outdated)).tolist(), strict=True):
            del self._markers[name]
            if not replaced:
                self._gone[name] = None
